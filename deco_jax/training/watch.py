"""Did a step go wrong, and does any process want to stop? Read one step late, so that no step is waited for."""

import jax

from deco_jax.checkpoints.store import Checkpoints
from deco_jax.data.pipeline import BadRecords
from deco_jax.errors import AgreedError, UsageError
from deco_jax.training.preemption import StopRequest


class Watch:
    """Reads what came out of a step, and what the processes said in it, while the next step runs."""

    def __init__(self, bad: BadRecords, max_nonfinite: int, checkpoints: Checkpoints):
        self.bad, self.max_nonfinite, self.checkpoints = bad, max_nonfinite, checkpoints
        self.in_flight: tuple[int, jax.Array, jax.Array] | None = None  # (step, bad steps in a row, messages)
        self.stop_agreed = False

    def told_to_stop(self, stop: StopRequest) -> bool:
        """Whether this is the step to stop at, the same one on every process."""
        return bool(stop) if jax.process_count() == 1 else self.stop_agreed

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
        if self.in_flight is not None:
            self._read(*self.in_flight)

    def _read(self, step: int, skipped_in_a_row: jax.Array, messages: jax.Array) -> None:
        skipped, messages = jax.device_get((skipped_in_a_row, messages))
        self.stop_agreed |= bool(messages[:, 0].any())
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
