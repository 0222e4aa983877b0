"""How did TensorFlow 1 resize an image? Bilinear, without antialiasing, pixel 0 on pixel 0.

`tf.image.resize_bilinear(align_corners=False, half_pixel_centers=False)`: output k takes from k·(size/new_size), which
is rounded to fp32 there and here, and what lies beyond the last pixel counts as that pixel.
"""

import jax.numpy as jnp
import numpy as np
from jax import Array


def resize_like_tensorflow(x_BxHxWxC: Array, height: int, width: int) -> Array:
    """(B, H, W, C) → (B, height, width, C), fp32. First along the rows, then down the columns, as there."""
    x = x_BxHxWxC.astype(jnp.float32)
    _, rows, columns, _ = x.shape
    for axis, size, new_size in ((2, columns, width), (1, rows, height)):
        if size == new_size:
            continue
        low_K, high_K, share_K = _sources(size, new_size)
        shape = [1] * 4
        shape[axis] = new_size
        low, high = jnp.take(x, low_K, axis), jnp.take(x, high_K, axis)
        x = low + (high - low) * share_K.reshape(shape)
    return x


def _sources(size: int, new_size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each output: the pixel before its place, the one behind, and the share of the latter."""
    place_K = np.arange(new_size, dtype=np.float32) * (np.float32(size) / np.float32(new_size))
    low_K = np.floor(place_K).astype(np.int32)
    return np.minimum(low_K, size - 1), np.minimum(low_K + 1, size - 1), place_K - low_K
