"""MiniLM-L6 (a BERT of six layers, trained to tell sentences apart): the states of all tokens.

Wang et al., "MiniLM", 2020; Devlin et al., "BERT", 2018. Weights come from `minilm/weights.py`.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from deco_jax.models.layers import Linear


class Layer(nn.Module):
    """s ← LN(s + Attention(s)); s ← LN(s + down(GELU(in s)))."""

    heads: int
    hidden: int
    epsilon: float
    dtype: jnp.dtype
    attention: str | None

    @nn.compact
    def __call__(self, s_BxLxD: Array, mask_Bx1x1xL: Array) -> tuple[Array, None]:
        """Tokens, and which may be seen → (tokens, nothing for the scan to collect)."""
        width = s_BxLxD.shape[-1]
        features, axes = (3, self.heads, width // self.heads), ("width", None, "heads", "head_dim")
        qkv = Linear(features, axes, dtype=self.dtype, name="qkv")(s_BxLxD)
        q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
        seen = jax.nn.dot_product_attention(q, k, v, mask=mask_Bx1x1xL, implementation=self.attention)
        seen = Linear(width, ("heads_out", "width"), dtype=self.dtype, name="out")(seen.reshape(s_BxLxD.shape))
        s_BxLxD = _norm(self.epsilon, self.dtype, "attention_norm")(s_BxLxD + seen)
        h = nn.gelu(Linear(self.hidden, ("width", "mlp"), dtype=self.dtype, name="in")(s_BxLxD), approximate=False)
        h = Linear(width, ("mlp", "width"), dtype=self.dtype, name="down")(h)
        return _norm(self.epsilon, self.dtype, "mlp_norm")(s_BxLxD + h), None


def _norm(epsilon: float, dtype: jnp.dtype, name: str) -> nn.LayerNorm:
    ones, zeros = (nn.with_logical_partitioning(f, ("width",)) for f in (nn.initializers.ones, nn.initializers.zeros))
    return nn.LayerNorm(
        epsilon=epsilon, dtype=dtype, scale_init=ones, bias_init=zeros, use_fast_variance=False, name=name
    )


class MiniLM(nn.Module):
    """Token numbers → the states after the last layer."""

    width: int = 384
    depth: int = 6
    heads: int = 12
    hidden: int = 1536
    vocabulary: int = 30522
    places: int = 512  # tokens of the longest text
    kinds: int = 2  # rows of the table of sentence kinds, of which the first is used
    padding: int = 0  # the token that stands where there is none, [PAD]
    epsilon: float = 1e-12
    dtype: jnp.dtype = jnp.bfloat16
    attention: str | None = None  # implementation of jax.nn.dot_product_attention
    scan: bool = True

    @nn.compact
    def __call__(self, tokens_BxL: Array) -> Array:
        """As `Qwen3`'s: (B, L), below zero where there is no token → (B, L, D); all see the real ones, padding too."""

        def table(name: str, rows: int) -> Array:
            init = nn.with_logical_partitioning(nn.initializers.normal(0.02), ("classes", "width"))
            return self.param(f"{name}_table", init, (rows, self.width), jnp.float32)

        real_BxL, length = tokens_BxL >= 0, tokens_BxL.shape[1]
        s = jnp.take(table("token", self.vocabulary), jnp.where(real_BxL, tokens_BxL, self.padding), axis=0)
        s = s + table("place", self.places)[:length] + table("kind", self.kinds)[0]
        s = _norm(self.epsilon, self.dtype, "norm")(s)
        mask = real_BxL[:, None, None, :]
        layers = nn.scan(
            Layer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=self.depth,
            unroll=1 if self.scan else self.depth,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        s, _ = layers(self.heads, self.hidden, self.epsilon, self.dtype, self.attention, name="layers")(s, mask)
        return s

    def forward_flops(self, tokens: int) -> float:
        """As of `Qwen3`."""
        d = self.width
        return 2.0 * self.depth * (tokens * (4 * d * d + 2 * d * self.hidden) + 2 * tokens**2 * d)
