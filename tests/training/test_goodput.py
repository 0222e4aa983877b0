"""Goodput: what a run's starts add up to, and what lies between them."""

import json

import pytest

from deco_jax.storage import Mirror
from deco_jax.training import goodput
from deco_jax.training.goodput import Clock, Goodput


@pytest.fixture
def now(monkeypatch):
    """The time, set by the test."""

    class Now:
        seconds = 1000.0

    monkeypatch.setattr(goodput.time, "time", lambda: Now.seconds)
    return Now


def attempt(tmp_path, now, step, saves, end=None):
    """A start at `step` that takes a second to begin and then saves at {step: seconds of stepping so far}."""
    clock = Clock()
    clock.seconds["init"] = 1.0
    now.seconds += 1.0
    goodput, begin = Goodput(Mirror(tmp_path), step, clock, active=True), now.seconds
    for saved, seconds in saves.items():
        clock.seconds["step"] = seconds
        now.seconds = begin + seconds
        goodput.note(saved)
    return goodput.close(end, ended=True) if end else ""


def test_a_killed_start_loses_what_came_after_its_last_checkpoint(tmp_path, now):
    attempt(tmp_path, now, 0, {10: 5.0, 20: 10.0})
    now.seconds += 4.0  # work after step 20, and the time until the next start
    text = attempt(tmp_path, now, 20, {30: 6.0}, end=30)
    assert text == (
        "Goodput: 72.7% of 22.0 s in 2 start(s) went into steps: step 16.0 s, lost to restarts 4.0 s, init 2.0 s."
    )


def test_a_checkpoint_that_was_not_finished_is_lost_too(tmp_path, now):
    attempt(tmp_path, now, 0, {10: 5.0, 20: 10.0})
    now.seconds += 4.0
    text = attempt(tmp_path, now, 10, {}, end=10)
    assert "lost to restarts 9.0 s" in text and "step 5.0 s" in text


def test_starts_that_die_before_their_first_checkpoint_are_lost_whole(tmp_path, now):
    for _ in range(2):
        attempt(tmp_path, now, 0, {})
        now.seconds += 7.0
    text = attempt(tmp_path, now, 0, {}, end=5)
    assert "in 3 start(s)" in text and "lost to restarts 14.0 s" in text


def test_time_between_a_finished_run_and_its_extension_is_not_lost(tmp_path, now):
    attempt(tmp_path, now, 0, {10: 5.0}, end=10)
    now.seconds += 1e6
    assert "lost to restarts 0.0 s" in attempt(tmp_path, now, 10, {20: 5.0}, end=20)


def test_a_line_that_was_cut_off_is_left_out(tmp_path, now):
    attempt(tmp_path, now, 0, {10: 5.0})
    with (tmp_path / "goodput.jsonl").open("a") as file:
        file.write('{"attempt": 1, "st')
    assert "in 2 start(s)" in attempt(tmp_path, now, 10, {}, end=10)


def test_only_one_process_writes(tmp_path):
    Goodput(Mirror(tmp_path), 0, Clock(), active=False).close(3, ended=True)
    assert list(tmp_path.iterdir()) == []


def test_every_line_says_where_the_time_went(tmp_path, now):
    attempt(tmp_path, now, 0, {10: 5.0}, end=12)
    lines = [json.loads(line) for line in (tmp_path / "goodput.jsonl").read_text().splitlines()]
    assert [(line["step"], line["seconds"].get("step", 0.0)) for line in lines] == [(0, 0.0), (10, 5.0), (12, 5.0)]
