"""Where did the time of a run go, over all its starts, and what did restarts cost?"""

import contextlib
import json
import pathlib
import time
from collections import defaultdict
from collections.abc import Iterator
from typing import Any


class Clock:
    """Seconds spent in each phase of one start of a run."""

    def __init__(self):
        self.seconds: dict[str, float] = defaultdict(float)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds the time spent within to `name`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - start

    def total(self) -> float:
        """Of all phases."""
        return sum(self.seconds.values())


class Goodput:
    """Where the time of a run went, over all its starts, and what restarts cost.

    `goodput.jsonl` gets one line at the start of an attempt, with every checkpoint, and at its end. Unless the run had
    finished, what lies between the checkpoint that is resumed and the new start is lost: work that is done twice, and
    time not running.
    """

    def __init__(self, workdir: pathlib.Path, step: int, clock: Clock, active: bool):
        self.clock, self.attempts = clock, 1
        self.before: dict[str, float] = {}  # seconds of earlier attempts, and what was lost between them
        self.path = None
        if not active:
            return
        self.path = workdir / "goodput.jsonl"
        lines = _read_lines(self.path)
        if lines:
            self.attempts = lines[-1]["attempt"] + 1
            last = [line for line in lines if line["attempt"] == lines[-1]["attempt"] and line["step"] <= step][-1:]
            for line in last:
                lost = 0.0 if line["ended"] else max(time.time() - clock.total() - line["time"], 0.0)
                self.before = _sum(line["seconds"], {"lost to restarts": lost})
        self.note(step)

    def note(self, step: int, ended: bool = False) -> None:
        """Writes down how much time has gone where, up to `step`; `ended`: the run is finished."""
        if self.path is not None:
            seconds = _sum(self.before, self.clock.seconds)
            line = {"attempt": self.attempts, "step": step, "time": time.time(), "ended": ended, "seconds": seconds}
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    def close(self, step: int, ended: bool) -> str:
        """The last line of the file, at the step that was reached, and the same for people."""
        self.note(step, ended)
        seconds = _sum(self.before, {"lost to restarts": 0.0}, self.clock.seconds)
        total = sum(seconds.values())
        parts = ", ".join(f"{name} {value:.1f} s" for name, value in sorted(seconds.items(), key=lambda item: -item[1]))
        return (
            f"Goodput: {seconds.get('step', 0.0) / max(total, 1e-9):.1%} of {total:.1f} s in {self.attempts} start(s) "
            f"went into steps: {parts}."
        )


def _read_lines(path: pathlib.Path) -> list[dict[str, Any]]:
    """Lines that parse; a machine that died may have cut off its last one."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            lines.append(json.loads(text))
    return lines


def _sum(*parts: dict[str, float]) -> dict[str, float]:
    return {name: sum(part.get(name, 0.0) for part in parts) for part in parts for name in part}
