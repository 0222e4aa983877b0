"""How are the crops of all images computed once and stored? `deco prepare --images`."""

import concurrent.futures
import contextlib
import dataclasses
import datetime
import hashlib
import itertools
import os
from collections.abc import Callable, Iterable, Iterator

import grain
import numpy as np
import PIL
from array_record.python.array_record_module import ArrayRecordWriter
from ml_collections import ConfigDict

from deco_jax import storage
from deco_jax.conditions import ClassLabels
from deco_jax.data.decode import check_centred, check_every_size
from deco_jax.data.pipeline import BadRecords, Batch, Threads, read_ahead
from deco_jax.data.prepared import (
    LABEL,
    MANIFEST,
    PARTIAL,
    WRITING,
    Contents,
    FileInfo,
    encode,
    images_file,
    info_file,
    missing_files,
    read_info,
    read_manifest,
)
from deco_jax.data.reading import file_size
from deco_jax.data.records import Source, compare
from deco_jax.data.sources import open_source
from deco_jax.errors import Stopped, UsageError
from deco_jax.jobs import Job, Progress, find_part, open_job
from deco_jax.jobs.progress import say
from deco_jax.parallel import processes
from deco_jax.preparation.folder import (
    check_no_class,
    free_space,
    of_each,
    remove_drafts,
    reopen,
    report_others,
    set_aside,
)
from deco_jax.preparation.reading import LoadRecords
from deco_jax.storage import AnyPath
from deco_jax.version import __version__

FILE_BYTES = 2**30  # of the pixels in a file, at most; on a disk it has about two thirds of that
WORKERS_A_FILE = 4  # that fill one file; they crop 1,400 photos/s to 256², and 1,700/s can be compressed
SMALLER = 0.65  # of the pixels' bytes, what photos take
SHOWN = ("image_size", "records", "records_a_file", "crop", "codec", "orient", "background", "decoding", "classes")


def prepare_images(
    config: ConfigDict, out: str, batch_size: int, part: str | None = None, verify: bool = False
) -> None:
    """Stores the crops of all images of the configuration's data, as `data/prepared.py` describes.

    A file is a shard of the job: it goes on where an earlier start ended, and processes and parts share the files.

    Args:
      config: the whole configuration.
      out: the folder; with several processes or parts, one they all see.
      batch_size: images at a time of each worker.
      part: see `jobs.find_part`.
      verify: read what is there and compare its SHA-256, not only its size; what differs is made anew.

    Raises:
      BrokenRun: this process of several fails alone, or others went away.
      TransientError: data or folder do not answer; or this machine is about to be taken away.
      UsageError: data or folder are not to be had; the folder holds images of something else, or is full; or too many
        records cannot be read.
    """
    with open_job("--out", out, find_part(part, os.environ)) as job:
        source, contents = processes.agree(lambda: _open(config, batch_size, job.folder))
        processes.assert_equal("what is to be prepared", repr(dataclasses.astuple(contents)))
        processes.agree(lambda: _is_of(job.folder, contents))  # before anything but an index is written there
        job.claim(lambda: _begin(job, contents))
        others = processes.agree(lambda: _damaged_of_others(job, contents))
        _set_aside_damaged(job, contents, verify)
        if job.stopped:
            job.say(f"Stopped by {job.stop.by or 'a signal to another process'}; not all files were compared.")
            return

        def missing() -> list[int]:
            return sorted({*missing_files(job.folder, contents), *_damaged(job.folder, others)})

        done = (job.folder / MANIFEST).exists() and not missing()
        if set(processes.allgather(str(done))) == {"True"}:  # another one may just have set a file aside
            job.say(_done(job.folder, out, contents))
            return
        if job.first and missing():  # another part may just have mended it
            reopen(job.folder / MANIFEST, job.folder / PARTIAL, contents)
        job.say("\n".join([*source.summary(), _plan(job, contents, missing())]))
        _write_files(job, config, source, contents, batch_size)
        if job.finish(missing, lambda: _complete(config, source, contents, job.folder)):
            job.say(_done(job.folder, out, contents))


