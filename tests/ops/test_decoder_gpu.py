"""The kernels for GPUs: what they compute, in plain JAX on this machine; and that they compile for an H100."""

import importlib.util
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from deco_jax.ops import decoder, decoder_gpu
from deco_jax.planning.topology import make_devices, parse_topology

D, P, DEPTH = 32, 64, 2


class Ref:
    """An array that a kernel reads and writes."""

    def __init__(self, array: np.ndarray):
        self.array, self.shape, self.dtype = array, array.shape, array.dtype

    @property
    def at(self) -> Any:
        return _At(self.array)

    def __getitem__(self, where: Any) -> jax.Array:
        return jnp.asarray(self.array[where].copy())

    def __setitem__(self, where: Any, value: jax.Array) -> None:
        assert (self.array[where].shape, self.dtype) == (value.shape, value.dtype)
        self.array[where] = np.asarray(value)


class _At:
    def __init__(self, array: np.ndarray):
        self.array = array

    def __getitem__(self, where: Any) -> Ref:
        return Ref(self.array[where])


@pytest.fixture
def plain_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels run one warpgroup after the other, on arrays that are NaN until they are written."""
    here = [0]

    def kernel(body: Any, *, out_type: Any, grid: tuple[int], scratch_types: list, **_: Any) -> Any:
        def run(*arrays: jax.Array) -> Any:
            empty = [Ref(np.full(x.shape, np.nan, x.dtype)) for x in jax.tree.leaves(out_type)]
            for here[0] in range(grid[0]):
                scratch = [x and Ref(np.full(x.shape, np.nan, x.dtype)) for x in scratch_types]
                body(*(Ref(np.array(x)) for x in arrays), *empty, *scratch)
            return jax.tree.unflatten(jax.tree.structure(out_type), [ref[...] for ref in empty])

        return run

    def loop(start: int, stop: int, body: Any, carried: Any) -> Any:
        for i in range(start, int(stop)):
            carried = body(i, carried)
        return carried

    def copy(source: Ref, target: Ref, barrier: None) -> None:
        target.array[...] = source.array

    def multiply(x: Any, y: Ref) -> jax.Array:
        return jnp.matmul(x[...], y[...], preferred_element_type=jnp.float32)

    replaced = {
        "plgpu": {
            "kernel": kernel,
            "copy_gmem_to_smem": copy,
            "barrier_wait": lambda barrier: None,
            "Barrier": lambda num_arrivals: None,
            "SMEM": lambda shape, dtype, transforms: types.SimpleNamespace(shape=shape, dtype=dtype),
            "load": lambda ref, where, **_: ref[where],
            "layout_cast": lambda x, layout: x,
            "transpose_ref": lambda ref, axes: Ref(ref.array.transpose(axes)),
        },
        "pl": {"ds": lambda start, size: slice(int(start), int(start) + size)},
        "lax": {"axis_index": lambda name: here[0], "fori_loop": loop, "rem": lambda a, b: a % b},
    }
    for name, functions in replaced.items():
        monkeypatch.setattr(decoder_gpu, name, types.SimpleNamespace(**vars(getattr(decoder_gpu, name)) | functions))
    monkeypatch.setattr(decoder_gpu, "_dot", multiply)
    monkeypatch.setattr(decoder_gpu, "_outer", lambda sums, x, dy: sums + multiply(x.array.T, dy))
    monkeypatch.setattr(decoder_gpu, "FORWARD_GROUPS", 2)
    monkeypatch.setattr(decoder_gpu, "BACKWARD_GROUPS", 2)


def _parameters(rng: np.random.Generator) -> dict[str, Any]:
    def linear(fan_in: int, *features: int) -> dict[str, Any]:
        kernel = rng.normal(size=(fan_in, *features)) / np.sqrt(fan_in)
        return {"kernel": jnp.float32(kernel), "bias": jnp.float32(0.1 * rng.normal(size=features))}

    def block() -> dict[str, Any]:
        norm = {"scale": jnp.float32(1 + 0.2 * rng.normal(size=D)), "bias": jnp.float32(0.2 * rng.normal(size=D))}
        return {"norm": norm, "modulation": linear(D, 3, D), "in": linear(D, D), "out": linear(D, D)}

    layers = {"query": linear(67, D), "in": linear(D, D), "condition": linear(8, P, D), "out": linear(D, 3)}
    return layers | {f"block_{i}": block() for i in range(DEPTH)}


def _arrays() -> tuple[Any, ...]:
    """(parameters, pixels, tokens, places, gradient of the output)."""
    rng = np.random.default_rng(0)
    pixels, tokens, places, dout = (
        rng.normal(size=size).astype(np.float32) for size in ((1, 3, P, 3), (1, 3, 8), (P, 64), (1, 3, P, 3))
    )
    return _parameters(rng), pixels, tokens, places, dout


def _form(**changes: Any) -> decoder.Form:
    return decoder.Form(
        **{"depth": DEPTH, "interaction": "adaln", "dtype": jnp.bfloat16, "rematerialise": lambda f: f} | changes
    )


@pytest.mark.slow
def test_kernels_agree_with_plain_jax(plain_kernels: None) -> None:
    parameters, pixels, tokens, places, dout = _arrays()
    exact = _form(dtype=jnp.float32)
    want, back = jax.vjp(lambda *a: decoder._plain(*a, places, exact), parameters, pixels, tokens)
    have, kernels_back = jax.vjp(lambda *a: decoder_gpu.fused(*a, places, _form()), parameters, pixels, tokens)
    pairs = zip(jax.tree.leaves((have, kernels_back(dout))), jax.tree.leaves((want, back(dout))), strict=True)
    for h, w in pairs:
        assert np.linalg.norm(h - w) < 2e-2 * np.linalg.norm(w)


def test_folding_changes_nothing() -> None:
    parameters, pixels, tokens, places, _ = _arrays()
    place_Pxd, weights = decoder_gpu.fold(parameters, places, DEPTH)
    condition = parameters["condition"]
    s = jax.nn.silu(jnp.einsum("bnD,Dpd->bnpd", tokens, condition["kernel"]) + condition["bias"])
    q = place_Pxd + pixels @ weights["colour"]

    def normed(x: jax.Array) -> jax.Array:
        return (x - x.mean(-1, keepdims=True)) * lax.rsqrt(x.var(-1, keepdims=True) + decoder_gpu.NORM_EPSILON)

    for i in range(DEPTH):
        j = i * decoder_gpu.PRODUCTS
        linear = [lambda x, k=k: x @ weights["kernels"][k] + weights["biases"][k] for k in range(j, j + 5)]
        shift, scale, gate = (linear[k](s) for k in range(3))
        q = q + gate * linear[4](jax.nn.silu(linear[3](normed(q) * scale + shift)))
    out = normed(q) @ weights["last"].T + weights["last_bias"]
    want = decoder._plain(parameters, pixels, tokens, places, _form(dtype=jnp.float32))
    np.testing.assert_allclose(out, want, atol=1e-4)


@pytest.mark.parametrize(
    ("device", "form", "pixels", "reason"),
    [
        ("NVIDIA B200", {}, (1, 1, P, 3), "Hopper"),
        ("NVIDIA H200", {"interaction": "add"}, (1, 1, P, 3), "decoder_interaction"),
        ("NVIDIA H200", {}, (1, 1, P, 12), "decoder_patch"),
        ("NVIDIA H200", {"dtype": jnp.float32}, (1, 1, P, 3), "bfloat16"),
        ("NVIDIA H200", {}, (1, 1, 16, 3), "multiple of 64"),
        ("NVIDIA H200", {}, (1, 1, P, 3), ""),
    ],
)
def test_says_why_it_cannot_run(
    monkeypatch: pytest.MonkeyPatch, device: str, form: dict[str, Any], pixels: tuple[int, ...], reason: str
) -> None:
    monkeypatch.setattr(jax, "devices", lambda: [types.SimpleNamespace(device_kind=device)])
    parameters = {"in": {"kernel": np.zeros((D, D))}}
    said = decoder_gpu.why_not_fused(parameters, np.zeros(pixels), None, None, _form(**form))
    assert reason in said if reason else not said


@pytest.mark.skipif(importlib.util.find_spec("jax_cuda13_plugin") is None, reason="needs jax-cuda13-plugin")
def test_kernels_compile_for_an_h100() -> None:
    parameters, pixels, tokens, places, dout = _arrays()
    parameters = {name: layer for name, layer in parameters.items() if name != "block_1"}
    form = _form(depth=1)
    mesh = Mesh(np.array(make_devices(parse_topology("h100:1"))[:1]), ("data",), axis_types=(AxisType.Auto,))

    def gradients(*arguments: Any) -> Any:
        *arguments, dout = arguments
        assert not decoder_gpu.why_not_fused(*arguments, places, form)
        return jax.vjp(lambda *a: decoder_gpu.fused(*a, places, form), *arguments)[1](dout)

    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, PartitionSpec())),
        (parameters, pixels, tokens, dout),
    )
    with jax.set_mesh(mesh):
        options = {"xla_gpu_enable_triton_gemm": False, "xla_gpu_autotune_level": "0"}
        text = jax.jit(gradients).lower(*shapes).compile(compiler_options=options).as_text()
    assert "mosaic_gpu" in text
