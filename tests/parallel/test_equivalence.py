"""Every preset computes what one device computes; the step compiles once; draws differ wherever they should."""

import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deco_jax.diffusion.flow import draw
from deco_jax.encoders.text import encoder_of
from deco_jax.parallel import mesh as meshes
from deco_jax.training import step as step_module
from deco_jax.training.start import abstract_state
from deco_jax.training.step import jit_step, make_train_step

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "benchmarks"))
import equivalence

pytestmark = pytest.mark.usefixtures("split_everything")


@pytest.fixture(scope="module")
def reference(split_everything):
    return equivalence.compute({}, jax.devices()[:1])[:2]


QUICK = ("data", "fsdp", "fsdp_tensor", "zero1", "fsdp, 2 parts", "hybrid, 2 slices")
assert set(QUICK) <= set(equivalence.CASES)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in equivalence.CASES]
)
def test_a_preset_changes_nothing(reference, name):
    *results, another_step, layout = equivalence.compute(equivalence.CASES[name], jax.devices())
    measured = equivalence.errors(reference, results)
    assert max(measured.values()) <= 1e-5, measured
    with meshes.use_mesh(layout), jax.no_tracing():
        state = another_step()  # of the same program: what came out of it goes in again as it is
    if "fsdp" in name:
        kernel = state.params["network"]["transformer"]["layers"]["block"]["mlp"]["up"]["kernel"]
        assert kernel.sharding.shard_shape(kernel.shape)[1] == kernel.shape[1] // layout.mesh.shape["fsdp"]
    for tree in (state.ema, state.opt_state[0].mu["network"], state.opt_state[0].nu["network"]):
        for a, b in zip(jax.tree.leaves(state.params["network"]), jax.tree.leaves(tree), strict=True):
            assert a.sharding.is_equivalent_to(b.sharding, a.ndim)


@pytest.mark.slow
@pytest.mark.parametrize(
    "rules",
    [
        {"width": ["data", "fsdp"], "mlp": "tensor"},
        {"width": "tensor", "mlp": ["fsdp", "data"], "heads": None, "heads_out": None},
        {"width": None, "layers": "data", "classes": "fsdp"},
    ],
)
def test_nor_do_rules_of_ones_own(reference, rules, tmp_path):
    """Every axis of matrices split, over both axes of a batch, and stacks by their layers."""
    file = tmp_path / "mine.py"
    file.write_text(f"def get_config():\n    return {{'data': 2, 'fsdp': 2, 'tensor': 2, 'rules': {rules}}}\n")
    *results, _, _ = equivalence.compute({"mesh.preset": str(file), "model.remat": "dots"}, jax.devices())
    measured = equivalence.errors(reference, results)
    assert max(measured.values()) <= 1e-5, measured


@pytest.fixture(scope="module")
def text_reference(split_everything):
    return equivalence.compute(equivalence.TEXT, jax.devices()[:1])[:2]


@pytest.mark.parametrize("name", equivalence.TEXT_CASES)
@pytest.mark.slow
def test_a_preset_changes_nothing_of_what_is_told_text(text_reference, name):
    """The network and its encoder, split by the same rules."""
    *results, _, layout = equivalence.compute(equivalence.TEXT_CASES[name], jax.devices())
    measured = equivalence.errors(text_reference, results)
    assert max(measured.values()) <= 1e-5, measured
    tables = encoder_of(equivalence.ENCODER, np.full(6, -1), "").abstract_params(layout)
    split = tables["layers"]["mlp"]["up"]["kernel"]
    assert split.sharding.shard_shape(split.shape)[1] == 16 // layout.mesh.shape["fsdp"]


def test_draws_differ_across_examples_devices_and_accumulation_steps(tiny_config, monkeypatch):
    """Guards against drawing with one key on every device, or for every part of the batch."""
    seen = []

    def spy(keys, *args):
        draws = draw(keys, *args)
        jax.debug.callback(lambda t, noise, drop: seen.append(jax.device_get((t, noise, drop))), *draws)
        return draws

    monkeypatch.setattr(step_module, "draw", spy)
    tiny_config.optimizer.accumulation = 2
    tiny_config.flow.null_probability = 0.5
    train_step, layout = make_train_step(tiny_config), meshes.make_layout(tiny_config.mesh)
    abstract, mesh = abstract_state(train_step, layout), layout.mesh
    batch = {"image": np.zeros((16, 28, 28, 3), np.uint8), "label": np.zeros(16, np.int32)}
    with meshes.use_mesh(layout):
        placed = meshes.place_batch(batch, mesh, np.arange(16), 16)
        messages = meshes.place_messages(0, np.full(16, -1), mesh, np.arange(16), 16)
        state, *_ = jit_step(train_step, abstract, layout)(equivalence.any_state(abstract), placed, messages, {})
        jax.block_until_ready(state)
        jax.effects_barrier()
    examples = {(t, n.tobytes(), bool(d)) for ts, ns, ds in seen for t, n, d in zip(ts, ns, ds, strict=True)}
    assert len(examples) == 16, "2 accumulation steps of 8 devices with an example each"
    assert len({t for t, _, _ in examples}) == len({n for _, n, _ in examples}) == 16
    assert {d for _, _, d in examples} == {False, True}
    assert jnp.isfinite(jnp.array([t for t, _, _ in examples])).all()
