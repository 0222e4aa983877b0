"""Whole runs, in this process: resuming, what they leave behind, diverging losses, bad records, mistakes."""

import itertools
import json
import math
import re
import sys
import threading

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

import deco_jax
from deco_jax.checkpoints import store
from deco_jax.config import restore_config
from deco_jax.data import pipeline
from deco_jax.errors import TransientError, UsageError
from deco_jax.parallel import mesh as meshes
from deco_jax.preparation.images import prepare_images
from deco_jax.preparation.teacher import prepare_teacher
from deco_jax.training.loop import train
from deco_jax.training.start import abstract_state, find_weights, first_state
from deco_jax.training.step import make_train_step
from tests.helpers import new_tiny_config, random_dinov2


def final_state(workdir):
    """Everything in the newest checkpoint, read without our own code path: Orbax into numpy."""
    import orbax.checkpoint as ocp

    folder, step = store.find_checkpoint(str(workdir))
    with ocp.PyTreeCheckpointer() as reader:
        tree = reader.restore(folder / str(step) / "state", args=ocp.args.PyTreeRestore())
    return step, {jax.tree_util.keystr(k): np.asarray(v) for k, v in jax.tree_util.tree_leaves_with_path(tree)}


def assert_same(a, b):
    assert a[0] == b[0] and a[1].keys() == b[1].keys()
    for name in a[1]:
        np.testing.assert_array_equal(a[1][name], b[1][name], err_msg=name)


