"""Attention as one TPU kernel (Pallas, Mosaic): the norm and rotation of queries and keys in it, no logits outside it.

A grid step is one image. It reads the raw projection, all heads side by side on the lanes, and turns it over: with
channels as rows and tokens on the lanes a head is a whole number of registers, neighbouring channels are neighbouring
rows, and a sum over channels or keys adds whole registers. Results replace what they are computed from, and are turned
back at the end. The backward pass computes everything again from the projection.

With x a query or key, w the norm's weight, R the rotation and r = 1/√(mean x² + ε): what attention sees is r·R(w∘x),
and of its gradient g come z = r·R⁻¹(g), dw = Σ z∘x and dx = w∘z − r²·x·mean(w∘z∘x).

Axis letters as in attention.py; M keys (tokens, then text), C a chunk of queries, F channels of all heads.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

NORM_EPSILON = 1e-6
INTERPRET = False  # run kernels step by step on any machine: for tests
LANES = 128
FEW = 512  # up to so many tokens, all queries of two heads are worked on at once, of more those of one by chunks
_LOG2_E = math.log2(math.e)

Norms = tuple[Array, Array]  # weights (e,) of the RMSNorm of queries and of that of keys, fp32
Tables = tuple[Array, Array] | None  # for some tokens, (e, R): cosines and signed sines


@dataclasses.dataclass(frozen=True)
class _Sizes:
    """What a kernel is made for."""

    tokens: int
    text: int  # tokens of it
    heads: int
    head_dim: int
    norms: bool
    angles: bool
    dtype: jnp.dtype

    @classmethod
    def of(cls, qkv: Array, norms: Norms | None, angles: Array | None, text_kv: Array | None) -> "_Sizes":
        """Those of `fused`'s arguments."""
        _, n, _, h, e = qkv.shape
        text = 0 if text_kv is None else text_kv.shape[1]
        return cls(n, text, h, e, norms is not None, angles is not None, qkv.dtype)

    @property
    def width(self) -> int:
        """Channels of all heads."""
        return self.heads * self.head_dim

    @property
    def chunk(self) -> int:
        """Queries worked on at a time."""
        return self.tokens if self.tokens <= FEW else next((c for c in (256, 128) if self.tokens % c == 0), 0)

    def chunks(self) -> Iterator[slice]:
        """The queries, by chunks."""
        return (slice(i, i + self.chunk) for i in range(0, self.tokens, self.chunk))

    def rows(self, part: int, head: Array) -> pl.Slice:
        """A head's rows in the transpose: its queries (part 0), keys (1), values (2); of text its keys (0), values."""
        return pl.ds(pl.multiple_of((part * self.heads + head) * self.head_dim, 8), self.head_dim)

    def product(self, a: Array, b: Array, contract: tuple[int, int]) -> Array:
        """The product over axis contract[0] of a and contract[1] of b, summed in fp32."""
        exact = jax.lax.Precision.HIGHEST if self.dtype == jnp.float32 else None
        axes = ((contract[0],), (contract[1],)), ((), ())
        operands = a.astype(self.dtype), b.astype(self.dtype)
        return jax.lax.dot_general(*operands, axes, precision=exact, preferred_element_type=jnp.float32)


@jax.custom_vjp
def fused(
    qkv_BxNx3xHxE: Array, norms: Norms | None, angles_NxK: Array | None, text_kv_BxLx2xHxE: Array | None
) -> Array:
    """As attention.attention, on one device."""
    arguments = (qkv_BxNx3xHxE, norms, angles_NxK, text_kv_BxLx2xHxE)
    b, n, _, h, e = qkv_BxNx3xHxE.shape
    sizes = _Sizes.of(*arguments)
    (out,) = _call(_forward_kernel, sizes, _inputs(*arguments), {"out": ((b, n, h * e), sizes.dtype)})
    return out.reshape(b, n, h, e)


def _forward(*arguments: Any) -> tuple[Array, tuple]:
    return fused(*arguments), arguments


