"""Can files be written into the folder of a preparation? Drafts of a killed start go, and space is looked at."""

import math
import re
import shutil

from deco_jax import storage
from deco_jax.jobs import Job
from deco_jax.jobs.job import WHOLE
from deco_jax.storage import AnyPath


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
    with storage.writing(job.folder):
        for draft in job.folder.glob(f".{kind}*"):
            file = re.match(rf"\.{kind}-(\d+)", draft.name)
            if job.part == WHOLE or (file and job.is_mine(int(file[1]))):
                shutil.rmtree(draft) if draft.is_dir() else draft.unlink()


def free_space(folder: AnyPath) -> float:
    """Bytes that are free on a folder's disk; infinite where nobody says."""
    usage = None if storage.is_remote(folder) else shutil.disk_usage(folder)
    return usage.free if usage and usage.total else math.inf  # some network folders say nothing
