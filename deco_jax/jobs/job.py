"""What does every long job have? Its folder, held by it alone; signals; its share of the work; an orderly end.

    with open_job("--out", out, find_part(part)) as job:      # on every process of the run
        things = processes.agree(lambda: open_things(…))      # bad input on one process ends all, with one message
        job.claim()                                           # from here on no other run works in the folder
        for shard in job.shards(missing()):                   # this worker's; ends early when told to stop
            with storage.write_beside(job.folder / f"{shard}.npy") as draft:
                …                                             # job.stop.check() gives a shard up
        job.finish(missing, complete)                         # when all shards are there, whoever made them

Machines come from what starts them: the processes of jax.distributed share the work, and so do the tasks of a SLURM
array, which know nothing of each other. A shard is a file, and what is missing is what is left to do: so the same
command goes on after any end.
"""

import contextlib
import dataclasses
import itertools
import re
from collections.abc import Callable, Collection, Iterator, Mapping

import jax

from deco_jax import storage
from deco_jax.errors import TransientError, UsageError
from deco_jax.jobs.progress import say
from deco_jax.jobs.stop import StopRequest, stop_request
from deco_jax.parallel import processes
from deco_jax.storage import AnyPath, lease

WHOLE = (0, 1)  # the part of a job that is not shared between independent workers
GO_ON = "The same command goes on from there."


@dataclasses.dataclass
class Job:
    """A job as one of its processes sees it."""

    folder: AnyPath
    name: str  # of the folder in messages, "--out=gs://bucket/features"
    part: tuple[int, int]  # (index, count) of this run among those that share the work and know nothing of each other
    stop: StopRequest  # of this process
    closing: contextlib.ExitStack  # what ends with the job, unless the run broke: closing may wait for other processes
    holding: contextlib.ExitStack  # what this process gives back in any case
    first: bool = dataclasses.field(default_factory=lambda: jax.process_index() == 0)
    held: lease.Lease | None = None  # the claim on the folder, of process 0
    stopped: bool = False  # `shards` ended early; on all processes alike

    def claim(self, clean: Callable[[], None] = lambda: None) -> None:
        """From here on this run alone works in the folder, or on its part; `clean`, on process 0, then begins.

        Raises:
          AgreedError: another run does, it cannot be written, or it is not the same folder on every process.
        """

        def begin() -> str:
            if not self.first:
                return ""
            self.held = self.holding.enter_context(lease.hold(self.folder, self.name, self.part))
            clean()
            return self.held.path.name

        def find() -> None:
            if not self.first and not storage.wait_until((self.folder / lease.FOLDER / claim).exists):
                raise UsageError(f"{self.name} is not the folder that process 0 writes to; it must be shared.")

        claim = processes.broadcast(processes.agree(begin))
        processes.agree(find)

    def check(self) -> None:
        """Raises TransientError if another run has taken the folder over."""
        if self.held is not None and self.held.lost:
            self.closing.pop_all()  # would write into the other run's folder
            raise TransientError(f"{self.name}: {self.held.lost}")

    def say(self, text: str) -> None:
        """Prints a line, on process 0."""
        if self.first:
            say(text)

    def is_mine(self, shard: int) -> bool:
        """Whether this run makes it, in one of its processes."""
        index, count = self.part
        return shard // jax.process_count() % count == index

    def share(self, shards: Collection[int]) -> list[int]:
        """Those of the shards that this worker makes, among all processes of all parts."""
        index, count = self.part
        worker, workers = index * jax.process_count() + jax.process_index(), count * jax.process_count()
        return [shard for shard in shards if shard % workers == worker]

    def shards(self, missing: Collection[int]) -> Iterator[int]:
        """This worker's share of the missing shards, one by one.

        After each, the processes of this run tell each other whether one was told to stop; then all end early. So call
        it on every process, and do not leave the loop.
        """
        mine = self.share(missing)
        for turn in itertools.count():
            wants = "stop" if self.stop else "more" if turn < len(mine) else ""
            said = processes.allgather(wants)
            self.stopped = "stop" in said
            if self.stopped or "more" not in said:
                return
            self.check()
            if turn < len(mine):
                yield mine[turn]

    def finish(self, missing: Callable[[], Collection[int]], complete: Callable[[], None]) -> bool:
        """Once no shard is missing, process 0 calls `complete`; of several parts, any that sees all shards does.

        Returns:
          Whether the whole work is done; otherwise says what is left.

        Raises:
          AgreedError: shards that this run has made are not there: it is not one folder for all processes.
        """
        if self.stopped and (left := processes.broadcast(str(len(missing())))) != "0":
            by = self.stop.by or "a signal to another process"
            self.say(f"Stopped by {by}; {left} shards are missing in {self.folder}. {GO_ON}")
            return False

        def end() -> str:
            own = self.first and any(map(self.is_mine, missing()))  # another host's may appear late
            if not self.first or (storage.wait_until(lambda: not missing()) if own else not missing()):
                if self.first:
                    complete()
                return "done"
            if any(map(self.is_mine, missing())):
                raise UsageError(f"{self.name} lacks files that were written; it must be one folder for all processes.")
            self.say(f"Part {self.part[0]} of {self.part[1]} is done; {len(missing())} shards of others are missing.")
            return "left"

        return processes.broadcast(processes.agree(end)) == "done"


