"""The order of the data, and each process's share of it.

    batch k ─► this process's rows of it ─► their places in the shuffled epochs ─► records ─► read and crop, row by row

Global batch k is a function of the seed and k alone. Neither the number of processes nor that of workers and threads
changes it, and the position in the data is the number of batches consumed: resuming is starting at batch k.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import hashlib
import itertools
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from multiprocessing import resource_tracker
from typing import NamedTuple

import grain
import numpy as np
from absl import flags, logging
from ml_collections import ConfigDict

from deco_jax.conditions import Captions
from deco_jax.data.decode import TooSmall
from deco_jax.data.features import StoredFeatures
from deco_jax.data.records import Source
from deco_jax.data.states import StoredStates
from deco_jax.data.tokens import Tokenizer
from deco_jax.errors import TransientError, UsageError

Batch = dict[str, np.ndarray]
USUAL_THREADS = 4  # with more, those of one process wait for each other
MOST_SMALL = 10_000  # in a row, before nearly all of the images are taken for too small


class BadLimit(NamedTuple):
    """How many records of a source may be unreadable."""

    records: int
    setting: str  # that says so, with its value

    @classmethod
    def from_config(cls, config: ConfigDict, source: Source) -> "BadLimit":
        """The lower one of the two that `config`, the `data` part of a configuration, has."""
        share = int(config.max_bad_share * len(source) + 1e-6)  # 0.29 · 100 is a little less than 29
        if share >= config.max_bad_records:
            return cls(config.max_bad_records, f"data.max_bad_records={config.max_bad_records}")
        return cls(share, f"data.max_bad_share={config.max_bad_share:g} of {len(source):,} records")


class Threads:
    """So many threads of this process, which start when they are first needed. Pickled, it is another process's own."""

    def __init__(self, count: int):
        self.count, self._pool = count, concurrent.futures.ThreadPoolExecutor(count, "rows")

    @classmethod
    def from_config(cls, config: ConfigDict) -> "Threads":
        """As many as `config`, the `data` part of a configuration, says; by default by the cores of the machine."""
        cores = len(os.sched_getaffinity(0))
        return cls(config.threads or min(max(cores // max(config.workers, 1), 2), USUAL_THREADS))

    def __reduce__(self) -> tuple[type["Threads"], tuple[int]]:
        return Threads, (self.count,)

    def each(self, do: Callable[[int], None], number: int) -> None:
        """Calls `do` with 0, 1, … below `number`, begun in this order.

        After an error nothing more is begun; of several, that of the lowest number is raised.
        """
        left, errors = collections.deque(range(number)), {}

        def work() -> None:
            with contextlib.suppress(IndexError):
                while True:
                    item = left.popleft()
                    try:
                        do(item)
                    except Exception as error:
                        left.clear()
                        errors[item] = error

        for worker in [self._pool.submit(work) for _ in range(min(self.count, number))]:
            worker.result()
        if errors:
            raise errors[min(errors)]

    def close(self) -> None:
        """Ends the threads, without waiting for what they do at the moment."""
        self._pool.shutdown(wait=False, cancel_futures=True)


@dataclasses.dataclass(frozen=True)
class LoadShare(grain.transforms.Map):
    """Reads this process's rows of a global batch, given the batch's number."""

    source: Source
    features: StoredFeatures | None
    order: grain.MapDataset  # of the records, epoch after epoch
    batch_size: int  # B, rows of a global batch
    rows: np.ndarray
    limit: BadLimit
    threads: Threads
    tokenizer: Tokenizer | None = None  # of captions
    states: StoredStates | None = None  # of captions, which then are not tokenized
    crop_seed: int | None = None  # of random crops; None = the centre
    min_side: int = 0  # of the source's decoder
    ended: list[Exception] = dataclasses.field(default_factory=list)  # not empty: why nobody waits for further batches

    def map(self, number: int) -> Batch:
        """Of each of the R rows what `batches` yields."""
        first, batch, lock = int(number) * self.batch_size, {}, threading.Lock()
        places = [first + row for row in self.rows.tolist()]
        records = [int(self.order[place]) for place in places]

        def load(row: int) -> None:
            loaded = self._load(records[row], places[row])
            with lock:  # the first one to come tells the shapes
                if not batch:
                    batch.update({key: np.empty((len(records), *np.shape(x)), x.dtype) for key, x in loaded.items()})
            for key, value in loaded.items():
                batch[key][row] = value

        self.threads.each(load, len(records))
        return batch

    def _load(self, index: int, place: int) -> Batch:
        """A record, or another one that can be read and is large enough; `bad` as `batches` says."""
        offset = None if self.crop_seed is None else crop_offset(self.crop_seed, place)
        unreadable, small = [], 0
        for record in self._candidates(index, place):
            if self.ended:
                raise self.ended[0]
            try:
                bad = unreadable[0] if unreadable else -1 - small
                row = {**self.source.load(record, offset), "bad": np.int32(bad)}
                if self.states is not None:
                    row["text"] = self.states[record]
                    del row[Captions.name]
                elif self.tokenizer is not None:
                    row["tokens"] = self.tokenizer.encode(row.pop(Captions.name))
                return row if self.features is None else row | {"features": self.features[record]}
            except (TransientError, UsageError, MemoryError) as error:  # say nothing about the record
                self.ended.append(error)  # other threads, which are joined, would try for minutes as well
                raise
            except TooSmall as error:
                small, reason = small + 1, error
            except Exception as error:  # whatever a decoder throws at a broken file
                unreadable, reason = [*unreadable, record], error
                if len(unreadable) > self.limit.records:
                    break
        if small:
            raise UsageError(
                f"Of {len(unreadable) + small} records in a row none can be taken, {small} of them being too small "
                f"({reason}); lower data.min_side."
            )
        raise UsageError(
            f"All {len(unreadable)} records from {self.source.describe(index)} on cannot be read ({reason}); "
            f"{self.limit.setting}."
        )

    def _candidates(self, index: int, place: int) -> Iterator[int]:
        """The record `index`, and those that may stand in for it: the ones after it, of which few are bad.

        Where small images are skipped these may lie in long rows, after which one image would stand in for all. So the
        others come from the order, half an epoch later, in steps of a batch: no two rows of a batch have a place in
        common.
        """
        number = len(self.source)
        if not self.min_side:
            return ((index + skipped) % number for skipped in range(number))
        tries, later = min(MOST_SMALL, 100 * number), place + number // 2
        return itertools.chain([index], (int(self.order[later + k * self.batch_size]) for k in range(tries)))


def crop_offset(seed: int, place: int) -> float:
    """Where the square of the record at this place in the epochs lies: uniform, from 0 to below 1.

    A function of both numbers alone, so that neither resuming nor the number of workers and processes changes a crop.
    """
    bits = np.random.Philox(key=np.array([seed, place], np.uint64)).random_raw()
    return (bits >> 11) * 2.0**-53


class BadRecords:
    """Counts, names and limits the records that could not be read."""

    def __init__(self, source: Source, config: ConfigDict, seen: Iterable[int] = (), log: bool = True):
        """Begins with those `seen` before a restart.

        Args:
          source: the records.
          config: the `data` part of a configuration.
          seen: numbers of records, of which the log has said what is wrong.
          log: whether others are named in the log.
        """
        self.source, self.limit, self.log = source, BadLimit.from_config(config, source), log
        self.seen, self.small, self.min_side = set(seen), 0, config.min_side
        self.last = source.describe(max(self.seen)) if self.seen else ""

    def check(self, bad_B: np.ndarray) -> None:
        """Takes note of a batch's bad records, as `batches` says; raises UsageError once there are more than the limit.

        Of images that are too small only the number of times is logged, whenever it has doubled.
        """
        before, self.small = self.small, self.small + int((-1 - bad_B[bad_B < -1]).sum())
        if self.log and before.bit_length() < self.small.bit_length():
            logging.warning("Images smaller than data.min_side=%d skipped so far: %d.", self.min_side, self.small)
        for index in sorted(set(bad_B[bad_B >= 0].tolist()) - self.seen):
            self.seen.add(index)
            self.last = self.source.describe(index)
            if not self.log:
                continue
            try:
                self.source.load(index)
                reason = "its image is readable now"
            except Exception as error:
                reason = f"{type(error).__name__}: {error}"
            logging.warning("Skipped unreadable record %d: %s (%s)", len(self.seen), self.last, reason)
        if len(self.seen) > self.limit.records:
            raise UsageError(
                f"{len(self.seen)} records cannot be read, the last {self.last}; "
                f"{self.limit.setting} allows fewer. Mend the data or raise the limit."
            )


def batches(
    config: ConfigDict,
    seed: int,
    source: Source,
    start: int,
    rows: np.ndarray | None = None,
    features: StoredFeatures | None = None,
    tokenizer: Tokenizer | None = None,
    states: StoredStates | None = None,
) -> Iterator[Batch]:
    """This process's rows of the global batches from number `start` on, without end.

    Args:
      config: the `data` part of a configuration.
      seed: of the shuffles, and of random crops.
      source: the records.
      start: the first batch's number.
      rows: which R of a batch's B rows to read; None = all.
      features: a teacher's, of the same records; one without counts as unreadable.
      tokenizer: of the captions, for sources that have them.
      states: a text encoder's, of the same records' captions; one without counts as unreadable.

    Raises:
      UsageError: more records in a row than allowed cannot be read.
      TransientError: the storage still fails after a while; nothing was counted, and no batch was changed.

    Yields:
      image (R, H, W, 3) uint8, the fields of the source's condition (R, …), bad (R,) int32 (−1: the
      record is good; −1 − n: it stands in for n that are too small; else the number of one that cannot be read, for
      which it stands in), and of what is stored that of the records: features (R, N, F) float16, and in
      place of tokens (R, L) int32 the states text (R, L, E) bfloat16.
    """
    rows = np.arange(config.batch_size) if rows is None else rows
    limit, threads = BadLimit.from_config(config, source), Threads.from_config(config)
    order = grain.MapDataset.range(len(source)).seed(seed).shuffle()  # places beyond its end are of later epochs
    crop_seed = seed if config.crop == "random" else None
    load = LoadShare(
        source,
        features,
        order,
        config.batch_size,
        rows,
        limit,
        threads,
        tokenizer,
        states,
        crop_seed,
        config.min_side,
    )
    numbers = grain.MapDataset.range(start, sys.maxsize // config.batch_size)
    with contextlib.ExitStack() as closing:
        closing.callback(threads.close)
        closing.callback(load.ended.append, TransientError("reading has ended"))  # for threads; workers are ended
        yield from read_ahead(numbers.map(load), config.workers)


def read_ahead(dataset: grain.MapDataset, workers: int) -> Iterator[Batch]:
    """The elements of `dataset` (one at least) in order, made ahead by so many processes; 0 = threads in this one."""
    # Threads and buffers count batches: 256 rows of 256² are 50 MB, with stored features 150 MB; of 512², four times.
    options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=2)
    dataset = dataset.to_iter_dataset(options)
    if workers:
        if not flags.FLAGS.is_parsed():  # grain reads absl's flags when it starts workers
            flags.FLAGS.mark_as_parsed()
        options = grain.MultiprocessingOptions(num_workers=workers)
        dataset = dataset.mp_prefetch(options, worker_init_fn=_end_with_parent)
    with contextlib.ExitStack() as closing:
        with _stop_signals_blocked():
            iterator = iter(dataset)
            closing.callback(iterator.close)  # also if the first batch fails: threads would go on trying
            closing.enter_context(_killed_worker_said())
            first = [next(iterator)]
        yield _without_name(first.pop())  # and keeps no batch
        yield from map(_without_name, iterator)


@contextlib.contextmanager
def _killed_worker_said() -> Iterator[None]:
    """grain's errors have no class of their own."""
    try:
        yield
    except RuntimeError as error:
        if "terminated unexpectedly" not in str(error):
            raise
        raise TransientError(
            "a process that reads the data was killed, perhaps as memory ran out; fewer data.workers need less"
        ) from error


def _without_name(batch: Batch) -> Batch:
    """The batch; what shared memory of a worker's it is in has lost its name, and so is free when its arrays are.

    grain would take the name away later, in a thread, and not at all from what is still in use at the end of the run.
    """
    for array in batch.values():
        if (memory := getattr(array, "shm", None)) is not None:
            memory.unlink()
            array._unlink_on_del = False
    return batch


def _end_with_parent(worker: int, workers: int) -> None:
    """A worker whose run was killed (SIGKILL, out of memory) would wait for it forever."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextlib.contextmanager
def _stop_signals_blocked() -> Iterator[None]:
    """Keeps Ctrl-C and SIGTERM for later, and from the workers that are started within, who inherit this.

    Terminals and schedulers signal every process of a run; the main one saves, and then ends its workers.
    """
    resource_tracker.ensure_running()  # the first worker's start would do it, and unblock both
    signals = {signal.SIGINT, signal.SIGTERM}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def fingerprint(config: ConfigDict, seed: int, source: Source) -> str:
    """A hash of what decides the global batches: names, labels and order of the records, seed and sizes."""
    crop = () if config.crop == "centre" else (config.crop,)  # younger than the others
    parts = (source.identity, len(source), seed, config.batch_size, config.image_size, *crop)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
