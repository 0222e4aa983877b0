"""The configurations in configs/: every one builds and its train step traces, and the paper's values stand in them."""

import ast
import dataclasses
import pathlib
import runpy

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from deco_jax.config import flatten, load_config
from deco_jax.diffusion.flow import Draws
from deco_jax.encoders.teacher import default_teacher
from deco_jax.encoders.text import default_text_encoder
from deco_jax.errors import UsageError
from deco_jax.models.build import parameter_shapes
from deco_jax.parallel import mesh as meshes
from deco_jax.training.start import abstract_state
from deco_jax.training.step import make_train_step

ROOT = pathlib.Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.py"))
DECO_L = str(ROOT / "configs" / "imagenet256_deco_l.py")

ROWS = runpy.run_path(str(ROOT / "configs" / "table1.py"))["ROWS"]
ABLATIONS = {name: d for name, (d, _) in runpy.run_path(str(ROOT / "configs" / "ablations.py"))["ABLATIONS"].items()}
# "table1.py:row" and "ablations.py:name" → what differs from the L run.
COMPARED = {f"{file}.py:{k}": d for file, all in (("table1", ROWS), ("ablations", ABLATIONS)) for k, d in all.items()}
EVERY = [path.name for path in CONFIGS if path.stem not in ("table1", "ablations")] + list(COMPARED)


def first_of_each(key):
    """The names in COMPARED that differ by what `key` makes of their differences; many are one and the same run."""
    return list({key(differences): name for name, differences in reversed(COMPARED.items())}.values())[::-1]


def the_program(differences):
    """What changes a program; other values of a weight or a quality only change numbers in it."""
    sizes = {field: value for field, value in differences.items() if not field.startswith("loss.")}
    off = {field for field, value in differences.items() if value == 0}
    return str(sorted(sizes.items())), str(sorted(off))


def the_run(differences):
    return str(sorted(differences.items()))


def load(name, overrides=()):
    return load_config(str(ROOT / "configs" / name), overrides)


@pytest.mark.parametrize("name", [name for name in EVERY if ":" not in name] + first_of_each(the_program))
def test_shipped_config_traces_its_train_step(name):
    """Full size, abstractly, on a mesh of eight with parameters split: shapes of the new state equal the old's."""
    config = load(name, ["--config.mesh.fsdp=4"])
    live = ":" not in name and config.loss.alignment_weight  # the others with stored features
    layout, frozen = meshes.make_layout(config.mesh), [default_teacher(config)] if live else []
    frozen += [default_text_encoder(config)] if config.model.kind == "deco_text" else []
    train_step = make_train_step(config, frozen)
    state, frozen_params = abstract_state(train_step, layout), {f.name: f.abstract_params(layout) for f in frozen}
    b, size = config.data.batch_size, config.data.image_size
    sharding = meshes.batch_sharding(layout.mesh)
    shapes = {"image": ((size, size, 3), jnp.uint8)}
    shapes |= {name: (field.shape, field.dtype) for name, field in train_step.network.condition.fields.items()}
    batch = {k: jax.ShapeDtypeStruct((b, *shape), dtype, sharding=sharding) for k, (shape, dtype) in shapes.items()}
    tokens = (size // config.model.patch_size) ** 2
    if config.loss.alignment_weight and not live:
        batch["features"] = jax.ShapeDtypeStruct((b, tokens, 768), jnp.float16, sharding=sharding)
    with meshes.use_mesh(layout):
        after, metrics = jax.eval_shape(jax.jit(train_step), state, batch, frozen_params)
    chex.assert_trees_all_equal_shapes_and_dtypes(after, state)
    weights = {"loss_frequency": config.loss.frequency_weight, "loss_alignment": config.loss.alignment_weight}
    assert {"loss", "loss_flow", "gradient_norm"} <= metrics.keys()
    assert all((term in metrics) == bool(weight) for term, weight in weights.items())
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves((state.params, state.ema)))


