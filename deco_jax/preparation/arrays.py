"""How are numbers of one shape computed for every record and stored, file by file? So features and states come about.

A file is a shard of the job: it goes on where an earlier start ended, and processes and parts share the files.
"""

import contextlib
import dataclasses
import datetime
import json
import os
from collections.abc import Callable, Iterator, Sequence

import grain
import numpy as np
from ml_collections import ConfigDict

from deco_jax import storage
from deco_jax.data.pipeline import BadRecords, Batch, read_ahead
from deco_jax.data.records import Source
from deco_jax.data.stored import (
    Contents,
    Damaged,
    about_file,
    array_file,
    bad_file,
    check_file,
    missing_files,
    read_contents,
    stored_as,
)
from deco_jax.errors import Stopped, UsageError
from deco_jax.jobs import Job, Progress, StopRequest, find_part, open_job
from deco_jax.parallel import mesh as meshes
from deco_jax.parallel import processes
from deco_jax.parallel.mesh import Layout
from deco_jax.preparation.folder import free_space, of_each, remove_drafts, reopen, report_others, set_aside
from deco_jax.preparation.reading import LoadCaptions, LoadRecords
from deco_jax.storage import AnyPath
from deco_jax.version import __version__

FILE_BYTES = 2**30  # of a file, at most
Begun = Callable[[], np.ndarray]  # waits for what a batch gives: (B, N, F)


@dataclasses.dataclass(frozen=True)
class Work:
    """What is to be computed of which records, and how."""

    config: ConfigDict  # the whole of it
    source: Source
    contents: Contents
    unit: str  # of what is read: "image"
    load: LoadRecords | LoadCaptions  # numbers of records → a batch
    compute: Callable[[Layout], Callable[[Batch], Begun]]  # this process's devices → from a batch on
    batch_size: int


def prepare(out: str, part: str | None, open_work: Callable[[AnyPath], Work]) -> None:
    """Stores the numbers of every record, as `data/stored.py` describes.

    Args:
      out: the folder; with several processes or parts, one they all see.
      part: see `jobs.find_part`.
      open_work: what is to be done, given the folder; raises UsageError if it cannot be.

    Raises:
      BrokenRun: this process of several fails alone, or others went away.
      TransientError: data or folder do not answer; or this machine is about to be taken away.
      UsageError: that of `open_work`; the folder holds something else; or too many records cannot be read.
    """
    with open_job("--out", out, find_part(part, os.environ)) as job:
        work = processes.agree(lambda: open_work(job.folder))
        contents = work.contents
        processes.assert_equal("what is to be prepared", repr(dataclasses.astuple(contents)))
        processes.agree(lambda: _is_of(job.folder, contents))  # before anything is written there
        job.claim(lambda: _begin(job, contents))
        others = processes.agree(lambda: _set_aside_damaged(job, contents))

        def missing() -> list[int]:
            return sorted({*missing_files(job.folder, contents), *_damaged(job.folder, contents, others)})

        done = about_file(contents.kind, job.folder).exists() and not missing()
        if set(processes.allgather(str(done))) == {"True"}:  # another one may just have set a file aside
            job.say(f"{job.folder} is done: it holds the {contents.kind} of all {contents.records:,} records.")
            return
        if job.first and missing():  # another part may just have mended it
            whole, partial = (about_file(contents.kind, job.folder, complete) for complete in (True, False))
            reopen(whole, partial, contents)
        job.say("\n".join([*work.source.summary(), _summary(contents, len(missing()))]))
        _write_files(job, work)
        if job.finish(missing, lambda: _complete(work, job.folder)):
            job.say(f"{job.folder} is done. To train with it: --config.{contents.setting}={job.folder}")


