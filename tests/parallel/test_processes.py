"""Runs of two and four processes on this machine (gloo): equal to one process; signals; death; other machines."""

import hashlib
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

import deco_jax
from deco_jax.checkpoints import store as checkpoint
from deco_jax.config import load_config
from deco_jax.parallel import mesh as meshes
from deco_jax.training.loop import train
from tests.helpers import relative_error

HERE = pathlib.Path(__file__).parent / "processes"
CONFIG = str(HERE / "tiny_run.py")
pytestmark = pytest.mark.usefixtures("quick_compile")


class Processes:
    """`deco train` in several processes with two or fewer devices each."""

    def __init__(self, folder, workdir, count, devices, *arguments, slow=0.0, fails=-1, own=lambda index: []):
        self.logs = [folder / f"output_{index}" for index in range(count)]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.running = []
        for index, log in enumerate(self.logs):
            environment = {
                **os.environ,
                "JAX_NUM_CPU_DEVICES": str(devices),
                "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
                "JAX_NUM_PROCESSES": str(count),
                "JAX_PROCESS_ID": str(index),
                "DECO_TEST_RECORD": str(folder / "record"),
                "DECO_TEST_SECONDS": str(slow),
                "DECO_TEST_FAILS": str(fails),
            }
            command = [sys.executable, str(HERE / "deco.py"), "train", "--config", CONFIG, "--workdir", str(workdir)]
            with log.open("w") as output:
                self.running.append(
                    subprocess.Popen(
                        [*command, *arguments, *own(index)],
                        env=environment,
                        stdout=output,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                    )
                )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.running:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)

    def output(self, index=0):
        return self.logs[index].read_text()

    def wait_for(self, text, seconds=120):
        end = time.monotonic() + seconds
        while text not in self.output():
            assert time.monotonic() < end, f"no {text!r} in {seconds} s:\n{self.output()}"
            assert self.running[0].poll() is None, self.output()
            time.sleep(0.1)

    def codes(self, seconds):
        end = time.monotonic() + seconds
        try:
            return [process.wait(max(end - time.monotonic(), 0.1)) for process in self.running]
        except subprocess.TimeoutExpired:
            pytest.fail(f"still running after {seconds} s:\n{self.output()}\n{self.output(1)}")


def batches(folder, count):
    """Of each step, hashes of the images in the order of the global batch."""
    files = [(folder / f"record.{index}").read_text().splitlines() for index in range(count)]
    steps = []
    for lines in zip(*files, strict=True):
        rows = [{int(row): image for row, image in json.loads(line).items()} for line in lines]
        assert sum(map(len, rows)) == 16, "each process loads its share and no more"
        steps.append([image for _, image in sorted(r for part in rows for r in part.items())])
    return steps


def final_state(workdir):
    """Everything in the newest checkpoint, read without our own code path: Orbax into numpy."""
    folder, step = checkpoint.find_checkpoint(str(workdir))
    with ocp.PyTreeCheckpointer() as reader:
        path = folder / str(step) / "state"
        as_numpy = jax.tree.map(
            lambda _: ocp.RestoreArgs(restore_type=np.ndarray), reader.metadata(path).item_metadata.tree
        )
        tree = reader.restore(path, args=ocp.args.PyTreeRestore(restore_args=as_numpy))
    return step, {jax.tree_util.keystr(k): np.asarray(v) for k, v in jax.tree_util.tree_leaves_with_path(tree)}


def assert_close(a, b):
    assert a[0] == b[0] and a[1].keys() == b[1].keys()
    for name, value in a[1].items():
        assert not np.any(b[1][name]) or relative_error(value, b[1][name]) < 1e-4, name


def losses(workdir):
    return [json.loads(line)["loss"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]


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


def test_from_eight_devices_to_four_to_one(two, tmp_path, monkeypatch):
    """And from preset to preset."""
    seen = run_here(tmp_path, 8, monkeypatch, steps=2, preset="fsdp_tensor")
    seen += run_here(tmp_path, 4, monkeypatch, steps=4, preset="data")
    seen += run_here(tmp_path, 1, monkeypatch, steps=6)
    assert seen == batches(two, 2)
    np.testing.assert_allclose(losses(tmp_path), losses(two / "run"), rtol=1e-5)
    assert_close(final_state(tmp_path), final_state(two / "run"))


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


def test_a_mistake_of_one_process_in_the_middle_ends_all(tmp_path):
    """It says what was wrong and ends with 2, the other with 75, and neither waits for the other."""
    with Processes(tmp_path, tmp_path / "run", 2, 1, fails=1) as run:
        assert run.codes(120) == [75, 2], run.output()
        assert "the data of this host are gone" in run.output(1)
        assert "another process of this run ended" in run.output(0)
