"""The pixel decoder as Pallas kernels for Hopper GPUs: nothing as wide as the decoder is in HBM, but for the condition.

Mosaic GPU's backend. A warpgroup holds a tile of T = 64 pixels, 32 channels each, in registers, in the layout of the
results of wgmma: products take their left side from registers and a weight from shared memory, a norm adds up a row
among four threads. Every tile of a warpgroup is at the same place of its patch, as G is a multiple of P / T.

The backward pass computes blocks again. A weight's gradient is a product of 64 × 32 (wgmma's least: 32 rows are the
channels, one, of ones, is the bias), and those of one block are what registers can hold. So there is one kernel a
block, and only the one of block 0 goes all the way back. G parts of every gradient are left for the compiler to add up.

R counts pixels of all patches.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from deco_jax.ops.door import over_devices
from deco_jax.ops.product import product

NORM_EPSILON = 1e-6
HOPPER = ("H100", "H200", "H800", "H20")  # in the names of devices with wgmma; later GPUs do not have it
TILE, WIDTH, COLOURS = 64, 32, 3
DEPTH = 8  # blocks whose weights fit into the shared memory, with room
FORWARD_GROUPS, BACKWARD_GROUPS = 4 * 132, 3 * 132  # warpgroups: so many on each of a GPU's processors
SHIFT, SCALE, GATE, IN, OUT = range(5)  # a block's products
PRODUCTS = 5
Weights = dict[str, Array]  # fp32; kernels (5M, d, d), biases (5M, d), colour (3, d), last (3, d), last_bias (3,)

LAYOUT = plgpu.Layout.WGMMA
BY_PIXEL, BY_CHANNEL = LAYOUT.reduce(1), LAYOUT.reduce(0)
HALF_WORDS = (plgpu.TilingTransform((8, WIDTH)), plgpu.SwizzleTransform(2 * WIDTH))  # how wgmma reads bf16
WORDS = (plgpu.TilingTransform((8, WIDTH)), plgpu.SwizzleTransform(4 * WIDTH))


def why_not_fused(parameters: Mapping[str, Any], pixels_BxNxPxC: Array, tokens: Array, places: Any, form: Any) -> str:
    """See `Implementation.refuses`."""
    device = jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]
    d, p = parameters["in"]["kernel"].shape[0], pixels_BxNxPxC.shape[2]
    if not any(name in device.device_kind for name in HOPPER):
        return f"the kernel is for Hopper GPUs, not for {device.device_kind}"
    if form.interaction != "adaln":
        return f"with model.decoder_interaction={form.interaction!r} there is no kernel"
    if pixels_BxNxPxC.shape[-1] != COLOURS:
        return "with model.decoder_patch above 1 there is no kernel"
    if form.dtype != jnp.bfloat16:
        return f"the kernel multiplies in bfloat16, not in {jnp.dtype(form.dtype).name}"
    if d != WIDTH:
        return f"the kernel wants model.decoder_width={d} to be {WIDTH}"
    if form.depth > DEPTH:
        return f"the shared memory holds {DEPTH} blocks, not model.decoder_depth={form.depth}"
    if p % TILE:
        return f"the kernel wants the {p} pixels of a patch to be a multiple of {TILE}"
    return ""


def fused(
    parameters: Mapping[str, Any], pixels_BxNxPx3: Array, tokens_BxNxD: Array, places_Px64: np.ndarray, form: Any
) -> Array:
    """See `ops.decoder.decode`."""
    condition = parameters["condition"]
    condition_BxNxPxd = product(tokens_BxNxD, condition["kernel"], form.dtype) + condition["bias"].astype(form.dtype)
    place_Pxd, weights = fold(parameters, jnp.asarray(places_Px64), form.depth)
    axes = ("batch", None, None, None)
    run = over_devices(_decode, (None, (None, None), axes, axes), axes)
    return run(weights, place_Pxd, pixels_BxNxPx3.astype(jnp.float32), condition_BxNxPxd)


def fold(parameters: Mapping[str, Any], places_Px64: Array, depth: int) -> tuple[Array, Weights]:
    """(the query's constant part (P, d), all other weights): what is linear, one after the other, becomes one.

    That is the query's two layers; and a norm's scale and bias with its modulation:
    (norm·γ + β)(1 + scale) + shift = norm·(γ(1 + scale)) + (shift + β(1 + scale)).
    """
    blocks = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(parameters[f"block_{i}"] for i in range(depth)))
    query, last = parameters["query"], parameters["out"]
    query_kernel, query_bias = parameters["in"]["kernel"], parameters["in"]["bias"]
    with jax.default_matmul_precision("highest"):
        place_Pxd = (places_Px64 @ query["kernel"][COLOURS:] + query["bias"]) @ query_kernel + query_bias
        colour_3xd = query["kernel"][:COLOURS] @ query_kernel
    gamma, beta = blocks["norm"]["scale"], blocks["norm"]["bias"]
    shift, scale, gate = jnp.moveaxis(blocks["modulation"]["kernel"], 2, 0)
    shift_bias, scale_bias, gate_bias = jnp.moveaxis(blocks["modulation"]["bias"], 1, 0)
    first, second = blocks["in"], blocks["out"]
    kernels = (shift + scale * beta[:, None], scale * gamma[:, None], gate, first["kernel"], second["kernel"])
    scale_bias = 1 + scale_bias
    biases = (shift_bias + scale_bias * beta, scale_bias * gamma, gate_bias, first["bias"], second["bias"])
    return place_Pxd, {
        "kernels": jnp.stack(kernels, axis=1).reshape(depth * PRODUCTS, *gate.shape[1:]),
        "biases": jnp.stack(biases, axis=1).reshape(depth * PRODUCTS, -1),
        "colour": colour_3xd,
        "last": last["kernel"].T,
        "last_bias": last["bias"],
    }


@jax.custom_vjp
def _decode(weights: Weights, place_Pxd: Array, pixels_BxNxPx3: Array, condition_BxNxPxd: Array) -> Array:
    """On one device: → (B, N, P, 3), fp32."""
    rows, groups = condition_BxNxPxd.size // WIDTH, _groups(FORWARD_GROUPS, place_Pxd)
    out = jax.ShapeDtypeStruct((COLOURS, rows), jnp.float32)
    call = _call("pixel_decoder", functools.partial(_forward_kernel, rows, groups), groups, out, [])
    out_3xR = call(weights, place_Pxd, _planes(pixels_BxNxPx3), condition_BxNxPxd)
    out_Rx3 = out_3xR.T + weights["last_bias"]
    return out_Rx3.reshape(pixels_BxNxPx3.shape)


def _forward(*arguments: Any) -> tuple[Array, tuple]:
    return _decode(*arguments), arguments


def _backward(saved: tuple, dout_BxNxPx3: Array) -> tuple:
    weights, place_Pxd, pixels_BxNxPx3, condition_BxNxPxd = saved
    groups, (p, d) = _groups(BACKWARD_GROUPS, place_Pxd), place_Pxd.shape
    rows, depth = condition_BxNxPxd.size // d, len(weights["kernels"]) // PRODUCTS
    shape, f32 = jax.ShapeDtypeStruct, jnp.float32
    scratch = [
        plgpu.SMEM((depth, TILE, d), f32, transforms=WORDS),
        plgpu.SMEM((TILE, 2 * d), jnp.bfloat16, transforms=HALF_WORDS),
        plgpu.SMEM((TILE, 2 * d), jnp.bfloat16, transforms=HALF_WORDS),
        plgpu.SMEM((TILE, d), jnp.bfloat16, transforms=HALF_WORDS),
    ]
    planes, dplanes = _planes(pixels_BxNxPx3), _planes(dout_BxNxPx3)
    gradients = []
    for target in range(depth):
        number = PRODUCTS + (target == 0) + (target == depth - 1)
        out = [shape((groups, number, 2 * d, d), f32)]
        if target == 0:
            whole = [shape((COLOURS, rows), f32), shape((rows, d), condition_BxNxPxd.dtype)]
            out += [*whole, shape((groups, TILE, d), f32)]
        body = functools.partial(_backward_kernel, target, rows, groups)
        call = _call("pixel_decoder_backward", body, groups, out, scratch)
        parts, *others = call(weights, place_Pxd, planes, condition_BxNxPxd, dplanes)
        gradients.append(parts.sum(0))
        if target == 0:
            dpixels_3xR, dcondition_Rxd, dplaces = others
    dplace_Pxd = dplaces.reshape(-1, p, d).sum(0)
    dweights = {
        "kernels": jnp.concatenate([g[:PRODUCTS, :d] for g in gradients]),
        "biases": jnp.concatenate([g[:PRODUCTS, d] for g in gradients]),
        "colour": gradients[0][PRODUCTS, d + 1 : d + 1 + COLOURS],
        "last": gradients[-1][-1, :d, :COLOURS].T,
        "last_bias": dplanes.sum(1),
    }
    dpixels = dpixels_3xR.T.reshape(pixels_BxNxPx3.shape)
    return dweights, dplace_Pxd, dpixels, dcondition_Rxd.reshape(condition_BxNxPxd.shape)


_decode.defvjp(_forward, _backward)


def _groups(most: int, place_Pxd: Array) -> int:
    """How many warpgroups: a multiple of the tiles of a patch."""
    tiles = len(place_Pxd) // TILE
    return max(most // tiles, 1) * tiles


def _planes(pixels_BxNxPx3: Array) -> Array:
    return pixels_BxNxPx3.reshape(-1, COLOURS).T


def _call(name: str, body: Callable, groups: int, out: Any, scratch: Sequence[Any]) -> Callable[..., Any]:
    """A kernel of `groups` warpgroups, to be called with (weights, place, pixels, condition, more arrays)."""

    def call(weights: Weights, place_Pxd: Array, pixels_3xR: Array, condition: Array, *more: Array) -> Any:
        held = (weights["kernels"].astype(condition.dtype), weights["biases"], weights["colour"], weights["last"])
        number = len(jax.tree.leaves(out))
        in_memory = [plgpu.SMEM(x.shape, x.dtype, transforms=HALF_WORDS if x.ndim == 3 else ()) for x in held]

        def whole_body(*refs: Any) -> None:
            sources, refs = refs[: len(held)], refs[len(held) :]
            arrays, refs = refs[: 3 + len(more) + number], refs[3 + len(more) + number :]
            barrier, *copies = refs[: len(held) + 1]
            for source, copy in zip(sources, copies, strict=True):
                plgpu.copy_gmem_to_smem(source, copy, barrier)
            plgpu.barrier_wait(barrier)
            body(_Weights(*copies), *arrays, *refs[len(held) + 1 :])

        whole_body.__name__ = name
        kernel = plgpu.kernel(
            whole_body,
            out_type=out,
            grid=(groups,),
            grid_names=("group",),
            scratch_types=[plgpu.Barrier(num_arrivals=len(held)), *in_memory, *scratch],
            compiler_params=plgpu.CompilerParams(approx_math=True),
        )
        return kernel(*held, place_Pxd, pixels_3xR, condition.reshape(-1, condition.shape[-1]), *more)

    return call


class _Weights:
    """Those in shared memory."""

    def __init__(self, kernels: Any, biases: Any, colour: Any, last: Any):
        self.kernels, self.biases, self.colour, self.last = kernels, biases, colour, last
        self.depth = kernels.shape[0] // PRODUCTS

    def row(self, ref: Any, i: int) -> Array:
        """Row i of (…, d), for every pixel of the tile."""
        return _along(plgpu.load(ref, (i, slice(None)), layout=BY_CHANNEL, optimized=False), 1)

    def linear(self, x_Txd: Array, i: int) -> Array:
        return _dot(x_Txd.astype(jnp.bfloat16), self.kernels.at[i]) + self.row(self.biases, i)

    def back(self, dy_Txd: Array, i: int) -> Array:
        return _dot(dy_Txd.astype(jnp.bfloat16), plgpu.transpose_ref(self.kernels.at[i], (1, 0)))


def _forward_kernel(
    rows: int, groups: int, weights: _Weights, place: Any, pixels: Any, condition: Any, out: Any
) -> None:
    """Writes the output, without the last bias, of every tile of this warpgroup."""

    def step(at: Any, q: Array, _: None) -> None:
        for c, x in enumerate(_colours(pixels, at)):
            q = q + x * weights.row(weights.colour, c)
        s = _silu(_load(condition, (at, slice(None))).astype(jnp.float32)).astype(jnp.bfloat16)
        for i in range(weights.depth):
            q = _block(weights, i * PRODUCTS, q, s)
        n, _ = _normed(q)
        for c in range(COLOURS):
            out[c, at] = jnp.sum(n * weights.row(weights.last, c), axis=1)

    _tiles(rows, groups, place, step, None)


def _backward_kernel(
    target: int,
    rows: int,
    groups: int,
    weights: _Weights,
    place: Any,
    pixels: Any,
    condition: Any,
    dout: Any,
    dkernels: Any,
    *refs: Any,
) -> None:
    """Writes this warpgroup's part of the gradients of block `target`'s weights.

    That of the last block: those of the last layer as well. That of block 0: those of the colours' weights and of the
    place as well, and, whole, those of pixels and condition.
    """
    *outputs, qs, left_condition, left, right = refs
    first, last = target == 0, target == weights.depth - 1
    zeros = plgpu.layout_cast(jnp.zeros((TILE, WIDTH), jnp.float32), LAYOUT)
    channel = plgpu.layout_cast(lax.broadcasted_iota(jnp.int32, (TILE, WIDTH), 1), LAYOUT)
    is_channel = [(channel == i).astype(jnp.float32) for i in range(COLOURS + 1)]
    left[:, WIDTH:] = is_channel[0].astype(jnp.bfloat16)  # ones: a row of the product is the bias's gradient

    def step(at: Any, q: Array, sums: tuple[Array, ...]) -> tuple[Array, ...]:
        sums = list(sums)
        beside = is_channel[0]
        for c, x in enumerate(_colours(pixels, at)):
            q = q + x * weights.row(weights.colour, c)
            beside = beside + x * is_channel[c + 1]
        raw = _load(condition, (at, slice(None))).astype(jnp.float32)
        sigma = _sigmoid(raw)
        s = (raw * sigma).astype(jnp.bfloat16)
        left_condition[:, :WIDTH], left_condition[:, WIDTH:] = s, beside.astype(jnp.bfloat16)
        for i in range(weights.depth):
            qs[i] = q
            q = _block(weights, i * PRODUCTS, q, s)
        n, factor = _normed(q)
        dn = dy = zeros
        for c, x in enumerate(_colours(dout, at)):
            dn, dy = dn + x * weights.row(weights.last, c), dy + x * is_channel[c]
        if last:
            left[:, :WIDTH], right[...] = n.astype(jnp.bfloat16), dy.astype(jnp.bfloat16)
            sums[PRODUCTS + first] = _outer(sums[PRODUCTS + first], left, right)
        dq, ds = _normed_back(dn, n, factor), zeros
        for i in reversed(range(target, weights.depth)):
            j = i * PRODUCTS
            n, factor = _normed(plgpu.load(qs, (i,), layout=LAYOUT))
            scale = weights.linear(s, j + SCALE)
            u = (n * scale + weights.linear(s, j + SHIFT)).astype(jnp.bfloat16)
            a = weights.linear(u, j + IN)
            sigma_a = _sigmoid(a)
            h = (a * sigma_a).astype(jnp.bfloat16)
            do = dq * weights.linear(s, j + GATE)
            da = weights.back(do, j + OUT) * (sigma_a * (1 + a * (1 - sigma_a)))
            du = weights.back(da, j + IN)
            dscale, dgate = du * n, dq * weights.linear(h, j + OUT)
            if i == target:
                operands = {IN: (u, da), OUT: (h, do), SHIFT: (None, du), SCALE: (None, dscale), GATE: (None, dgate)}
                for k, (x, dx) in operands.items():
                    right[...] = dx.astype(jnp.bfloat16)
                    if x is not None:
                        left[:, :WIDTH] = x
                    sums[k] = _outer(sums[k], left_condition if x is None else left, right)
            if first:
                ds = ds + weights.back(du, j + SHIFT) + weights.back(dscale, j + SCALE) + weights.back(dgate, j + GATE)
            if first or i > target:
                dq = dq + _normed_back(du * scale, n, factor)
        if first:
            dpixels, dcondition, _ = outputs
            dcondition[at, :] = (ds * (sigma * (1 + raw * (1 - sigma)))).astype(dcondition.dtype)
            for c in range(COLOURS):
                dpixels[c, at] = jnp.sum(dq * weights.row(weights.colour, c), axis=1)
            right[...] = dq.astype(jnp.bfloat16)
            sums[PRODUCTS] = _outer(sums[PRODUCTS], left_condition, right)
            sums[-1] = sums[-1] + dq
        return tuple(sums)

    number = dkernels.shape[1]
    wide = plgpu.layout_cast(jnp.zeros((2 * WIDTH, WIDTH), jnp.float32), LAYOUT)
    sums = _tiles(rows, groups, place, step, (wide,) * number + (zeros,) * first)
    here = lax.axis_index("group")
    for i in range(number):
        dkernels[here, i] = sums[i]
    if first:
        outputs[-1][here] = sums[-1]


def _tiles(rows: int, groups: int, place: Any, step: Callable, start: Any) -> Any:
    """Calls step(where a tile is, the constant part of its query, what is carried) for all tiles of this warpgroup."""
    here = lax.axis_index("group")

    def body(k: Array, carried: Any) -> Any:
        i = (here + k * groups) * TILE
        return step(pl.ds(i, TILE), _load(place, (pl.ds(lax.rem(i, place.shape[0]), TILE), slice(None))), carried)

    return lax.fori_loop(0, (rows // TILE - here + groups - 1) // groups, body, start)


def _block(weights: _Weights, j: int, q: Array, s: Array) -> Array:
    n, _ = _normed(q)
    u = n * weights.linear(s, j + SCALE) + weights.linear(s, j + SHIFT)
    h = _silu(weights.linear(u, j + IN))
    return q + weights.linear(s, j + GATE) * weights.linear(h, j + OUT)


def _load(ref: Any, where: tuple) -> Array:
    return plgpu.load(ref, where, layout=LAYOUT, optimized=False)


def _colours(ref_3xR: Any, at: Any) -> list[Array]:
    """Each of three colours, for every channel."""
    return [_along(plgpu.load(ref_3xR, (c, at), layout=BY_PIXEL, optimized=False), 0) for c in range(COLOURS)]


def _along(x: Array, axis: int) -> Array:
    return lax.broadcast_in_dim(x, (TILE, WIDTH), (axis,))


def _dot(x_Txd: Array, weight: Any) -> Array:
    """Registers times shared memory."""

    def multiply(sums: Any) -> Array:
        plgpu.wgmma(sums, x_Txd, weight)
        return sums[...]

    return pl.run_scoped(multiply, plgpu.ACC((TILE, WIDTH), jnp.float32))


def _outer(sums: Array, x_TxK: Any, dy_Txd: Any) -> Array:
    """sums + xᵀ·dy, both in shared memory."""
    plgpu.commit_smem()
    return pl.run_state(lambda ref: plgpu.wgmma(ref, plgpu.transpose_ref(x_TxK, (1, 0)), dy_Txd))(plgpu.ACC.init(sums))


def _sigmoid(x: Array) -> Array:
    return 0.5 + 0.5 * jnp.tanh(0.5 * x)


def _silu(x: Array) -> Array:
    return x * _sigmoid(x)


def _normed(x: Array) -> tuple[Array, Array]:
    """(the norm without weights, 1 / the standard deviation)."""
    centred = x - _along(jnp.sum(x, axis=1) * (1 / WIDTH), 0)
    factor = _along(lax.rsqrt(jnp.sum(centred * centred, axis=1) * (1 / WIDTH) + NORM_EPSILON), 0)
    return centred * factor, factor


def _normed_back(dn: Array, n: Array, factor: Array) -> Array:
    mean, along_n = jnp.sum(dn, axis=1) * (1 / WIDTH), jnp.sum(dn * n, axis=1) * (1 / WIDTH)
    return factor * (dn - _along(mean, 0) - n * _along(along_n, 0))
