"""How does a file or folder get its name only when it is whole, on a disk or in a bucket?"""

import contextlib
import json
import os
import pathlib
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

from deco_jax.errors import Stopped, UsageError
from deco_jax.storage.paths import AnyPath, is_remote
from deco_jax.storage.retry import is_transient, retried

SHARED_FOLDER_DELAY = 60  # seconds until a host surely sees what another has written to a network folder


@contextlib.contextmanager
def write_beside(path: AnyPath, first_wins: bool = False) -> Iterator[pathlib.Path]:
    """A draft of `path`, to be made within as a file or folder on this machine, which takes its place at the end.

    What was at `path` stays until then, and stays if writing fails. The draft has the name of `path`, in a folder of
    its own, since some writers look at names: beside it on a disk, in the temporary folder for a bucket, to which it is
    then copied, a folder file by file. Errors of the operating system come through: in the middle of a run they are no
    bad input. Where a user's path is tried first, see `writing`.

    Args:
      path: of the file or folder.
      first_wins: a folder that is at `path` by the end stays, as another process made the same.
    """
    if is_remote(path):
        with tempfile.TemporaryDirectory() as around:
            draft = pathlib.Path(around) / path.name
            yield draft
            if not (first_wins and path.exists()):
                upload(draft, path)
        return
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


def upload(source: pathlib.Path, target: AnyPath) -> None:
    """Copies a file, or a folder file by file, from this machine into a bucket; each file appears whole."""
    files = sorted(p for p in source.rglob("*") if p.is_file()) if source.is_dir() else [source]
    for file in files:
        to = target / file.relative_to(source).as_posix() if source.is_dir() else target

        def copy(file: pathlib.Path = file, to: AnyPath = to) -> None:
            with file.open("rb") as reader, to.open("wb") as writer:
                while block := reader.read(2**24):
                    writer.write(block)

        retried(f"writing {to}", copy)


@contextlib.contextmanager
def writing(path: AnyPath, what: str = "written") -> Iterator[None]:
    """Within it, an error of the system or the bucket that does not pass is a UsageError that names `path`."""
    try:
        yield
    except (UsageError, Stopped):
        raise
    except Exception as error:
        if is_transient(error) or not (isinstance(error, OSError) or is_remote(path)):
            raise
        raise UsageError(f"{path} cannot be {what}: {_reason(path, error)}.") from error


def reading(path: AnyPath) -> contextlib.AbstractContextManager[None]:
    """As `writing`, for what is read."""
    return writing(path, "read")


def _reason(path: AnyPath, error: Exception) -> str:
    """In words; libraries for buckets name addresses of requests, and no remedy."""
    text = str(error).strip() or type(error).__name__
    if not is_remote(path):
        return text.splitlines()[0]
    if isinstance(error, FileNotFoundError):
        scheme, _, rest = os.fspath(path).partition("://")
        return f"it is not there, or there is no bucket {scheme}://{rest.partition('/')[0]}"
    reason = text.splitlines()[-1].rstrip(".")
    if str(getattr(error, "code", "")) == "401" or isinstance(error, PermissionError) or "credential" in text.lower():
        reason += (
            ". Credentials come from `gcloud auth application-default login`, a key file that is named by "
            "GOOGLE_APPLICATION_CREDENTIALS, or the service account of the machine"
        )
    return reason


def write_bytes(path: AnyPath, content: bytes) -> None:
    """Replaces `path` by a file of this content, which is on the disk when this returns.

    Raises:
      UsageError: the disk or bucket does not take it.
      TransientError: it still fails after a while.
    """
    with writing(path):
        if is_remote(path):
            return retried(f"writing {path}", lambda: path.write_bytes(content))
        with write_beside(path) as draft, draft.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())


def write_json(path: AnyPath, values: Any) -> None:
    """Replaces `path` by these values as JSON."""
    write_bytes(path, json.dumps(values, indent=2, ensure_ascii=False).encode())


def wait_until(condition: Callable[[], bool]) -> bool:
    """Waits until `condition` holds, as files of other hosts appear; returns whether it came to hold in time."""
    end = time.monotonic() + SHARED_FOLDER_DELAY
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.5)
    return True