@contextlib.contextmanager
def open_job(option: str, name: str, part: tuple[int, int] = WHOLE) -> Iterator[Job]:
    """A job in the folder that a user names; within it signals raise a flag, and no process waits for one that failed.

    Args:
      option: whose value is the folder: "--out".
      name: that value, a path or an address.
      part: see `find_part`; a job whose processes work together on everything has one part.

    Raises:
      BrokenRun: this process of several failed alone, or others went away.
      TransientError: this machine is about to be taken away; all is saved, and another one is to go on.
      UsageError: the folder is none.
    """
    folder = processes.agree(lambda: storage.to_folder(option, name))
    with (
        stop_request() as stop,
        contextlib.ExitStack() as holding,
        contextlib.ExitStack() as closing,
        processes.fail_together(closing),
    ):
        yield Job(folder, f"{option}={name}", part, stop, closing, holding)
    if stop.notice:  # with 0, whoever started this process would take the job for finished
        raise TransientError(f"stopped by {stop.by}")


def find_part(given: str | None, environment: Mapping[str, str]) -> tuple[int, int]:
    """The part of the work that this run is to do: (index, count), as `--part` or a SLURM array says; else all of it.

    Args:
      given: "3/16", from 0/16 to 15/16; None = not given.
      environment: usually `os.environ`.

    Raises:
      UsageError: that is no part.
    """
    if given is not None:
        match = re.fullmatch(r"(\d+)/(\d+)", given)
        if not match or int(match[1]) >= int(match[2]):
            raise UsageError(f"--part={given} is no part; of 16 the first is 0/16 and the last 15/16.")
        return int(match[1]), int(match[2])
    if "SLURM_ARRAY_TASK_ID" not in environment:
        return WHOLE
    names = [f"SLURM_ARRAY_TASK_{x}" for x in ("ID", "MIN", "STEP", "COUNT")]
    if missing := [name for name in names if not environment.get(name, "").isdecimal()]:
        raise UsageError(f"{names[0]} is set, and {missing[0]} is not; SLURM sets both. Or pass the part: --part=I/N.")
    task, first, step, count = (int(environment[name]) for name in names)
    index, rest = divmod(task - first, step)
    if rest or index >= count:
        raise UsageError(
            f"the array of {count} tasks has gaps, and does not say which part task {task} is; pass it: "
            f"--part=$SLURM_ARRAY_TASK_ID/COUNT, with the COUNT of the first start."
        )
    return index, count
