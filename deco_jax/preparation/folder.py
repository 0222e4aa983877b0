"""Can files be written into the folder of a preparation? Drafts of a killed start go, and space is looked at."""

import concurrent.futures
import dataclasses
import itertools
import math
import re
import shutil
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from ml_collections import ConfigDict

from deco_jax import storage
from deco_jax.errors import UsageError
from deco_jax.jobs import Job
from deco_jax.jobs.job import WHOLE
from deco_jax.jobs.progress import say
from deco_jax.storage import AnyPath

T = TypeVar("T")
THREADS = 16  # buckets and network folders answer late


def remove_drafts(job: Job, kind: str) -> None:
    """Removes the drafts that a start which was killed has left, on a disk; those of other parts are in use.

    Args:
      job: in the folder of which they are.
      kind: of the files, as their names begin: "features".

    Raises:
      UsageError: they cannot be removed.
    """
    if storage.is_remote(job.folder):
        return
    ours = re.compile(rf"\.{kind}(?:-(\d{{5}}))?\.(?:npy|array_record|(?:bad\.|partial\.)?json)\..+")
    with storage.writing(job.folder):
        for draft in job.folder.glob(f".{kind}*"):
            file = ours.fullmatch(draft.name)
            if file and (job.part == WHOLE or (file[1] and job.is_mine(int(file[1])))):
                shutil.rmtree(draft) if draft.is_dir() else draft.unlink()


def check_no_class(folder: AnyPath, data: ConfigDict) -> None:
    """Raises UsageError if `folder`, which is --out, lies where the source takes it for a folder of a class."""
    if data.source != "folder" or not data.path:
        return
    out, root = storage.resolved(folder), storage.resolved(data.path)
    if root in out.parents and not out.relative_to(root).parts[0].startswith("."):
        raise UsageError(f"--out={folder} lies in data.path={data.path}, as the classes do; choose another folder.")


def of_each(look: Callable[[int], T], files: Sequence[int]) -> list[T]:
    """What `look` finds of each file, several at a time."""
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(look, files))


def set_aside(path: AnyPath) -> None:
    """Renames a damaged file, so that it is missing and nothing of it is lost."""
    names = itertools.chain([f"{path.name}.damaged"], (f"{path.name}.damaged{k}" for k in itertools.count(2)))
    with storage.writing(path):
        target = next(target for target in map(path.with_name, names) if not target.exists())
        path.rename(target)
    say(f"{path.name} is damaged: it is kept as {target.name}, for you to remove, and made anew.")


def report_others(job: Job, damaged: Sequence[int], name: Callable[[int], str]) -> None:
    """Says which damaged files are of other parts, whose work it is to make them anew."""
    for file in damaged:
        job.say(f"{name(file)} is damaged; the part that made it makes it anew, or a start without parts.")


def reopen(whole: AnyPath, partial: AnyPath, contents: Any) -> None:
    """Of a folder that was complete: it says so no more, until all files are there again.

    Args:
      whole: the file that says what is in it, and that it is complete.
      partial: the one that says so until it is.
      contents: the dataclass that is written there.
    """
    if whole.exists():
        storage.write_json(partial, dataclasses.asdict(contents))
        with storage.writing(whole):
            whole.unlink(missing_ok=True)


def free_space(folder: AnyPath) -> float:
    """Bytes that are free on a folder's disk; infinite where nobody says."""
    usage = None if storage.is_remote(folder) else shutil.disk_usage(folder)
    return usage.free if usage and usage.total else math.inf  # some network folders say nothing
