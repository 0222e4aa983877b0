"""What devices send each other of parameters and gradients, and in which dtype."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deco_jax.encoders.dinov2.model import DINOv2
from deco_jax.encoders.teacher import teacher_of
from deco_jax.errors import UsageError
from deco_jax.parallel import mesh as meshes
from deco_jax.training.start import abstract_state
from deco_jax.training.step import is_matrix, jit_step, make_train_step
from tests.helpers import relative_error

pytestmark = pytest.mark.usefixtures("split_everything")


@pytest.fixture
def config(tiny_config):
    tiny_config.data.batch_size, tiny_config.model.dtype = 32, "bfloat16"
    tiny_config.mesh.preset = "zero1"
    return tiny_config


def program(config, frozen=()):
    """(the step's program, traced; what it is called with)."""
    train_step, layout = make_train_step(config, frozen), meshes.make_layout(config.mesh)
    abstract, mesh, rows = abstract_state(train_step, layout), layout.mesh, np.arange(32)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda p: rng.normal(0, 0.2, p.shape).astype(np.float32), abstract.params)
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), abstract)
    state = zeros.replace(params=params, ema=jax.tree.map(np.copy, params["network"]))
    state = jax.tree.map(lambda x, a: jax.device_put(x, a.sharding), state, abstract)
    batch = {"image": rng.integers(0, 256, (32, 28, 28, 3), np.uint8), "label": rng.integers(0, 10, 32)}
    batch["label"] = batch["label"].astype(np.int32)
    with meshes.use_mesh(layout):
        placed = meshes.place_batch(batch, mesh, rows, 32)
        messages = meshes.place_messages(0, np.full(32, -1), mesh, rows, 32)
        weights = {network.name: network.abstract_params(layout) for network in frozen}
        lowered = jit_step(train_step, abstract, layout).lower(state, placed, messages, weights)
    return lowered, (state, placed, messages, {})


def sent(lowered, kind):
    """Dtypes of what each of the collectives that the step itself asks for sends."""
    found = re.findall(rf'"stablehlo.{kind}"\(.*?\n?.*?\)[^\n]*: \(tensor<[\dx]*x?(\w+)>', lowered.as_text(), re.DOTALL)
    return found


def test_what_is_kept_lies_as_with_fsdp(config):
    """So that checkpoints are the same, and a run may go on with either."""
    states = []
    for preset in ("zero1", "fsdp"):
        config.mesh.preset = preset
        states.append(abstract_state(make_train_step(config), meshes.make_layout(config.mesh)))
    for a, b in zip(*map(jax.tree.leaves, states), strict=True):
        assert (a.shape, a.dtype, a.sharding) == (b.shape, b.dtype, b.sharding)


@pytest.mark.parametrize("preset, counts", [("zero1", (1, 4)), ("fsdp", (4,))])
def test_parameters_are_gathered_and_gradients_sent_once_however_many_parts(config, preset, counts):
    """Matrices in bf16 and their gradients in fp32, the rest in fp32; no parameter twice."""
    config.mesh.preset, config.optimizer.accumulate = preset, "step"
    state = abstract_state(make_train_step(config), meshes.make_layout(config.mesh))
    leaves = jax.tree_util.tree_leaves_with_path(state.params)
    split = [is_matrix(path) for path, leaf in leaves if not leaf.sharding.is_fully_replicated]
    for parts in counts:
        config.optimizer.accumulation = parts
        lowered, _ = program(config)
        gathered, scattered = sent(lowered, "all_gather"), sent(lowered, "reduce_scatter")
        assert sorted(gathered) == sorted("bf16" if matrix else "f32" for matrix in split)
        assert scattered == ["f32"] * len(split)
    config.optimizer.gradient_dtype = "bfloat16"
    assert sorted(sent(program(config)[0], "reduce_scatter")) == sorted("bf16" if matrix else "f32" for matrix in split)


