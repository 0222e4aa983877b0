"""How do readers that need a file of this machine, as they map it, read one in a bucket?

It is copied once per host to ~/.cache/deco_jax/buckets, under a lock, and checked; processes that start together wait
for the first. A file that changed in the bucket is copied again, next to the old one.
"""

import base64
import concurrent.futures
import contextlib
import errno
import fcntl
import hashlib
import os
import pathlib
import time
from collections.abc import Iterator
from typing import Any

import fsspec
from absl import logging

from deco_jax.errors import UsageError
from deco_jax.storage.paths import AnyPath, is_remote
from deco_jax.storage.retry import patience, retried
from deco_jax.storage.writing import reading, write_beside, writing

CACHE = "~/.cache/deco_jax/buckets"
THREADS = 8  # files that are copied at a time
VERSION = ("generation", "ETag", "md5Hash", "crc32c", "size", "mtime", "LastModified")  # of an object


def local_copy(path: AnyPath) -> pathlib.Path:
    """A file or folder of this machine with the content of `path`, which is `path` itself if that is local.

    Raises:
      UsageError: there is no such file in the bucket, or it may not be read.
      TransientError: the bucket does not answer, or what arrives is not what it says.
    """
    if not is_remote(path):
        return path
    files, inside = fsspec.core.url_to_fs(os.fspath(path))
    with reading(path):
        found = retried(f"reading {path}", lambda: files.find(inside, detail=True))
    if not found:
        raise UsageError(f"{path} does not exist.")
    told = [(name, *(str(info.get(key)) for key in VERSION)) for name, info in sorted(found.items())]
    key = hashlib.sha256(repr((os.fspath(path), told)).encode()).hexdigest()[:24]
    copy = pathlib.Path(CACHE).expanduser() / key / path.name
    end = time.monotonic() + patience()  # also for those that wait while another process tries
    with reading(path), host_lock(copy.parent):
        if copy.exists():
            return copy
        logging.info("Copying %s (%.1f MB) to %s.", path, sum(info["size"] for info in found.values()) / 1e6, copy)
        with write_beside(copy) as draft, concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
            copies = [
                pool.submit(_copy, files, info, draft / name.removeprefix(inside).strip("/"), end)
                for name, info in found.items()
            ]
            for one in copies:
                one.result()
    return copy


@contextlib.contextmanager
def host_lock(path: pathlib.Path) -> Iterator[None]:
    """Within it, no other process of this machine is in one for the same `path`; waits for it. It uses `path`.lock."""
    lock = path.with_name(f"{path.name}.lock")
    with writing(lock):
        lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                raise
            logging.warning("%s cannot be locked (%s); processes that start together may do work twice.", path, error)
        yield


def _copy(files: fsspec.AbstractFileSystem, info: dict[str, Any], target: pathlib.Path, end: float) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)

    def copy() -> None:
        files.get_file(info["name"], str(target))
        if damage := _damage(target, info):
            raise ConnectionError(f"what arrived is damaged: {damage}")

    retried(f"reading {info['name']}", copy, end - time.monotonic())


def _damage(file: pathlib.Path, info: dict[str, Any]) -> str:
    """What is wrong with a copy; "" if it is what the bucket says."""
    if file.stat().st_size != info["size"]:
        return f"{file.stat().st_size} bytes of {info['size']}"
    if "md5Hash" in info:
        with file.open("rb") as content:
            digest = hashlib.file_digest(content, "md5").digest()
        if base64.b64encode(digest).decode() != info["md5Hash"]:
            return "another MD5 hash"
    return ""
