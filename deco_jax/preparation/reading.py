"""How are records read by their numbers, in workers, for what is computed of them?"""

import dataclasses
from collections.abc import Sequence

import grain
import numpy as np

from deco_jax.data.pipeline import Batch, Threads
from deco_jax.data.records import Source
from deco_jax.errors import TransientError, UsageError


@dataclasses.dataclass(frozen=True)
class LoadRecords(grain.transforms.Map):
    """Reads records by their numbers, several at a time; one that cannot be read is black, with label 0."""

    source: Source
    size: int  # pixels along a side
    threads: Threads
    ended: list[Exception] = dataclasses.field(default_factory=list)  # not empty: why no batch is waited for

    def map(self, records: Sequence[int]) -> Batch:
        """B numbers, −1 for none → image (B, H, W, 3) uint8, label, record and bad, each (B,).

        `record` is the number, and so is `bad` where it cannot be read, elsewhere −1.

        Raises:
          TransientError: the storage still fails after a while.
          UsageError: the source may not be read.
        """
        batch = {
            "image": np.zeros((len(records), self.size, self.size, 3), np.uint8),
            "label": np.zeros(len(records), np.int32),
            "record": np.asarray(records),
            "bad": np.full(len(records), -1),
        }

        def load(row: int) -> None:
            if (number := int(records[row])) < 0:
                return
            if self.ended:
                raise self.ended[0]
            try:
                record = self.source.load(number)
                batch["image"][row], batch["label"][row] = record["image"], record.get("label", 0)
            except (TransientError, UsageError, MemoryError) as error:  # say nothing about the record
                self.ended.append(error)  # other threads, which are joined, would try for minutes as well
                raise
            except Exception:  # whatever a decoder throws at a broken file
                batch["bad"][row] = number

        self.threads.each(load, len(records))
        return batch
