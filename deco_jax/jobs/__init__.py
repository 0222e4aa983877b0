"""What all long jobs share: their folder and its lease, signals, shards of work for each machine, progress."""

from deco_jax.jobs.job import Job, find_part, open_job
from deco_jax.jobs.progress import Progress
from deco_jax.jobs.stop import StopRequest

__all__ = ["Job", "Progress", "StopRequest", "find_part", "open_job"]
