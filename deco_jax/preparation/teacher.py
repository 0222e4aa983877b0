"""How are a teacher's features of every image computed once and stored? `deco prepare --teacher`."""

import contextlib
import dataclasses
import datetime
import json
import os
from collections.abc import Iterator
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from ml_collections import ConfigDict

from deco_jax import storage
from deco_jax.data.features import (
    COMPLETE,
    PARTIAL,
    UNKNOWN,
    Contents,
    bad_file,
    features_file,
    missing_files,
    read_contents,
)
from deco_jax.data.pipeline import BadRecords, Batch, Threads, read_ahead
from deco_jax.data.records import Source
from deco_jax.data.sources import open_source
from deco_jax.diffusion.flow import to_float
from deco_jax.encoders import teacher as teachers
from deco_jax.encoders.frozen import FrozenWeights
from deco_jax.encoders.teacher import IMAGE_PATCH
from deco_jax.errors import Stopped, UsageError
from deco_jax.jobs import Job, Progress, StopRequest, find_part, open_job
from deco_jax.parallel import mesh as meshes
from deco_jax.parallel import processes
from deco_jax.parallel.mesh import Layout
from deco_jax.preparation.folder import free_space, remove_drafts
from deco_jax.preparation.reading import LoadRecords
from deco_jax.storage import AnyPath
from deco_jax.version import __version__

FILE_BYTES = 2**30  # of a file of features, at most


def prepare_teacher(config: ConfigDict, out: str, batch_size: int, part: str | None = None) -> None:
    """Stores the teacher's features of every record of the configuration's data, as `features` describes.

    A file is a shard of the job: it goes on where an earlier start ended, and processes and parts share the files.

    Args:
      config: the whole configuration.
      out: the folder; with several processes or parts, one they all see.
      batch_size: images at a time on this process's devices, rounded up to a multiple of them.
      part: see `jobs.find_part`.

    Raises:
      BrokenRun: this process of several fails alone, or others went away.
      TransientError: data or folder do not answer; or this machine is about to be taken away.
      UsageError: data, teacher or folder are not to be had; the folder holds features of something else; or too many
        records cannot be read.
    """
    with open_job("--out", out, find_part(part, os.environ)) as job:
        source, teacher, contents = processes.agree(lambda: _open(config, batch_size, job.folder))
        processes.assert_equal("what is to be prepared", repr(dataclasses.astuple(contents)))
        processes.agree(lambda: _is_of(job.folder, contents))  # before anything is written there
        job.claim(lambda: _begin(job, contents))

        def missing() -> list[int]:
            return missing_files(job.folder, contents)

        done = (job.folder / COMPLETE).exists() and not missing()
        if processes.broadcast(str(done)) == "True":
            job.say(f"{job.folder} is done: it holds the features of all {contents.records:,} records.")
            return
        job.say("\n".join([*source.summary(), _summary(contents, len(missing()))]))
        _write_files(job, config, source, teacher, contents, batch_size)
        if job.finish(missing, lambda: _complete(config, source, contents, job.folder)):
            job.say(f"{job.folder} is done. To train with it: --config.teacher.stored={job.folder}")