def rows_a_file(tokens: int, features: int) -> int:
    """Of (tokens, features) numbers of two bytes each."""
    return max(FILE_BYTES // (2 * tokens * features), 1)


def _bytes(contents: Contents, *shape: int) -> int:
    return int(np.prod(shape, dtype=np.int64)) * contents.dtype.itemsize


def _summary(contents: Contents, missing: int) -> str:
    size = _bytes(contents, contents.rows, contents.tokens, contents.features)
    return (
        f"{contents.kind.capitalize()} of {contents.records:,} records, {contents.tokens}×{contents.features} "
        f"{contents.dtype.name} each: {size / 1e9:,.3f} GB in {contents.files} files; {missing} are to be made."
    )


# --- the folder


def _begin(job: Job, contents: Contents) -> None:
    """Removes what a start that was killed has left, and writes into the folder what its numbers are of."""
    remove_drafts(job, contents.kind)
    needed = sum(_bytes(contents, *contents.shape(file)) for file in missing_files(job.folder, contents))
    if needed > (free := free_space(job.folder)):
        raise UsageError(
            f"--out={job.folder} has {free / 1e9:,.1f} GB free, and the missing {contents.kind} take "
            f"{needed / 1e9:,.1f} GB; choose another disk, or let every step compute them: {contents.setting}=''."
        )
    if not _is_of(job.folder, contents):
        storage.write_json(about_file(contents.kind, job.folder, complete=False), dataclasses.asdict(contents))


def _is_of(folder: AnyPath, contents: Contents, damaged: bool = False) -> bool:
    """Whether the folder holds such numbers, and says that they are those; UsageError if others, or it does not say.

    Not all of them, if files are missing or `damaged`.
    """
    kind = contents.kind
    with storage.reading(folder):
        said = read_contents(type(contents), folder)
    if said is None:
        if next(folder.glob(f"{kind}-*"), None):
            raise UsageError(f"--out={folder} holds {kind}, and nothing that says of what; choose another folder.")
        return False
    there, _, complete = said
    different = contents.differences(there, complete and not damaged and not missing_files(folder, contents))
    if different:
        told = "; ".join(different)
        raise UsageError(f"--out={folder} holds {kind} of something else: {told}. Choose another folder.")
    return True


def _set_aside_damaged(job: Job, contents: Contents) -> list[int]:
    """Renames this worker's damaged files, so that they are missing; returns those of other parts that are damaged."""
    there = sorted(set(range(contents.files)) - set(missing_files(job.folder, contents)))
    looked_at = [*job.share(there), *(file for file in there if not job.is_mine(file))]
    damaged = _damaged(job.folder, contents, looked_at)
    if damaged:
        _is_of(job.folder, contents, damaged=True)
    for file in filter(job.is_mine, damaged):
        set_aside(array_file(contents.kind, job.folder, file))
    others = [file for file in damaged if not job.is_mine(file)]
    report_others(job, others, lambda file: array_file(contents.kind, job.folder, file).name)
    return others


def _damaged(folder: AnyPath, contents: Contents, files: Sequence[int]) -> list[int]:
    """Those of the files that have not the header and size that they must have, or are not there."""

    def is_damaged(file: int) -> bool:
        try:
            check_file(folder, file, contents)
        except Damaged:
            return True
        return False

    return [file for file, bad in zip(files, of_each(is_damaged, files), strict=True) if bad]


# --- the numbers


def _write_files(job: Job, work: Work) -> None:
    """This process's share of the files that are missing."""
    contents, config = work.contents, work.config.data
    layout, mine = meshes.local_layout(), job.share(missing_files(job.folder, contents))
    batch_size = meshes.round_up(min(work.batch_size, contents.records), layout.mesh)
    bad = BadRecords(work.source, config, _bad_so_far(job.folder, contents))
    bad.check(np.array([], int))
    rows = sum(contents.shape(file)[0] for file in mine)
    with contextlib.ExitStack() as closing:
        progress = closing.enter_context(contextlib.closing(Progress(rows, work.unit, active=job.first)))
        computed = iter(())
        if mine:
            records_MxB = np.concatenate([_in_batches(contents, file, batch_size) for file in mine])
            closing.callback(work.load.threads.close)
            workers = min(config.workers, len(records_MxB))
            batches = read_ahead(grain.MapDataset.source(records_MxB).map(work.load), workers)
            computed = _compute(work.compute(layout), closing.enter_context(contextlib.closing(batches)))
        for file in job.shards(mine):
            with contextlib.suppress(Stopped):
                path = array_file(contents.kind, job.folder, file)
                _write_file(path, contents, file, computed, bad, progress, job.stop)


def _in_batches(contents: Contents, file: int, batch_size: int) -> np.ndarray:
    """Numbers of a file's records, (batches, B); the last batch is filled up with −1."""
    first, rows = file * contents.records_a_file, contents.shape(file)[0]
    records = np.full((-(-rows // batch_size), batch_size), -1)
    records.flat[:rows] = np.arange(first, first + rows)
    return records


def _compute(begin: Callable[[Batch], Begun], batches: Iterator[Batch]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Of each batch the numbers (B, N, F), NaN where the record is unreadable, and `bad` (B,).

    One batch is read back while the devices work on the next.
    """

    def read_back(batch: Batch, begun: Begun) -> tuple[np.ndarray, np.ndarray]:
        numbers = np.array(begun())
        numbers[batch["bad"] >= 0] = np.nan
        return numbers, batch["bad"]

    under_way = None
    for batch in batches:
        following = batch, begin(batch)
        if under_way is not None:
            yield read_back(*under_way)
        under_way = following
    yield read_back(*under_way)


def _write_file(
    path: AnyPath,
    contents: Contents,
    number: int,
    computed: Iterator[tuple[np.ndarray, np.ndarray]],
    bad: BadRecords,
    progress: Progress,
    stop: StopRequest,
) -> None:
    """One file, from as many batches as it takes; what is unreadable in it is written first. Stopped: none."""
    shape, dtype, unreadable = contents.shape(number), stored_as(contents.dtype), []
    missing = shape[0]
    with storage.write_beside(path) as draft, draft.open("wb") as file:
        header = {"descr": dtype.str, "fortran_order": False, "shape": shape}
        with storage.writing(path):
            np.lib.format.write_array_header_1_0(file, header)
        while missing > 0:
            stop.check()
            numbers_BxNxF, bad_B = next(computed)
            bad.check(bad_B)
            unreadable += bad_B[bad_B >= 0].tolist()
            rows = min(missing, len(numbers_BxNxF))
            with storage.writing(path):
                file.write(numbers_BxNxF[:rows].astype(contents.dtype, copy=False).view(dtype))
            progress.update(progress.done + rows)
            missing -= rows
        with storage.writing(path):  # some network folders tell only now that they are full
            file.flush()
            os.fsync(file.fileno())
        bad_file(path).unlink(missing_ok=True)
        if unreadable:
            storage.write_json(bad_file(path), unreadable)


def _bad_so_far(folder: AnyPath, contents: Contents) -> list[int]:
    """Numbers of the records that could not be read when the files that are there were made."""
    kind, missing, found = contents.kind, set(missing_files(folder, contents)), []
    for path in folder.glob(f"{kind}-*.bad.json"):
        if int(path.name.split(".")[0].removeprefix(f"{kind}-")) in missing:
            continue
        try:
            found += [int(record) for record in json.loads(path.read_text())]
        except (ValueError, TypeError) as error:
            raise UsageError(f"{path} is damaged ({error}); remove it and its .npy.") from error
    return sorted(found)


def _complete(work: Work, folder: AnyPath) -> None:
    """Writes the file that says what the numbers are of, and that all are there."""
    bad, kind = _bad_so_far(folder, work.contents), work.contents.kind
    BadRecords(work.source, work.config.data, bad).check(np.array([], int))
    made = {"bad": bad, "deco_jax": __version__, "date": datetime.date.today().isoformat()}
    storage.write_json(about_file(kind, folder), dataclasses.asdict(work.contents) | made)
    about_file(kind, folder, complete=False).unlink(missing_ok=True)
