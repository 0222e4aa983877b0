"""Attention's implementations agree, on odd sizes and on several devices; what cannot run says why."""

import importlib.metadata
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from deco_jax.config import default_config
from deco_jax.errors import UsageError
from deco_jax.models.dit import Attention, Transformer
from deco_jax.ops import attention_tpu, door
from deco_jax.ops.attention import TABLE, attention
from deco_jax.parallel import mesh as meshes
from deco_jax.planning.topology import make_devices, parse_topology
from tests.helpers import relative_error

REFERENCE = TABLE[-1].run


@pytest.fixture
def kernel(monkeypatch):
    """The TPU kernel, interpreted on this machine; it is what "auto" takes."""
    monkeypatch.setattr(attention_tpu, "INTERPRET", True)
    monkeypatch.setattr(door, "platform", lambda: "tpu")
    return TABLE[0].run


def draw(batch, tokens, heads, head_dim, dtype=jnp.float32, norms=True, angles=True, text=0):
    """The operation's arguments, and what its output is multiplied with for a loss."""
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    qkv = normal(batch, tokens, 3, heads, head_dim).astype(dtype)
    scales = (1 + 0.3 * normal(head_dim), 1 + 0.3 * normal(head_dim)) if norms else None
    text_kv = normal(batch, text, 2, heads, head_dim).astype(dtype) if text else None
    angles = 3 * normal(tokens, head_dim // 2) if angles else None
    return (qkv, scales, angles, text_kv), normal(batch, tokens, heads, head_dim)


def value_and_gradients(run, arguments, weights):
    """[output, the gradients by the projection, the norms' weights and the text, as far as there are such]."""
    qkv, norms, angles, text_kv = arguments

    def loss(qkv, norms, text_kv):
        out = run(qkv, norms, angles, text_kv)
        return jnp.sum(out.astype(jnp.float32) * weights), out

    (_, out), gradients = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(qkv, norms, text_kv)
    return jax.tree.leaves((out, gradients))


def assert_equal(found, expected, tolerance):
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype
        assert relative_error(ours.astype(jnp.float32), theirs.astype(jnp.float32)) <= tolerance
        assert jnp.abs(ours - theirs).max() <= tolerance * jnp.abs(theirs).max()


CASES = {
    "odd": {"batch": 3, "tokens": 25, "heads": 3, "head_dim": 24},
    "text": {"batch": 2, "tokens": 16, "heads": 2, "head_dim": 72, "text": 12},
    "a teacher's": {"batch": 1, "tokens": 17, "heads": 1, "head_dim": 64, "norms": False, "angles": False},
}


@pytest.mark.parametrize("case", CASES)
def test_the_kernel_equals_the_plain_operation(case, kernel):
    arguments, weights = draw(**CASES[case])
    expected = value_and_gradients(REFERENCE, arguments, weights)
    assert_equal(value_and_gradients(kernel, arguments, weights), expected, 2e-5)


def test_many_queries_are_worked_on_in_chunks(kernel, monkeypatch):
    monkeypatch.setattr(attention_tpu, "FEW", 128)
    arguments, weights = draw(1, 384, 1, 16)
    expected = value_and_gradients(REFERENCE, arguments, weights)
    assert_equal(value_and_gradients(kernel, arguments, weights), expected, 2e-5)


def test_bfloat16_is_as_near_as_its_rounding(kernel):
    """Both round at other places. Each is 2⁻⁸ or so from what fp32 gives for the same inputs; the kernel no farther."""
    (qkv, *rest), weights = draw(2, 32, 2, 72, jnp.bfloat16)
    exact = value_and_gradients(REFERENCE, (qkv.astype(jnp.float32), *rest), weights)
    for name, run in (("xla", REFERENCE), ("kernel", kernel)):
        for found, true in zip(value_and_gradients(run, (qkv, *rest), weights), exact, strict=True):
            assert relative_error(found.astype(jnp.float32), true) <= 0.01, name


def test_the_kernel_runs_on_every_device_for_its_part(kernel):
    """A pallas_call is not partitioned; batch and heads are split by hand, and the norms' gradients summed."""
    arguments, weights = draw(4, 16, 2, 8)
    expected = value_and_gradients(REFERENCE, arguments, weights)
    config = default_config().mesh
    config.data, config.fsdp, config.tensor = 2, 2, 2
    layout = meshes.make_layout(config)
    qkv, *rest = arguments
    split = NamedSharding(layout.mesh, PartitionSpec(("data", "fsdp"), None, None, "tensor"))
    with meshes.use_mesh(layout):
        found = value_and_gradients(kernel, (jax.device_put(qkv, split), *rest), weights)
    assert found[0].sharding.spec[:3] == (("data", "fsdp"), None, "tensor")
    assert_equal(jax.device_get(found), expected, 2e-5)


def test_a_batch_that_devices_do_not_divide_is_whole_on_each(kernel):
    arguments, weights = draw(3, 8, 1, 8)
    expected = value_and_gradients(REFERENCE, arguments, weights)
    config = default_config().mesh
    config.data, config.fsdp, config.tensor = 2, 2, 2
    with meshes.use_mesh(meshes.make_layout(config)):
        found = value_and_gradients(kernel, arguments, weights)
    assert_equal(jax.device_get(found), expected, 2e-5)


def test_the_layer_takes_the_kernel(kernel):
    """auto, on a TPU: one pallas_call per layer."""
    layer, x = Attention(2, jnp.bfloat16, "auto"), jnp.zeros((1, 16, 32), jnp.bfloat16)
    program = str(jax.make_jaxpr(lambda x: layer.init_with_output(jax.random.key(0), x)[0])(x))
    assert program.count("pallas_call[") == 1


def test_the_backward_pass_runs_no_forward_kernel_again(kernel):
    """remat=dots keeps what attention puts out, of which the next layer's weight gradient is made."""
    network = Transformer(2, 2, jnp.bfloat16, "auto", "dots", scan=True)
    s, c = jnp.zeros((1, 16, 32), jnp.bfloat16), jnp.zeros((1, 32), jnp.bfloat16)
    params = network.init(jax.random.key(0), s, c, None)
    loss = lambda params: network.apply(params, s, c, None)[0].astype(jnp.float32).sum()  # noqa: E731
    program = str(jax.make_jaxpr(jax.grad(loss))(params))
    assert program.count("pallas_call[") == 2, "one forward, one backward"


REFUSED = {
    "pallas": [
        ("cpu", {}, "it needs a TPU"),
        ("tpu", {"dtype": jnp.float16}, "takes bfloat16 and float32, not float16"),
        ("tpu", {"head_dim": 12}, "heads of a multiple of 8 channels, not 12"),
        ("tpu", {"tokens": 513}, "a multiple of 128, not 513"),
    ],
    "cudnn": [
        ("cpu", {}, "it needs a GPU"),
        ("gpu", {"dtype": jnp.float32}, "takes bfloat16 and float16, not float32"),
        ("gpu", {"head_dim": 12}, "a multiple of 8 channels up to 128, not 12"),
        ("gpu", {}, "pip install nvidia-cudnn-cu13"),
    ],
}


@pytest.mark.parametrize("name, case", [(name, case) for name, cases in REFUSED.items() for case in cases])
def test_what_cannot_run_says_why(name, case, monkeypatch):
    platform, changed, reason = case
    monkeypatch.setattr(door, "platform", lambda: platform)
    sizes = {"batch": 1, "tokens": 8, "heads": 1, "head_dim": 16, "dtype": jnp.bfloat16, "angles": False} | changed
    arguments, _ = draw(**sizes)
    if "pip install" in reason:  # torch for CUDA brings it along
        monkeypatch.setattr(importlib.metadata, "distributions", lambda **name: iter(()))
    with pytest.raises(UsageError, match=f"model.attention='{name}' cannot run here: .*{reason}"):
        jax.eval_shape(lambda: attention(*arguments, name))


@pytest.mark.tpu_compiler
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not here: pip install -e '.[tpu]'")
@pytest.mark.parametrize(
    "topology, tokens, head_dim, text, dtype",
    [
        ("v4:2x2x1", 256, 72, 0, "bfloat16"),
        ("v5e:2x2", 256, 72, 0, "bfloat16"),
        ("v5e:2x2", 257, 64, 0, "bfloat16"),
        ("v6e:2x2", 256, 64, 128, "float32"),
        pytest.param("v5p:2x2x1", 1024, 72, 0, "bfloat16", marks=pytest.mark.slow),
        pytest.param("v6e:2x2", 1024, 72, 0, "bfloat16", marks=pytest.mark.slow),
    ],
)
def test_it_compiles_for_tpus(topology, tokens, head_dim, text, dtype):
    """Both kernels, in one program without a copy of the projection or a matrix of logits; 16 heads, as published."""
    config = default_config().mesh
    config.preset = "data"
    layout = meshes.make_layout(config, make_devices(parse_topology(topology)))
    heads, batch = 16, 4

    def shape(*sizes, dtype=dtype):
        split = PartitionSpec(("data", "fsdp")) if sizes[0] == batch else PartitionSpec()
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=NamedSharding(layout.mesh, split))

    arguments = [
        shape(batch, tokens, 3, heads, head_dim),
        (shape(head_dim, dtype="float32"),) * 2,
        shape(tokens, head_dim // 2, dtype="float32"),
        shape(batch, text, 2, heads, head_dim) if text else None,
    ]
    weights = shape(batch, tokens, heads, head_dim)
    with meshes.use_mesh(layout):
        assert door.platform() == "tpu"

        def gradients(arguments, weights):
            out, back = jax.vjp(lambda *arguments: attention(*arguments, "auto"), *arguments)
            return out, back(weights)

        text_of_program = jax.jit(gradients).lower(arguments, weights).compile().as_text()
    assert text_of_program.count('custom_call_target="tpu_custom_call"') == 2
