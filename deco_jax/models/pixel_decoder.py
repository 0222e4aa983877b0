"""The pixel decoder: a light, attention-free network on every pixel at full resolution (paper, section 3.2)."""

import math

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax import Array

from deco_jax.models.dit import rematerialised
from deco_jax.models.layers import Linear, from_patches, layer_norm, modulate, rotary_angles, to_patches, uniform

INTERACTIONS = ("adaln", "add")  # of a patch's token with the queries of its pixels


def pixel_position_features(side: int) -> np.ndarray:
    """64 smooth features of a query's place among the side × side of its patch, (side², 64), fp32 (docs/model.md, 2.8).

    feature[8m+n] = cos(π a ω_m)·cos(π b ω_n) / (1 + ω_m ω_n), with a and b the query's x and y in [0, 1] and
    ω = 0, 8/7, … 8.
    """
    place = np.linspace(0, 1, side)
    omega = np.linspace(0, 8, 8)
    waves_PxM = np.cos(np.pi * place[:, None] * omega)
    b_PxPx1xN = waves_PxM[:, None, None, :]
    a_PxPxMx1 = waves_PxM[None, :, :, None]
    features = a_PxPxMx1 * b_PxPx1xN / (1 + omega[:, None] * omega)
    return features.reshape(side**2, 64).astype(np.float32)


def rotary_position_features(side: int) -> np.ndarray:
    """The same for text-conditional networks: cosines of a rotary embedding, x and y in turn (docs/model.md, 4)."""
    return np.cos(rotary_angles(side, side, 128, side, side))


POSITION_FEATURES = {"waves": pixel_position_features, "rotary": rotary_position_features}


class PixelQuery(nn.Module):
    """Linear([colours, 64 position features] → d), with the constant part computed once, not at every patch."""

    width: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, pixels_BxNxPxC: Array, position_Px64: Array) -> Array:
        """(B, N, P, C) → (B, N, P, d); C is 3, or more where a query stands for several pixels."""
        colours = pixels_BxNxPxC.shape[-1]
        channels = colours + position_Px64.shape[-1]
        init = uniform(1 / math.sqrt(channels))
        kernel_init = nn.with_logical_partitioning(init, (None, "decoder_width"))
        kernel = self.param("kernel", kernel_init, (channels, self.width), jnp.float32)
        bias = self.param("bias", nn.with_logical_partitioning(init, ("decoder_width",)), (self.width,), jnp.float32)
        colour_kernel, position_kernel = kernel[:colours].astype(self.dtype), kernel[colours:]
        return pixels_BxNxPxC.astype(self.dtype) @ colour_kernel + (position_Px64 @ position_kernel + bias).astype(
            self.dtype
        )


class ResidualBlock(nn.Module):
    """q ← q + gate·Linear(SiLU(Linear(LN(q)(1 + scale) + shift))), modulated by SiLU(condition) query by query.

    Without a condition nothing is modulated: q ← q + Linear(SiLU(Linear(LN(q)))).
    """

    dtype: jnp.dtype

    @nn.compact
    def __call__(self, q_BxNxPxd: Array, condition_BxNxPxd: Array | None) -> Array:
        """Both (B, N, P, d); returns q."""
        width = q_BxNxPxd.shape[-1]
        axes = ("decoder_width", "decoder_width_out")
        h, gate = layer_norm("decoder_width", self.dtype, "norm")(q_BxNxPxd), 1
        if condition_BxNxPxd is not None:
            modulation = Linear(
                (3, width), ("decoder_width", None, "decoder_width_out"), "zeros", dtype=self.dtype, name="modulation"
            )(nn.silu(condition_BxNxPxd))
            shift, scale, gate = modulation[..., 0, :], modulation[..., 1, :], modulation[..., 2, :]
            h = modulate(h, shift, scale)
        h = nn.silu(Linear(width, axes, "xavier", dtype=self.dtype, name="in")(h))
        return q_BxNxPxd + gate * Linear(width, axes, "xavier", dtype=self.dtype, name="out")(h)


class PixelDecoder(nn.Module):
    """Decodes every pixel of the output from its noised colour, its place and its patch's token.

    A token is decoded into one condition vector per pixel; the query (colour and place) then passes `depth`
    residual blocks modulated by it. Everything is linear in the number of pixels.

    Two fields make the other decoders of the paper's Table 4. It has no equations for them; they are read here as
    follows. With `group` = r a query, and a condition, stands for a square of r × r pixels: 3r² colours go in
    and out. With `interaction` = "add" the condition is added to the query, once, and nothing is modulated.
    """

    width: int  # d, channels of a pixel
    depth: int  # residual blocks
    patch_size: int  # pixels along a patch's side
    group: int  # r, pixels along the side of a query's square
    interaction: str  # one of INTERACTIONS
    dtype: jnp.dtype
    remat: str  # a key of REMAT_POLICIES
    positions: str = "waves"  # a key of POSITION_FEATURES

    @nn.compact
    def __call__(self, pixels_BxNxPx3: Array, tokens_BxNxD: Array) -> Array:
        """pixels: noised RGB, patch by patch; tokens: the transformer's output. Returns fp32, shaped as pixels."""
        d, p, r = self.width, self.patch_size, self.group
        places = POSITION_FEATURES[self.positions](p // r)
        squares = pixels_BxNxPx3 if r == 1 else _to_squares(pixels_BxNxPx3, p, r)
        q = PixelQuery(d, self.dtype, name="query")(squares, jnp.asarray(places))
        q = Linear(d, ("decoder_width", "decoder_width_out"), "xavier", dtype=self.dtype, name="in")(q)
        condition = Linear(
            (len(places), d), ("width", "pixels", "decoder_width"), "xavier", dtype=self.dtype, name="condition"
        )(tokens_BxNxD)
        if self.interaction == "add":
            q, condition = q + condition, None
        block = rematerialised(ResidualBlock, self.remat)
        for i in range(self.depth):
            q = block(self.dtype, name=f"block_{i}")(q, condition)
        q = layer_norm(None, self.dtype, "norm")(q)
        out = Linear(3 * r * r, ("decoder_width", None), "zeros", dtype=self.dtype, name="out")(q).astype(jnp.float32)
        return out if r == 1 else _from_squares(out, p, r)


def _to_squares(pixels_BxNxPxC: Array, p: int, r: int) -> Array:
    """(B, N, p², C) → (B, N, (p/r)², r²·C): the pixels of a square, row by row, follow each other."""
    b, n, _, c = pixels_BxNxPxC.shape
    return to_patches(pixels_BxNxPxC.reshape(b * n, p, p, c), r).reshape(b, n, (p // r) ** 2, r * r * c)


def _from_squares(squares_BxNxSxC: Array, p: int, r: int) -> Array:
    """Inverse of `_to_squares` for three colours: (B, N, (p/r)², 3r²) → (B, N, p², 3)."""
    b, n, s, _ = squares_BxNxSxC.shape
    return from_patches(squares_BxNxSxC.reshape(b * n, s, r * r, 3), p, p, r).reshape(b, n, p * p, 3)
