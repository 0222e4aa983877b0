"""Configurations: every shipped file builds and its train step traces; mistakes are named before anything runs."""

import ast
import pathlib

import chex
import jax
import jax.numpy as jnp
import pytest

from deco_jax.config import check_config, default_config, flatten, load_config
from deco_jax.errors import UsageError
from deco_jax.parallel import mesh as meshes
from deco_jax.training.start import abstract_state
from deco_jax.training.step import make_trainer

ROOT = pathlib.Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.py"))
QUICKSTART = str(ROOT / "configs" / "quickstart.py")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_shipped_config_traces_its_train_step(path):
    """Full size, abstractly, on a mesh of eight with parameters split: shapes of the new state equal the old's."""
    config = load_config(str(path), ["--config.mesh.fsdp=4"])
    mesh, trainer = meshes.make_mesh(config.mesh), make_trainer(config)
    state = abstract_state(trainer, mesh)
    b, size = config.data.batch_size, config.data.image_size
    sharding = meshes.batch_sharding(mesh)
    batch = {
        "image": jax.ShapeDtypeStruct((b, size, size, 3), jnp.uint8, sharding=sharding),
        "label": jax.ShapeDtypeStruct((b,), jnp.int32, sharding=sharding),
    }
    with meshes.use_mesh(mesh):
        after, metrics = jax.eval_shape(jax.jit(trainer.step), state, batch)
    chex.assert_trees_all_equal_shapes_and_dtypes(after, state)
    assert {"loss", "loss_flow", "loss_frequency", "gradient_norm"} <= metrics.keys()
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves((state.params, state.ema)))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_shipped_config_says_how_to_run_it(path):
    text = ast.get_docstring(ast.parse(path.read_text()))
    assert f"deco train --config configs/{path.name} --workdir" in text


def test_paper_values():
    """SPEC section 6."""
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


def test_every_field_has_a_comment():
    source = (ROOT / "deco_jax" / "config.py").read_text()
    body = source[source.index("c = ConfigDict()") : source.index("return c.lock()")]
    settings = [line for line in body.splitlines() if "=" in line and "ConfigDict()" not in line]
    assert len(settings) == len(flatten(default_config()))
    assert [line for line in settings if "  # " not in line] == []


def test_overrides_are_typed():
    c = load_config(
        QUICKSTART,
        ["--config.optimizer.lr=1", "--config.sample.guidance_interval=(0.1, 0.9)", "--config.model.scan=false"],
    )
    assert (c.optimizer.lr, c.sample.guidance_interval, c.model.scan) == (1.0, (0.1, 0.9), False)


@pytest.mark.parametrize(
    "override, message",
    [
        ("--config.optimizer.lrr=1", "--config.optimizer.lrr does not exist; nearest: --config.optimizer.lr"),
        ("--config.optimiser.lr=1", "nearest: --config.optimizer.lr"),
        ("--config.model.width=wide", "--config.model.width=wide is not of type int; its value now is 128"),
        ("--config.model.width=1.5", "--config.model.width=1.5 is not of type int"),
        ("--config.model.scan=perhaps", "--config.model.scan=perhaps is not of type bool"),
        ("--config.model=1", "--config.model does not exist"),
        ("--lr=1", "--lr=1 is not understood"),
        ("--config.optimizer.lr", "is not understood"),
        (
            "--config.data.image_size=30",
            "data.image_size=30 is not divisible by model.patch_size=4; nearest: 28 and 32",
        ),
        ("--config.data.source=imagenet", "data.source='imagenet' is not known; allowed: digits, folder, tfds"),
        ("--config.loss.frequency_quality=101", "loss.frequency_quality=101 must be from 1 to 100"),
        ("--config.flow.null_probability=2", "flow.null_probability=2.0 must be from 0 to 1"),
        ("--config.flow.time_shift=0", "flow.time_shift=0.0 must be positive"),
        ("--config.optimizer.accumulation=3", "data.batch_size=32 is not divisible by optimizer.accumulation=3"),
        ("--config.sample.solver=magic", "solver='magic' is not known"),
        ("--config.sample.guidance_interval=(1,)", "guidance_interval="),
        ("--config.train.log_every=0", "train.log_every=0 must be 1 or more"),
    ],
)
def test_bad_overrides_are_named(override, message):
    with pytest.raises(UsageError) as error:
        load_config(QUICKSTART, [override])
    assert message in str(error.value)


def test_bad_files_are_named(tmp_path):
    with pytest.raises(UsageError, match="nowhere.py is no file"):
        load_config("nowhere.py")
    file = tmp_path / "mine.py"
    head = "from deco_jax.config import default_config\ndef get_config():\n    c = default_config()\n"
    file.write_text(head + "    c.model.widht = 3\n    return c\n")
    with pytest.raises(UsageError, match='mine.py: Did you mean "width" instead of "widht"'):
        load_config(str(file))
    file.write_text(head + "    c.model.width = 3.5\n    return c\n")
    with pytest.raises(UsageError, match="mine.py: Could not override field 'width'"):
        load_config(str(file))


def test_alignment_needs_a_block_that_exists():
    c = default_config()
    c.loss.update(alignment_weight=0.5, alignment_layer=23)
    with pytest.raises(UsageError, match="loss.alignment_layer=23 does not exist; model.depth=22"):
        check_config(c)
