"""The frequency-aware loss: velocity errors weighted as JPEG weights them (paper, section 3.3; docs/model.md, 5).

An error is turned into YCbCr, cut into 8×8 blocks, transformed by the orthonormal DCT-II, squared and weighted by the
inverse of JPEG's quantisation tables. All of it is linear before the square, so one transform of v̂ − v suffices.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

BLOCK = 8
WEIGHT_MODES = ("inv_gamma", "inv")

# ITU-T T.81, Annex K, tables K.1 and K.2: rows are vertical frequencies.
_LUMINANCE = """
16 11 10 16  24  40  51  61
12 12 14 19  26  58  60  55
14 13 16 24  40  57  69  56
14 17 22 29  51  87  80  62
18 22 37 56  68 109 103  77
24 35 55 64  81 104 113  92
49 64 78 87 103 121 120 101
72 92 95 98 112 100 103  99"""
_CHROMINANCE = """
17 18 24 47 99 99 99 99
18 21 26 66 99 99 99 99
24 26 56 99 99 99 99 99
47 66 99 99 99 99 99 99
99 99 99 99 99 99 99 99
99 99 99 99 99 99 99 99
99 99 99 99 99 99 99 99
99 99 99 99 99 99 99 99"""
# JFIF: columns are R, G, B; no offset on Cb and Cr.
_YCBCR = np.array(
    [[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]],
)


def dct_matrix() -> np.ndarray:
    """The orthonormal DCT-II of 8 samples, (frequency, sample), float64."""
    k, n = np.mgrid[:BLOCK, :BLOCK]
    scale = np.where(k == 0, math.sqrt(1 / BLOCK), math.sqrt(2 / BLOCK))
    return scale * np.cos(np.pi * (2 * n + 1) * k / (2 * BLOCK))


@functools.cache
def frequency_weights(quality: int, mode: str, gamma: float) -> np.ndarray:
    """Weight of each DCT coefficient: (3 = Y, Cb, Cr; 8; 8), float64, each channel with mean 1.

    Args:
      quality: JPEG quality, 1 to 100.
      mode: "inv_gamma": (mean(Q)/Q)^gamma; "inv": 1/Q, gamma unused. Q is the quantisation table at that quality.
      gamma: see mode.
    """
    scale = 5000 / quality if quality < 50 else 200 - 2 * quality
    weights = []
    for text in (_LUMINANCE, _CHROMINANCE, _CHROMINANCE):
        base = np.array(text.split(), np.float64).reshape(BLOCK, BLOCK)
        table = np.clip(np.floor((base * scale + 50) / 100), 1, 255)
        weight = (table.mean() / table) ** gamma if mode == "inv_gamma" else 1 / table
        weights.append(weight / weight.mean())
    return np.stack(weights)


def rgb_to_ycbcr(x: Array) -> Array:
    """(…, 3) RGB → (…, 3) YCbCr, without offset, fp32."""
    return jnp.einsum("...c,yc->...y", x, jnp.asarray(_YCBCR, jnp.float32), precision=jax.lax.Precision.HIGHEST)


def block_dct(x_BxHxWxC: Array) -> Array:
    """8×8 block DCT: (B, H, W, C) → (B, H/8, W/8, 8, 8, C), fp32; sides are reflect-padded to multiples of 8."""
    b, h, w, c = x_BxHxWxC.shape
    pad_h, pad_w = -h % BLOCK, -w % BLOCK
    x = jnp.pad(x_BxHxWxC, ((0, 0), (0, pad_h), (0, pad_w), (0, 0)), mode="reflect")
    blocks = x.reshape(b, (h + pad_h) // BLOCK, BLOCK, (w + pad_w) // BLOCK, BLOCK, c)
    dct = jnp.asarray(dct_matrix(), jnp.float32)
    return jnp.einsum("bhiwjc,ui,vj->bhwuvc", blocks, dct, dct, precision=jax.lax.Precision.HIGHEST)


def frequency_loss(error_BxHxWx3: Array, weights_3x8x8: np.ndarray) -> Array:
    """Mean over examples, blocks, frequencies and channels of weight·DCT(YCbCr(error))²; a fp32 scalar.

    Args:
      error_BxHxWx3: v̂ − v.
      weights_3x8x8: see `frequency_weights`.
    """
    coefficients = block_dct(rgb_to_ycbcr(error_BxHxWx3.astype(jnp.float32)))
    return jnp.mean(jnp.asarray(weights_3x8x8.transpose(1, 2, 0), jnp.float32) * coefficients**2)
