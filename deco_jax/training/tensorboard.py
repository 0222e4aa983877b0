"""Curves and pictures for TensorBoard, which never hold up a run.

The events are tensorboardX's; its own writer is not used, as its thread ends with the first error of the disk, and
whoever has more to write then waits for it for ever.
"""

import concurrent.futures
import contextlib
import itertools
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from absl import logging

FLUSH_SECONDS = 60.0


class TensorBoard:
    """Writes events to files in a folder, in a thread. After an error, which is a warning, it begins another file."""

    def __init__(self, folder: pathlib.Path):
        import tensorboardX  # noqa: F401  imports torch where that is installed, so not before a run needs it

        self.folder, self.numbers, self.flushed = folder, itertools.count(), 0.0
        self.events: Any = None
        self.pool = concurrent.futures.ThreadPoolExecutor(1)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Adds a point to each of these curves."""
        from tensorboardX import summary

        for name, value in values.items():
            self._submit(lambda name=name, value=value: self._add(step, summary.scalar(name, value)))

    def picture(self, step: int, name: str, image_HxWx3: np.ndarray) -> None:
        """Adds a uint8 picture."""
        from tensorboardX import summary

        self._submit(lambda: self._add(step, summary.image(name, image_HxWx3, dataformats="HWC")))

    def flush(self) -> None:
        """Returns when what was added is on the disk, as far as that takes it."""
        self._submit(self._flush).result()

    def close(self) -> None:
        """Flushes, and ends the thread."""
        self.flush()
        self.pool.shutdown()

    def _submit(self, work: Callable[[], None]) -> concurrent.futures.Future:
        return self.pool.submit(self._going_on, work)

    def _going_on(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:
            logging.warning("TensorBoard's events cannot be written (%s), which does not end the run.", error)
            broken, self.events = self.events, None  # it may end within a record
            with contextlib.suppress(Exception):
                broken.close()

    def _add(self, step: int, summary: Any) -> None:
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event

        if self.events is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.events = EventsWriter(str(self.folder / "events"), f".{next(self.numbers)}")
        self.events.write_event(Event(wall_time=time.time(), step=step, summary=summary))
        if time.monotonic() - self.flushed > FLUSH_SECONDS:
            self._flush()

    def _flush(self) -> None:
        self.flushed = time.monotonic()
        if self.events is not None:
            self.events.flush()
