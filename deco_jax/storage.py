"""How does a file or folder get its name only when it is whole, and how does one run keep a folder to itself?"""

import contextlib
import fcntl
import json
import os
import pathlib
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

from absl import logging

from deco_jax.errors import UsageError

SHARED_FOLDER_DELAY = 60  # seconds until a host surely sees what another has written to a network folder


@contextlib.contextmanager
def write_beside(path: pathlib.Path, first_wins: bool = False) -> Iterator[pathlib.Path]:
    """A draft beside `path`, to be made within as a file or folder, which takes the place of `path` at the end.

    What was at `path` stays until then, and stays if writing fails. The draft has the name of `path`, in a folder of
    its own, since some writers look at names. Errors of the operating system come through: in the middle of a run
    they are no bad input. Where a user's path is tried first, see `writing`.

    Args:
      path: of the file or folder.
      first_wins: a folder that is at `path` by the end stays, as another process made the same.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as around:
        draft, replaced = pathlib.Path(around) / path.name, pathlib.Path(around) / ".replaced"
        yield draft
        if path.is_dir() and not first_wins:
            path.rename(replaced)  # a folder cannot be renamed over another
        try:
            draft.replace(path)
        except OSError:
            if replaced.exists():
                replaced.rename(path)
            if not (first_wins and path.is_dir()):
                raise


@contextlib.contextmanager
def writing(path: pathlib.Path) -> Iterator[None]:
    """Within it, an error of the operating system is a UsageError that names `path`."""
    try:
        yield
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error}.") from error


def write_bytes(path: pathlib.Path, content: bytes) -> None:
    """Replaces `path` by a file of this content, which is on the disk when this returns.

    Raises:
      UsageError: the disk does not take it.
    """
    with writing(path), write_beside(path) as draft, draft.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def write_json(path: pathlib.Path, values: Any) -> None:
    """Replaces `path` by these values as JSON."""
    write_bytes(path, json.dumps(values, indent=2, ensure_ascii=False).encode())


def local_folder(option: str, name: str) -> pathlib.Path:
    """The folder that a user names with `option`, there or not; UsageError if it is a file or a bucket's address."""
    folder = pathlib.Path(name).expanduser()
    if "://" in name or (folder.exists() and not folder.is_dir()):
        raise UsageError(f"{option}={name} is no folder. A bucket must be mounted (with gcsfuse, say).")
    return folder


@contextlib.contextmanager
def locked(folder: pathlib.Path, name: str) -> Iterator[None]:
    """Within it, this process alone uses `folder`, which is made if missing.

    As far as the folder's locks reach: on gcsfuse that is one host.

    Args:
      folder: gets a file `.lock`.
      name: of the folder in messages, for instance "--workdir=runs/xl".

    Raises:
      UsageError: another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UsageError(f"{name} is in use by another process.") from error
        except OSError as error:  # Lustre without -o flock, NFS without a lock daemon
            logging.warning("%s cannot be locked (%s): see to it yourself that one run uses it.", folder, error)
        yield


def wait_until(condition: Callable[[], bool]) -> bool:
    """Waits until `condition` holds, as files of other hosts appear; returns whether it came to hold in time."""
    end = time.monotonic() + SHARED_FOLDER_DELAY
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.5)
    return True
