"""The pixel decoder as one Pallas kernel for TPUs: no array as wide as the decoder is in HBM, but for the condition.

Plain JAX keeps a pixel's d = 32 channels on the 128 lanes of a register: three quarters of it stay empty, and of the
memory. Here tokens lie on the lanes and channels on the sublanes, one pixel of every patch at a time: matrices stand
left of what they multiply, a norm adds up sublanes, and nothing is padded. The product that makes the condition of a
token is left to the compiler, which writes it in just this order. The backward pass computes a pixel's blocks again;
gradients of weights are added up on the chip, in fp32, and lie there from the first step of the grid to the last.

R counts tokens of all examples, n those of one step of the grid; a weight has its bias as two further columns.
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from deco_jax.ops.door import over_devices
from deco_jax.ops.product import product

NORM_EPSILON = 1e-6
LANES = 128
ONES = 16  # rows below what a weight multiplies: two of ones, for the bias, and zeros up to the end of a bf16 tile
BLOCK = 2**21  # bytes of the condition that a step of the grid has on the chip; there are up to four such blocks
UNROLL = 4  # pixels that the compiler sees at a time, whose instructions it interleaves
Weights = dict[str, Array]  # fp32 (out, in + 1), the last column the bias; "colour" has none


def why_not_fused(parameters: Mapping[str, Any], pixels_BxNxPxC: Array, tokens: Array, places: Any, form: Any) -> str:
    """See `Implementation.refuses`."""
    d = parameters["in"]["kernel"].shape[0]
    if form.interaction != "adaln":
        return f"with model.decoder_interaction={form.interaction!r} there is no kernel"
    if pixels_BxNxPxC.shape[-1] != 3:
        return "with model.decoder_patch above 1 there is no kernel"
    widths = (16, 32, 48, 64) if form.dtype == jnp.bfloat16 else (16, 32)
    if d not in widths:
        return f"model.decoder_width={d} with {jnp.dtype(form.dtype).name} is none of the kernel's widths, {widths}"
    return ""


def fused(
    parameters: Mapping[str, Any],
    pixels_BxNxPx3: Array,
    tokens_BxNxD: Array,
    places_Px64: np.ndarray,
    form: Any,
    interpret: bool = False,
) -> Array:
    """See `ops.decoder.decode`; `interpret` runs the kernel anywhere, slowly."""
    b, n, p, _ = pixels_BxNxPx3.shape
    tokens_RxD = tokens_BxNxD.reshape(b * n, -1)
    condition = parameters["condition"]
    condition_RxPxd = product(tokens_RxD, condition["kernel"], form.dtype) + condition["bias"].astype(form.dtype)
    place_Pxd, weights = _fold(parameters, jnp.asarray(places_Px64), form.depth)
    run = over_devices(
        functools.partial(_decode, form.dtype, interpret),
        (None, ("pixels", None), ("pixels", None, "batch"), ("pixels", None, "batch")),
        ("pixels", None, "batch"),
    )
    pixels_Px3xR = pixels_BxNxPx3.astype(jnp.float32).transpose(2, 3, 0, 1).reshape(p, 3, b * n)
    out_Px3xR = run(weights, place_Pxd, pixels_Px3xR, condition_RxPxd.transpose(1, 2, 0))
    return out_Px3xR.reshape(p, 3, b, n).transpose(2, 3, 0, 1)


def _fold(parameters: Mapping[str, Any], places_Px64: Array, depth: int) -> tuple[Array, Weights]:
    """(the query's constant part (P, d), all other weights): what is linear, one after the other, becomes one.

    That is the query's two layers; and a norm's scale and bias with its modulation:
    (norm·γ + β)(1 + scale) + shift = norm·(γ(1 + scale)) + (shift + β(1 + scale)).
    """
    blocks = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(parameters[f"block_{i}"] for i in range(depth)))
    query, second = parameters["query"], parameters["in"]
    with jax.default_matmul_precision("highest"):
        place_Pxd = (places_Px64 @ query["kernel"][3:] + query["bias"]) @ second["kernel"] + second["bias"]
        colour_dx3 = (query["kernel"][:3] @ second["kernel"]).T
    modulation = blocks["modulation"]
    kernel_Mx3xdxd = modulation["kernel"].transpose(0, 2, 3, 1)
    bias_Mx3xdx1 = (modulation["bias"] + jnp.array([[0.0], [1.0], [0.0]]))[..., None]
    shift, scale, gate = jnp.moveaxis(jnp.concatenate([kernel_Mx3xdxd, bias_Mx3xdx1], axis=-1), 1, 0)
    norm_scale, norm_bias = blocks["norm"]["scale"][..., None], blocks["norm"]["bias"][..., None]
    return place_Pxd, {
        "colour": colour_dx3,
        "modulation": jnp.concatenate([shift + norm_bias * scale, norm_scale * scale, gate], axis=1),
        "in": _augmented(blocks["in"]),
        "out": _augmented(blocks["out"]),
        "last": _augmented(parameters["out"]),
    }


def _augmented(linear: Mapping[str, Array]) -> Array:
    """Kernel (…, in, out) and bias (…, out) → (…, out, in + 1)."""
    return jnp.concatenate([linear["kernel"].mT, linear["bias"][..., None]], axis=-1)


class _Matrix(NamedTuple):
    """A weight in the dtype of the products."""

    forward: Array  # (out, in + ONES); of "colour" (out, in)
    backward: Array  # (in, out)
    gradient: Array | None = None  # zeros of fp32, as `forward`, which stand for it where one asks for gradients


def _matrix(weight: Array, has_bias: bool, dtype: jnp.dtype) -> _Matrix:
    if not has_bias:
        return _Matrix(weight.astype(dtype), weight.mT.astype(dtype))
    kernel, bias = weight[..., :-1].astype(dtype), weight[..., -1:]
    bits = jnp.finfo(dtype)
    rounded = lax.reduce_precision(bias, bits.nexp, bits.nmant)  # a conversion and back may be left out by XLA
    zeros = jnp.zeros((*bias.shape[:-1], ONES - 2), jnp.float32)
    below = jnp.concatenate([rounded, bias - rounded, zeros], axis=-1).astype(dtype)
    return _Matrix(jnp.concatenate([kernel, below], axis=-1), kernel.mT)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _decode(
    dtype: jnp.dtype, interpret: bool, weights: Weights, place_Pxd: Array, pixels_Px3xR: Array, condition_PxdxR: Array
) -> Array:
    """On one device: → (P, 3, R), fp32."""
    r = pixels_Px3xR.shape[-1]
    call = _Call(dtype, interpret, weights, _pad(pixels_Px3xR), _pad(condition_PxdxR))
    out_Px3xR = pl.pallas_call(
        call.forward,
        grid=call.grid,
        in_specs=[*call.weights, call.place, call.pixels, call.condition],
        out_specs=call.pixels,
        out_shape=call.pixels_shape,
        compiler_params=call.compiler_params,
        interpret=interpret,
        name="pixel_decoder",
    )(*call.leaves, place_Pxd[:, :, None], _pad(pixels_Px3xR), _pad(condition_PxdxR))
    return out_Px3xR[..., :r]


def _forward(dtype: jnp.dtype, interpret: bool, *arguments: Any) -> tuple[Array, tuple]:
    return _decode(dtype, interpret, *arguments), arguments


def _backward(dtype: jnp.dtype, interpret: bool, saved: tuple, dout_Px3xR: Array) -> tuple:
    weights, place_Pxd, pixels_Px3xR, condition_PxdxR = saved
    (p, d), r = place_Pxd.shape, pixels_Px3xR.shape[-1]
    arrays = [_pad(x) for x in (pixels_Px3xR, condition_PxdxR, dout_Px3xR)]
    call = _Call(dtype, interpret, weights, *arrays[:2])
    gradients = [jax.ShapeDtypeStruct(m.forward.shape, jnp.float32) for m in call.matrices.values()]
    *dmatrices, dplace_PxdxL, dpixels_Px3xR, dcondition_PxdxR = pl.pallas_call(
        call.backward,
        grid=call.grid,
        in_specs=[*call.weights, call.place, call.pixels, call.condition, call.pixels],
        out_specs=[*map(_whole, gradients), call.dplace, call.pixels, call.condition],
        out_shape=[
            *gradients,
            jax.ShapeDtypeStruct((p, d, LANES), jnp.float32),
            call.pixels_shape,
            jax.ShapeDtypeStruct(arrays[1].shape, arrays[1].dtype),
        ],
        compiler_params=call.compiler_params,
        interpret=interpret,
        name="pixel_decoder_backward",
    )(*call.leaves, place_Pxd[:, :, None], *arrays)
    dweights = {name: dm[..., : weights[name].shape[-1]] for name, dm in zip(call.matrices, dmatrices, strict=True)}
    return dweights, dplace_PxdxL.sum(-1), dpixels_Px3xR[..., :r], dcondition_PxdxR[..., :r]


_decode.defvjp(_forward, _backward)


def _pad(x: Array) -> Array:
    """Zeros behind the last axis, up to a multiple of LANES. They add nothing to gradients, as none comes to them."""
    missing = -x.shape[-1] % LANES
    return jnp.pad(x, [(0, 0), (0, 0), (0, missing)]) if missing else x


def _whole(array: Any) -> pl.BlockSpec:
    return pl.BlockSpec(array.shape, lambda j, i: (0,) * len(array.shape))


class _Call:
    """What both kernels have in common: the grid (pixels of a patch, tokens), its blocks, and what one step does."""

    def __init__(
        self, dtype: jnp.dtype, interpret: bool, weights: Weights, pixels_Px3xR: Array, condition_PxdxR: Array
    ):
        p, d, r = condition_PxdxR.shape
        self.dtype, self.unroll = dtype, 1 if interpret else UNROLL
        self.matrices = {name: _matrix(weight, name != "colour", dtype) for name, weight in weights.items()}
        self.leaves, self.structure = jax.tree.flatten(self.matrices)
        token = d * condition_PxdxR.dtype.itemsize
        n = next(size for size in (512, 256, LANES) if r % size == 0 and size * token <= BLOCK // 32)
        block = next(size for size in (32, 16, 8, 4, 2, 1) if p % size == 0 and size * n * token <= BLOCK)
        self.grid = (p // block, r // n)
        self.weights = [_whole(leaf) for leaf in self.leaves]
        self.place = pl.BlockSpec((block, d, 1), lambda j, i: (j, 0, 0))
        self.dplace = pl.BlockSpec((block, d, LANES), lambda j, i: (j, 0, 0))
        self.pixels = pl.BlockSpec((block, 3, n), lambda j, i: (j, 0, i))
        self.condition = pl.BlockSpec((block, d, n), lambda j, i: (j, 0, i))
        self.pixels_shape = jax.ShapeDtypeStruct(pixels_Px3xR.shape, jnp.float32)
        self.compiler_params = pltpu.CompilerParams(dimension_semantics=("arbitrary", "arbitrary"))

    def forward(self, *refs: Any) -> None:
        """Writes the output of a block of pixels."""
        *weights, place, pixels, condition, out = refs
        matrices = _by_block(jax.tree.unflatten(self.structure, weights))

        def body(k: Array, _: None) -> None:
            out[k] = _decode_pixel(self.dtype, matrices, place[k], pixels[k], condition[k])

        lax.fori_loop(0, len(pixels), body, None, unroll=self.unroll)

    def backward(self, *refs: Any) -> None:
        """Writes the gradients of a block of pixels and of their condition, and adds to those of the weights."""
        inputs, outputs = refs[: len(self.leaves) + 4], refs[len(self.leaves) + 4 :]
        *weights, place, pixels, condition, dout = inputs
        *dmatrices, dplace, dpixels, dcondition = outputs
        matrices = _by_block(jax.tree.unflatten(self.structure, weights))
        slots = jax.tree.map(lambda m: jnp.zeros(m.forward.shape, jnp.float32), matrices, is_leaf=_is_matrix)

        @pl.when((pl.program_id(0) == 0) & (pl.program_id(1) == 0))
        def _() -> None:
            for ref in dmatrices:
                ref[...] = jnp.zeros_like(ref)

        @pl.when(pl.program_id(1) == 0)
        def _() -> None:
            dplace[...] = jnp.zeros_like(dplace)

        def decode(slots: Any, place_dxn: Array, pixel_3xn: Array, condition_dxn: Array) -> Array:
            with_slots = jax.tree.map(lambda m, slot: m._replace(gradient=slot), matrices, slots, is_leaf=_is_matrix)
            return _decode_pixel(self.dtype, with_slots, place_dxn, pixel_3xn, condition_dxn)

        def body(k: Array, _: None) -> None:
            place_dxn = jnp.broadcast_to(place[k], condition.shape[1:])
            _, back = jax.vjp(decode, slots, place_dxn, pixels[k], condition[k])
            added, dplace_dxn, dpixels[k], dcondition[k] = back(dout[k])
            for ref, name in zip(dmatrices, matrices, strict=True):
                if isinstance(added[name], list):
                    for i, gradient in enumerate(added[name]):
                        ref[i] += gradient
                else:
                    ref[...] += added[name]
            dplace[k] += sum(dplace_dxn[:, i : i + LANES] for i in range(0, place_dxn.shape[1], LANES))

        lax.fori_loop(0, len(pixels), body, None, unroll=self.unroll)


def _is_matrix(leaf: Any) -> bool:
    return isinstance(leaf, _Matrix)


def _by_block(refs: dict[str, _Matrix]) -> dict[str, Any]:
    """What is in the references; where there is one matrix a block, a list."""

    def read(m: _Matrix) -> _Matrix | list[_Matrix]:
        if len(m.forward.shape) == 2:
            return _Matrix(m.forward[...], m.backward[...])
        return [_Matrix(m.forward[i], m.backward[i]) for i in range(m.forward.shape[0])]

    return {name: read(m) for name, m in refs.items()}


def _decode_pixel(
    dtype: jnp.dtype, matrices: dict[str, Any], place_dxn: Array, pixel_3xn: Array, condition_dxn: Array
) -> Array:
    """One pixel of n patches, (3, n): see docs/model.md, 2.8, and `_fold`."""
    ones = (lax.broadcasted_iota(jnp.int32, (ONES, pixel_3xn.shape[-1]), 0) < 2).astype(dtype)
    multiply = functools.partial(_multiply, dtype)
    q = place_dxn + multiply(matrices["colour"], pixel_3xn, None)
    d = len(q)
    condition = _silu(condition_dxn.astype(jnp.float32))
    for modulate, first, second in zip(matrices["modulation"], matrices["in"], matrices["out"], strict=True):
        modulation = multiply(modulate, condition, ones)
        shift, scale, gate = modulation[:d], modulation[d : 2 * d], modulation[2 * d :]
        h = _silu(multiply(first, _normed(q) * scale + shift, ones))
        q = q + gate * multiply(second, h, ones)
    return multiply(matrices["last"], _normed(q), ones)


def _normed(x_dxn: Array) -> Array:
    centred = x_dxn - jnp.mean(x_dxn, axis=0, keepdims=True)
    return centred * lax.rsqrt(jnp.mean(jnp.square(centred), axis=0, keepdims=True) + NORM_EPSILON)


def _silu(x: Array) -> Array:
    """x·σ(x), by one transcendental function."""
    half = 0.5 * x
    return half + half * jnp.tanh(half)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _multiply(dtype: jnp.dtype, matrix: _Matrix, x_Kxn: Array, ones: Array | None) -> Array:
    """The matrix times x, with its bias; multiplied in `dtype`, added up in fp32, in both directions."""
    return _dot(matrix.forward, _operand(dtype, x_Kxn, ones), (1, 0))


def _multiply_forward(dtype: jnp.dtype, matrix: _Matrix, x_Kxn: Array, ones: Array | None) -> tuple:
    operand = _operand(dtype, x_Kxn, ones)
    return _dot(matrix.forward, operand, (1, 0)), (matrix, operand, ones)


def _multiply_backward(dtype: jnp.dtype, saved: tuple, dy: Array) -> tuple:
    matrix, operand, ones = saved
    dy = dy.astype(dtype)
    none = jax.tree.map(jnp.zeros_like, (matrix._replace(gradient=None), ones))
    return none[0]._replace(gradient=_dot(dy, operand, (1, 1))), _dot(matrix.backward, dy, (1, 0)), none[1]


_multiply.defvjp(_multiply_forward, _multiply_backward)


def _operand(dtype: jnp.dtype, x_Kxn: Array, ones: Array | None) -> Array:
    x = x_Kxn.astype(dtype)
    return x if ones is None else jnp.concatenate([x, ones])


def _dot(a: Array, b: Array, axes: tuple[int, int]) -> Array:
    """Sums over one axis of each, in fp32."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dimensions = (((axes[0],), (axes[1],)), ((), ()))
    return lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)
