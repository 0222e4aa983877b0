"""Did a step go wrong, and what do the processes tell each other? Read one step late, so that no step is waited for."""

import time

import jax
import numpy as np

from deco_jax.checkpoints.store import Checkpoints
from deco_jax.data.pipeline import BadRecords
from deco_jax.errors import AgreedError, UsageError
from deco_jax.jobs import StopRequest
from deco_jax.parallel.mesh import Flag


class Watch:
    """Reads what came out of a step, and what the processes said in it, while the next step runs.

    What it holds afterwards is the same on every process at the same step.
    """

    def __init__(self, bad: BadRecords, max_nonfinite: int, checkpoints: Checkpoints, save_minutes: float):
        self.bad, self.max_nonfinite, self.checkpoints = bad, max_nonfinite, checkpoints
        self.save_seconds, self.saved_at = 60 * save_minutes, time.monotonic()
        self.in_flight: tuple[int, jax.Array, jax.Array] | None = None  # (step, bad steps in a row, messages)
        self.stop_agreed = self.save_agreed = False
        self.last_whole: int | None = None  # the last step for which all data came; None = they still come

    def flags(self, stop: StopRequest, absent: bool) -> int:
        """What this process tells the others with the next step. The first one's clock says when it is time to save."""
        late = 0 < self.save_seconds <= time.monotonic() - self.saved_at and jax.process_index() == 0
        return Flag.STOP * bool(stop) | Flag.SAVE * late | Flag.ABSENT * absent

    def told_to_stop(self, stop: StopRequest) -> bool:
        """Whether this is the step to stop at, the same one on every process."""
        return bool(stop) if jax.process_count() == 1 else self.stop_agreed

    def saved(self) -> None:
        """The time until the next save begins. All steps have been read (see `finish`)."""
        self.saved_at, self.save_agreed = time.monotonic(), False

    def __call__(self, step: int, metrics: dict[str, jax.Array], messages: jax.Array) -> None:
        """Takes note of a step that has been dispatched, and waits for the one before: batches do not pile up.

        Raises:
          AgreedError: too many bad steps in a row, or bad records; on every process at the same step.
        """
        previous, self.in_flight = self.in_flight, (step, metrics["skipped_in_a_row"], messages)
        if previous is not None:
            self._read(*previous)

    def finish(self) -> None:
        """Waits for the step that is under way, and reads it."""
        previous, self.in_flight = self.in_flight, None
        if previous is not None:
            self._read(*previous)

    def _read(self, step: int, skipped_in_a_row: jax.Array, messages: jax.Array) -> None:
        skipped, messages = jax.device_get((skipped_in_a_row, messages))
        flags = np.bitwise_or.reduce(messages[:, 0])
        self.stop_agreed |= bool(flags & Flag.STOP)
        self.save_agreed |= bool(flags & Flag.SAVE)
        if flags & Flag.ABSENT and self.last_whole is None:
            self.last_whole = step - 1
        try:
            self.bad.check(messages[:, 1:].ravel())
        except UsageError as error:
            raise AgreedError(str(error)) from error
        if skipped >= self.max_nonfinite:
            good = self.checkpoints.latest()
            raise AgreedError(
                f"loss or gradient not finite for {skipped} steps up to step {step} "
                f"(train.max_nonfinite={self.max_nonfinite}); these steps changed no weights. "
                f"Last checkpoint: {'none' if good is None else self.checkpoints.folder / str(good)}. "
                "A lower optimizer.lr, optimizer.clip_norm=1 or optimizer.beta2=0.95 may help; "
                "the same command goes on with them."
            )
