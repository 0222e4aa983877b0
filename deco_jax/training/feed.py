"""What does a process feed into a step once its data do not come? Zeros, until all processes know and end together."""

import concurrent.futures
import time
from collections.abc import Iterator

import numpy as np
from absl import logging

from deco_jax.data.pipeline import Batch
from deco_jax.errors import TransientError
from deco_jax.jobs import StopRequest
from deco_jax.storage import is_transient

LISTEN, PATIENCE = 1.0, 10.0  # seconds: between looks for a signal, and for which data are waited for after one


class Feed:
    """This process's batches. After an error that may pass (`absent`), each is of zeros, which no step may train on.

    So it is when the process was told to stop and data are not there in time: a machine may be about to be taken away
    while its storage does not answer.

    A process that ended at once would take the others with it, who would lose what was trained since the last save.
    """

    def __init__(self, batches: Iterator[Batch], stop: StopRequest):
        self.batches, self.stop = batches, stop
        self._reader = concurrent.futures.ThreadPoolExecutor(1, "reading")
        self.zeros: Batch | None = None  # shaped as a batch; None before the first
        self.error: Exception | None = None

    @property
    def absent(self) -> bool:
        """Whether the batches are zeros."""
        return self.error is not None

    def next(self) -> Batch:
        """The next batch; raises what reading raises, except errors that may pass, once there was a batch."""
        if self.error is None:
            try:
                batch = self._wait(self._reader.submit(next, self.batches))
            except Exception as error:
                if self.zeros is None or not is_transient(error):
                    raise
                logging.error("The data do not come: %s. The run saves and ends.", error)
                self.error = error
            else:
                if self.zeros is None:
                    self.zeros = {name: np.zeros(value.shape, value.dtype) for name, value in batch.items()}
                    self.zeros["bad"] -= 1
                return batch
        return dict(self.zeros)

    def check(self) -> None:
        """Raises TransientError if the data did not come."""
        if self.error is not None:
            raise TransientError(f"the data do not come: {self.error}") from self.error

    def _wait(self, reading: concurrent.futures.Future[Batch]) -> Batch:
        told = None  # when it was seen that the process is to stop
        while True:
            try:
                return reading.result(LISTEN)
            except TimeoutError:
                if reading.done():
                    raise
            told = told or (time.monotonic() if self.stop else None)
            if told is not None and time.monotonic() - told > PATIENCE:
                raise TransientError(f"told to stop by {self.stop.by} while waiting for them")

    def close(self) -> None:
        """Ends the reading; what does not answer is left to the end of the process."""
        self._reader.shutdown(wait=False, cancel_futures=True)
        if not getattr(self.batches, "gi_running", False):
            self.batches.close()
