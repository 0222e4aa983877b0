"""How do the bytes of a record come from a disk or a bucket? In one go, and again after errors that pass.

Only then is anything decoded: so an error of the storage is never taken for a broken image.
"""

import errno
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import fsspec
from absl import logging

from deco_jax import storage
from deco_jax.storage import AnyPath
from deco_jax.storage.fetch import VERSION


def read_bytes(path: str, start: int = 0, count: int | None = None) -> bytes:
    """`count` bytes (None: all) of a file from byte `start` on; fewer if it ends before.

    Raises:
      OSError: it is not there, or may not be read.
      UsageError: its bucket may not be read.
      TransientError: reading still fails after a while, or its whole folder went away, as one that is mounted does.
    """
    read = _read_remote if storage.is_remote(path) else _read_local
    return storage.retried(f"reading {path}", lambda: read(path, start, count))


def _read_local(path: str, start: int, count: int | None) -> bytes:
    try:
        with open(path, "rb") as file:
            file.seek(start)
            return file.read(-1 if count is None else count)
    except FileNotFoundError as error:
        if os.path.isdir(os.path.dirname(path)):
            raise
        raise OSError(errno.ESTALE, "its folder is gone", path) from error


def _read_remote(path: str, start: int, count: int | None) -> bytes:
    storage.to_path(path[: path.index("://") + 3])  # prepares the library: this may be a worker
    system, name = fsspec.core.url_to_fs(path)
    try:
        return system.cat_file(name, start, None if count is None else start + count)
    except FileNotFoundError:
        raise
    except Exception:  # credentials that ran out are no fault of the one file
        with storage.reading(storage.to_path(path)):
            raise


def file_version(path: str) -> list[Any]:
    """What changes when a file does: size and times (see `times_of`) on a disk, size and what else a bucket says."""
    if storage.is_remote(path):
        system, name = fsspec.core.url_to_fs(path)
        info = storage.retried(f"looking at {path}", lambda: system.info(name))
        return [info["size"], *(str(info.get(key)) for key in VERSION)]
    found = storage.retried(f"looking at {path}", lambda: os.stat(path))
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns]


def times_of(folder: str | os.PathLike) -> list[int]:
    """When a folder's entries last changed, and when anything of it did, in ns since 1970.

    Programs that unpack or copy set the first one back to what it was elsewhere. The second one nobody can set.
    """
    found = os.stat(folder)
    return [found.st_mtime_ns, found.st_ctime_ns]


def file_size(path: str) -> int:
    """Of a file, in bytes."""
    if storage.is_remote(path):
        system, name = fsspec.core.url_to_fs(path)
        return storage.retried(f"looking at {path}", lambda: system.size(name))
    return storage.retried(f"looking at {path}", lambda: os.path.getsize(path))


def list_files(
    root: AnyPath, times: dict[str, list[int]] | None = None, tell: Callable[[int], None] = lambda files: None
) -> list[str]:
    """All files below a folder by their names from there on, "cat/1.png", in the order of their parts.

    A hidden folder on the first level is not looked into, and listed as ".git/". Links to files count as files; links
    to folders are followed on the first level alone; how many lead to nothing, or to folders further down, is logged.

    Args:
      root: the folder.
      times: gets of each folder below it that was looked into, "cat", its `times_of`; of one in a bucket nothing.
      tell: is called now and then with the number of files so far.
    """
    if storage.is_remote(root):
        system, name = fsspec.core.url_to_fs(str(root))
        found = storage.retried(f"listing {root}", lambda: system.find(name))
        prefix = f"{name.rstrip('/')}/"
        names = [file.removeprefix(prefix) for file in found if not file.endswith("/")]
    else:
        names = storage.retried(f"listing {root}", lambda: _walk_all(root, {} if times is None else times, tell))
    # As sorting by name.split("/"), of which a million would take a gigabyte: no name has the character 0.
    return sorted(names, key=lambda name: name.replace("/", "\0"))


def _walk_all(root: pathlib.Path, times: dict[str, list[int]], tell: Callable[[int], None]) -> list[str]:
    names, lost = [], []
    times.clear()  # of a try that failed
    for name in _walk(root, "", times, lost):
        names.append(name)
        if len(names) % 1000 == 0:
            tell(len(names))
    if lost:
        logging.warning("%s: left out are %d links that lead to no file, such as %s.", root, len(lost), lost[0])
    return names


def _walk(root: pathlib.Path, below: str, times: dict[str, list[int]], lost: list[str]) -> Iterator[str]:
    if below:
        times[below[:-1]] = times_of(root / below)  # before listing: what comes later is seen later
    with os.scandir(root / below) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=not below):
                folder = f"{below}{entry.name}/"
                yield from [folder] if folder.startswith(".") else _walk(root, folder, times, lost)
            elif entry.is_file():
                yield below + entry.name
            elif entry.is_symlink():
                lost.append(below + entry.name)