def logged(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A workdir with six steps run without interruption; no test changes it."""
    workdir, config = tmp_path_factory.mktemp("straight"), new_tiny_config()
    config.train.update(log_every=1, save_every=3, sample_every=3, profile_at=1)
    train(config, str(workdir))
    return workdir


def test_resuming_is_exact(tiny_config, straight, tmp_path):
    """6 steps straight, and 3, then 3 in a new run: bitwise equal parameters, EMA, optimiser and losses."""
    tiny_config.train.update(log_every=1, save_every=3, steps=3)
    train(tiny_config, str(tmp_path))
    tiny_config.train.steps = 6
    tiny_config.data.workers = 2  # the order of the data does not depend on it
    train(tiny_config, str(tmp_path))
    assert_same(final_state(tmp_path), final_state(straight))
    assert [line["step"] for line in logged(straight)] == [1, 2, 3, 4, 5, 6]
    assert [line["loss"] for line in logged(tmp_path)] == [line["loss"] for line in logged(straight)]


def test_a_run_goes_on_from_prepared_images(tiny_config, straight, tmp_path, capsys):
    """Begun on the source, finished on what was prepared of it in the meantime: not a bit is different."""
    tiny_config.train.update(log_every=1, save_every=3, steps=3)
    train(tiny_config, str(tmp_path / "run"))
    prepare_images(tiny_config, str(tmp_path / "images"), 500)
    tiny_config.train.steps = 6
    tiny_config.data.update(source="prepared", path=str(tmp_path / "images"))
    train(tiny_config, str(tmp_path / "run"))
    assert "Changed since the checkpoint: data.source: digits there, prepared here." in capsys.readouterr().out
    assert_same(final_state(tmp_path / "run"), final_state(straight))
    assert [line["loss"] for line in logged(tmp_path / "run")] == [line["loss"] for line in logged(straight)]


def test_data_that_stop_coming_lose_nothing(tiny_config, straight, tmp_path, monkeypatch):
    """What was trained is saved although no save was due, and the next run trains on the same images."""
    read = pipeline.batches

    def failing(*args):
        yield from itertools.islice(read(*args), 4)
        raise ConnectionResetError("the server is gone")

    tiny_config.train.update(log_every=1, save_every=100)
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "batches", failing)
        with pytest.raises(TransientError, match="the data do not come: the server is gone"):
            train(tiny_config, str(tmp_path))
    assert final_state(tmp_path)[0] == 4 and len(logged(tmp_path)) == 4
    train(tiny_config, str(tmp_path))
    assert_same(final_state(tmp_path), final_state(straight))
    assert [line["loss"] for line in logged(tmp_path)] == [line["loss"] for line in logged(straight)]


@pytest.mark.slow
def test_a_run_saves_after_minutes_too(tiny_config, straight, tmp_path):
    """Said with one step and read with the next, as with several processes; 0 is never."""
    for minutes, saved in ((1e-9, [1, 3, 5, 6]), (0.0, [6])):
        tiny_config.train.update(log_every=1, save_every=100, save_minutes=minutes)
        train(tiny_config, str(tmp_path / str(minutes)))
        steps = sorted(int(path.name) for path in (tmp_path / str(minutes) / "checkpoints").iterdir())
        assert steps == saved, f"{minutes} minutes"
        assert_same(final_state(tmp_path / str(minutes)), final_state(straight))


def test_a_run_says_what_it_trains_on_and_what_it_has_saved(tiny_config, tmp_path, capsys):
    tiny_config.train.steps = 2
    train(tiny_config, str(tmp_path))
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "Images: 5,000 in 10 classes: 0 0, 1 1, 2 2, …, 9 9."
    folder = tmp_path / "checkpoints" / "2"
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and path.name != "checksums.0.json")
    saved = re.compile(rf"Saved: {folder} \({size / 1e6:.1f} MB, \d+\.\d s\)\.")
    assert any(map(saved.fullmatch, said)), (size, said)
    assert store.read_meta(*store.find_checkpoint(str(tmp_path)))["class_names"] == list("0123456789")


@pytest.mark.slow
def test_a_longer_run_goes_on_if_no_rate_that_was_changes_or_if_told_so(tiny_config, tmp_path, capsys):
    tiny_config.train.update(steps=3, save_every=2)
    tiny_config.optimizer.decay_steps = 2
    train(tiny_config, str(tmp_path))
    tiny_config.train.steps = 6
    with pytest.raises(UsageError, match=r"train.steps=6 .*: step 3 had 0.0005, not 0.001, since train.steps was 3\."):
        train(tiny_config, str(tmp_path))
    tiny_config.train.reschedule = True
    train(tiny_config, str(tmp_path))
    assert "Changed since the checkpoint: learning rate of step 3: 0.0005 there, 0.001 here." in capsys.readouterr().out
    assert [line["learning_rate"] for line in logged(tmp_path)][-2:] == pytest.approx([0.001, 0.0005])


def test_a_run_whose_folder_another_has_taken_over_ends_without_saving(tiny_config, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules["deco_jax.storage.lease"], "RENEW", 0.1)
    tiny_config.train.update(steps=10**6, save_every=10**6)

    ended = threading.Event()

    def take_over():
        while not ended.wait(0.1):  # until it is noticed: a renewal that is just under way puts the claim back
            if (tmp_path / "metrics.jsonl").exists():
                for claim in (tmp_path / ".lease").glob("*.json"):
                    claim.unlink(missing_ok=True)

    thread = threading.Thread(target=take_over)
    thread.start()
    with pytest.raises(TransientError, match=f"--workdir={tmp_path}: another run has taken {tmp_path} over"):
        train(tiny_config, str(tmp_path))
    ended.set()
    thread.join()
    assert not list((tmp_path / "checkpoints").iterdir())


def test_a_picture_that_cannot_be_written_ends_no_run(tiny_config, tmp_path, caplog):
    (tmp_path / "samples").write_text("no folder")
    tiny_config.train.update(steps=2, sample_every=1)
    train(tiny_config, str(tmp_path))
    assert final_state(tmp_path)[0] == 2
    assert "samples cannot be written (FileExistsError: " in caplog.text


def test_what_a_run_leaves_behind(straight):
    second = logged(straight)[1]  # the first step is the compiler's, its time is not logged
    names = {"loss", "loss_flow", "loss_frequency", "gradient_norm", "learning_rate", "images_per_second"}
    assert names | {"step_seconds", "data_wait_seconds", "skipped"} <= second.keys()
    assert all(math.isfinite(value) for value in second.values())
    assert list((straight / "tensorboard").glob("events.out.tfevents.*"))
    assert list((straight / "profile" / "process_0").rglob("*.xplane.pb"))
    grids = sorted(p.name for p in (straight / "samples").iterdir())
    assert grids == ["step_00000003.png", "step_00000006.png"]
    assert Image.open(straight / "samples" / grids[0]).size == (8 * 28 + 7, 28)


def test_a_finished_run_changes_nothing(tiny_config, straight):
    before = {p: p.stat().st_mtime_ns for p in straight.rglob("*") if p.is_file()}
    train(tiny_config, str(straight))
    assert before == {p: p.stat().st_mtime_ns for p in straight.rglob("*") if p.is_file()}


def test_another_run_does_not_resume(tiny_config, straight):
    """All fields that make it another run are listed, and nothing is touched."""
    tiny_config.train.steps = 9
    tiny_config.optimizer.lr = 5e-4
    tiny_config.data.batch_size = 32
    tiny_config.seed = 1
    with pytest.raises(UsageError) as error:
        train(tiny_config, str(straight))
    assert "configuration: data.batch_size: 16 there, 32 here; seed: 0 there, 1 here. Restore" in str(error.value)
    assert store.find_checkpoint(str(straight))[1] == 6


def test_a_run_keeps_how_it_decodes_images(tiny_config, tmp_path, capsys):
    """Pixels do not change in the middle of a run: neither by another setting nor by a version's other default."""
    tiny_config.train.update(steps=1)
    tiny_config.data.update(orient=False, background="")
    train(tiny_config, str(tmp_path))
    tiny_config.train.update(steps=2)
    tiny_config.data.update(orient=True, background="white")
    train(tiny_config, str(tmp_path))
    assert "data.orient stays False, as this run began; True is for new runs." in capsys.readouterr().out
    assert tiny_config.data.orient, "it is the caller's"
    saved = restore_config(store.newest_meta(tmp_path))
    assert (saved.train.steps, saved.data.orient, saved.data.background) == (2, False, "")


def test_both_sets_of_weights_load(straight):
    """From the workdir and from one checkpoint in it."""
    model, ema = deco_jax.load_pretrained(str(straight))
    _, online = deco_jax.load_pretrained(str(straight / "checkpoints" / "6"), weights="online")
    state = final_state(straight)[1]
    for name, params in (("ema", ema), ("params']['network", online)):
        for path, value in jax.tree_util.tree_leaves_with_path(params):
            np.testing.assert_array_equal(value, state[f"['{name}']{jax.tree_util.keystr(path)}"])
    assert any(np.any(a != b) for a, b in zip(*map(jax.tree.leaves, (ema, online)), strict=True))
    images = deco_jax.sample(model, ema, [0, "null"], jax.random.key(0), image_size=28, steps=1)
    assert images.shape == (2, 28, 28, 3)


def test_a_new_run_starts_from_given_weights(tiny_config, straight, tmp_path):
    """Online weights and EMA, with a fresh optimiser; but only of the same network."""
    tiny_config.train.update(init_from=str(straight), steps=1)
    tiny_config.model.decoder_depth = 2
    with pytest.raises(UsageError, match="holds another network: model.decoder_depth: 1 there, 2 here"):
        train(tiny_config, str(tmp_path / "other"))
    tiny_config.model.decoder_depth = 1
    tiny_config.optimizer.lr = 0.0
    tiny_config.ema.decay = 1.0
    train(tiny_config, str(tmp_path / "new"))
    fresh = final_state(tmp_path / "new")[1]
    for name, value in final_state(straight)[1].items():
        if name.startswith(("['params']", "['ema']")):
            np.testing.assert_array_equal(fresh[name], value, err_msg=name)
    assert fresh["['step']"] == 1


@pytest.mark.slow
def test_features_from_the_disk_train_as_the_live_teacher(tiny_config, tmp_path):
    """Losses within 1e-5 (float16); a run may change from one to the other, but not to another teacher."""
    save_file(random_dinov2(), tmp_path / "teacher.safetensors")
    tiny_config.model.patch_size = 16
    tiny_config.data.image_size = 32
    tiny_config.loss.update(alignment_weight=0.5, alignment_layer=1, alignment_features=64)
    tiny_config.teacher.weights = str(tmp_path / "teacher.safetensors")
    tiny_config.train.update(steps=2, log_every=1)
    train(tiny_config, str(tmp_path / "live"))
    prepare_teacher(tiny_config, str(tmp_path / "features"), batch_size=1000)
    save_file(random_dinov2(seed=1), tmp_path / "teacher.safetensors")  # nothing asks it again
    tiny_config.teacher.stored = str(tmp_path / "features")
    train(tiny_config, str(tmp_path / "stored"))
    for a, b in zip(logged(tmp_path / "live"), logged(tmp_path / "stored"), strict=True):
        assert a["loss_alignment"] > 0.1 and abs(a["loss_alignment"] - b["loss_alignment"]) < 1e-5
        assert abs(a["loss"] - b["loss"]) < 1e-5
    tiny_config.train.init_from = str(tmp_path / "live")
    train_step, layout = make_train_step(tiny_config), meshes.make_layout(tiny_config.mesh)
    state = first_state(train_step, abstract_state(train_step, layout), layout, find_weights(tiny_config))
    projector = state.params["projector"]["out"]["kernel"]  # a run that starts from these weights has it too
    saved = final_state(tmp_path / "live")[1]
    np.testing.assert_array_equal(projector, saved["['params']['projector']['out']['kernel']"])
    tiny_config.train.update(init_from="", steps=3)
    train(tiny_config, str(tmp_path / "live"))
    assert final_state(tmp_path / "live")[0] == 3
    tiny_config.train.steps, tiny_config.teacher.stored = 4, ""
    with pytest.raises(UsageError, match=r"another configuration: teacher: weights \w{16} there, \w{16} here"):
        train(tiny_config, str(tmp_path / "live"))


def test_a_half_written_checkpoint_is_never_chosen(tiny_config, tmp_path):
    tiny_config.train.update(steps=2)
    train(tiny_config, str(tmp_path))
    folder = tmp_path / "checkpoints"
    complete = folder / "2"
    for name in ("9", "8.orbax-checkpoint-tmp-1234"):  # killed while writing, in either of Orbax's ways of finishing
        (folder / name / "state").mkdir(parents=True)
        (folder / name / "state" / "_METADATA").write_bytes((complete / "state" / "_METADATA").read_bytes())
    assert store.find_checkpoint(str(tmp_path)) == (folder, 2)
    with pytest.raises(UsageError, match="9 holds no finished checkpoint"):
        store.find_checkpoint(str(folder / "9"))
    tiny_config.train.steps = 9  # the run goes on from 2 and saves its own 9; the remains are set aside, not deleted
    train(tiny_config, str(tmp_path))
    assert final_state(tmp_path)[0] == 9
    assert (folder / "9.incomplete" / "state" / "_METADATA").exists()


def test_a_diverged_run_stops_and_keeps_its_last_checkpoint(tiny_config, tmp_path):
    """A learning rate of 1e38: the first update is still finite, every loss after it is not."""
    tiny_config.train.update(steps=20, max_nonfinite=3, log_every=1, save_every=1)
    tiny_config.optimizer.lr = 1e38
    with pytest.raises(UsageError, match=r"not finite for 3 steps up to step 4 .*max_nonfinite=3") as error:
        train(tiny_config, str(tmp_path))
    step, state = final_state(tmp_path)
    assert f"Last checkpoint: {tmp_path / 'checkpoints' / str(step)}." in str(error.value)
    assert step >= 1 and all(np.isfinite(v).all() for v in state.values())
    assert logged(tmp_path)[-1]["loss"] is None, "a loss that is not finite is null in JSON"


def test_unreadable_images_are_skipped_up_to_the_limit(tiny_config, tmp_path, caplog):
    rng = np.random.default_rng(0)
    for name in "ab":
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(8):
            pixels = rng.integers(0, 256, (30, 40, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{i}.jpg")
    broken = tmp_path / "images" / "b" / "3.jpg"
    broken.write_bytes(broken.read_bytes()[:200])
    tiny_config.data.update(source="folder", path=str(tmp_path / "images"), max_bad_records=1)
    tiny_config.train.steps = 3  # three epochs: the broken image comes by three times and counts once
    train(tiny_config, str(tmp_path / "run"))
    folder, step = store.find_checkpoint(str(tmp_path / "run"))
    assert step == 3
    bad = json.loads((folder / "3" / "data" / "metadata").read_text())["bad"]
    assert len(bad) == 1, "the next start counts on from there"
    caplog.clear()
    tiny_config.train.steps = 4
    train(tiny_config, str(tmp_path / "run"))
    assert "unreadable" not in caplog.text, "what the log has said it need not say again"
    tiny_config.train.steps = 5
    Image.new("RGB", (40, 30)).save(tmp_path / "images" / "a" / "new.png")
    with pytest.raises(UsageError, match=r"\(16 records there, 17 here; class 'a': 8 there, 9 here; new: a/new.png\)"):
        train(tiny_config, str(tmp_path / "run"))
    tiny_config.data.max_bad_records = 0
    with pytest.raises(UsageError, match=r"data.max_bad_records=0"):
        train(tiny_config, str(tmp_path / "strict"))


def test_mistakes_are_found_before_anything_is_written(tiny_config, tmp_path):
    workdir = tmp_path / "run"
    for field, value, message in [
        ("batch_size", 12, "data.batch_size=12 is not divisible by 8 devices"),
        ("image_size", 14, "data.image_size=14 does not suit the digits"),
    ]:
        config = tiny_config.copy_and_resolve_references()
        config.data[field] = value
        with pytest.raises(UsageError, match=message):
            train(config, str(workdir))
    tiny_config.model.num_classes = 9
    with pytest.raises(UsageError, match="model.num_classes=9 is too few; the data has 10 classes"):
        train(tiny_config, str(workdir))
    tiny_config.model.num_classes = 10
    tiny_config.train.init_from = str(tmp_path / "nothing")
    with pytest.raises(UsageError, match="nothing does not exist"):
        train(tiny_config, str(workdir))
    assert not (workdir / "config.json").exists()
