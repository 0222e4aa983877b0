"""What does a run tell while it trains? Scalars to JSONL and TensorBoard, pictures, a progress bar or lines."""

import concurrent.futures
import contextlib
import json
import time
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np
from absl import logging
from ml_collections import ConfigDict

from deco_jax.jobs import Progress
from deco_jax.parallel.hardware import peak_flops
from deco_jax.sampling.pictures import save_png
from deco_jax.storage import Mirror
from deco_jax.training.goodput import Clock, Goodput
from deco_jax.training.online import Evaluated
from deco_jax.training.tensorboard import TensorBoard

COPY_EVERY = 60.0  # seconds between copies of what was written, where the workdir is in a bucket
SLOW_DATA = 0.05  # share of the time for which devices may wait for data before the log says it


class Reporter:
    """All that a run tells while it trains. The scalars of a step are read when the next one is under way."""

    def __init__(
        self,
        config: ConfigDict,
        batch_size: int,
        mirror: Mirror,
        step: int,
        clock: Clock,
        image_flops: float,
        data: str,
    ):
        """Opens the logs.

        Args:
          config: the `train` part of a configuration.
          batch_size: images of a step.
          mirror: of the workdir.
          step: the first.
          clock: of the loop.
          image_flops: a step's per image.
          data: where the images come from, see `data_in_words`.
        """
        first = jax.process_index() == 0
        self.config, self.batch_size, self.clock, self.step, self.mirror = config, batch_size, clock, step, mirror
        self.data, self.idle = data, Idle(clock)
        peak = peak_flops(jax.devices()[0])
        self.mfu_of_an_image = None if peak is None else image_flops / (peak * jax.device_count())
        self.progress = Progress(config.steps, "step", step, first)
        self.writers = Writers(mirror) if first else None
        self.goodput = Goodput(mirror, step, clock, first)
        self.waiting: tuple[int, dict[str, jax.Array]] | None = None  # a step to log, its metrics on the devices
        self.since: tuple[int, float, float, float] | None = None  # see `_now`, when something was last logged
        self.copied = time.monotonic()

    def after(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Takes note of a step that has been dispatched; logs the one that was waiting."""
        self.idle.dispatched(metrics)
        self.write()
        self.step = step
        if self.since is None:  # the first step's time is the compiler's
            self.since = self._now(step)
        if step % self.config.log_every == 0 or step == self.config.steps:
            self.waiting = step, metrics

    def return_to(self, step: int) -> None:
        """Nothing is told of later steps, which changed nothing."""
        self.step = step
        if self.waiting is not None and self.waiting[0] > step:
            self.waiting = None

    def write(self) -> None:
        """Writes the scalars that are waiting, if there are any."""
        if self.waiting is None:
            return
        (step, metrics), self.waiting = self.waiting, None
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        before, self.since = self.since, self._now(step)
        steps, busy, data_wait, idle = (new - old for new, old in zip(self.since, before, strict=True))
        if steps:
            values["step_seconds"], values["data_wait_seconds"] = busy / steps, data_wait / steps
            values["images_per_second"] = self.batch_size / values["step_seconds"]
            if self.mfu_of_an_image is not None:
                values["mfu"] = values["images_per_second"] * self.mfu_of_an_image
        if self.writers is not None:
            self.writers.scalars(step, values)
        shown = f"loss {values['loss']:.4f}"
        if steps:
            shown += f", {values['images_per_second']:.0f} images/s"
            if idle > SLOW_DATA * busy:
                waiting = f"{100 * idle / busy:.0f} % waiting for data ({self.data})"
                shown += f", {waiting}"
                if self.writers is None:  # whose lines nobody sees
                    logging.warning("Process %d, step %d: %s", jax.process_index(), step, waiting)
        self.progress.show(step, shown, values.get("step_seconds"))
        if time.monotonic() - self.copied > COPY_EVERY:
            self.flush()

    def _now(self, step: int) -> tuple[int, float, float, float]:
        """(step, a clock that stands still while the run samples, saves or compiles, seconds of waiting for data of the
        loop, and of the devices)."""
        seconds = self.clock.seconds
        busy = time.perf_counter() - sum(seconds[name] for name in ("eval", "checkpoint", "compile"))
        return step, busy, seconds["data wait"], self.idle.seconds

    def picture(self, step: int, grid_HxWx3: np.ndarray) -> None:
        """Keeps a grid of samples (uint8)."""
        if self.writers is not None:
            self.writers.picture(step, grid_HxWx3)

    def evaluated(self, found: Iterable[Evaluated]) -> None:
        """Keeps what evaluations found, and says it."""
        for one in found:
            values = ", ".join(f"{name} {value:.4g}" for name, value in one.metrics.items())
            self.progress.say(f"Evaluation of step {one.step}, {one.about['images']} images: {values}.")
            self.writers.evaluation(one)

    def tell(self, lines: Iterable[str]) -> None:
        """Prints lines as they are."""
        for line in lines:
            self.progress.say(line)

    def saving(self, step: int) -> None:
        """Takes note of a checkpoint."""
        with going_on("goodput.jsonl"):
            self.goodput.note(step)
        self.flush()

    def flush(self) -> None:
        """What was written so far outlives this process."""
        self.copied = time.monotonic()
        if self.writers is not None:
            self.writers.flush()
        self.mirror.flush()

    def close(self, error_type: type | None, *_: Any) -> None:
        """Ends logs and bar, and says where the time went; called as the run ends, with the exception's type if any."""
        ended = error_type is None and self.step >= self.config.steps
        self.idle.close()
        self.progress.close()
        with going_on("goodput.jsonl"):
            self.progress.say(self.goodput.close(self.step, ended))
        if self.writers is not None:
            self.writers.close()
        with going_on("metrics, pictures or profile"):
            self.mirror.close()


class Idle:
    """For how long had this process's devices nothing to do, as the next batch was not there?

    The loop waits for a batch while they work on the step before, so a part of its waiting, perhaps all, costs nothing.
    """

    def __init__(self, clock: Clock):
        self.seconds, self._clock = 0.0, clock
        self._watching = concurrent.futures.ThreadPoolExecutor(1, "steps")
        self._last: tuple[float, float, concurrent.futures.Future[float]] | None = None  # see `dispatched`

    def dispatched(self, metrics: dict[str, jax.Array]) -> None:
        """Takes note of a step that has its batch and has been dispatched; the one before it is done."""
        now, waited = time.perf_counter(), self._clock.seconds["data wait"]
        if self._last is not None:
            then, waited_then, done = self._last
            waits = waited - waited_then  # from `then` on, unless the loop sampled or saved first
            self.seconds += min(max(then + waits - done.result(), 0.0), waits)
        self._last = now, waited, self._watching.submit(_when_done, metrics)

    def close(self) -> None:
        """Ends the thread once its step is done."""
        self._watching.shutdown(wait=False)


def _when_done(metrics: dict[str, jax.Array]) -> float:
    with contextlib.suppress(Exception):  # the loop gets it as well
        jax.block_until_ready(metrics)
    return time.perf_counter()


def data_in_words(config: ConfigDict) -> str:
    """Where the images come from, as `config`, the `data` part of a configuration, says: "folder /data/imagenet"."""
    name = f"{config.name}/{config.split}" if config.source == "tfds" else ""
    return " ".join(part for part in (config.source, name, config.path) if part)


class Writers:
    """Scalars and pictures of a run: `metrics.jsonl`, one line per logged step; `tensorboard/`; `samples/`; and
    `evaluation.jsonl`, one line per evaluation.

    A resumed run appends. What the disk or bucket does not take is missing, with a warning: no reason to end a run.
    """

    def __init__(self, mirror: Mirror):
        self.folder, self.path = mirror.folder, mirror.fetch("metrics.jsonl")
        mirror.fetch("evaluation.jsonl")
        self.jsonl = self._open()
        self.tensorboard = TensorBoard(self.folder / "tensorboard")

    def _open(self) -> Any:
        return self.path.open("a", buffering=1, encoding="utf-8")

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Writes one line of scalars. A value that is not finite becomes null in the JSONL, a gap in TensorBoard."""
        line = {k: v if np.isfinite(v) else None for k, v in values.items()}
        with going_on("metrics"):
            if self.jsonl.closed:  # it could not be opened again
                self.jsonl = self._open()
            self.jsonl.write(json.dumps({"step": step, "time": time.time(), **line}) + "\n")
            self.tensorboard.scalars(step, {name: value for name, value in line.items() if value is not None})

    def picture(self, step: int, grid_HxWx3: np.ndarray) -> None:
        """Keeps a grid of samples (uint8) as a file, and shows it in TensorBoard."""
        with going_on("samples"):
            save_png(grid_HxWx3, self.folder / "samples" / f"step_{step:08d}.png")
            self.tensorboard.picture(step, "samples", grid_HxWx3)

    def evaluation(self, found: Evaluated) -> None:
        """Adds a line to `evaluation.jsonl`, and the metrics to TensorBoard."""
        line = {"step": found.step, "time": time.time(), "metrics": found.metrics, **found.about}
        with going_on("evaluation.jsonl"):
            with (self.folder / "evaluation.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            self.tensorboard.scalars(found.step, {f"evaluation/{name}": v for name, v in found.metrics.items()})

    def flush(self) -> None:
        """What was written so far outlives this process, also in a mounted bucket, which stores what is closed."""
        with going_on("metrics"):
            self.jsonl.close()
            self.jsonl = self._open()
            self.tensorboard.flush()

    def close(self) -> None:
        """Flushes both."""
        with going_on("metrics"):
            self.jsonl.close()
            self.tensorboard.close()


@contextlib.contextmanager
def going_on(what: str) -> Iterator[None]:
    """Within it, an error of the system or of a bucket is a warning: `what` cannot be written."""
    try:
        yield
    except Exception as error:  # libraries for buckets have their own kinds
        logging.warning("%s cannot be written (%s: %s), which does not end the run.", what, type(error).__name__, error)
