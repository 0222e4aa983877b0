"""The Diffusion Transformer on patches: attention, SwiGLU, AdaLN, and the scanned blocks (docs/model.md, 2.5)."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from deco_jax.models.layers import Linear, modulate, rms_norm, rotate

REMAT_POLICIES = {
    "none": None,  # keep every activation
    "full": jax.checkpoint_policies.nothing_saveable,  # keep each block's input only
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # keep the outputs of the linear layers
}


def rematerialised(block: type[nn.Module], remat: str, prevent_cse: bool = True) -> type[nn.Module]:
    """The block, of which the backward pass recomputes what `remat`, a key of REMAT_POLICIES, does not keep."""
    return block if remat == "none" else nn.remat(block, prevent_cse=prevent_cse, policy=REMAT_POLICIES[remat])


class Attention(nn.Module):
    """Self-attention, scale 1/√e; with angles, queries and keys are RMS-normed and rotated."""

    heads: int
    dtype: jnp.dtype
    implementation: str | None  # of jax.nn.dot_product_attention: None, "xla" or "cudnn"
    use_bias: bool = False  # of queries, keys and values

    @nn.compact
    def __call__(self, x_BxNxD: Array, angles_NxK: Array | None = None) -> Array:
        """Tokens (B, N, D) and their rotary angles (N, D/h/2) → (B, N, D)."""
        width = x_BxNxD.shape[-1]
        features, axes = (3, self.heads, width // self.heads), ("width", None, "heads", "head_dim")
        qkv = Linear(features, axes, use_bias=self.use_bias, dtype=self.dtype, name="qkv")(x_BxNxD)
        q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
        if angles_NxK is not None:
            q = rotate(rms_norm("head_dim", self.dtype, "query_norm")(q), angles_NxK)
            k = rotate(rms_norm("head_dim", self.dtype, "key_norm")(k), angles_NxK)
        out_BxNxHxE = jax.nn.dot_product_attention(q, k, v, implementation=self.implementation)
        out_BxNxD = out_BxNxHxE.reshape(x_BxNxD.shape)
        return Linear(width, ("heads_out", "width"), dtype=self.dtype, name="out")(out_BxNxD)


class SwiGLU(nn.Module):
    """down(SiLU(gate x) · (up x)), no biases."""

    hidden: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x_BxNxD: Array) -> Array:
        """(B, N, D) → (B, N, D)."""
        gate = Linear(self.hidden, ("width", "mlp"), use_bias=False, dtype=self.dtype, name="gate")(x_BxNxD)
        up = Linear(self.hidden, ("width", "mlp"), use_bias=False, dtype=self.dtype, name="up")(x_BxNxD)
        down = Linear(x_BxNxD.shape[-1], ("mlp", "width"), use_bias=False, dtype=self.dtype, name="down")
        return down(nn.silu(gate) * up)


class Block(nn.Module):
    """s ← s + gate·Attention(modulated RMS(s)); s ← s + gate·SwiGLU(modulated RMS(s))."""

    heads: int
    dtype: jnp.dtype
    attention: str | None

    @nn.compact
    def __call__(self, s_BxNxD: Array, c_BxD: Array, angles_NxK: Array) -> Array:
        """Tokens, conditions and rotary angles → tokens."""
        width = s_BxNxD.shape[-1]
        modulation = Linear((6, width), ("width", None, "modulation"), dtype=self.dtype, name="modulation")(c_BxD)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = jnp.moveaxis(modulation[:, :, None, :], 1, 0)
        h = modulate(rms_norm("width", self.dtype, "attention_norm")(s_BxNxD), shift_a, scale_a)
        s_BxNxD = s_BxNxD + gate_a * Attention(self.heads, self.dtype, self.attention, name="attention")(h, angles_NxK)
        h = modulate(rms_norm("width", self.dtype, "mlp_norm")(s_BxNxD), shift_m, scale_m)
        s_BxNxD = s_BxNxD + gate_m * SwiGLU(int(2 * 4 * width / 3), self.dtype, name="mlp")(h)
        return nn.with_logical_constraint(s_BxNxD, ("batch", "tokens", "activation_width"))


class _Layer(nn.Module):
    """One step of the scan: a block, and a copy of its output where the caller asked for it."""

    block: type[nn.Module]
    heads: int
    dtype: jnp.dtype
    attention: str | None
    hidden_layer: int | None

    @nn.compact
    def __call__(self, carry, layer, c_BxD, angles_NxK):
        s, hidden = carry
        s = self.block(self.heads, self.dtype, self.attention, name="block")(s, c_BxD, angles_NxK)
        if self.hidden_layer is not None:
            hidden = jnp.where(layer == self.hidden_layer, s, hidden)
        return (s, hidden), None


class Transformer(nn.Module):
    """`depth` blocks, scanned over parameters stacked along a leading `layers` axis."""

    depth: int
    heads: int
    dtype: jnp.dtype
    attention: str | None
    remat: str  # a key of REMAT_POLICIES
    scan: bool  # False unrolls the loop in the compiled program; the parameters are the same

    @nn.compact
    def __call__(
        self, s_BxNxD: Array, c_BxD: Array, angles_NxK: Array, hidden_layer: int | None = None
    ) -> tuple[Array, Array | None]:
        """Returns the tokens after the last block and, if asked, those after block `hidden_layer` (1 is the first)."""
        block = rematerialised(Block, self.remat, prevent_cse=not self.scan)
        layers = nn.scan(
            _Layer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast, nn.broadcast),
            length=self.depth,
            unroll=1 if self.scan else self.depth,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(block, self.heads, self.dtype, self.attention, hidden_layer, name="layers")
        # The second carry enters linearly and outside the remat: the backward pass needs no copy of it per layer.
        hidden = None if hidden_layer is None else jnp.zeros_like(s_BxNxD)
        (s_BxNxD, hidden), _ = layers((s_BxNxD, hidden), jnp.arange(1, self.depth + 1), c_BxD, angles_NxK)
        return s_BxNxD, hidden
