"""The pixel decoder: a light, attention-free network on every pixel at full resolution (paper, section 3.2)."""

import functools
import math
from collections.abc import Callable
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from deco_jax.models.dit import REMAT_POLICIES
from deco_jax.models.layers import Axes, from_patches, rotary_angles, to_patches, uniform
from deco_jax.ops.decoder import Form, decode

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


class LinearParameters(nn.Module):
    """Those of a linear layer that is computed elsewhere, with the initialisations of `Linear`."""

    features: tuple[int, ...]
    axes: Axes  # logical names of the kernel's axes: the input's, then the features'
    init: Literal["torch", "xavier", "zeros"]

    @nn.compact
    def __call__(self, fan_in: int) -> dict[str, Array]:
        """{kernel (fan_in, *features), bias (*features)}, fp32."""
        torch, zeros = uniform(1 / math.sqrt(fan_in)), nn.initializers.zeros
        kernel_init, bias_init = {
            "torch": (torch, torch),
            "xavier": (uniform(math.sqrt(6 / (fan_in + math.prod(self.features)))), zeros),
            "zeros": (zeros, zeros),
        }[self.init]
        kernel_init = nn.with_logical_partitioning(kernel_init, self.axes)
        bias_init = nn.with_logical_partitioning(bias_init, self.axes[1:])
        kernel = self.param("kernel", kernel_init, (fan_in, *self.features), jnp.float32)
        return {"kernel": kernel, "bias": self.param("bias", bias_init, self.features, jnp.float32)}


class NormParameters(nn.Module):
    """Scale and bias of a LayerNorm that is computed elsewhere."""

    width: int

    @nn.compact
    def __call__(self) -> dict[str, Array]:
        """{scale (width,), bias (width,)}, fp32."""
        inits = {"scale": nn.initializers.ones, "bias": nn.initializers.zeros}
        boxed = {name: nn.with_logical_partitioning(init, ("decoder_width",)) for name, init in inits.items()}
        return {name: self.param(name, init, (self.width,), jnp.float32) for name, init in boxed.items()}


class BlockParameters(nn.Module):
    """Those of a residual block."""

    width: int
    interaction: str  # one of INTERACTIONS

    @nn.compact
    def __call__(self) -> dict[str, dict[str, Array]]:
        """{norm, modulation unless conditions are added, in, out}."""
        d, axes = self.width, ("decoder_width", "decoder_width_out")
        parameters = {"norm": NormParameters(d, name="norm")()}
        if self.interaction == "adaln":
            modulation = LinearParameters((3, d), (axes[0], None, axes[1]), "zeros", name="modulation")
            parameters["modulation"] = modulation(d)
        return parameters | {name: LinearParameters((d,), axes, "xavier", name=name)(d) for name in ("in", "out")}


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
    implementation: str = "auto"  # of ops/decoder.py

    @nn.compact
    def __call__(self, pixels_BxNxPx3: Array, tokens_BxNxD: Array) -> Array:
        """pixels: noised RGB, patch by patch; tokens: the transformer's output. Returns fp32, shaped as pixels."""
        d, p, r, axes = self.width, self.patch_size, self.group, ("decoder_width", "decoder_width_out")
        places, colours = POSITION_FEATURES[self.positions](p // r), 3 * r * r
        condition = LinearParameters((len(places), d), ("width", "pixels", axes[0]), "xavier", name="condition")
        parameters = {
            "query": LinearParameters((d,), (None, axes[0]), "torch", name="query")(colours + places.shape[1]),
            "in": LinearParameters((d,), axes, "xavier", name="in")(d),
            "condition": condition(tokens_BxNxD.shape[-1]),
            **{f"block_{i}": BlockParameters(d, self.interaction, name=f"block_{i}")() for i in range(self.depth)},
            "out": LinearParameters((colours,), (axes[0], None), "zeros", name="out")(d),
        }
        form = Form(self.depth, self.interaction, self.dtype, functools.partial(_rematerialised, self.remat))
        squares = pixels_BxNxPx3 if r == 1 else _to_squares(pixels_BxNxPx3, p, r)
        out = decode(parameters, squares, tokens_BxNxD, places, form, self.implementation)
        return out if r == 1 else _from_squares(out, p, r)


def _rematerialised(remat: str, block: Callable) -> Callable:
    """The block, of which the backward pass recomputes what `remat`, a key of REMAT_POLICIES, does not keep."""
    return block if remat == "none" else jax.checkpoint(block, policy=REMAT_POLICIES[remat])


def _to_squares(pixels_BxNxPxC: Array, p: int, r: int) -> Array:
    """(B, N, p², C) → (B, N, (p/r)², r²·C): the pixels of a square, row by row, follow each other."""
    b, n, _, c = pixels_BxNxPxC.shape
    return to_patches(pixels_BxNxPxC.reshape(b * n, p, p, c), r).reshape(b, n, (p // r) ** 2, r * r * c)


def _from_squares(squares_BxNxSxC: Array, p: int, r: int) -> Array:
    """Inverse of `_to_squares` for three colours: (B, N, (p/r)², 3r²) → (B, N, p², 3)."""
    b, n, s, _ = squares_BxNxSxC.shape
    return from_patches(squares_BxNxSxC.reshape(b * n, s, r * r, 3), p, p, r).reshape(b, n, p * p, 3)
