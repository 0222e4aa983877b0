"""Where there is no terminal: lines with rate and time left, after growing pauses, and at the end."""

import pytest

from deco_jax.jobs import progress
from deco_jax.jobs.progress import Progress, duration


def test_lines_with_rate_and_time_left(monkeypatch, capsys):
    now = 1000.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    shown = Progress(1000, "image", done=100)
    for done in range(110, 1001, 10):  # one second each, the first one, which compiles, 60
        now += 1 if done > 110 else 60
        shown.update(done)
    shown.close()
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "image 110/1000",
        "image 210/1000: 10.00 images/s, 1 min 19 s left",
        "image 410/1000: 10.00 images/s, 0 min 59 s left",
        "image 810/1000: 10.00 images/s, 0 min 19 s left",
        "image 1000/1000: 10.00 images/s, 0 min 00 s left",
    ]


def test_the_same_with_words_of_ones_own(capsys):
    Progress(9, "step").show(3, "loss 0.5", 20.0)
    Progress(9, "step", active=False).show(3, "of another process", 20.0)
    assert capsys.readouterr().out == "step 3/9: loss 0.5, 2 min 00 s left\n"


@pytest.mark.parametrize("seconds, text", [(0, "0 min 00 s"), (75.4, "1 min 15 s"), (7300, "2 h 01 min")])
def test_durations(seconds, text):
    assert duration(seconds) == text