def _backward(arguments: tuple, dout_BxNxHxE: Array) -> tuple:
    qkv, norms, angles, text_kv = arguments
    sizes, inputs = _Sizes.of(*arguments), _inputs(*arguments)
    inputs["dout"] = dout_BxNxHxE.reshape(*qkv.shape[:2], sizes.width)
    outputs = {"dqkv": (inputs["qkv"].shape, sizes.dtype)}
    if sizes.norms:
        outputs["dnorms"] = ((qkv.shape[0], sizes.head_dim, 2), jnp.float32)
    if sizes.text:
        outputs["dtext"] = (inputs["text"].shape, sizes.dtype)
    found = dict(zip(outputs, _call(_backward_kernel, sizes, inputs, outputs), strict=True))
    dnorms = None if norms is None else tuple(found["dnorms"].sum(axis=0).T)
    dangles = None if angles is None else jnp.zeros_like(angles)
    dtext_kv = None if text_kv is None else found["dtext"].reshape(text_kv.shape)
    return found["dqkv"].reshape(qkv.shape), dnorms, dangles, dtext_kv


fused.defvjp(_forward, _backward)


def refuses(
    qkv_BxNx3xHxE: Array, norms: Norms | None, angles_NxK: Array | None, text_kv_BxLx2xHxE: Array | None
) -> str:
    """Why the kernel cannot run with these; "" if it can."""
    sizes = _Sizes.of(qkv_BxNx3xHxE, norms, angles_NxK, text_kv_BxLx2xHxE)
    if sizes.dtype not in (jnp.bfloat16, jnp.float32):
        return f"the TPU kernel takes bfloat16 and float32, not {sizes.dtype}"
    if sizes.head_dim % 8:
        return f"the TPU kernel takes heads of a multiple of 8 channels, not {sizes.head_dim}"
    if not sizes.chunk:
        return f"of more than {FEW} tokens the TPU kernel takes a multiple of {LANES}, not {sizes.tokens}"
    _, _, need = _fit(sizes)
    if need > (there := _memory()):
        return f"the TPU kernel needs {need / 2**20:.0f} MiB of on-chip memory, of {there / 2**20:.0f}"
    return ""


