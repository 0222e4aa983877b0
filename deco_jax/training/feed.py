"""What does a process feed into a step once its data do not come? Zeros, until all processes know and end together."""

from collections.abc import Iterator

import numpy as np
from absl import logging

from deco_jax.data.pipeline import Batch
from deco_jax.errors import TransientError
from deco_jax.storage import is_transient


class Feed:
    """This process's batches. After an error that may pass (`absent`), each is of zeros, which no step may train on.

    A process that ended at once would take the others with it, who would lose what was trained since the last save.
    """

    def __init__(self, batches: Iterator[Batch]):
        self.batches = batches
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
                batch = next(self.batches)
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
