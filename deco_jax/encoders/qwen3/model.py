"""Qwen3, a causal language model; of its last layer the states of all tokens, padding included (docs/model.md, 4).

Yang et al., "Qwen3 Technical Report", 2025. Weights come from `qwen3/weights.py`. Axis letters: B batch, L tokens,
D width, h query heads, g key and value heads, e channels of a head.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from deco_jax.models.dit import SwiGLU
from deco_jax.models.layers import Linear, matrix
from deco_jax.ops.product import look_up

# The published sizes that serve as text encoders; upstream takes the second.
SIZES = {
    "0.6B": {"width": 1024, "depth": 28, "heads": 16, "hidden": 3072},
    "1.7B": {"width": 2048, "depth": 28, "heads": 16, "hidden": 6144},
    "4B": {"width": 2560, "depth": 36, "heads": 32, "hidden": 9728},
}


def _norm(model: "Qwen3 | Layer | Attention", axis: str, name: str) -> nn.RMSNorm:
    scale_init = nn.with_logical_partitioning(nn.initializers.ones, (axis,))
    return nn.RMSNorm(epsilon=model.epsilon, dtype=model.dtype, scale_init=scale_init, name=name)


def _rotate(x_BxLxhxE: Array, theta: float) -> Array:
    """Turns channels (k, k + e/2) of the token at place l by the angle l·θ^(−2k/e), in fp32."""
    _, length, _, e = x_BxLxhxE.shape
    angles_LxK = np.arange(length)[:, None] * theta ** (-2.0 * np.arange(e // 2) / e)
    cos, sin = (jnp.asarray(f(angles_LxK)[:, None], jnp.float32) for f in (np.cos, np.sin))
    a, b = jnp.split(x_BxLxhxE.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BxLxhxE.dtype)


class Attention(nn.Module):
    """Grouped-query attention with RMSNorm of queries and keys, and rotary positions."""

    heads: int
    kv_heads: int
    head_dim: int
    theta: float
    epsilon: float
    dtype: jnp.dtype
    implementation: str | None

    @nn.compact
    def __call__(self, x_BxLxD: Array, seen_BxLxL: Array) -> Array:
        """Tokens, and which (second) each token (first) may see → (B, L, D). Who may see none gets zeros."""

        def project(heads: int, name: str) -> Array:
            axes = ("width", "heads", "head_dim")
            return Linear((heads, self.head_dim), axes, use_bias=False, dtype=self.dtype, name=name)(x_BxLxD)

        q = _rotate(_norm(self, "head_dim", "query_norm")(project(self.heads, "query")), self.theta)
        k = _rotate(_norm(self, "head_dim", "key_norm")(project(self.kv_heads, "key")), self.theta)
        v, mask = project(self.kv_heads, "value"), seen_BxLxL[:, None]
        out = jax.nn.dot_product_attention(q, k, v, mask=mask, implementation=self.implementation)
        out = jnp.where(seen_BxLxL.any(axis=-1)[..., None, None], out, 0).reshape(*x_BxLxD.shape[:2], -1)
        width = x_BxLxD.shape[-1]
        return Linear(width, ("heads_out", "width"), use_bias=False, dtype=self.dtype, name="out")(out)


class Layer(nn.Module):
    """s ← s + Attention(RMS(s)); s ← s + SwiGLU(RMS(s))."""

    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    theta: float
    epsilon: float
    dtype: jnp.dtype
    attention: str | None

    @nn.compact
    def __call__(self, s_BxLxD: Array, seen_BxLxL: Array) -> tuple[Array, None]:
        """Tokens → (tokens, nothing for the scan to collect)."""
        sizes = self.heads, self.kv_heads, self.head_dim, self.theta, self.epsilon
        attention = Attention(*sizes, self.dtype, self.attention, name="attention")
        s_BxLxD = s_BxLxD + attention(_norm(self, "width", "attention_norm")(s_BxLxD), seen_BxLxL)
        s_BxLxD = s_BxLxD + SwiGLU(self.hidden, self.dtype, name="mlp")(_norm(self, "width", "mlp_norm")(s_BxLxD))
        return nn.with_logical_constraint(s_BxLxD, ("batch", "tokens", "activation_width")), None


class Qwen3(nn.Module):
    """Token numbers → the states after the last layer and its norm."""

    width: int
    depth: int
    heads: int
    hidden: int  # channels of the MLPs
    kv_heads: int = 8
    head_dim: int = 128
    vocabulary: int = 151936
    padding: int = 151643  # the token that stands where there is none, <|endoftext|>
    theta: float = 1e6  # base of the rotary angles
    epsilon: float = 1e-6  # of the norms
    dtype: jnp.dtype = jnp.bfloat16  # of matrix products and tokens; statistics of norms are fp32
    attention: str | None = None  # implementation of jax.nn.dot_product_attention
    scan: bool = True  # False unrolls the loop in the compiled program; the parameters are the same

    @nn.compact
    def __call__(self, tokens_BxL: Array) -> Array:
        """States of all tokens, of padding too: it sees the real ones before it.

        Args:
          tokens_BxL: numbers of the tokens, int32, below zero where there is none; those are the last ones.

        Returns:
          (B, L, D) in `dtype`.
        """
        real_BxL, length = tokens_BxL >= 0, tokens_BxL.shape[1]
        init = nn.with_logical_partitioning(nn.initializers.normal(0.02), ("classes", "width"))
        table = matrix(self, "table", init, (self.vocabulary, self.width))
        s = look_up(table, jnp.where(real_BxL, tokens_BxL, self.padding)).astype(self.dtype)
        s = nn.with_logical_constraint(s, ("batch", "tokens", "activation_width"))
        seen_BxLxL = jnp.tril(jnp.ones((length, length), bool)) & real_BxL[:, None, :]
        layers = nn.scan(
            Layer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=self.depth,
            unroll=1 if self.scan else self.depth,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        s, _ = layers(
            self.heads,
            self.kv_heads,
            self.head_dim,
            self.hidden,
            self.theta,
            self.epsilon,
            self.dtype,
            self.attention,
            name="layers",
        )(s, seen_BxLxL)
        return _norm(self, "width", "norm")(s)

    def forward_flops(self, tokens: int) -> float:
        """Floating-point operations of one forward pass on one prompt, 2 per multiply-add, matrix products only."""
        d, heads = self.width, self.head_dim * self.heads
        layer = tokens * (2 * d * (heads + self.head_dim * self.kv_heads) + 3 * d * self.hidden)
        return 2.0 * self.depth * (layer + 2 * tokens**2 * heads)