def _loop(count: int, together: int, body: Callable[[list[Array]], None]) -> None:
    """Runs `body` for the numbers 0 … count − 1, up to `together` at a time: the compiler interleaves them."""
    together = next(n for n in range(together, 0, -1) if count % n == 0)
    if count:
        jax.lax.fori_loop(0, count // together, lambda i, _: body([i * together + k for k in range(together)]), None)


def _turn_over(source: Any, target: Any, width: int) -> None:
    """Writes the transpose of a block (1, R, F) to (F, R), or the other way, by columns of 128 of F = `width`."""

    def move(firsts: list[Any], count: int) -> None:
        parts = [pl.ds(first, count) for first in firsts]
        if len(source.shape) == 3:
            for part, rows in [(part, source[0, :, part].T.astype(target.dtype)) for part in parts]:
                target[part, :] = rows
        else:
            for part, columns in [(part, source[part, :].astype(target.dtype).T) for part in parts]:
                target[0, :, part] = columns

    whole, together = width // LANES, 9 if source.size <= FEW * 4096 else 3
    _loop(whole, together, lambda numbers: move([pl.multiple_of(i * LANES, LANES) for i in numbers], LANES))
    if width % LANES:
        move([whole * LANES], width % LANES)


def _swap(x_ExR: Array) -> Array:
    """Exchanges the channels of each pair."""
    even = jax.lax.broadcasted_iota(jnp.int32, x_ExR.shape, 0) % 2 == 0
    return jnp.where(even, pltpu.roll(x_ExR, x_ExR.shape[0] - 1, 0), pltpu.roll(x_ExR, 1, 0))


def _factor(x_ExR: Array) -> Array:
    """1/√(mean x² + ε), (1, R)."""
    return jax.lax.rsqrt(jnp.mean(x_ExR * x_ExR, axis=0, keepdims=True) + NORM_EPSILON)


def _prepare(x_ExR: Array, weight_ExR: Array | None, turn: Tables, scale: float = 1) -> Array:
    """scale·r·R(w∘x)."""
    y = x_ExR if weight_ExR is None else x_ExR * weight_ExR
    if turn is not None:
        y = y * turn[0] + _swap(y) * turn[1]
    if weight_ExR is not None:
        return y * (_factor(x_ExR) * scale)
    return y if scale == 1 else y * scale


def _prepare_back(
    g_ExR: Array, x_ExR: Array, weight_ExR: Array | None, turn: Tables, scale: float = 1
) -> tuple[Array, Array | None]:
    """From scale·(the gradient of r·R(w∘x)) those of x and, not yet summed over the tokens, of w."""
    if turn is not None:
        g_ExR = g_ExR * turn[0] - _swap(g_ExR) * turn[1]
    if weight_ExR is None:
        return g_ExR if scale == 1 else g_ExR * scale, None
    r_1xR = _factor(x_ExR)
    z = g_ExR * (r_1xR * scale)
    wz = weight_ExR * z
    return wz - x_ExR * (r_1xR * r_1xR * jnp.mean(wz * x_ExR, axis=0, keepdims=True)), z * x_ExR


class _Image:
    """What the kernels compute with of one image: `refs` by name, among them the transposes of its arguments."""

    def __init__(self, sizes: _Sizes, refs: dict[str, Any]):
        self.sizes, self.refs = sizes, refs
        for name in ("qkv", "text", "dout"):
            if name in refs:
                _turn_over(refs[name], refs[f"turned_{name}"], refs[name].shape[2])
        self.weights = [refs["query_scale"][...], refs["key_scale"][...]] if sizes.norms else [None, None]
        self.turn = (refs["cos"][...], refs["sin"][...]) if sizes.angles else None
        self.text_weight = None
        if sizes.text and sizes.norms:
            self.text_weight = jnp.broadcast_to(self.weights[1][:, :1], (sizes.head_dim, sizes.text))

    def prepared(self, head: Array) -> tuple[Array, Array, Array]:
        """As attention sees them: queries (e, N), times log₂(e)/√e; keys and values with the text's, (e, M)."""
        sizes = self.sizes
        q, k, v = (self.refs["turned_qkv"][sizes.rows(part, head), :] for part in range(3))
        q = _prepare(q, self.weights[0], self.turn, _LOG2_E / math.sqrt(sizes.head_dim))
        k = _prepare(k, self.weights[1], self.turn)
        if sizes.text:
            text_k, text_v = (self.refs["turned_text"][sizes.rows(part, head), :] for part in range(2))
            k = jnp.concatenate([k, _prepare(text_k, self.text_weight, None)], axis=1)
            v = jnp.concatenate([v, text_v], axis=1)
        return q.astype(sizes.dtype), k.astype(sizes.dtype), v.astype(sizes.dtype)


def _softmax(sizes: _Sizes, k_ExM: Array, q_ExC: Array) -> tuple[Array, Array]:
    """Of the logits of all keys and some queries, exp(logits − their greatest), and 1 over its sum, (1, C)."""
    logits_MxC = sizes.product(k_ExM, q_ExC, (0, 0))
    p_MxC = jnp.exp2(logits_MxC - jnp.max(logits_MxC, axis=0, keepdims=True))
    return p_MxC, 1 / jnp.sum(p_MxC, axis=0, keepdims=True)


def _attend(sizes: _Sizes, q_ExN: Array, k_ExM: Array, v_ExM: Array) -> Array:
    """A head's result, (e, N)."""
    outs = []
    for chunk in sizes.chunks():
        p_MxC, inverse_1xC = _softmax(sizes, k_ExM, q_ExN[:, chunk])
        outs.append(sizes.product(v_ExM, p_MxC, (1, 0)) * inverse_1xC)
    return jnp.concatenate(outs, axis=1)


def _attend_back(
    sizes: _Sizes, dout_ExN: Array, q_ExN: Array, k_ExM: Array, v_ExM: Array
) -> tuple[Array, Array, Array]:
    """The gradients of q, k and v; those of q and k as of logits that were the products of q and k."""
    dq_ExN, dk_ExM, dv_ExM = [], 0.0, 0.0
    for chunk in sizes.chunks():
        q_ExC, dout_ExC = q_ExN[:, chunk], dout_ExN[:, chunk]
        p_MxC, inverse_1xC = _softmax(sizes, k_ExM, q_ExC)
        p_MxC = p_MxC * inverse_1xC
        dp_MxC = sizes.product(v_ExM, dout_ExC, (0, 0))
        dlogits_MxC = p_MxC * (dp_MxC - jnp.sum(p_MxC * dp_MxC, axis=0, keepdims=True))
        dlogits_MxC = dlogits_MxC.astype(sizes.dtype)
        dq_ExN.append(sizes.product(k_ExM, dlogits_MxC, (1, 0)))
        dk_ExM += sizes.product(q_ExC, dlogits_MxC, (1, 1))
        dv_ExM += sizes.product(dout_ExC, p_MxC, (1, 1))
    return jnp.concatenate(dq_ExN, axis=1), dk_ExM, dv_ExM


def _forward_kernel(sizes: _Sizes, together: int, names: tuple[str, ...], *refs: Any) -> None:
    named = dict(zip(names, refs, strict=True))
    image, turned = _Image(sizes, named), named["turned_qkv"]

    def attend(heads: list[Array]) -> None:
        outs = [_attend(sizes, *image.prepared(head)) for head in heads]
        for head, out_ExN in zip(heads, outs, strict=True):
            turned[sizes.rows(0, head), :] = out_ExN

    _loop(sizes.heads, together, attend)
    _turn_over(turned, named["out"], sizes.width)


def _backward_kernel(sizes: _Sizes, together: int, names: tuple[str, ...], *refs: Any) -> None:
    named = dict(zip(names, refs, strict=True))
    image, n = _Image(sizes, named), sizes.tokens
    turned, text = named["turned_qkv"], named.get("turned_text")
    scales = 1 / math.sqrt(sizes.head_dim), 1 / _LOG2_E
    if sizes.norms:
        named["dnorms"][...] = jnp.zeros(named["dnorms"].shape, jnp.float32)

    def differentiate(head: Array) -> tuple[list, list]:
        """[(where, rows, what to write there)], and [(which norm, gradient of its weight)]."""
        dout_ExN = named["turned_dout"][sizes.rows(0, head), :].astype(sizes.dtype)
        dq_ExN, dk_ExM, dv_ExM = _attend_back(sizes, dout_ExN, *image.prepared(head))
        q, k, v = (sizes.rows(part, head) for part in range(3))
        results, dnorms = [(turned, v, dv_ExM[:, :n])], []
        raw = [(0, turned, q, dq_ExN, image.weights[0], image.turn)]
        raw += [(1, turned, k, dk_ExM[:, :n], image.weights[1], image.turn)]
        if sizes.text:
            results.append((text, k, dv_ExM[:, n:]))
            raw.append((1, text, q, dk_ExM[:, n:], image.text_weight, None))
        for norm, place, rows, gradient, weight, turn in raw:
            dx, dweight = _prepare_back(gradient, place[rows, :], weight, turn, scales[norm])
            results.append((place, rows, dx))
            dnorms += [] if dweight is None else [(norm, jnp.sum(dweight, axis=1, keepdims=True))]
        return results, dnorms

    def attend_back(heads: list[Array]) -> None:
        for results, dnorms in [differentiate(head) for head in heads]:
            for place, rows, dx in results:
                place[rows, :] = dx
            for norm, dweight_Ex1 in dnorms:
                named["dnorms"][0, :, norm : norm + 1] += dweight_Ex1

    _loop(sizes.heads, together, attend_back)
    _turn_over(turned, named["dqkv"], 3 * sizes.width)
    if sizes.text:
        _turn_over(text, named["dtext"], 2 * sizes.width)


def _inputs(
    qkv_BxNx3xHxE: Array, norms: Norms | None, angles_NxK: Array | None, text_kv_BxLx2xHxE: Array | None
) -> dict[str, Array]:
    """What both kernels read: of each image three axes; for all images tables (e, N)."""
    b, n, _, h, e = qkv_BxNx3xHxE.shape
    inputs = {"qkv": qkv_BxNx3xHxE.reshape(b, n, 3 * h * e)}
    if norms is not None:
        for name, scale_E in zip(("query_scale", "key_scale"), norms, strict=True):
            inputs[name] = jnp.broadcast_to(scale_E.astype(jnp.float32)[:, None], (e, n))
    if angles_NxK is not None:
        signs_Ex1 = jnp.tile(jnp.array([[-1.0], [1.0]], jnp.float32), (e // 2, 1))
        inputs["cos"] = jnp.repeat(jnp.cos(angles_NxK.T), 2, axis=0)
        inputs["sin"] = jnp.repeat(jnp.sin(angles_NxK.T), 2, axis=0) * signs_Ex1
    if text_kv_BxLx2xHxE is not None:
        inputs["text"] = text_kv_BxLx2xHxE.reshape(b, -1, 2 * h * e)
    return inputs


def _call(kernel: Callable[..., None], sizes: _Sizes, inputs: dict[str, Array], outputs: dict[str, tuple]) -> list:
    """Runs a kernel on every image: outputs by name, of these shapes and dtypes, in their order."""
    transposes = {f"turned_{name}": inputs[name].shape[:0:-1] for name in ("qkv", "text", "dout") if name in inputs}
    together, buffers, memory = _fit(sizes)

    def block(shape: tuple[int, ...]) -> pl.BlockSpec:
        mode = None if buffers == 2 else pl.Buffered(1)
        if len(shape) == 2:  # the same for all images
            return pl.BlockSpec(shape, lambda b: (0, 0), pipeline_mode=mode)
        return pl.BlockSpec((1, *shape[1:]), lambda b: (b, 0, 0), pipeline_mode=mode)

    return pl.pallas_call(
        functools.partial(kernel, sizes, together, (*inputs, *outputs, *transposes)),
        grid=inputs["qkv"].shape[:1],
        in_specs=[block(array.shape) for array in inputs.values()],
        out_specs=[block(shape) for shape, _ in outputs.values()],
        out_shape=[jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in outputs.values()],
        scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in transposes.values()],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",), vmem_limit_bytes=memory),
        name=f"attention{kernel.__name__.removesuffix('_kernel')}",
        interpret=INTERPRET,
    )(*inputs.values())


def _fit(sizes: _Sizes) -> tuple[int, int, int]:
    """Heads worked on at a time, buffers of each block, and the on-chip memory that the larger kernel then takes."""
    keys, lanes = sizes.tokens + sizes.text, -(-sizes.tokens // LANES) * LANES
    blocks = (7 * sizes.tokens + 4 * sizes.text) * sizes.width * sizes.dtype.itemsize + 16 * sizes.head_dim * lanes
    transposes = 4 * (4 * lanes + 2 * sizes.text) * sizes.width
    working = 4 * (8 * keys * min(sizes.chunk, lanes) + 16 * sizes.head_dim * keys)  # of a head
    for together, buffers in ((2, 2), (1, 2), (1, 1)):
        need = buffers * blocks + transposes + together * working + 2**20
        if need <= _memory() and (together == 1 or sizes.tokens <= FEW):
            break
    return together, buffers, need


def _memory() -> int:
    """Bytes of a core's on-chip memory that a kernel may take."""
    return 2**30 if INTERPRET else pltpu.get_tpu_info().vmem_capacity_bytes * 15 // 16