def test_the_three_stages_of_text_to_image():
    """The paper's, section 6 of what the published system computes; one network of 1,133,759,395 parameters."""
    runs = [load(f"t2i_{stage}.py") for stage in ("pretrain256", "pretrain512", "sft512")]
    found = [
        (
            run.data.image_size,
            run.data.batch_size,
            run.optimizer.lr,
            (run.optimizer.beta1, run.optimizer.beta2),
            run.flow.time_shift,
            run.train.steps,
            bool(run.train.init_from),
        )
        for run in runs
    ]
    assert found == [
        (256, 1536, 2e-4, (0.9, 0.95), 2.0, 200_000, False),
        (512, 512, 1e-4, (0.9, 0.95), 4.0, 100_000, True),
        (512, 512, 1e-5, (0.9, 0.999), 4.0, 40_000, True),
    ]
    for run in runs:
        assert (run.optimizer.clip_norm, run.flow.null_probability, run.loss.alignment_layer) == (1.0, 0.1, 6)
        assert (run.sample.solver, run.sample.steps, run.sample.guidance, run.sample.shift) == ("adams2", 25, 4.0, 3.0)
        shapes = parameter_shapes(make_train_step(run).network)
        assert sum(x.size for x in jax.tree.leaves(shapes)) == 1_133_759_395


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_shipped_config_says_how_to_run_it(path):
    text = ast.get_docstring(ast.parse(path.read_text()))
    argument = {"table1": ":ROW", "ablations": ":NAME"}.get(path.stem, "")
    assert f"deco train --config configs/{path.name}{argument} --workdir" in text


@pytest.mark.parametrize("name", COMPARED)
def test_a_compared_run_is_the_l_run_but_for_what_its_table_says(name):
    """It loads, so it is checked and builds; and not a field more or less is another than in the L run."""
    ours, theirs = flatten(load(name)), flatten(load_config(DECO_L))
    assert {field: value for field, value in ours.items() if value != theirs[field]} == COMPARED[name]


@pytest.mark.parametrize(
    "row, parameters",
    [
        ("baseline", 459_171_584),
        ("baseline_image", 459_171_584),
        ("pixnerd", 452_113_795),
        ("deco_without_alignment", 426_938_019),
        ("deco_without_frequency", 426_938_019),
        ("deco", 426_938_019),
    ],
)
def test_parameters_of_table_1(row, parameters):
    network = make_train_step(load(f"table1.py:{row}")).network
    assert sum(x.size for x in jax.tree.leaves(parameter_shapes(network))) == parameters


def test_the_ablations_are_the_papers():
    """Table 4: which values there are of what, each with the figure that the paper has for it."""
    families = {}
    for name, (differences, fid) in runpy.run_path(str(ROOT / "configs" / "ablations.py"))["ABLATIONS"].items():
        field = {
            "decoder_width": "model.decoder_width",
            "decoder_depth": "model.decoder_depth",
            "decoder_patch": "model.decoder_patch",
            "interaction": "model.decoder_interaction",
            "frequency_weight": "loss.frequency_weight",
            "frequency_quality": "loss.frequency_quality",
            "alignment": "loss.alignment_weight",
        }
        family = next(f for f in field if name.startswith(f))
        value = flatten(load(f"ablations.py:{name}"))[field[family]]
        families.setdefault(family, {})[value] = fid
        chosen_without = family in ("decoder_width", "decoder_depth")
        assert (differences.get("loss.frequency_weight") == 0) == (chosen_without or name == "frequency_weight_0")
    assert families == {
        "decoder_width": {16: 37.63, 32: 34.12, 64: 35.88},
        "decoder_depth": {1: 37.10, 3: 34.12, 6: 35.46},
        "decoder_patch": {1: 31.35, 4: 34.39, 16: 55.59},
        "interaction": {"adaln": 31.35, "add": 36.02},
        "frequency_weight": {0: 34.12, 0.5: 33.54, 1: 31.35, 2: 32.97},
        "frequency_quality": {50: 31.54, 85: 31.35, 100: 33.84},
        "alignment": {0.5: 31.35, 0: 67.55},
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", first_of_each(the_program))
def test_a_compared_run_trains_a_step(name):
    """Small, but for what it is about: the loss is finite and every parameter of the network moves."""
    config = load(name)
    config.model.update(num_classes=10, width=16, depth=1, heads=2, decoder_width=8, decoder_depth=1, dtype="float32")
    config.update_from_flattened_dict({k: v for k, v in COMPARED[name].items() if k != "model.depth"})
    config.model.remat = "none"
    config.data.image_size, config.data.batch_size = 32, 2
    config.loss.update(alignment_layer=1, alignment_features=8)
    step, rng = make_train_step(config), np.random.default_rng(0)
    state = jax.eval_shape(lambda: nn.meta.unbox(step.initial_state()))
    params = jax.tree.map(lambda p: rng.normal(0, 0.2, p.shape).astype(np.float32), state.params)
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), state)
    batch = {
        "image": rng.integers(0, 256, (2, 32, 32, 3), np.uint8),
        "label": np.array([3, 7], np.int32),
        "features": rng.normal(size=(2, 4, 8)).astype(np.float16),
    }
    after, metrics = jax.jit(step)(zeros.replace(params=params, ema=params["network"]), batch)
    assert np.isfinite(metrics["loss"]) and int(metrics["skipped"]) == 0
    still = [
        jax.tree_util.keystr(path)
        for path, (old, new) in jax.tree_util.tree_leaves_with_path(
            jax.tree.map(lambda a, b: (a, b), params["network"], after.params["network"]), is_leaf=_is_pair
        )
        if not np.any(old != new)
    ]
    assert not still, f"no gradient reached {still}"


