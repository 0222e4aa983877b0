"""The pixel decoder: a light, attention-free network on every pixel at full resolution (paper, section 3.2)."""

import math

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax import Array

from deco_jax.models.dit import REMAT_POLICIES
from deco_jax.models.layers import Linear, layer_norm, modulate, uniform


def pixel_position_features(patch_size: int) -> np.ndarray:
    """64 smooth features of a pixel's place in its patch, (p², 64), fp32 (SPEC 2.8).

    feature[8m+n] = cos(π a ω_m)·cos(π b ω_n) / (1 + ω_m ω_n), with a and b the pixel's x and y in [0, 1] and
    ω = 0, 8/7, … 8.
    """
    side = np.linspace(0, 1, patch_size)
    omega = np.linspace(0, 8, 8)
    waves_PxM = np.cos(np.pi * side[:, None] * omega)
    b_PxPx1xN = waves_PxM[:, None, None, :]
    a_PxPxMx1 = waves_PxM[None, :, :, None]
    features = a_PxPxMx1 * b_PxPx1xN / (1 + omega[:, None] * omega)
    return features.reshape(patch_size**2, 64).astype(np.float32)


class PixelQuery(nn.Module):
    """Linear([r, g, b, 64 position features] → d), with the constant part computed once, not at every patch."""

    width: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, pixels_BxNxPx3: Array, position_Px64: Array) -> Array:
        """(B, N, p², 3) → (B, N, p², d)."""
        channels = pixels_BxNxPx3.shape[-1] + position_Px64.shape[-1]
        init = uniform(1 / math.sqrt(channels))
        kernel_init = nn.with_logical_partitioning(init, (None, "decoder_width"))
        kernel = self.param("kernel", kernel_init, (channels, self.width), jnp.float32)
        bias = self.param("bias", nn.with_logical_partitioning(init, ("decoder_width",)), (self.width,), jnp.float32)
        colour_kernel, position_kernel = kernel[:3].astype(self.dtype), kernel[3:]
        return pixels_BxNxPx3.astype(self.dtype) @ colour_kernel + (position_Px64 @ position_kernel + bias).astype(
            self.dtype
        )


class ResidualBlock(nn.Module):
    """q ← q + gate·Linear(SiLU(Linear(LN(q)(1 + scale) + shift))), modulated by SiLU(condition) pixel by pixel."""

    dtype: jnp.dtype

    @nn.compact
    def __call__(self, q_BxNxPxd: Array, condition_BxNxPxd: Array) -> Array:
        """Both (B, N, p², d); returns q."""
        width = q_BxNxPxd.shape[-1]
        axes = ("decoder_width", "decoder_width_out")
        modulation = Linear(
            (3, width), ("decoder_width", None, "decoder_width_out"), "zeros", dtype=self.dtype, name="modulation"
        )(nn.silu(condition_BxNxPxd))
        shift, scale, gate = modulation[..., 0, :], modulation[..., 1, :], modulation[..., 2, :]
        h = modulate(layer_norm("decoder_width", self.dtype, "norm")(q_BxNxPxd), shift, scale)
        h = nn.silu(Linear(width, axes, "xavier", dtype=self.dtype, name="in")(h))
        return q_BxNxPxd + gate * Linear(width, axes, "xavier", dtype=self.dtype, name="out")(h)


class PixelDecoder(nn.Module):
    """Decodes the velocity of every pixel from its noised colour, its place and its patch's token.

    A token is decoded into one condition vector a pixel; the query (colour and place) then passes `depth`
    residual blocks modulated by it. Everything is linear in the number of pixels.
    """

    width: int  # d, channels of a pixel
    depth: int  # residual blocks
    patch_size: int  # pixels along a patch's side
    dtype: jnp.dtype
    remat: str  # a key of REMAT_POLICIES

    @nn.compact
    def __call__(self, pixels_BxNxPx3: Array, tokens_BxNxD: Array) -> Array:
        """pixels: noised RGB, patch by patch; tokens: the transformer's output. Returns v̂, fp32, shaped as pixels."""
        d, p = self.width, self.patch_size
        q = PixelQuery(d, self.dtype, name="query")(pixels_BxNxPx3, jnp.asarray(pixel_position_features(p)))
        q = Linear(d, ("decoder_width", "decoder_width_out"), "xavier", dtype=self.dtype, name="in")(q)
        condition = Linear(
            (p * p, d), ("width", "pixels", "decoder_width"), "xavier", dtype=self.dtype, name="condition"
        )(tokens_BxNxD)
        block = ResidualBlock
        if self.remat != "none":
            block = nn.remat(ResidualBlock, policy=REMAT_POLICIES[self.remat])
        for i in range(self.depth):
            q = block(self.dtype, name=f"block_{i}")(q, condition)
        q = layer_norm(None, self.dtype, "norm")(q)
        out = Linear(3, ("decoder_width", None), "zeros", dtype=self.dtype, name="out")(q)
        return out.astype(jnp.float32)
