"""What does a run tell? Scalars to JSONL and TensorBoard, pictures, a progress bar or lines, and where time went."""

import contextlib
import json
import pathlib
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from deco_jax.parallel.hardware import peak_flops


class Reporter:
    """All that a run tells while it trains. The scalars of a step are read when the next one is under way."""

    def __init__(
        self, config: ConfigDict, batch_size: int, workdir: pathlib.Path, step: int, clock: "Clock", image_flops: float
    ):
        """`config` is the `train` part of a configuration, `step` the first, `image_flops` a step's per image."""
        active = jax.process_index() == 0
        self.config, self.batch_size, self.clock, self.image_flops = config, batch_size, clock, image_flops
        self.peak = peak_flops(jax.devices()[0])
        self.writers, self.progress = Writers(workdir, active), Progress(config.steps, step, active)
        self.goodput = Goodput(workdir, step, clock, active)
        self.step = step
        self.waiting: tuple[int, dict[str, jax.Array]] | None = None  # a step to log, its metrics on the devices
        self.since: tuple[int, float, float] | None = None  # (step, busy, data wait) when something was last logged

    def after(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Takes note of a step that has been dispatched; logs the one that was waiting."""
        self.write()
        self.step = step
        if self.since is None:  # the first step's time is the compiler's
            self.since = step, self._busy(), self.clock.seconds["data wait"]
        if step % self.config.log_every == 0 or step == self.config.steps:
            self.waiting = step, metrics

    def write(self) -> None:
        """Writes the scalars that are waiting, if there are any."""
        if self.waiting is None:
            return
        (step, metrics), self.waiting = self.waiting, None
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        now, data = self._busy(), self.clock.seconds["data wait"]
        last_step, last_time, last_data = self.since
        self.since = step, now, data
        if step > last_step:
            values["step_seconds"] = (now - last_time) / (step - last_step)
            values["data_wait_seconds"] = (data - last_data) / (step - last_step)
            values["images_per_second"] = self.batch_size / values["step_seconds"]
        if self.peak is not None and "images_per_second" in values:
            values["mfu"] = values["images_per_second"] * self.image_flops / (self.peak * jax.device_count())
        self.writers.scalars(step, values)
        self.progress.update(step, values)

    def _busy(self) -> float:
        """A clock that stands still while the run samples, saves or compiles."""
        return time.perf_counter() - sum(self.clock.seconds[name] for name in ("eval", "checkpoint", "compile"))

    def picture(self, step: int, grid_HxWx3: np.ndarray) -> None:
        """Shows a grid of samples."""
        self.writers.picture(step, grid_HxWx3)

    def saved(self, step: int) -> None:
        """Takes note of a checkpoint."""
        self.goodput.note(step)
        self.writers.flush()

    def say(self, text: str) -> None:
        """Prints a line."""
        self.progress.say(text)

    def close(self, error_type: type | None, *_: Any) -> None:
        """Ends logs and bar, and says where the time went; called as the run ends, with the exception's type if any."""
        ended = error_type is None and self.step >= self.config.steps
        self.writers.close()
        self.progress.close()
        self.progress.say(self.goodput.close(self.step, ended))


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


class Writers:
    """Scalars and pictures of a run, written by the first host only.

    Files: `metrics.jsonl`, one line per logged step, appended to by a resumed run; `tensorboard/`;
    `samples/step_00001000.png`.
    """

    def __init__(self, workdir: pathlib.Path, active: bool):
        self.samples = workdir / "samples"
        self.jsonl = self.tensorboard = None
        if active:
            import tensorboardX  # imports torch where that is installed, so not before a run needs it

            self.samples.mkdir(parents=True, exist_ok=True)
            self.jsonl = (workdir / "metrics.jsonl").open("a", buffering=1, encoding="utf-8")
            self.tensorboard = tensorboardX.SummaryWriter(str(workdir / "tensorboard"))

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Writes one line of scalars. A value that is not finite becomes null in the JSONL."""
        if self.jsonl is None:
            return
        line = {k: v if np.isfinite(v) else None for k, v in values.items()}
        self.jsonl.write(json.dumps({"step": step, "time": time.time(), **line}) + "\n")
        for name, value in values.items():
            self.tensorboard.add_scalar(name, value, step)

    def picture(self, step: int, grid_HxWx3: np.ndarray) -> None:
        """Shows a grid of samples (uint8) in TensorBoard."""
        if self.tensorboard is not None:
            self.tensorboard.add_image("samples", grid_HxWx3, step, dataformats="HWC")
            self.tensorboard.flush()

    def flush(self) -> None:
        """What was written so far outlives this process, also in a mounted bucket, which stores what is closed."""
        if self.jsonl is not None:
            name = self.jsonl.name
            self.jsonl.close()
            self.jsonl = open(name, "a", buffering=1, encoding="utf-8")  # noqa: SIM115
            self.tensorboard.flush()

    def close(self) -> None:
        """Flushes both."""
        if self.jsonl is not None:
            self.jsonl.close()
            self.tensorboard.close()


class Progress:
    """A bar with loss, images/s and time left in a terminal; elsewhere one line per logged step."""

    def __init__(self, total: int, start: int, active: bool):
        self.total, self.active = total, active
        self.bar = None
        if active and sys.stderr.isatty():
            self.bar = tqdm(total=total, initial=start, unit="step", dynamic_ncols=True, smoothing=0.05)

    def update(self, step: int, values: dict[str, float]) -> None:
        """Shows the scalars logged for `step`."""
        shown, left = f"loss {values['loss']:.4f}", ""
        if "step_seconds" in values:
            shown += f", {values['images_per_second']:.0f} images/s"
            left = f", {_duration((self.total - step) * values['step_seconds'])} left"
        if self.bar is not None:
            self.bar.set_postfix_str(shown, refresh=False)
            self.bar.update(step - self.bar.n)
        elif self.active:
            self.say(f"step {step}/{self.total}: {shown}{left}")

    def say(self, text: str) -> None:
        """Prints a line, above the bar if there is one."""
        if self.active:
            if self.bar is not None:
                self.bar.write(text)
            else:
                print(text, flush=True)

    def close(self) -> None:
        """Leaves the bar as it is."""
        if self.bar is not None:
            self.bar.close()


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s"