def _open(config: ConfigDict, batch_size: int, folder: AnyPath) -> tuple[Source, Contents]:
    if batch_size < 1:
        raise UsageError(f"--batch-size={batch_size} must be at least 1.")
    if config.data.source == "prepared":
        raise UsageError("data.source='prepared' are prepared images already; name the source that they were made of.")
    check_centred(config.data.crop, f"--out={folder}")
    check_every_size(config.data.min_side, f"--out={folder}")
    if config.data.path and storage.resolved(config.data.path) == storage.resolved(folder):
        raise UsageError(f"--out={folder} is data.path itself; choose another folder.")
    check_no_class(folder, config.data)
    source, size = open_source(config.data, folder), config.data.image_size
    if not isinstance(source.condition, ClassLabels):
        raise UsageError(
            f"data.source={config.data.source!r} has captions; only images with class labels are prepared."
        )
    return source, Contents(
        identity=source.identity,
        records=len(source),
        records_a_file=max(FILE_BYTES // (LABEL + 3 * size**2), 1),
        image_size=size,
        orient=config.data.orient,
        background=config.data.background,
        decoding=source.decoding,
        classes=source.condition.num_classes,
        class_names=list(source.class_names),
        contents=source.contents(),
    )


def _plan(job: Job, contents: Contents, missing: list[int]) -> str:
    """What is to be made, and whether it may not fit."""

    def photos(files: Iterable[int]) -> float:
        return SMALLER * sum(_bytes(contents.records_of(file), contents) for file in files)

    text = (
        f"{contents.records:,} images of {contents.image_size}×{contents.image_size} in {contents.files:,} file(s), "
        f"of photos about {photos(range(contents.files)) / 1e9:,.2f} GB; {len(missing):,} file(s) are to be made."
    )
    needed, free = photos(filter(job.is_mine, missing)), free_space(job.folder)
    if needed > free:
        text += (
            f"\nAttention: {job.folder} has {free / 1e9:,.2f} GB free, and photos would take {needed / 1e9:,.2f} GB."
        )
    return text


def _bytes(records: range, contents: Contents) -> int:
    return len(records) * (LABEL + 3 * contents.image_size**2)


def _done(folder: AnyPath, out: str, contents: Contents) -> str:
    total = sum(info.bytes for info in _infos(folder, list(range(contents.files))))
    return (
        f"{folder} is done: {contents.records:,} images, {total / 1e9:,.3g} GB. "
        f"To train from it: --config.data.source=prepared --config.data.path={out}"
    )


# --- the folder


def _is_of(folder: AnyPath, contents: Contents) -> bool:
    """Whether the folder holds images, and says that they are those; UsageError if others, or it does not say."""
    with storage.reading(folder):
        said = read_manifest(folder)
    if said is None:
        if next(folder.glob("images-*"), None):
            raise UsageError(f"--out={folder} holds images, and nothing that says of what; choose another folder.")
        return False
    there, ours = dataclasses.asdict(said.contents), dataclasses.asdict(contents)
    different = [f"{k}: {there[k]!r} there, {ours[k]!r} here" for k in SHOWN if there[k] != ours[k]]
    different = different[:1] if there["image_size"] != ours["image_size"] else different  # what follows from it
    if there["identity"] != ours["identity"]:
        different.append(compare(there["contents"], ours["contents"]) or "other names, labels or another order")
    if different:
        raise UsageError(
            f"--out={folder} holds images of something else: {'; '.join(different)}. Choose another folder."
        )
    return True


def _begin(job: Job, contents: Contents) -> None:
    """Removes what a start that was killed has left, and writes into the folder what its images are of."""
    remove_drafts(job, "images")
    if not _is_of(job.folder, contents):
        storage.write_json(job.folder / PARTIAL, dataclasses.asdict(contents))


def _set_aside_damaged(job: Job, contents: Contents, verify: bool) -> None:
    """Renames this worker's damaged files, so that they are missing."""
    there = _there(job.folder, contents)
    mine = job.share(there)
    known = dict(zip(mine, of_each(lambda file: _known(job.folder, file), mine), strict=True))
    with contextlib.closing(Progress(len(mine), "file", active=job.first and verify)) as progress:
        for done, file in enumerate(job.shards(there) if verify else mine, 1):
            path = images_file(job.folder, file)
            if known[file] is None or (verify and _sha256(path) != known[file].sha256):
                set_aside(path)
            if verify:
                progress.update(done)


def _damaged_of_others(job: Job, contents: Contents) -> list[int]:
    """Files of other parts that have another size than they must have."""
    damaged = _damaged(job.folder, [file for file in _there(job.folder, contents) if not job.is_mine(file)])
    report_others(job, damaged, lambda file: images_file(job.folder, file).name)
    return damaged


def _damaged(folder: AnyPath, files: list[int]) -> list[int]:
    """Those of the files that have another size than they must have, or of which nothing is known."""
    known = of_each(lambda file: _known(folder, file, mend=False), files)
    return [file for file, info in zip(files, known, strict=True) if info is None]


def _known(folder: AnyPath, file: int, mend: bool = True) -> FileInfo | None:
    """What is known of a file; None if it has another size, or nothing is known.

    Args:
      folder: with the images.
      file: its number.
      mend: write beside the file what only the manifest knows.
    """
    try:
        known = read_info(folder, file)
    except UsageError as error:  # which the manifest may make good
        manifest = read_manifest(folder)
        if manifest is None or not manifest.complete:
            say(f"{error}")
            return None
        known = manifest.files[file]
        if mend:
            storage.write_json(info_file(folder, file), dataclasses.asdict(known))
    try:
        return known if file_size(str(images_file(folder, file))) == known.bytes else None
    except FileNotFoundError:  # another part has just set it aside
        return None


def _there(folder: AnyPath, contents: Contents) -> list[int]:
    return sorted(set(range(contents.files)) - set(missing_files(folder, contents)))


def _sha256(path: AnyPath) -> str:
    def read() -> str:
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while block := file.read(2**24):
                digest.update(block)
        return digest.hexdigest()

    return storage.retried(f"reading {path}", read)


# --- the images


def _write_files(job: Job, config: ConfigDict, source: Source, contents: Contents, batch_size: int) -> None:
    """This process's share of the files that are missing."""
    mine = job.share(missing_files(job.folder, contents))
    bad = BadRecords(source, config.data, _bad_so_far(job.folder, contents))
    bad.check(np.array([], int))
    images = sum(len(contents.records_of(file)) for file in mine)
    with contextlib.ExitStack() as closing:
        progress = closing.enter_context(contextlib.closing(Progress(images, "image", active=job.first)))
        batches, groups = iter(()), _groups(mine, config.data.workers)
        if mine:
            parts = [part for group in groups for part in _in_turn(contents, group, batch_size)]
            load = LoadRecords(source, contents.image_size, Threads.from_config(config.data))
            closing.callback(load.threads.close)
            dataset = grain.MapDataset.source(parts).map(load).map(_encoded)
            batches = read_ahead(dataset, min(config.data.workers, len(parts)))
            closing.enter_context(contextlib.closing(batches))
        begins = {group[0]: group for group in groups}
        for file in job.shards(mine):
            with contextlib.suppress(Stopped):
                if file in begins:
                    parts = _in_turn(contents, begins[file], batch_size)
                    _write_together(job, contents, parts, batches, bad, progress)


def _groups(files: list[int], workers: int) -> list[list[int]]:
    """Files that are written at the same time: ArrayRecord compresses each in one thread, which keeps up with few."""
    together = max(workers // WORKERS_A_FILE, 1)
    return [files[start : start + together] for start in range(0, len(files), together)]


def _in_turn(contents: Contents, files: list[int], batch_size: int) -> list[range]:
    """The files' records in batches: the first of each file, the second of each, …"""
    batches = [_in_batches(contents.records_of(file), batch_size) for file in files]
    return [batch for turn in itertools.zip_longest(*batches) for batch in turn if batch is not None]


def _in_batches(records: range, batch_size: int) -> list[range]:
    return [records[start : start + batch_size] for start in range(0, len(records), batch_size)]


def _encoded(batch: Batch) -> Batch:
    """What is written of each image; in the workers, as cropping is."""
    return batch | {"image": encode(batch["image"])}


def _write_together(
    job: Job,
    contents: Contents,
    parts: list[range],
    batches: Iterator[Batch],
    bad: BadRecords,
    progress: Progress,
) -> None:
    """The files of these records, which `batches` brings, each in a thread of its own. Stopped: none of the files."""
    files = {records[0] // contents.records_a_file for records in parts}
    with contextlib.ExitStack() as closing:
        writers = {file: closing.enter_context(_file_writer(job.folder, file, bad.source)) for file in files}
        pool = closing.enter_context(concurrent.futures.ThreadPoolExecutor(len(files)))
        under_way: dict[int, concurrent.futures.Future] = {}
        for records in parts:
            job.stop.check()
            batch = next(batches)
            bad.check(batch["bad"])
            file = records[0] // contents.records_a_file
            if file in under_way:
                under_way[file].result()  # a file's batches are written one after the other
            under_way[file] = pool.submit(writers[file], batch)
            progress.update(progress.done + len(records))
        for write in under_way.values():
            write.result()


@contextlib.contextmanager
def _file_writer(folder: AnyPath, file: int, source: Source) -> Iterator[Callable[[Batch], None]]:
    """Within it, what writes a batch to the file; at its end, what is known of the file, and then it has its name."""
    path, unreadable = images_file(folder, file), {}
    with storage.write_beside(path) as draft:
        with storage.writing(path), _full_disk_said():
            writer = ArrayRecordWriter(str(draft), WRITING)

        def write(batch: Batch) -> None:
            for image, label, number in zip(batch["image"], batch["label"], batch["bad"].tolist(), strict=True):
                if number >= 0:
                    unreadable[str(number)] = source.describe(number)
                with storage.writing(path), _full_disk_said():
                    writer.write(b"" if number >= 0 else label.astype("<i4").tobytes() + image.tobytes())

        try:
            yield write
        finally:
            with storage.writing(path), _full_disk_said():
                writer.close()
        with storage.writing(path), draft.open("rb") as written:
            os.fsync(written.fileno())  # ArrayRecord does not
        info = FileInfo(draft.stat().st_size, _sha256(draft), unreadable)
        storage.write_json(info_file(folder, file), dataclasses.asdict(info))


@contextlib.contextmanager
def _full_disk_said() -> Iterator[None]:
    """ArrayRecord's errors have no class of their own."""
    try:
        yield
    except RuntimeError as error:
        raise OSError(str(error).partition("; ")[0]) from error


def _bad_so_far(folder: AnyPath, contents: Contents) -> list[int]:
    """Numbers of the records that could not be read when the files that are there were made."""
    return sorted(int(number) for info in _infos(folder, _there(folder, contents)) for number in info.bad)


def _infos(folder: AnyPath, files: list[int]) -> list[FileInfo]:
    return of_each(lambda file: read_info(folder, file), files)


def _complete(config: ConfigDict, source: Source, contents: Contents, folder: AnyPath) -> None:
    """Writes images.json."""
    BadRecords(source, config.data, _bad_so_far(folder, contents)).check(np.array([], int))
    files = [dataclasses.asdict(info) for info in _infos(folder, list(range(contents.files)))]
    made = {"deco_jax": __version__, "pillow": PIL.__version__, "date": datetime.date.today().isoformat()}
    storage.write_json(folder / MANIFEST, dataclasses.asdict(contents) | made | {"files": files})
    (folder / PARTIAL).unlink(missing_ok=True)
