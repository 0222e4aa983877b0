"""What does a run tell while it trains? Scalars to JSONL and TensorBoard, pictures, a progress bar or lines."""

import json
import os
import pathlib
import time
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from deco_jax.parallel.hardware import peak_flops
from deco_jax.training.goodput import Clock, Goodput


class Reporter:
    """All that a run tells while it trains. The scalars of a step are read when the next one is under way."""

    def __init__(
        self, config: ConfigDict, batch_size: int, workdir: pathlib.Path, step: int, clock: Clock, image_flops: float
    ):
        """`config` is the `train` part of a configuration, `step` the first, `image_flops` a step's per image."""
        active = jax.process_index() == 0
        self.config, self.batch_size, self.clock, self.step = config, batch_size, clock, step
        peak = peak_flops(jax.devices()[0])
        self.mfu_of_an_image = None if peak is None else image_flops / (peak * jax.device_count())
        self.writers, self.progress = Writers(workdir, active), Progress(config.steps, step, active)
        self.goodput = Goodput(workdir, step, clock, active)
        self.waiting: tuple[int, dict[str, jax.Array]] | None = None  # a step to log, its metrics on the devices
        self.since: tuple[int, float, float] | None = None  # see `_now`, when something was last logged

    def after(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Takes note of a step that has been dispatched; logs the one that was waiting."""
        self.write()
        self.step = step
        if self.since is None:  # the first step's time is the compiler's
            self.since = self._now(step)
        if step % self.config.log_every == 0 or step == self.config.steps:
            self.waiting = step, metrics

    def write(self) -> None:
        """Writes the scalars that are waiting, if there are any."""
        if self.waiting is None:
            return
        (step, metrics), self.waiting = self.waiting, None
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        before, self.since = self.since, self._now(step)
        steps, busy, data_wait = (new - old for new, old in zip(self.since, before, strict=True))
        if steps:
            values["step_seconds"], values["data_wait_seconds"] = busy / steps, data_wait / steps
            values["images_per_second"] = self.batch_size / values["step_seconds"]
            if self.mfu_of_an_image is not None:
                values["mfu"] = values["images_per_second"] * self.mfu_of_an_image
        self.writers.scalars(step, values)
        self.progress.update(step, values)

    def _now(self, step: int) -> tuple[int, float, float]:
        """(step, a clock that stands still while the run samples, saves or compiles, seconds of waiting for data)."""
        seconds = self.clock.seconds
        busy = time.perf_counter() - sum(seconds[name] for name in ("eval", "checkpoint", "compile"))
        return step, busy, seconds["data wait"]

    def saved(self, step: int) -> None:
        """Takes note of a checkpoint."""
        self.goodput.note(step)
        self.writers.flush()

    def close(self, error_type: type | None, *_: Any) -> None:
        """Ends logs and bar, and says where the time went; called as the run ends, with the exception's type if any."""
        ended = error_type is None and self.step >= self.config.steps
        self.writers.close()
        self.progress.bar.close()
        self.progress.say(self.goodput.close(self.step, ended))


class Writers:
    """Scalars and pictures of a run: `metrics.jsonl`, one line per logged step, and `tensorboard/`.

    A resumed run appends to both. Only the writers of the first process are active; those of the others write nothing.
    """

    def __init__(self, workdir: pathlib.Path, active: bool):
        import tensorboardX  # imports torch where that is installed, so not before a run needs it

        self.path = workdir / "metrics.jsonl" if active else pathlib.Path(os.devnull)
        self.jsonl = self._open()
        self.tensorboard = tensorboardX.SummaryWriter(str(workdir / "tensorboard"), write_to_disk=active)

    def _open(self) -> Any:
        return self.path.open("a", buffering=1, encoding="utf-8")

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Writes one line of scalars. A value that is not finite becomes null in the JSONL."""
        line = {k: v if np.isfinite(v) else None for k, v in values.items()}
        self.jsonl.write(json.dumps({"step": step, "time": time.time(), **line}) + "\n")
        for name, value in values.items():
            self.tensorboard.add_scalar(name, value, step)

    def picture(self, step: int, grid_HxWx3: np.ndarray) -> None:
        """Shows a grid of samples (uint8) in TensorBoard."""
        self.tensorboard.add_image("samples", grid_HxWx3, step, dataformats="HWC")
        self.tensorboard.flush()

    def flush(self) -> None:
        """What was written so far outlives this process, also in a mounted bucket, which stores what is closed."""
        self.jsonl.close()
        self.jsonl = self._open()
        self.tensorboard.flush()

    def close(self) -> None:
        """Flushes both."""
        self.jsonl.close()
        self.tensorboard.close()


class Progress:
    """A bar with loss, images/s and time left in a terminal; elsewhere one line per logged step."""

    def __init__(self, total: int, start: int, active: bool):
        self.total, self.active = total, active
        disable = None if active else True  # None: unless stderr is a terminal
        self.bar = tqdm(total=total, initial=start, unit="step", dynamic_ncols=True, smoothing=0.05, disable=disable)

    def update(self, step: int, values: dict[str, float]) -> None:
        """Shows the scalars logged for `step`."""
        shown, left = f"loss {values['loss']:.4f}", ""
        if "step_seconds" in values:
            shown += f", {values['images_per_second']:.0f} images/s"
            left = f", {_duration((self.total - step) * values['step_seconds'])} left"
        if self.bar.disable:
            self.say(f"step {step}/{self.total}: {shown}{left}")
        else:
            self.bar.set_postfix_str(shown, refresh=False)
            self.bar.update(step - self.bar.n)

    def say(self, text: str) -> None:
        """Prints a line, above the bar if there is one."""
        if self.active:
            with tqdm.external_write_mode():
                print(text, flush=True)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s"
