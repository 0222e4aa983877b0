"""Where did the time of a run go, over all its starts, and what did restarts cost?"""

import contextlib
import json
import os
import pathlib
import time
from collections import Counter
from collections.abc import Iterator

from deco_jax.storage import Mirror


class Clock:
    """Seconds spent in each phase of one start of a run."""

    def __init__(self):
        self.seconds: Counter[str] = Counter()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds the time spent within to `name`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - start


class Goodput:
    """Where the time of a run went, over all its starts, and what restarts cost.

    `goodput.jsonl` gets one line at the start of an attempt, with every checkpoint, and at its end. Unless the run had
    finished, what lies between the checkpoint that is resumed and the new start is lost: work that is done twice, and
    time not running.
    """

    def __init__(self, mirror: Mirror, step: int, clock: Clock, active: bool):
        self.clock, self.attempts = clock, 1
        self.before: Counter[str] = Counter()  # seconds of earlier attempts, and what was lost between them
        self.path = mirror.fetch("goodput.jsonl") if active else pathlib.Path(os.devnull)
        lines = []
        for text in self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []:
            with contextlib.suppress(ValueError):  # a machine that died may have cut off its last line
                lines.append(json.loads(text))
        if lines:
            last = lines[-1]["attempt"]
            self.attempts = last + 1
            for line in [line for line in lines if line["attempt"] == last and line["step"] <= step][-1:]:
                lost = 0.0 if line["ended"] else max(time.time() - clock.seconds.total() - line["time"], 0.0)
                self.before.update({"lost to restarts": lost})
                self.before.update(line["seconds"])
        self.note(step)

    def note(self, step: int, ended: bool = False) -> None:
        """Writes down how much time has gone where, up to `step`; `ended`: the run is finished."""
        seconds = self._seconds()
        line = {"attempt": self.attempts, "step": step, "time": time.time(), "ended": ended, "seconds": seconds}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def close(self, step: int, ended: bool) -> str:
        """The last line of the file, at the step that was reached, and the same for people."""
        self.note(step, ended)
        seconds = self._seconds()
        seconds.update({"lost to restarts": 0.0})  # told also where it is nothing
        total = seconds.total()
        parts = ", ".join(f"{name} {value:.1f} s" for name, value in seconds.most_common())
        return (
            f"Goodput: {seconds['step'] / max(total, 1e-9):.1%} of {total:.1f} s in {self.attempts} start(s) "
            f"went into steps: {parts}."
        )

    def _seconds(self) -> Counter[str]:
        """Of all attempts."""
        seconds = self.before.copy()
        seconds.update(self.clock.seconds)
        return seconds
