"""The small parts every network here is made of: linear layers, norms, embeddings, rotary positions.

Parameters are fp32 and carry logical axis names (`parallel/mesh.py` maps these to mesh axes). Matrix products run in
`dtype`; norms take their statistics in fp32. Axis letters: B batch, N tokens, D width, h heads, e head dimension.
"""

import math
from collections.abc import Callable
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from deco_jax.ops.product import Part, look_up, product

Axes = tuple[str | None, ...]
NORM_EPSILON = 1e-6


def uniform(bound: float) -> Callable[..., Array]:
    """Initialiser: U(−bound, bound)."""
    return lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound)


def matrix(module: nn.Module, name: str, init: Callable[..., Array], shape: tuple[int, ...]) -> Array | Part:
    """A parameter of a module, fp32: as a `Part` where it is one, which `param` would gather whole."""
    kept = module.get_variable("params", name)
    return kept if isinstance(kept, Part) else module.param(name, init, shape, jnp.float32)


class Linear(nn.Module):
    """y = x·kernel + bias, with one of the initialisations of docs/model.md, section 2.

    `init` is one of
      torch   kernel and bias U(±1/√fan_in), PyTorch's default;
      xavier  kernel U(±√(6/(fan_in + fan_out))), bias 0;
      normal  kernel N(0, 0.02²), bias U(±1/√fan_in);
      zeros   kernel and bias 0.
    """

    features: int | tuple[int, ...]  # a tuple splits the output into several axes
    axes: Axes  # logical names of the kernel's axes: the input's, then the features'
    init: Literal["torch", "xavier", "normal", "zeros"] = "torch"
    use_bias: bool = True
    dtype: jnp.dtype = jnp.bfloat16

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """(…, fan_in) → (…, *features), in `dtype`."""
        features = (self.features,) if isinstance(self.features, int) else self.features
        fan_in, fan_out = x.shape[-1], math.prod(features)
        torch_uniform = uniform(1 / math.sqrt(fan_in))
        kernel_init, bias_init = {
            "torch": (torch_uniform, torch_uniform),
            "xavier": (uniform(math.sqrt(6 / (fan_in + fan_out))), nn.initializers.zeros),
            "normal": (nn.initializers.normal(0.02), torch_uniform),
            "zeros": (nn.initializers.zeros, nn.initializers.zeros),
        }[self.init]
        kernel_init = nn.with_logical_partitioning(kernel_init, self.axes)
        y = product(x, matrix(self, "kernel", kernel_init, (fan_in, *features)), self.dtype)
        if self.use_bias:
            bias = self.param("bias", nn.with_logical_partitioning(bias_init, self.axes[1:]), features, jnp.float32)
            y = y + bias.astype(self.dtype)
        return y


def rms_norm(axis: str, dtype: jnp.dtype, name: str) -> nn.RMSNorm:
    """RMSNorm with a learned weight over the last axis, whose logical name is `axis`."""
    scale_init = nn.with_logical_partitioning(nn.initializers.ones, (axis,))
    return nn.RMSNorm(epsilon=NORM_EPSILON, dtype=dtype, scale_init=scale_init, name=name)


def layer_norm(axis: str | None, dtype: jnp.dtype, name: str) -> nn.LayerNorm:
    """LayerNorm over the last axis; with `axis` (its logical name) it has weight and bias, with None neither."""
    return nn.LayerNorm(
        epsilon=NORM_EPSILON,
        dtype=dtype,
        use_bias=axis is not None,
        use_scale=axis is not None,
        scale_init=nn.with_logical_partitioning(nn.initializers.ones, (axis,)),
        bias_init=nn.with_logical_partitioning(nn.initializers.zeros, (axis,)),
        use_fast_variance=False,
        name=name,
    )


def modulate(x: Array, shift: Array, scale: Array) -> Array:
    """x·(1 + scale) + shift."""
    return x * (1 + scale) + shift