def _open(config: ConfigDict, batch_size: int, folder: AnyPath | None = None) -> tuple[Source, FrozenWeights, Contents]:
    if batch_size < 1:
        raise UsageError(f"--batch-size={batch_size} must be at least 1.")
    teachers.check_grids(config)
    source, teacher = open_source(config.data, folder), teachers.load_teacher(config)
    tokens, width = (config.data.image_size // IMAGE_PATCH) ** 2, teacher.network.module.width
    contents = Contents(
        identity=source.identity,
        records=len(source),
        records_a_file=max(FILE_BYTES // _bytes(1, tokens, width), 1),
        tokens=tokens,
        features=width,
        image_size=config.data.image_size,
        patch=IMAGE_PATCH,
        teacher=teacher.digest,
        decoding=source.decoding,
    )
    return source, teacher, contents


def _bytes(*shape: int) -> int:
    return int(np.prod(shape, dtype=np.int64)) * np.dtype(np.float16).itemsize


def _summary(contents: Contents, missing: int) -> str:
    size = _bytes(contents.records, contents.tokens, contents.features)
    return (
        f"Features of {contents.records:,} records, {contents.tokens}×{contents.features} float16 each: "
        f"{size / 1e9:,.3f} GB in {contents.files} files; {missing} are to be made."
    )


# --- the folder


def _begin(job: Job, contents: Contents) -> None:
    """Removes what a start that was killed has left, and writes into the folder what its features are of."""
    remove_drafts(job, "features")
    needed = sum(_bytes(*contents.shape(file)) for file in missing_files(job.folder, contents))
    if needed > (free := free_space(job.folder)):
        raise UsageError(
            f"--out={job.folder} has {free / 1e9:,.1f} GB free, and the missing features take {needed / 1e9:,.1f} GB; "
            "choose another disk, or train with the teacher in every step: teacher.stored=''."
        )
    if not _is_of(job.folder, contents):
        storage.write_json(job.folder / PARTIAL, dataclasses.asdict(contents))


def _is_of(folder: AnyPath, contents: Contents) -> bool:
    """Whether the folder holds features, and says that they are those; UsageError if others, or it does not say."""
    with storage.reading(folder):
        said = read_contents(folder)
    if said is None:
        if next(folder.glob("features-*"), None):
            raise UsageError(f"--out={folder} holds features, and nothing that says of what; choose another folder.")
        return False
    there, ours = dataclasses.asdict(said[0]), dataclasses.asdict(contents)
    if there["decoding"] == UNKNOWN:  # a version that knew one way; what is complete stays, and training warns
        there["decoding"] = ours["decoding"] if said[2] and not missing_files(folder, contents) else ""
    different = "; ".join(f"{k}: {there[k]} there, {ours[k]} here" for k in ours if there[k] != ours[k])
    how = "" if there["decoding"] == ours["decoding"] else ", or set data.orient and data.background as they were"
    if different:
        raise UsageError(f"--out={folder} holds features of something else: {different}. Choose another folder{how}.")
    return True


# --- the features


def _write_files(
    job: Job, config: ConfigDict, source: Source, teacher: FrozenWeights, contents: Contents, batch_size: int
) -> None:
    """This process's share of the files that are missing."""
    layout, mine = meshes.local_layout(), job.share(missing_files(job.folder, contents))
    batch_size = meshes.round_up(min(batch_size, contents.records), layout.mesh)
    bad = BadRecords(source, config.data, _bad_so_far(job.folder, contents))
    bad.check(np.array([], int))
    images = sum(contents.shape(file)[0] for file in mine)
    with contextlib.ExitStack() as closing:
        progress = closing.enter_context(contextlib.closing(Progress(images, "image", active=job.first)))
        computed = iter(())
        if mine:
            records_MxB = np.concatenate([_in_batches(contents, file, batch_size) for file in mine])
            load = LoadRecords(source, contents.image_size, Threads.from_config(config.data))
            closing.callback(load.threads.close)
            workers = min(config.data.workers, len(records_MxB))
            batches = read_ahead(grain.MapDataset.source(records_MxB).map(load), workers)
            computed = _compute(teacher, closing.enter_context(contextlib.closing(batches)), layout, source)
        for file in job.shards(mine):
            with contextlib.suppress(Stopped):
                path = features_file(job.folder, file)
                _write_file(path, contents.shape(file), computed, bad, progress, job.stop)


def _in_batches(contents: Contents, file: int, batch_size: int) -> np.ndarray:
    """Numbers of a file's records, (batches, B); the last batch is filled up with −1."""
    first, rows = file * contents.records_a_file, contents.shape(file)[0]
    records = np.full((-(-rows // batch_size), batch_size), -1)
    records.flat[:rows] = np.arange(first, first + rows)
    return records


def _compute(
    teacher: FrozenWeights, batches: Iterator[Batch], layout: Layout, source: Source
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Of each batch the features (B, N, F) float16, NaN where the image is unreadable, and `bad` (B,).

    One batch is read back while the devices work on the next.
    """
    network, params = teacher.network, teacher.place(layout)

    @jax.jit
    def forward(params: Any, image_BxHxWx3: Array) -> tuple[Array, Array]:
        batch = network(params, {"image": to_float(image_BxHxWx3)})
        features = batch[network.writes].astype(jnp.float16)
        return features, jnp.isfinite(features).all(axis=(1, 2))

    def read_back(batch: Batch, features: Array, finite: Array) -> tuple[np.ndarray, np.ndarray]:
        unreadable = batch["bad"] >= 0
        for record in batch["record"][(batch["record"] >= 0) & ~unreadable & ~np.asarray(finite)][:1]:
            raise UsageError(
                f"The teacher's features of record {record}, {source.describe(record)}, do not fit float16, whose "
                "largest number is 65504; train with the teacher in every step: teacher.stored=''."
            )
        features = np.array(features)
        features[unreadable] = np.nan
        return features, batch["bad"]

    under_way = None
    for batch in batches:
        image = jax.device_put(batch["image"], meshes.batch_sharding(layout.mesh))
        with meshes.use_mesh(layout):
            following = batch, *forward(params, image)
        if under_way is not None:
            yield read_back(*under_way)
        under_way = following
    yield read_back(*under_way)


def _write_file(
    path: AnyPath,
    shape: tuple[int, int, int],
    computed: Iterator[tuple[np.ndarray, np.ndarray]],
    bad: BadRecords,
    progress: Progress,
    stop: StopRequest,
) -> None:
    """One file, from as many batches as it takes; what is unreadable in it is written first. Stopped: none."""
    missing, unreadable = shape[0], []
    with storage.write_beside(path) as draft, draft.open("wb") as file:
        header = {"descr": "<f2", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        while missing > 0:
            stop.check()
            features_BxNxF, bad_B = next(computed)
            bad.check(bad_B)
            unreadable += bad_B[bad_B >= 0].tolist()
            rows = min(missing, len(features_BxNxF))
            with storage.writing(path):
                file.write(features_BxNxF[:rows])
            progress.update(progress.done + rows)
            missing -= rows
        file.flush()
        os.fsync(file.fileno())
        bad_file(path).unlink(missing_ok=True)
        if unreadable:
            storage.write_json(bad_file(path), unreadable)


def _bad_so_far(folder: AnyPath, contents: Contents) -> list[int]:
    """Numbers of the records that could not be read when the files that are there were made."""
    missing, found = set(missing_files(folder, contents)), []
    for path in folder.glob("features-*.bad.json"):
        if int(path.name.split(".")[0].removeprefix("features-")) in missing:
            continue
        try:
            found += [int(record) for record in json.loads(path.read_text())]
        except (ValueError, TypeError) as error:
            raise UsageError(f"{path} is damaged ({error}); remove it and its .npy.") from error
    return sorted(found)


def _complete(config: ConfigDict, source: Source, contents: Contents, folder: AnyPath) -> None:
    """Writes features.json."""
    bad = _bad_so_far(folder, contents)
    BadRecords(source, config.data, bad).check(np.array([], int))
    made = {"bad": bad, "deco_jax": __version__, "date": datetime.date.today().isoformat()}
    storage.write_json(folder / COMPLETE, dataclasses.asdict(contents) | made)
    (folder / PARTIAL).unlink(missing_ok=True)
