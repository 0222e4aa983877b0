"""The pixel decoder as a function of its parameters: the equations of docs/model.md, 2.8, and who computes them."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array

from deco_jax.ops import decoder_tpu
from deco_jax.ops.door import Implementation, choose
from deco_jax.ops.product import precision_of, product

NORM_EPSILON = 1e-6
Parameters = Mapping[str, Any]  # {"query": {"kernel": …, "bias": …}, "block_0": {"norm": {"scale": …, …}, …}, …}


@dataclasses.dataclass(frozen=True)
class Form:
    """Which decoder it is, and how it is computed."""

    depth: int  # residual blocks
    interaction: str  # of a token with the queries of its pixels: adaln, or add
    dtype: jnp.dtype  # of the matrix products
    rematerialise: Callable[[Callable], Callable]  # a block → the block whose backward pass recomputes; plain path only


def decode(
    parameters: Parameters, pixels_BxNxPxC: Array, tokens_BxNxD: Array, places_Px64: np.ndarray, form: Form, wanted: str
) -> Array:
    """Decodes every query of the output from its colours, its place and its patch's token.

    Args:
      parameters: query and in, condition, block_0 …, out.
      pixels_BxNxPxC: noised colours, patch by patch; C is 3, or more where a query stands for several pixels.
      tokens_BxNxD: the transformer's output.
      places_Px64: features of a query's place in its patch.
      form: see `Form`.
      wanted: "auto", or the name of an implementation.

    Returns:
      (B, N, P, C), fp32.
    """
    arguments = parameters, pixels_BxNxPxC, tokens_BxNxD, places_Px64, form
    return choose("model.decoder", TABLE, wanted, *arguments).run(*arguments)


def query(parameters: Parameters, pixels_BxNxPxC: Array, places_Px64: Array, dtype: jnp.dtype) -> Array:
    """Linear([colours, features of the place] → d), with the constant part computed once, not at every patch."""
    colours, kernel = pixels_BxNxPxC.shape[-1], parameters["kernel"]
    constant_Pxd = jnp.matmul(places_Px64, kernel[colours:], precision=jax.lax.Precision.HIGHEST) + parameters["bias"]
    coloured = jnp.matmul(pixels_BxNxPxC.astype(dtype), kernel[:colours].astype(dtype), precision=precision_of(dtype))
    return coloured + constant_Pxd.astype(dtype)


def _plain(
    parameters: Parameters, pixels_BxNxPxC: Array, tokens_BxNxD: Array, places_Px64: np.ndarray, form: Form
) -> Array:
    """See `decode`: in plain JAX."""
    dtype = form.dtype
    q = _linear(parameters["in"], query(parameters["query"], pixels_BxNxPxC, jnp.asarray(places_Px64), dtype), dtype)
    condition = _linear(parameters["condition"], tokens_BxNxD, dtype)
    if form.interaction == "add":
        q, condition = q + condition, None

    def block(parameters: Parameters, q: Array, condition: Array | None) -> Array:
        """q ← q + gate·Linear(SiLU(Linear(LN(q)(1 + scale) + shift))); without a condition nothing is modulated."""
        h, gate = _layer_norm(q, dtype, parameters["norm"]), 1
        if condition is not None:
            modulation = _linear(parameters["modulation"], nn.silu(condition), dtype)
            shift, scale, gate = modulation[..., 0, :], modulation[..., 1, :], modulation[..., 2, :]
            h = h * (1 + scale) + shift
        h = nn.silu(_linear(parameters["in"], h, dtype))
        return q + gate * _linear(parameters["out"], h, dtype)

    block = form.rematerialise(block)
    for i in range(form.depth):
        q = block(parameters[f"block_{i}"], q, condition)
    return _linear(parameters["out"], _layer_norm(q, dtype), dtype).astype(jnp.float32)


def _linear(parameters: Parameters, x: Array, dtype: jnp.dtype) -> Array:
    return product(x, parameters["kernel"], dtype) + parameters["bias"].astype(dtype)


def _layer_norm(x: Array, dtype: jnp.dtype, parameters: Parameters | None = None) -> Array:
    """LayerNorm over the last axis, in fp32, without parameters if there are none; comes out in `dtype`."""
    has = parameters is not None
    norm = nn.LayerNorm(NORM_EPSILON, dtype, use_bias=has, use_scale=has, use_fast_variance=False, parent=None)
    return norm.apply({"params": parameters or {}}, x)


def _on_gpu(*arguments: Any) -> Array:
    """See `decode`. Only here is Mosaic's GPU part loaded: it takes seconds, and not every platform's jaxlib has it."""
    from deco_jax.ops.decoder_gpu import fused

    return fused(*arguments)


def _why_not_on_gpu(*arguments: Any) -> str:
    from deco_jax.ops.decoder_gpu import why_not_fused

    return why_not_fused(*arguments)


TABLE = (
    Implementation("pallas", decoder_tpu.fused, ("tpu",), decoder_tpu.why_not_fused),
    Implementation("pallas", _on_gpu, ("gpu",), _why_not_on_gpu),
    Implementation("xla", _plain),
)