class TimeEmbedding(nn.Module):
    """τ(t): 128 cosines and sines of t ∈ [0, 1] with periods up to 2π·10, then two linears (docs/model.md, 2.3)."""

    width: int
    dtype: jnp.dtype = jnp.bfloat16

    @nn.compact
    def __call__(self, t_B: Array) -> Array:
        """(B,) → (B, D)."""
        frequencies_K = jnp.asarray(np.exp(-math.log(10) * np.arange(128) / 128), jnp.float32)
        angles_BxK = t_B.astype(jnp.float32)[:, None] * frequencies_K
        features = jnp.concatenate([jnp.cos(angles_BxK), jnp.sin(angles_BxK)], axis=-1)
        hidden = Linear(self.width, ("frequency", "width"), "normal", dtype=self.dtype, name="in")(features)
        return Linear(self.width, ("width", "width_out"), "normal", dtype=self.dtype, name="out")(nn.silu(hidden))


class LabelEmbedding(nn.Module):
    """A learned row per class, and a last row for "no class", the null condition."""

    num_classes: int
    width: int
    dtype: jnp.dtype = jnp.bfloat16

    @nn.compact
    def __call__(self, labels_B: Array) -> Array:
        """(B,) integers in [0, num_classes] → (B, D)."""
        init = nn.with_logical_partitioning(nn.initializers.normal(0.02), ("classes", "width"))
        table = matrix(self, "table", init, (self.num_classes + 1, self.width))
        return look_up(table, labels_B).astype(self.dtype)


class TextEmbedding(nn.Module):
    """RMS(Linear(states of a text encoder)) + a learned row per place (docs/model.md, 4)."""

    tokens: int
    width: int
    dtype: jnp.dtype = jnp.bfloat16

    @nn.compact
    def __call__(self, text_BxLxE: Array) -> Array:
        """(B, L, E) → (B, L, D)."""
        text_BxLxD = Linear(self.width, ("text_features", "width"), dtype=self.dtype, name="in")(text_BxLxE)
        init = nn.with_logical_partitioning(nn.initializers.normal(1.0), (None, "text", "width"))
        positions = self.param("positions", init, (1, self.tokens, self.width), jnp.float32)
        return rms_norm("width", self.dtype, "norm")(text_BxLxD) + positions.astype(self.dtype)


def rotary_angles(rows: int, columns: int, head_dim: int, x_end: float = 16, y_end: float = 16) -> np.ndarray:
    """Angles of the 2-D rotary embedding, (rows·columns, head_dim/2), fp32 (docs/model.md, 2.6).

    Positions run from 0 to `x_end` along a row and to `y_end` along a column. As these are 16 whatever the resolution,
    a class-conditional network trained at one size runs at another. Even complex slots turn with x, odd ones with y.
    """
    theta_I = 10000.0 ** (-4.0 * np.arange(head_dim // 4) / head_dim)
    x_C, y_R = np.linspace(0, x_end, columns), np.linspace(0, y_end, rows)
    y_RxC, x_RxC = np.meshgrid(y_R, x_C, indexing="ij")
    position_NxIx2 = np.stack([x_RxC, y_RxC], axis=-1).reshape(-1, 1, 2)
    return (position_NxIx2 * theta_I[:, None]).reshape(rows * columns, head_dim // 2).astype(np.float32)


def to_patches(x_BxHxWxC: Array, patch_size: int) -> Array:
    """(B, H, W, C) → (B, N, p², C): patches in row-major order, pixels of a patch in row-major order."""
    b, h, w, c = x_BxHxWxC.shape
    p = patch_size
    x = x_BxHxWxC.reshape(b, h // p, p, w // p, p, c).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(b, (h // p) * (w // p), p * p, c)


def from_patches(x_BxNxPxC: Array, height: int, width: int, patch_size: int) -> Array:
    """Inverse of `to_patches`: (B, N, p², C) → (B, H, W, C)."""
    b, _, _, c = x_BxNxPxC.shape
    p = patch_size
    x = x_BxNxPxC.reshape(b, height // p, width // p, p, p, c).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(b, height, width, c)
