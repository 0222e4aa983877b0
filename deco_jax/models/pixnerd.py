"""PixNerd, a network of the paper's comparisons: every token generates the MLP that its own pixels pass through."""

import functools

import flax.linen as nn
import jax.numpy as jnp
from jax import Array, lax

from deco_jax.models.dit import rematerialised
from deco_jax.models.layers import Linear, rms_norm
from deco_jax.models.pixel_decoder import LinearParameters, pixel_position_features
from deco_jax.models.trunk import ClassConditional
from deco_jax.ops.decoder import query
from deco_jax.ops.product import precision_of


class PixNerd(ClassConditional, kw_only=True):
    """Class-conditional PixNerd (docs/model.md, 3): DeCo's transformer, another decoder."""

    decoder_width: int  # d, channels of a pixel
    decoder_depth: int  # blocks of the decoder
    decoder_expansion: int = 2  # m: a generated MLP has m·d hidden channels

    def decode(self, s_BxNxD: Array, pixels_BxNxPx3: Array, tau_BxD: Array, c_BxD: Array) -> Array:
        """See `Trunk`."""
        return FieldDecoder(
            self.decoder_width,
            self.decoder_depth,
            self.decoder_expansion,
            self.patch_size,
            self.dtype,
            self.remat,
            name="decoder",
        )(pixels_BxNxPx3, nn.silu(tau_BxD[:, None, :] + s_BxNxD))


class FieldBlock(nn.Module):
    """q ← q + SiLU(RMS(q)·W₁)·W₂; the token generates W₁ (d × md) and W₂ (md × d), whose columns have length 1."""

    expansion: int  # m
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, q_BxNxPxd: Array, tokens_BxNxD: Array) -> Array:
        """Pixels (B, N, p², d) and the tokens they belong to → pixels."""
        d = q_BxNxPxd.shape[-1]
        hidden = self.expansion * d
        generated = Linear((2, d * hidden), ("width", None, "generated"), dtype=self.dtype, name="generator")(
            tokens_BxNxD
        )
        w1 = _unit_columns(generated[..., 0, :].reshape(*generated.shape[:2], d, hidden))
        w2 = _unit_columns(generated[..., 1, :].reshape(*generated.shape[:2], hidden, d))
        matmul = functools.partial(jnp.matmul, precision=precision_of(self.dtype))
        return q_BxNxPxd + matmul(nn.silu(matmul(rms_norm("decoder_width", self.dtype, "norm")(q_BxNxPxd), w1)), w2)


class FieldDecoder(nn.Module):
    """Decodes every pixel of the output from its noised colour and its place, by MLPs that its token makes."""

    width: int  # d, channels of a pixel
    depth: int  # blocks
    expansion: int  # m
    patch_size: int  # pixels along a patch's side
    dtype: jnp.dtype
    remat: str  # a key of REMAT_POLICIES

    @nn.compact
    def __call__(self, pixels_BxNxPx3: Array, tokens_BxNxD: Array) -> Array:
        """pixels: noised RGB, patch by patch; tokens: the transformer's output. Returns fp32, shaped as pixels."""
        position_Px64 = jnp.asarray(pixel_position_features(self.patch_size))
        parameters = LinearParameters((self.width,), (None, "decoder_width"), "torch", name="query")(3 + 64)
        q = query(parameters, pixels_BxNxPx3, position_Px64, self.dtype)
        block = rematerialised(FieldBlock, self.remat)
        for j in range(self.depth):
            q = block(self.expansion, self.dtype, name=f"block_{j}")(q, tokens_BxNxD)
        q = rms_norm("decoder_width", self.dtype, "norm")(q)
        return Linear(3, ("decoder_width", None), dtype=self.dtype, name="out")(q).astype(jnp.float32)


def _unit_columns(w_BxNxIxO: Array) -> Array:
    """Divides by the length along the input axis, computed in fp32; same dtype back."""
    w = w_BxNxIxO.astype(jnp.float32)
    squares = jnp.sum(w * w, axis=-2, keepdims=True)
    return (w * lax.rsqrt(jnp.maximum(squares, 1e-24))).astype(w_BxNxIxO.dtype)
