"""How are very many images drawn, by all devices and hosts, and packed into one file? `deco generate`.

    OUT/generation.json      how they are drawn; a folder that was begun in another way is refused
    OUT/samples-00000.npy …  shards, uint8 (S, H, W, 3), images k·S to (k + 1)·S − 1; until samples.npz is whole
    OUT/samples.npz          arr_0: the images, uint8 (N, H, W, 3); arr_1: their labels, int64 (N,)
    OUT/png/00000.png …      on request

A shard gets its name when it is whole, and so does samples.npz; only then shards are removed. So whatever a killed
start has left, the same command makes what is missing and nothing else.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import io
import itertools
import json
import math
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Collection, Iterator
from typing import Any

import numpy as np
from flax import linen as nn

from deco_jax import storage
from deco_jax.config import build_model
from deco_jax.encoders.frozen import digest_of
from deco_jax.errors import Stopped, UsageError
from deco_jax.generation import pictures
from deco_jax.generation.batches import generate
from deco_jax.generation.folder import check_folder
from deco_jax.generation.npz import Parts, write_npz
from deco_jax.generation.requests import Requests, read_requests
from deco_jax.jobs import Job, Progress, find_part, open_job
from deco_jax.jobs.job import GO_ON, WHOLE
from deco_jax.parallel import mesh as meshes
from deco_jax.parallel import processes
from deco_jax.pretrained.load import Pretrained, open_pretrained
from deco_jax.sampling.settings import Sampling, check_image_size, parse_image_size
from deco_jax.storage import AnyPath

SETTINGS, SAMPLES, OTHER = "generation.json", "samples.npz", "choose another folder"
SHARD_IMAGES, SHARD_BYTES = 1000, 2**27  # of a shard, at most, unless a batch is more
# What a killed start leaves of a shard, of a picture, or of the other files.
DRAFT = re.compile(r"\.(?:samples-(\d+)\.npy|(\d+)\.png|samples\.npz|generation\.json)\.")


def generate_samples(
    source: str,
    out: str,
    num: int | None = None,
    per_class: int | None = None,
    labels: str = "all",
    label_file: str | None = None,
    negative: str | None = None,
    png: bool = False,
    seed: int = 0,
    weights: str = "ema",
    dtype: str | None = None,
    batch_size: int = 64,
    part: str | None = None,
    **sampling: Any,
) -> AnyPath | None:
    """Draws images into `out`/samples.npz, in shards that processes and parts share.

    Image i depends on the seed and i alone, and shows label i modulo their number.

    Args:
      source: anything that `load_pretrained` opens.
      out: the folder, on this machine or in a bucket; with several processes or parts, one they all see.
      num: images; None = 50,000, or one for each line of `label_file`.
      per_class: images of each label, in place of `num`.
      labels: as in "0,5-9,golden retriever,null", or "all".
      label_file: a text file with one label on each line, in place of `labels`; image i shows line i.
      negative: the label that guidance leads away from; None = no class.
      png: also `out`/png/00000.png, …
      seed: of the noise.
      weights: "ema" or "online".
      dtype: of matrix products, "bfloat16" or "float32"; None = as trained.
      batch_size: images at a time on this process's devices; best a multiple of them.
      part: see `jobs.find_part`.
      **sampling: `image_size` ("256", "256x384") and fields of `Sampling`; None = as the run's configuration says.

    Returns:
      The path of samples.npz; None if it is not there yet, as other parts are at work or this run was told to stop.

    Raises:
      BrokenRun: this process of several fails alone, or others went away.
      TransientError: the folder does not answer; or this machine is about to be taken away.
      UsageError: an argument is out of range, the network is not to be had, `out` holds something else or has no
        space, or an image is not finite.
    """
    with open_job("--out", out, find_part(part, os.environ)) as job:

        def look() -> Plan:
            found = open_pretrained(source, dtype=dtype)
            found.check_set(weights)
            model = build_model(found.config.model)
            wanted = read_requests(model.condition, found.class_names, num, per_class, labels, label_file, negative)
            check_folder(out, wanted.num, batch_size, seed)
            return _plan(found, model, wanted, seed, weights, batch_size, **sampling)

        plan = processes.agree(look)
        processes.assert_equal("what is to be generated", json.dumps(plan.how))
        processes.agree(lambda: _is_of(job, plan.how))  # before anything is written there
        job.claim(lambda: _begin(job, plan, png))

        missing = functools.partial(missing_shards, job.folder, plan)
        left = missing()
        if processes.broadcast("draw" if left else "pack") == "draw":
            job.say(_summary(plan, left))
            params = processes.agree(lambda: plan.found.read(plan.weights))
            digest = processes.agree(lambda: _settle(job, plan, params))
            processes.assert_equal("the hash of the weights", digest)
            _make_shards(job, plan, params, left, png)
        if not job.finish(missing, lambda: _complete(job, plan, png)):
            return None
        path = job.folder / SAMPLES
        whole = path.exists() and not (png and pictures.missing(job.folder, plan.num))
        if processes.broadcast("whole" if whole else "") != "whole":
            job.say(f"Stopped by {job.stop.by}; {path} is not made yet, all images are there. {GO_ON}")
            return None
        job.say(f"{path} is done: it holds {plan.num:,} images and their labels.")
        return path


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is to be drawn, and how."""

    found: Pretrained
    model: nn.Module
    weights: str
    wanted: Requests
    seed: int
    image_size: tuple[int, int]  # (height, width)
    batch_size: int
    settings: Sampling

    @property
    def num(self) -> int:
        """How many images."""
        return self.wanted.num

    @property
    def shard_images(self) -> int:
        """Images of a shard, S: a multiple of the batch, the same whatever devices there are."""
        most = min(SHARD_IMAGES, SHARD_BYTES // (3 * math.prod(self.image_size)), self.num)
        return max(most // self.batch_size, 1) * self.batch_size

    @property
    def shards(self) -> int:
        """How many there are."""
        return -(-self.num // self.shard_images)

    def numbers(self, shard: int) -> range:
        """Of the images of a shard."""
        return range(shard * self.shard_images, min((shard + 1) * self.shard_images, self.num))

    def shape(self, images: int) -> tuple[int, int, int, int]:
        """Of so many images."""
        return (images, *self.image_size, 3)

    @property
    def how(self) -> dict[str, Any]:
        """All that the images depend on, but for the numbers in the network: the content of generation.json."""
        wanted = {"num": self.num, "labels": str(self.wanted), "negative": self.wanted.negative}
        how = {"source": str(self.found), "fingerprint": self.found.fingerprint}
        how |= {"weights": self.weights, "dtype": self.found.config.model.dtype}
        sampler = dataclasses.asdict(self.settings) | {"guidance_interval": list(self.settings.guidance_interval)}
        size = {"image_size": list(self.image_size), "batch_size": self.batch_size}
        return how | {"seed": self.seed} | wanted | size | sampler


def _plan(
    found: Pretrained,
    model: nn.Module,
    wanted: Requests,
    seed: int,
    weights: str,
    batch_size: int,
    image_size: str | None = None,
    **changes: Any,
) -> Plan:
    settings = Sampling.from_config(found.config.sample, **changes)
    height, width = parse_image_size(image_size) or (found.config.data.image_size,) * 2
    check_image_size((height, width), model.patch_size)
    return Plan(found, model, weights, wanted, seed, (height, width), min(batch_size, wanted.num), settings)


def _summary(plan: Plan, left: Collection[int]) -> str:
    height, width = plan.image_size
    network = f"{plan.found}: {plan.weights} weights, computing in {plan.found.config.model.dtype}"
    gigabytes = math.prod(plan.shape(plan.num)) / 1e9
    return (
        f"{network}.\n{plan.num:,} images of {height}×{width} pixels, {gigabytes:,.3f} GB, {plan.wanted.balance}; "
        f"{plan.shards} shards, of which {len(left)} are to be made."
    )


# --- the folder


def _shard(folder: AnyPath, shard: int) -> AnyPath:
    return folder / f"samples-{shard:05d}.npy"


def missing_shards(folder: AnyPath, plan: Plan) -> list[int]:
    """Those that are neither there nor in samples.npz."""

    def look() -> tuple[set[str], bool]:
        names = {path.name for path in folder.glob("samples-*.npy")}
        return names, (folder / SAMPLES).exists()  # in this order: another part may just remove what is in it

    with storage.reading(folder):
        names, whole = storage.retried(f"reading {folder}", look)
    return [] if whole else [k for k in range(plan.shards) if _shard(folder, k).name not in names]


def _is_of(job: Job, how: dict[str, Any]) -> bool:
    """Whether the folder holds images that are drawn like this, or is to; False if it holds none.

    Raises:
      UsageError: they are drawn in another way, or nothing says how.
    """

    def look() -> tuple[list[str], str]:
        names = sorted(path.name for path in job.folder.iterdir()) if job.folder.is_dir() else []
        return names, (job.folder / SETTINGS).read_text() if SETTINGS in names else ""

    with storage.reading(job.folder):
        names, text = storage.retried(f"reading {job.folder}", look)
    images = [name for name in names if name.endswith((".npy", ".npz", ".png")) and not name.startswith(".")]
    images += [name for name in names if name in (pictures.FOLDER, "sample.json")]
    if not text:
        if images:
            raise UsageError(f"{job.name} holds {images[0]}, and no {SETTINGS} that says how it was made; {OTHER}.")
        return False
    try:
        there = dict(json.loads(text))
    except ValueError as error:
        raise UsageError(f"{job.folder / SETTINGS} is damaged ({error}); {OTHER}.") from error
    here = json.loads(json.dumps(how))
    different = [f"{key}: {there.get(key)} there, {here[key]} here" for key in here if there.get(key) != here[key]]
    if different and not images and job.part == WHOLE:  # nothing is drawn yet, and nobody else is about to
        return False
    if different:
        raise UsageError(f"{job.name} holds images that are drawn in another way ({'; '.join(different)}); {OTHER}.")
    return True


def _begin(job: Job, plan: Plan, png: bool) -> None:
    """Removes what a start that was killed has left, and looks whether there is space for what is missing."""
    remote = storage.is_remote(job.folder)
    if not remote:
        with storage.writing(job.folder):
            for draft in itertools.chain(job.folder.glob(".*"), (job.folder / pictures.FOLDER).glob(".*")):
                if found := DRAFT.match(draft.name):
                    shard = found[1] or (found[2] and int(found[2]) // plan.shard_images)
                    if job.part == WHOLE or (shard is not None and job.is_mine(int(shard))):  # others are at work
                        shutil.rmtree(draft, ignore_errors=True)
    if (job.folder / SAMPLES).exists():
        return
    image, left = 3 * math.prod(plan.image_size), missing_shards(job.folder, plan)
    npz, shards = image * plan.num, 0 if remote else image * sum(len(plan.numbers(k)) for k in left)
    pngs = npz if png and not remote else 0
    where = pathlib.Path(tempfile.gettempdir()) if remote else job.folder
    usage = shutil.disk_usage(where)
    if usage.total and npz + shards + pngs > usage.free:  # some network folders say nothing
        asked = f"the folder for temporary files, {where} (TMPDIR)," if remote else f"{job.name}"
        raise UsageError(
            f"{asked} has {usage.free / 1e9:,.1f} GB free, and {plan.num:,} images take "
            f"{(npz + shards + pngs) / 1e9:,.1f} GB until {SAMPLES} is whole; choose another disk or fewer images."
        )


def _settle(job: Job, plan: Plan, params: Any) -> str:
    """The hash of the network's numbers, which process 0 notes with all other settings; others are refused."""
    digest = digest_of(params)
    how = plan.how | {"weights_digest": digest}
    if job.first and not _is_of(job, how):
        storage.write_json(job.folder / SETTINGS, how)
    return digest


# --- the images


def _make_shards(job: Job, plan: Plan, params: Any, missing: Collection[int], png: bool) -> None:
    """This process's share of the shards that are missing."""
    mine = job.share(missing)
    own, run = (sum(len(plan.numbers(k)) for k in shards) for shards in (mine, filter(job.is_mine, missing)))
    there = plan.num - sum(len(plan.numbers(k)) for k in missing)
    batch = meshes.round_up(plan.batch_size, meshes.local_layout().mesh)
    numbers = itertools.chain.from_iterable(_filled_up(plan.numbers(k), batch) for k in mine)
    args = plan.wanted.labels, plan.seed, plan.image_size, plan.batch_size, plan.settings, numbers
    images, made = generate(plan.model, params, *args, plan.wanted.negative), 0
    with contextlib.closing(images), contextlib.closing(Progress(there + run, "image", there, job.first)) as progress:
        for shard in job.shards(missing):
            with contextlib.suppress(Stopped):
                for written in _write_shard(job, plan, shard, batch, images, png):
                    progress.update(there + round((made + written) * run / own))  # others are as fast
                made += len(plan.numbers(shard))


def _filled_up(numbers: range, batch_size: int) -> Iterator[int]:
    """The numbers, the last one repeated until batches are full: so an image has the same place in every start."""
    return itertools.chain(numbers, itertools.repeat(numbers[-1], -len(numbers) % batch_size))


def _header(shape: tuple[int, ...]) -> bytes:
    """How an .npy file of uint8 begins."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return header.getvalue()


def _write_shard(
    job: Job, plan: Plan, shard: int, batch: int, images: Iterator[np.ndarray], png: bool
) -> Iterator[int]:
    """One shard, and its pictures before it gets its name; yields after every batch how many images of it are made."""
    path, numbers = _shard(job.folder, shard), plan.numbers(shard)
    with (
        storage.writing(path),
        storage.write_beside(path) as draft,
        draft.open("wb") as file,
        concurrent.futures.ThreadPoolExecutor(pictures.WRITERS) as pool,
    ):
        file.write(_header(plan.shape(len(numbers))))
        waiting = []
        for done, number in enumerate(numbers):
            job.stop.check()
            if done and done % batch == 0:
                yield done
            image_HxWx3 = next(images)
            file.write(np.ascontiguousarray(image_HxWx3))
            if png:
                waiting.append(pool.submit(pictures.save, job.folder, number, image_HxWx3))
        for _ in range(-len(numbers) % batch):
            next(images)
        for picture in waiting:
            picture.result()
        file.flush()
        os.fsync(file.fileno())
    yield len(numbers)


# --- what whoever finishes last makes of them


def _complete(job: Job, plan: Plan, png: bool) -> None:
    """samples.npz and missing pictures, unless told to stop; then the shards go."""
    with contextlib.suppress(Stopped):
        path = job.folder / SAMPLES
        if not path.exists():
            job.say(f"Packing {plan.num:,} images into {path}.")
            labels_N = np.asarray(plan.model.condition.read(plan.wanted.shown), np.int64)
            arrays = {
                "arr_0": Parts(plan.shape(plan.num), "uint8", _read_shards(job, plan)),
                "arr_1": Parts((plan.num,), "int64", [labels_N]),
            }
            try:
                with storage.writing(path):
                    write_npz(path, arrays)
            except UsageError:  # another part may have been faster, and has removed shards
                if not path.exists():
                    raise
        if png:
            pictures.fill(job, path, plan.num)
        for made in job.folder.glob("samples-*.npy"):
            _remove(made)
        if not storage.is_remote(job.folder):
            for draft in job.folder.glob(f".{SAMPLES}.*"):  # of a killed part; or of one that now finds it made
                shutil.rmtree(draft, ignore_errors=True)


def _remove(path: AnyPath) -> None:
    storage.retried(f"removing {path}", lambda: path.unlink(missing_ok=True))


def _read_shards(job: Job, plan: Plan) -> Iterator[np.ndarray]:
    """One after the other; Stopped as soon as this process is told to stop."""
    for shard in range(plan.shards):
        job.stop.check()
        job.check()
        path, shape = _shard(job.folder, shard), plan.shape(len(plan.numbers(shard)))
        with storage.reading(path):
            content = storage.retried(f"reading {path}", path.read_bytes)
        header, size = _header(shape), math.prod(shape)
        if len(content) != len(header) + size or not content.startswith(header):
            raise UsageError(f"{path} is damaged, it has {len(content):,} bytes; remove it and start again.")
        yield np.frombuffer(content, np.uint8, offset=len(header)).reshape(shape)
