"""Runs that learn from captions: the encoder in the step, resuming, the three stages, and what does not fit."""

import contextlib
import json

import jax
import numpy as np
import pytest
from PIL import Image

import deco_jax
from deco_jax.data import pipeline
from deco_jax.errors import UsageError
from deco_jax.parallel import mesh as meshes
from deco_jax.preparation.text import prepare_text
from deco_jax.training import start
from deco_jax.training.loop import train
from tests.encoders.test_text import write_encoder
from tests.helpers import relative_error
from tests.training.test_loop import assert_same, final_state, logged
from tests.training.test_step import shaken

pytest.importorskip("tokenizers")
COLOURS = {"red": (220, 30, 30), "blue": (30, 30, 220)}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Captioned squares and the recorded Qwen3; no test changes them."""
    root = tmp_path_factory.mktemp("made")
    (root / "images").mkdir()
    for i in range(12):
        name = list(COLOURS)[i % 2]
        Image.new("RGB", (20 + i, 24), COLOURS[name]).save(root / "images" / f"{i:02}.png")
        (root / "images" / f"{i:02}.txt").write_text(f"a {name} circle\n")
    write_encoder(root / "qwen")
    return root


@pytest.fixture
def config(made, tiny_config):
    c = tiny_config
    c.model.update(kind="deco_text", patch_size=8, text_tokens=12, text_features=32, text_depth=1)
    c.data.update(source="captions", path=str(made / "images"), image_size=16, batch_size=8)
    c.text.encoder = str(made / "qwen")
    c.flow.null_probability = 0.3
    c.sample.update(num=24, prompts=("a red circle", "a blue circle"), guidance=2.0, solver="adams2", shift=3.0)
    c.train.update(log_every=1, save_every=2, sample_every=4, steps=4)
    return c


@pytest.mark.slow
def test_a_run_that_is_resumed_is_the_same(config, tmp_path, capsys):
    """Four steps straight, and two, then two in a new run with workers: bitwise; grids are there."""
    train(config, str(tmp_path / "straight"))
    printed = capsys.readouterr().out
    assert "Images: 12 with captions" in printed and "text encoded by" in printed
    (grid,) = (tmp_path / "straight" / "samples").glob("*.png")
    with Image.open(grid) as image:
        assert image.width > image.height > 16, "a row for each prompt, and the first again if there are more"
    config.train.steps = 2
    train(config, str(tmp_path / "resumed"))
    config.train.steps, config.data.workers = 4, 1
    train(config, str(tmp_path / "resumed"))
    assert_same(final_state(tmp_path / "straight"), final_state(tmp_path / "resumed"))
    losses = [line["loss"] for line in logged(tmp_path / "straight")]
    assert [line["loss"] for line in logged(tmp_path / "resumed")] == losses and np.isfinite(losses).all()
    model, _ = deco_jax.load_pretrained(str(tmp_path / "straight"))
    assert model.condition.tokens == 12


@pytest.mark.slow
def test_the_three_stages_follow_each_other(config, tmp_path, capsys):
    """256², 512², fine-tuning in small: weights and their average are taken over, the optimiser begins anew."""
    train(config, str(tmp_path / "0"))
    config.data.image_size, config.flow.time_shift = 32, 4.0
    config.optimizer.lr, config.ema.decay = 0.0, 1.0  # so that what is saved is what was taken over
    config.train.steps = 2
    for stage in (1, 2):
        config.train.init_from = str(tmp_path / f"{stage - 1}")
        config.optimizer.beta2 = 0.9 + 0.09 * stage
        train(config, str(tmp_path / f"{stage}"))
        assert f"starts from {config.train.init_from}" in capsys.readouterr().out
        (_, before), (step, after) = final_state(tmp_path / f"{stage - 1}"), final_state(tmp_path / f"{stage}")
        taken = [name for name in before if name.startswith(("['ema']", "['params']['network']"))]
        assert len(taken) > 40 and step == 2
        for name in taken:
            np.testing.assert_array_equal(after[name], before[name], err_msg=name)
        counts = [int(after[name]) for name in after if "count" in name]
        assert counts and set(counts) == {2}, "the optimiser begins anew"


@pytest.mark.parametrize("process, listed", [(0, True), (1, False)])
def test_one_process_lists_shards_before_the_others(config, tmp_path, monkeypatch, process, listed):
    """In a bucket it reads them all."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: process)
    config.data.update(source="webdataset", path="/nowhere")
    with pytest.raises(UsageError, match="does not exist") if listed else contextlib.nullcontext():
        start.list_data(config, tmp_path)


@pytest.mark.slow
def test_another_encoder_is_another_run(config, made, tmp_path):
    config.train.update(steps=2, sample_every=0)
    train(config, str(tmp_path / "run"))
    words = ["red", "a", "blue", "circle", "<|endoftext|>", "[UNK]"]
    config.text.encoder = write_encoder(tmp_path / "other", words=words)
    config.train.steps = 4
    with pytest.raises(UsageError, match=r"text: weights .* there, .* here"):
        train(config, str(tmp_path / "run"))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"text.encoder": "/nowhere"}, "text.encoder='/nowhere' is no file or folder"),
        ({"model.text_features": 48}, "has states of 32 channels, and model.text_features=48; they must be equal"),
        (
            {"data.source": "digits", "data.image_size": 32},
            "learns from captions, and the images of data.source have classes; sources of captions are webdataset",
        ),
        ({"model.kind": "deco"}, "learns from class labels, and the images of data.source have captions"),
        ({"train.evaluate_every": 1, "evaluate.reference": "x.npz"}, "train.evaluate_every must be 0"),
    ],
)
def test_what_does_not_fit(config, tmp_path, change, message):
    for field, value in change.items():
        part, name = field.split(".")
        config[part][name] = value
    with pytest.raises(UsageError, match=message):
        train(config, str(tmp_path / "run"))


