"""The product of a linear layer: its gradients, their dtype, what is kept for them, and on several devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import NamedSharding, PartitionSpec

from deco_jax.config import default_config
from deco_jax.models.build import parameter_shapes
from deco_jax.models.dit import REMAT_POLICIES
from deco_jax.ops.product import Part, gradients_in, look_up, product
from deco_jax.parallel import mesh as meshes
from tests.helpers import Golden, relative_error


def draw(*shapes):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


@pytest.mark.parametrize("lead, features", [((3, 5), (6,)), ((7,), (2, 3, 4)), ((2, 3, 5), (1, 4)), ((), (6,))])
def test_output_and_both_gradients_are_those_of_tensordot(lead, features):
    x, kernel, weights = draw((*lead, 11), (11, *features), (*lead, *features))

    def loss(multiply, x, kernel):
        return jnp.sum(weights * jnp.sin(multiply(x, kernel)))

    ours = functools.partial(product, dtype=jnp.float32)
    theirs = functools.partial(jnp.tensordot, axes=1)
    assert relative_error(ours(x, kernel), theirs(x, kernel)) <= 1e-6
    for a, b in zip(*(jax.grad(functools.partial(loss, f), (0, 1))(x, kernel) for f in (ours, theirs)), strict=True):
        assert a.shape == b.shape and relative_error(a, b) <= 1e-6


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_weight_gradients_are_summed_in_the_dtype_that_was_asked_for(dtype):
    """Devices add up what this product puts out: a bf16 one would lose what fp32 was asked to keep."""
    x, kernel = draw((64, 8), (8, 3))

    def gradient(x, kernel):
        with gradients_in(dtype):
            return jax.grad(lambda k: jnp.sum(product(x, k, jnp.bfloat16).astype(jnp.float32)))(kernel)

    dots = [line for line in jax.jit(gradient).lower(x, kernel).as_text().splitlines() if "dot_general" in line]
    assert any(f"-> tensor<8x3x{'f32' if dtype == 'float32' else 'bf16'}>" in line for line in dots), dots
    assert gradient(x, kernel).dtype == jnp.float32, "the gradient has its parameter's dtype"


def test_the_parameter_itself_is_kept_for_the_backward_pass():
    """Scanned layers would keep a copy of every kernel that is flattened before, all layers of it."""
    x, kernels = draw((4, 8), (5, 8, 2, 4))

    def layer(x, kernel):
        return jnp.sin(product(x, kernel, jnp.float32)[:, 0] @ jnp.ones((4, 8))), None

    def loss(kernels):
        return jnp.sum(jax.lax.scan(layer, x, kernels)[0])

    kept = jax.eval_shape(lambda k: jax.vjp(loss, k)[1], kernels)
    shapes = [leaf.shape for leaf in jax.tree.leaves(kept)]
    assert (5, 8, 8) not in shapes, shapes


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_kernel_and_a_table_in_parts_are_as_whole_ones(axis):
    """Outputs, and gradients of which every device gets its part, whichever axis is split."""
    config = default_config().mesh
    config.data, config.fsdp = 2, 4
    mesh = meshes.make_layout(config, jax.devices()[:8]).mesh
    x, kernel, table, weights = draw((8, 5, 8), (8, 4, 8), (12, 8), (8, 5, 4, 8))
    rows = jnp.arange(40).reshape(8, 5) % 12

    def loss(x, kernel, table, rows, weights):
        return jnp.sum(weights * jnp.sin(product(x + look_up(table, rows), kernel, jnp.float32)))

    def on_device(x, kernel, table, rows, weights):
        parts = (
            Part(kernel, tuple(("fsdp",) if i == axis else () for i in range(3))),
            Part(table, ((), ("data", "fsdp"))),
        )
        dx, dkernel, dtable = jax.grad(loss, (0, 1, 2))(x, *parts, rows, weights)
        return dx, jax.lax.psum(dkernel.value, "data"), dtable.value

    batch, split = PartitionSpec(("data", "fsdp")), PartitionSpec(*[None] * axis, "fsdp")
    columns = PartitionSpec(None, ("data", "fsdp"))
    run = jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=(batch, split, columns, batch, batch),
        out_specs=(batch, split, columns),
        check_vma=False,
    )
    expected = jax.grad(loss, (0, 1, 2))(x, kernel, table, rows, weights)
    for a, b in zip(jax.jit(run)(x, kernel, table, rows, weights), expected, strict=True):
        assert a.shape == b.shape and relative_error(a, b) <= 1e-6


@pytest.mark.parametrize("preset", ["data", "fsdp", "fsdp_tensor"])
def test_eight_devices_under_remat_compute_the_same(preset):
    """Rematerialised by the policy "dots", jitted and differentiated, kernels and batch laid out as in training."""
    x, kernel, down, weights = draw((8, 4, 16), (16, 2, 8), (16, 16), (8, 4, 16))

    @functools.partial(jax.checkpoint, policy=REMAT_POLICIES["dots"])
    def layer(x, kernel, down):
        hidden = jnp.sin(product(x, kernel, jnp.float32)).reshape(8, 4, 16)
        return product(nn.with_logical_constraint(hidden, ("batch", None, "mlp")), down, jnp.float32)

    def gradients(*arguments):
        return jax.grad(lambda *a: jnp.sum(weights * jnp.cos(layer(*a))), (0, 1, 2))(*arguments)

    expected = gradients(x, kernel, down)
    config = default_config().mesh
    config.preset = preset
    layout = meshes.make_layout(config, jax.devices()[:8])
    with meshes.use_mesh(layout):
        axes = [("batch", None, None), ("width", None, "mlp"), ("mlp", "width")]
        specs = [NamedSharding(layout.mesh, nn.logical_to_mesh_axes(names, layout.rules)) for names in axes]
        placed = [jax.device_put(a, spec) for a, spec in zip((x, kernel, down), specs, strict=True)]
        ours = jax.jit(gradients)(*placed)
    for a, b in zip(ours, expected, strict=True):
        assert relative_error(a, b) <= 1e-5


@pytest.mark.parametrize("case", ["deco_c2i", "deco_t2i", "pixnerd", "baseline_dit"])
def test_a_float32_network_multiplies_in_float32_everywhere(case):
    """TPUs and GPUs take fewer bits unless told; as they are told it does not show on a CPU, the program is read."""
    programs = []
    for dtype in (jnp.float32, jnp.bfloat16):
        model = Golden(case).model(dtype=dtype, attention="xla")
        inputs = jnp.zeros((1, 16, 16, 3)), jnp.zeros(1), model.condition.example(1)
        lowered = jax.jit(jax.grad(lambda params, f=model.apply, x=inputs: jnp.sum(f({"params": params}, *x) ** 2)))
        text = lowered.lower(parameter_shapes(model)).as_text()
        programs.append([line for line in text.splitlines() if "stablehlo.dot_general" in line])
    exact, coarse = programs
    assert len(exact) > 10 and all("precision = [HIGHEST, HIGHEST]" in line for line in exact)
    # Of a bfloat16 network the constant part of the queries alone is made in float32.
    assert all(("HIGHEST" in line) == ("bf16" not in line) for line in coarse)
