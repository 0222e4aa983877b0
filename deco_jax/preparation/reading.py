"""How are records read by their numbers, in workers, for what is computed of them?"""

import dataclasses
from collections.abc import Callable, Sequence

import grain
import numpy as np

from deco_jax.data.pipeline import Batch, Threads
from deco_jax.data.records import Source
from deco_jax.data.tokens import NONE, Tokenizer
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
        images = np.zeros((len(records), self.size, self.size, 3), np.uint8)
        labels = np.zeros(len(records), np.int32)

        def load(row: int, number: int) -> None:
            record = self.source.load(number)
            images[row], labels[row] = record["image"], record.get("label", 0)

        return {"image": images, "label": labels, **_each(records, load, self.threads, self.ended)}


@dataclasses.dataclass(frozen=True)
class LoadCaptions(grain.transforms.Map):
    """Reads captions by the numbers of their records, and no images; of one that cannot be read there are no tokens."""

    source: Source
    tokenizer: Tokenizer
    threads: Threads
    ended: list[Exception] = dataclasses.field(default_factory=list)  # as of `LoadRecords`

    def map(self, records: Sequence[int]) -> Batch:
        """B numbers → tokens (B, L) int32, record and bad; else as of `LoadRecords`.

        The number after the last record's is that of the empty prompt.
        """
        tokens = np.full((len(records), self.tokenizer.length), NONE, np.int32)

        def load(row: int, number: int) -> None:
            tokens[row] = self.tokenizer.encode(self.source.caption(number) if number < len(self.source) else "")

        return {"tokens": tokens, **_each(records, load, self.threads, self.ended)}


def _each(records: Sequence[int], load: Callable[[int, int], None], threads: Threads, ended: list[Exception]) -> Batch:
    """Calls `load` with every row and its record's number, several at a time → record and bad."""
    bad = np.full(len(records), -1)

    def load_row(row: int) -> None:
        if (number := int(records[row])) < 0:
            return
        if ended:
            raise ended[0]
        try:
            load(row, number)
        except (TransientError, UsageError, MemoryError) as error:  # say nothing about the record
            ended.append(error)  # other threads, which are joined, would try for minutes as well
            raise
        except Exception:  # whatever a decoder throws at a broken file
            bad[row] = number

    threads.each(load_row, len(records))
    return {"record": np.asarray(records), "bad": bad}