def test_with_fsdp_every_layer_gathers_its_matrices_and_sends_their_gradients(config):
    """In bf16, in both passes, and in fp32, once; left to find this out, a partitioner sends some of them whole."""
    config.mesh.preset = "fsdp"
    leaves = jax.tree_util.tree_leaves_with_path(
        abstract_state(make_train_step(config), meshes.make_layout(config.mesh)).params
    )
    split = [path for path, leaf in leaves if not leaf.sharding.is_fully_replicated]
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path in split]
    tables = [name for name in names if name.endswith("/table")]
    layers = [name for name in names if "/layers/" in name and name.endswith("/kernel")]
    rest = [is_matrix(path) for path, name in zip(split, names, strict=True) if name not in (*tables, *layers)]
    assert len(tables) == 1 and len(layers) == 6
    lowered, _ = program(config)
    gathered = ["bf16"] * 2 * len(layers) + ["bf16" if matrix else "f32" for matrix in rest]
    assert sorted(sent(lowered, "all_gather")) == sorted([*gathered, "i32"]), "of a table, the rows that are wanted"
    assert sent(lowered, "reduce_scatter") == ["f32"] * (len(layers) + len(rest))
    assert len(sent(lowered, "all_to_all")) == 2 * len(tables)
    config.optimizer.gradient_dtype = "bfloat16"
    in_bf16 = ["bf16" if matrix else "f32" for matrix in [True] * len(layers) + rest]
    assert sorted(sent(program(config)[0], "reduce_scatter")) == sorted(in_bf16)


def test_layers_of_the_teacher_gather_their_own_matrices(config):
    """Once, as it has no backward pass; whole, a giant one would take 2.3 GB."""
    config.mesh.preset = "fsdp"
    without = sent(program(config)[0], "all_gather")
    config.loss.update(alignment_weight=0.5, alignment_layer=1, alignment_features=24)
    teacher = teacher_of(DINOv2(24, 5, 2, patch_size=14, image_patch=7, table_side=3), config)
    lowered, _ = program(config, [teacher])
    assert len(sent(lowered, "all_gather")) >= len(without) + 4, "its attention's and SwiGLU's two each, and more"
    gathers = [line for line in lowered.as_text().splitlines() if "stablehlo.all_gather" in line]
    kernels = [line for line in gathers if "xbf16>" in line]
    assert kernels and not any("tensor<5x" in line for line in kernels), "a stack of five, gathered whole"


@pytest.mark.slow
def test_a_cast_before_the_gather_changes_no_number(config):
    """Guards against rounding what a network reads in fp32: the pixels' queries, tables, norms."""
    metrics, gradients = [], []
    for preset in ("data", "zero1"):
        config.mesh.preset = preset
        lowered, arguments = program(config)
        with meshes.use_mesh(meshes.make_layout(config.mesh)):
            state, found, _ = lowered.compile()(*arguments)
        metrics.append(jax.device_get(found))
        gradients.append(jax.device_get(state.opt_state[0].mu))
    for name, value in metrics[0].items():
        if name.startswith("loss"):
            assert abs(metrics[1][name] - value) <= 2e-6 * abs(value), name
    for a, b in zip(*map(jax.tree.leaves, gradients), strict=True):
        assert relative_error(a, b) < 2e-2, "bf16 products, added up in another order"
    assert jnp.isfinite(metrics[0]["loss"])


def test_a_preset_of_ones_own_may_compute_whole(config, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def get_config():\n    return {'data': 2, 'fsdp': 4, 'compute': 'whole'}\n")
    config.mesh.preset = str(file)
    assert meshes.make_layout(config.mesh).whole
    file.write_text("def get_config():\n    return {'data': 2, 'fsdp': 4, 'compute': 'halved'}\n")
    with pytest.raises(UsageError, match="has compute='halved'; parameters compute split or whole"):
        meshes.make_layout(config.mesh)
