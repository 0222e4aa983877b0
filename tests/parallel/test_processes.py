"""Runs of two and four processes on this machine (gloo): equal to one process; signals; death; other machines."""

import hashlib
import os
import shutil
import signal

import jax
import numpy as np
import pytest

import deco_jax
from deco_jax.checkpoints import store as checkpoint
from deco_jax.config import load_config
from deco_jax.parallel import mesh as meshes
from deco_jax.training.loop import train
from tests.parallel.processes.harness import CONFIG, Processes, assert_close, batches, final_state, losses


def run_here(workdir, devices, monkeypatch, steps=6, preset="fsdp"):
    """The same run in this process, on some of its devices: hashes of its batches."""
    steps_seen, make_layout, place_batch = [], meshes.make_layout, meshes.place_batch

    def record(batch, *rest):
        images = zip(batch["image"], batch["label"], strict=True)
        steps_seen.append([hashlib.sha256(x.tobytes() + y.tobytes()).hexdigest()[:16] for x, y in images])
        return place_batch(batch, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(meshes, "SMALL", 0)
        patch.setattr(meshes, "make_layout", lambda config: make_layout(config, jax.devices()[:devices]))
        patch.setattr(meshes, "place_batch", record)
        train(load_config(CONFIG, [f"--config.mesh.preset={preset}", f"--config.train.steps={steps}"]), str(workdir))
    return steps_seen


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A workdir of two processes with two devices each, six steps, grids at 3 and 6; no test changes it."""
    folder = tmp_path_factory.mktemp("two")
    with Processes(folder, folder / "run", 2, 2, "--config.mesh.preset=fsdp", "--config.train.sample_every=3") as run:
        assert run.codes(240) == [0, 0], run.output() + run.output(1)
    return folder


def test_two_processes_train_as_one(two, tmp_path, monkeypatch):
    """Same images at the same rows, each process its share; same losses and weights as one process."""
    assert run_here(tmp_path / "one", 4, monkeypatch) == batches(two, 2)
    np.testing.assert_allclose(losses(two / "run"), losses(tmp_path / "one"), rtol=1e-5)
    assert_close(final_state(two / "run"), final_state(tmp_path / "one"))
    assert (two / "run" / "samples" / "step_00000006.png").is_file()
    model, params = deco_jax.load_pretrained(str(two / "run"))  # what many processes wrote, one opens
    assert jax.tree.structure(params) and model.depth == 2
    output = (two / "output_0").read_text()
    assert "Processes: coordinator" in output and "2 process(es)" in output and "Goodput: " in output


@pytest.mark.slow
@pytest.mark.parametrize("processes, devices", [(4, 1), (1, 8)])
def test_a_run_of_two_processes_continues_with_others(two, tmp_path, monkeypatch, processes, devices):
    """From step 3 with four processes, or one, on another number of devices: the next global batches are the same."""
    workdir = tmp_path / "run"
    for part in ("3/state", "3/data", "3/meta", "3/_CHECKPOINT_METADATA"):
        source, target = two / "run" / "checkpoints" / part, workdir / "checkpoints" / part
        target.parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if source.is_dir() else shutil.copy)(source, target)
    if processes == 1:
        seen = run_here(workdir, devices, monkeypatch)
    else:
        with Processes(tmp_path, workdir, processes, devices, "--config.mesh.preset=fsdp") as run:
            assert run.codes(240) == [0] * processes, run.output()
            assert "resumes at step 3" in run.output()
        seen = batches(tmp_path, processes)
    assert seen == batches(two, 2)[3:]
    np.testing.assert_allclose(losses(workdir), losses(two / "run")[3:], rtol=1e-5)
    assert_close(final_state(workdir), final_state(two / "run"))


@pytest.mark.slow
def test_from_eight_devices_to_four_to_one(two, tmp_path, monkeypatch):
    """And from preset to preset."""
    seen = run_here(tmp_path, 8, monkeypatch, steps=2, preset="fsdp_tensor")
    seen += run_here(tmp_path, 4, monkeypatch, steps=4, preset="data")
    seen += run_here(tmp_path, 1, monkeypatch, steps=6)
    assert seen == batches(two, 2)
    np.testing.assert_allclose(losses(tmp_path), losses(two / "run"), rtol=1e-5)
    assert_close(final_state(tmp_path), final_state(two / "run"))


@pytest.mark.slow
@pytest.mark.parametrize("preset, victim", [("fsdp", 1), ("fsdp_tensor", 0)])
def test_data_that_stop_coming_to_one_process_lose_nothing(two, tmp_path, preset, victim):
    """All save the same step and end with 75; the same command trains on the images of an undisturbed run.

    With `fsdp_tensor` both processes hold copies of the same rows, of which those of one are not there. Meanwhile the
    first one's clock calls for saves, which all make at the same steps.
    """
    often = (f"--config.mesh.preset={preset}", "--config.train.save_minutes=1e-9")
    with Processes(tmp_path, tmp_path / "run", 2, 2, *often, absent=victim) as run:
        assert run.codes(120) == [75, 75], run.output() + run.output(1)
        assert "Stopped as data do not come; step 3 is saved." in run.output()
        assert "data do not come: the server is gone" in run.output(1 - victim)
    assert checkpoint.find_checkpoint(str(tmp_path / "run"))[1] == 3
    for index in (0, 1):
        (tmp_path / f"record.{index}").unlink()
    with Processes(tmp_path, tmp_path / "run", 2, 2, *often) as run:
        assert run.codes(120) == [0, 0], run.output() + run.output(1)
    if preset == "fsdp":
        assert batches(tmp_path, 2) == batches(two, 2)[3:]
    np.testing.assert_allclose(losses(tmp_path / "run"), losses(two / "run"), rtol=1e-5)
    assert_close(final_state(tmp_path / "run"), final_state(two / "run"))


@pytest.mark.slow
@pytest.mark.parametrize("preset, victim", [("fsdp", 1), ("fsdp_tensor", 0)])
def test_signals_and_death_of_one_process(tmp_path, preset, victim):
    """SIGTERM to one: all save the same step and exit 0. SIGKILL of one: the other says so and ends. Both resume.

    With `fsdp_tensor` the two processes hold the same images, and hear of each other's signal all the same.
    """
    workdir, other = tmp_path / "run", 1 - victim
    endless = ("--config.train.steps=100000", f"--config.mesh.preset={preset}")
    with Processes(tmp_path, workdir, 2, 1, *endless, slow=0.2) as run:
        run.wait_for("step 4/")
        run.running[victim].send_signal(signal.SIGTERM)
        assert run.codes(60) == [0, 0], run.output()
        step = checkpoint.find_checkpoint(str(workdir))[1]
        by = "a signal to another process" if victim else "SIGTERM"
        assert f"Stopped by {by}; step {step} is saved." in run.output()
        assert step >= 4

    with Processes(tmp_path, workdir, 2, 1, *endless, slow=0.2) as run:
        run.wait_for(f"step {step + 4}/")
        assert f"resumes at step {step}" in run.output()
        run.running[victim].kill()
        codes = run.codes(60)
        assert codes[victim] == -signal.SIGKILL
        # Process 0 is jax's coordinator: without it jax may end the others before our message, with SIGABRT.
        assert codes[other] in ((75,) if victim else (75, -signal.SIGABRT)), run.output(other)
        said = "another process of this run ended or no longer answers", "another task died"
        assert any(words in run.output(other) for words in said)

    saved = checkpoint.find_checkpoint(str(workdir))[1]
    assert saved >= step
    if preset != "fsdp":
        return
    with Processes(tmp_path, workdir, 2, 1, f"--config.train.steps={saved + 1}") as run:
        assert run.codes(120) == [0, 0], run.output()
        assert f"resumes at step {saved}" in run.output()
        assert "3 start(s)" in run.output() and "lost to restarts" in run.output()


@pytest.mark.parametrize(
    "own, message",
    [
        (lambda index: [f"--config.seed={index}"], "the configuration (a hash) of process 1 is"),
        (lambda index: [f"--workdir={os.environ['PYTEST_TMP']}/{index}"], "is not the folder that process 0 writes to"),
    ],
)
def test_processes_that_were_started_differently_say_so(tmp_path, monkeypatch, own, message):
    """Instead of waiting for each other."""
    monkeypatch.setenv("PYTEST_TMP", str(tmp_path))
    with Processes(tmp_path, tmp_path / "run", 2, 1, own=own) as run:
        assert run.codes(120) == [2, 2], run.output()
        for index in (0, 1):
            assert message in run.output(index)
    assert not list(tmp_path.rglob("checkpoints/*"))


@pytest.mark.slow
def test_a_mistake_of_one_process_in_the_middle_ends_all(tmp_path):
    """It says what was wrong and ends with 2, the other with 75, and neither waits for the other."""
    with Processes(tmp_path, tmp_path / "run", 2, 1, fails=1) as run:
        assert run.codes(120) == [75, 2], run.output()
        assert "the data of this host are gone" in run.output(1)
        assert "another process of this run ended" in run.output(0)
