"""Runs of `deco train` in several processes on this machine, and what they leave behind."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from deco_jax.checkpoints import store
from deco_jax.storage import to_path
from tests.helpers import relative_error

HERE = pathlib.Path(__file__).parent
CONFIG = str(HERE / "tiny_run.py")


class Processes:
    """`deco train` in several processes with two or fewer devices each."""

    def __init__(
        self, folder, workdir, count, devices, *arguments, slow=0.0, fails=-1, absent=-1, env=(), own=lambda index: []
    ):
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
                "DECO_TEST_ABSENT": str(absent),
                **dict(env),
            }
            command = [sys.executable, str(HERE / "deco.py"), "train", "--config", CONFIG, "--workdir", str(workdir)]
            with log.open("w") as output:
                self.running.append(
                    subprocess.Popen(
                        [*command, *arguments, *own(index)],
                        env={name: value for name, value in environment.items() if value is not None},
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
            pytest.fail(f"still running after {seconds} s:\n" + "\n".join(map(self.output, range(len(self.logs)))))


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
    folder, step = store.find_checkpoint(str(workdir))
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
    return [json.loads(line)["loss"] for line in (to_path(workdir) / "metrics.jsonl").read_text().splitlines()]