@pytest.mark.slow
def test_prompts_decide_after_a_little_training(config, tmp_path):
    """Not that it is good: that what is learnt depends on the caption, and guidance on the empty prompt."""
    config.train.update(steps=30, log_every=10, save_every=100, sample_every=0)
    config.optimizer.lr = 3e-3
    train(config, str(tmp_path / "run"))
    lines = logged(tmp_path / "run")
    assert lines[-1]["loss"] < lines[0]["loss"]
    model, params = deco_jax.load_pretrained(str(tmp_path / "run"), weights="online")
    encoder = deco_jax.load_text_encoder(config.text.encoder, tokens=12, dtype="float32")
    settings = {"image_size": 16, "steps": 4, "solver": "adams2", "guidance": 1.0}
    key, prompts = jax.random.key(0), {name: [f"a {name} circle"] * 8 for name in COLOURS}
    red, blue = (
        np.asarray(deco_jax.sample(model, params, prompts[name], key, encoder=encoder, **settings)).mean((0, 1, 2))
        for name in COLOURS
    )
    assert red[0] - red[2] > blue[0] - blue[2], json.dumps([red.tolist(), blue.tolist()])


# --- stored states


@pytest.fixture
def stored(config, tmp_path):
    """Where the states of all captions lie."""
    prepare_text(config, str(tmp_path / "states"), batch_size=5)
    return str(tmp_path / "states")


def loss_and_gradient(config, folder, turned=0):
    """Of the first batch, of a network that listens; `turned`: each example gets the caption of so many before it.

    The gradient is that of the matrix through which all text goes.
    """
    parts = start.open_parts(config, folder)
    frozen = {weights.network.name: weights.place(parts.layout) for weights in parts.frozen}
    batch = next(pipeline.batches(config.data, 0, parts.source, 0, None, None, parts.tokenizer, parts.states))
    del batch["bad"]
    name = "tokens" if parts.states is None else "text"
    batch[name] = np.roll(batch[name], turned, axis=0)
    with meshes.use_mesh(parts.layout):
        found, losses = jax.jit(parts.train_step.gradients)(shaken(parts.train_step), batch, frozen)
    return float(losses["loss"]), np.asarray(found["network"]["text_embedding"]["in"]["kernel"])


@pytest.mark.slow
def test_stored_states_teach_what_the_encoder_does(config, stored, tmp_path):
    """In fp32 they differ by bfloat16's last bit, which is little beside what another caption changes."""
    config.flow.null_probability = 0.5  # dropped examples have the stored state of the empty prompt
    live, gradient = loss_and_gradient(config, tmp_path)
    config.text.stored = stored
    loss, other = loss_and_gradient(config, tmp_path)
    _, of_others = loss_and_gradient(config, tmp_path, turned=1)
    assert relative_error(of_others, gradient) > 0.02, "captions would not matter"
    assert abs(loss - live) < 1e-5 * live
    assert relative_error(other, gradient) < 2**-8


@pytest.mark.slow
def test_a_run_may_change_to_stored_states(config, stored, tmp_path, capsys):
    """Their hash is the encoder's. The grid shows the same prompts; what is trained is nearly the same."""
    config.train.update(steps=2, save_every=1)
    train(config, str(tmp_path / "live"))
    for config.train.steps, config.text.stored in ((1, ""), (2, stored)):
        train(config, str(tmp_path / "changed"))
    assert f"Changed since the checkpoint: text.stored:  there, {stored} here" in capsys.readouterr().out
    losses = [[line["loss"] for line in logged(tmp_path / name)] for name in ("live", "changed")]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
    grids = [next((tmp_path / name / "samples").glob("*2.png")) for name in ("live", "changed")]
    live, changed = (np.asarray(Image.open(grid)).astype(int) for grid in grids)
    assert np.abs(changed - live).max() <= 1


@pytest.mark.slow
def test_with_stored_states_the_encoder_is_for_grids_alone(config, stored, tmp_path, capsys):
    """Without grids it need not be there; with workers and a second start the run is the same to the bit."""
    config.text.update(stored=stored, encoder="/nowhere")
    with pytest.raises(UsageError, match="is no file or folder.*Grids of samples need it.*train.sample_every=0"):
        train(config, str(tmp_path / "refused"))
    config.train.sample_every = 0
    train(config, str(tmp_path / "straight"))
    assert f"told the states in {stored} (384 parameters)" in capsys.readouterr().out
    config.train.steps = 2
    train(config, str(tmp_path / "resumed"))
    config.train.steps, config.data.workers = 4, 1
    train(config, str(tmp_path / "resumed"))
    assert_same(final_state(tmp_path / "straight"), final_state(tmp_path / "resumed"))


def test_stored_states_that_do_not_fit(config, stored, tmp_path):
    config.text.stored = stored
    other = config.copy_and_resolve_references()
    other.text.encoder = write_encoder(tmp_path / "other", words=["red", "a", "blue", "circle", "<|endoftext|>"])
    with pytest.raises(UsageError, match=r"of another encoder than text.encoder=.*other with .*: \S+ there, \S+ here"):
        train(other, str(tmp_path / "run"))
    classes = config.copy_and_resolve_references()
    classes.model.kind, classes.data.source = "deco", "digits"
    classes.data.image_size = 32
    with pytest.raises(UsageError, match="is of captions, and model.kind='deco' learns from class labels"):
        train(classes, str(tmp_path / "run"))