def test_runs_that_differ_in_a_number_of_the_loss_differ_in_their_loss():
    """What the step above leaves out; of a network that predicts nothing, with the same draws."""
    rng = np.random.default_rng(0)
    images, noise = (rng.normal(size=(2, 16, 16, 3)).astype(np.float32) for _ in range(2))
    draws = Draws(np.array([0.3, 0.6], np.float32), noise, np.zeros(2, bool))
    losses = {}
    for name in first_of_each(the_run):
        objective = make_train_step(load(name)).objective
        objective = dataclasses.replace(objective, alignment_weight=0.0, prediction="velocity")
        key = tuple(COMPARED[name].get(f"loss.frequency_{field}") for field in ("weight", "quality"))
        losses[key], _ = objective(lambda x, t, labels: 0 * x, None, images, np.zeros(2, np.int32), draws, None)
    assert len(losses) == len(set(map(float, losses.values()))) == 6 and np.isfinite(list(losses.values())).all()
    weights = [float(losses[weight, None]) for weight in (0.0, 0.5, None, 2.0)]
    np.testing.assert_allclose(np.diff(weights), np.array([0.5, 0.5, 1]) * (weights[2] - weights[0]), rtol=1e-4)


def _is_pair(x):
    return isinstance(x, tuple)


def test_paper_values():
    """docs/model.md, section 6."""
    for name, p_null, size, accumulation, steps in [
        ("imagenet256_deco_l", 0.1, 256, 1, 200_000),
        ("imagenet256_deco_xl", 0.2, 256, 1, 4_000_000),
        ("imagenet512_deco_xl", 0.2, 512, 2, 100_000),
    ]:
        c = load_config(str(ROOT / "configs" / f"{name}.py"))
        assert (c.flow.null_probability, c.data.image_size, c.optimizer.accumulation) == (p_null, size, accumulation)
        assert (c.train.steps, c.data.batch_size, c.ema.decay) == (steps, 256, 0.9999)
        o = c.optimizer
        assert (o.lr, o.beta1, o.beta2, o.weight_decay, o.eps, o.clip_norm) == (1e-4, 0.9, 0.999, 0, 1e-8, 0)
        assert (c.flow.time_distribution, c.flow.time_shift) == ("lognorm", 1)
        assert (c.loss.frequency_weight, c.loss.frequency_quality, c.loss.frequency_gamma) == (1, 85, 1)
        assert (c.loss.alignment_weight, c.loss.alignment_layer, c.loss.alignment_features) == (0.5, 8, 768)
        assert tuple(c.sample.guidance_interval) == ((0.0, 1.0) if size == 512 or p_null == 0.1 else (0.1, 1.0))
        guidance = {"imagenet256_deco_l": 1.0, "imagenet256_deco_xl": 3.0, "imagenet512_deco_xl": 5.0}[name]
        assert (c.sample.guidance, c.sample.steps) == (guidance, 50 if p_null == 0.1 else 100)


@pytest.mark.parametrize("name", ["table1.py:baseline_x", "table1.py", "ablations.py:decoder_width_8", "ablations.py"])
def test_unknown_rows_and_ablations_are_named_with_all_there_are(name):
    with pytest.raises(UsageError) as error:
        load(name)
    file, _, given = name.partition(":")
    known = ROWS if file == "table1.py" else ABLATIONS
    assert str(error.value).startswith(f"{ROOT / 'configs' / name}: {given!r} is no ")
    assert str(error.value).endswith(f"after the file and a colon stands one of: {', '.join(known)}.")
