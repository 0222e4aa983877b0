"""How does a file that grows, like a log, get into a bucket, to which nothing can be appended?

It grows in a folder of this machine, and a thread copies what changed, so that no step of a run waits for a bucket.
"""

import pathlib
import shutil
import tempfile
import threading

from absl import logging

from deco_jax.errors import TransientError
from deco_jax.storage.paths import AnyPath, is_remote
from deco_jax.storage.retry import is_transient, retried
from deco_jax.storage.writing import upload


class Mirror:
    """A local folder, `folder`: `target` itself if that is local; what is in it is copied to a `target` in a bucket."""

    def __init__(self, target: AnyPath):
        self.target = target
        self.remote = is_remote(target)
        self.folder = pathlib.Path(tempfile.mkdtemp(prefix="deco_mirror_")) if self.remote else target
        self.folder.mkdir(parents=True, exist_ok=True)
        self._copied: dict[pathlib.Path, tuple[int, int]] = {}  # file: size and time of what is in the bucket
        self._lock, self._thread, self._again = threading.Lock(), None, False
        self._error: Exception | None = None  # of the last flush

    def fetch(self, name: str) -> pathlib.Path:
        """`folder / name`, with what earlier runs wrote to that file, so that it can be appended to.

        Raises:
          TransientError: the bucket does not answer.
        """
        file, source = self.folder / name, self.target / name
        if self.remote and retried(f"reading {source}", source.exists):
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(retried(f"reading {source}", source.read_bytes))
            self._copied[file] = _state(file)
        return file

    def flush(self) -> None:
        """Starts to copy what changed, and returns at once; while a copy is under way, one more follows it."""
        if not self.remote:
            return
        with self._lock:
            self._again = True
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name=f"copying to {self.target}", daemon=True)
                self._thread.start()

    def close(self) -> None:
        """Flushes, and waits until everything is in the bucket.

        Raises:
          TransientError, OSError, …: something is not; the folder of this machine then stays, and is named.
        """
        if not self.remote:
            return
        self.flush()
        while thread := self._thread:
            thread.join()
        if self._error is None:
            shutil.rmtree(self.folder, ignore_errors=True)
        elif is_transient(self._error):
            raise TransientError(f"{self._error}; what was written is in {self.folder}") from self._error
        else:
            raise self._error

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._again:
                    self._thread = None
                    return
                self._again = False
            try:
                self._copy()
                self._error = None
            except Exception as error:
                self._error = error
                logging.warning("%s is behind %s (%s); tried again later.", self.target, self.folder, error)

    def _copy(self) -> None:
        for file in sorted(self.folder.rglob("*")):
            state = _state(file)
            if file.is_file() and self._copied.get(file) != state:
                upload(file, self.target / file.relative_to(self.folder).as_posix())
                self._copied[file] = state


def _state(file: pathlib.Path) -> tuple[int, int]:
    stat = file.stat()
    return stat.st_size, stat.st_mtime_ns
