"""Does the log say so when devices wait for data, and only then?"""

import json
import re
import time

import jax
import numpy as np
import pytest

from deco_jax.config import default_config
from deco_jax.data import pipeline
from deco_jax.storage import Mirror
from deco_jax.training.goodput import Clock
from deco_jax.training.loop import train
from deco_jax.training.report import Idle, Reporter, data_in_words


class Result:
    """What a step that ends at a given time computes."""

    def __init__(self, ready):
        self.ready = ready

    def block_until_ready(self):
        time.sleep(max(self.ready - time.perf_counter(), 0))
        return self

    def __array__(self, dtype=None, copy=None):
        self.block_until_ready()
        return np.ones((), dtype)


def run(clock, step_seconds, batch_seconds, steps, after):
    """A loop as `training/loop`'s: waits for a batch, dispatches a step, waits for the step before.

    Returns for how many seconds nothing was computed as the next batch was not there.
    """
    before, idle = None, 0.0
    for step in range(1, steps + 1):
        with clock.phase("data wait"):
            time.sleep(batch_seconds)
        now = time.perf_counter()
        idle += max(now - before.ready, 0.0) if before else 0.0
        result = Result(max(now, before.ready if before else 0) + step_seconds)
        with clock.phase("step"):
            if before is not None:
                before.block_until_ready()
        after(step, {"loss": result})
        before = result
    return idle


@pytest.mark.parametrize("step, batch", [(0.1, 0.02), (0.02, 0.06), (0, 0.03)])
def test_devices_wait_for_what_comes_after_they_are_done(step, batch):
    """The loop waits for a batch while they work on the step before: only the rest of that is lost."""
    clock = Clock()
    measured = Idle(clock)
    expected = run(clock, step, batch, 11, lambda _, metrics: measured.dispatched(metrics))
    measured.close()
    assert measured.seconds == pytest.approx(expected, rel=0.3, abs=0.1)
    assert measured.seconds < 0.1 if batch < step else measured.seconds > 0.2, "what overlaps with a step costs nothing"
    assert clock.seconds["data wait"] > 10 * batch


def lines_of(capsys, folder, step_seconds, batch_seconds, data):
    """What a run of 20 steps of 8 images says."""
    clock, config = Clock(), default_config().train
    config.update(steps=20, log_every=20)
    reporter = Reporter(config, 8, Mirror(folder), 0, clock, 1e6, data)
    capsys.readouterr()
    run(clock, step_seconds, batch_seconds, 20, reporter.after)
    reporter.write()
    reporter.close(None)
    return capsys.readouterr().out.splitlines()


def test_slow_data_are_named_in_the_log(capsys, tmp_path):
    line = lines_of(capsys, tmp_path, 0.01, 0.03, "folder /data/imagenet")[0]
    found = re.fullmatch(
        r"step 20/20: loss 1\.0000, \d+ images/s, (\d+) % waiting for data \(folder /data/imagenet\), 0 min 00 s left",
        line,
    )
    assert found and 40 < int(found[1]) < 90, line
    (scalars,) = [json.loads(text) for text in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert scalars["data_wait_seconds"] > 0.03, "what the loop waited, all of it"


def test_data_that_come_in_time_are_no_news(capsys, tmp_path):
    line = lines_of(capsys, tmp_path, 0.08, 0.01, "folder /data/imagenet")[0]
    assert re.fullmatch(r"step 20/20: loss 1\.0000, \d+ images/s, 0 min 00 s left", line)


def test_other_processes_warn_of_their_own_disk(capsys, caplog, tmp_path, monkeypatch):
    """The first process, whose lines people see, waits for them in its steps."""
    monkeypatch.setattr(jax, "process_index", lambda: 3)
    with caplog.at_level("WARNING", logger="absl"):
        assert lines_of(capsys, tmp_path, 0.01, 0.03, "tars /data/train.tar") == []
    (warning,) = [record.getMessage() for record in caplog.records]
    assert re.fullmatch(r"Process 3, step 20: \d+ % waiting for data \(tars /data/train\.tar\)", warning)


def test_a_run_whose_data_are_slow_says_so(tiny_config, tmp_path, monkeypatch, capsys):
    read = pipeline.batches

    def slow(*args):
        for batch in read(*args):
            time.sleep(0.5)
            yield batch

    monkeypatch.setattr(pipeline, "batches", slow)
    tiny_config.train.update(steps=3, log_every=1, sample_every=0, save_every=100)
    train(tiny_config, str(tmp_path))
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert re.search(r"images/s, \d\d % waiting for data \(digits\), ", said[1]), said


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"source": "folder", "path": "/data/imagenet"}, "folder /data/imagenet"),
        ({"source": "digits"}, "digits"),
        ({"source": "tfds"}, "tfds imagenet2012/train"),
        ({"source": "tfds", "path": "gs://b/sets", "name": "cifar10"}, "tfds cifar10/train gs://b/sets"),
    ],
)
def test_where_data_come_from_in_words(fields, words):
    config = default_config().data
    config.update(fields)
    assert data_in_words(config) == words
