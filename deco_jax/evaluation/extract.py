"""What does a feature network see in very many images? Computed once, in shards that processes share.

    OUT/features/NAME-DIGEST/00000.npz   of images 0 to 999: each output of the network, fp32 (K, D); `bad`, numbers of
                                         images that cannot be read; `pixels`, the SHA-256 of all K images

A shard is a file, which has its name only when it is whole. So the same command goes on after any end.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import hashlib
import io
import itertools
import os
import shutil
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence

import jax
import numpy as np
from jax import Array

from deco_jax import storage
from deco_jax.encoders.features import FEATURES, FeatureNetwork, load_features
from deco_jax.errors import Stopped, UsageError
from deco_jax.evaluation.images import Images
from deco_jax.jobs import Job, Progress
from deco_jax.parallel import mesh as meshes
from deco_jax.storage import AnyPath

SHARD_IMAGES = 1000
AHEAD = 2  # batches that are read before they are needed


@dataclasses.dataclass(frozen=True)
class Extraction:
    """The features of the first `number` images by one network, which are or will be in `folder`."""

    images: Images
    number: int
    network: FeatureNetwork
    folder: AnyPath

    @property
    def shards(self) -> int:
        """How many there are."""
        return -(-self.number // SHARD_IMAGES)

    def file(self, shard: int) -> AnyPath:
        """Of a shard."""
        return self.folder / f"{shard:05d}.npz"

    def numbers(self, shard: int) -> range:
        """Of the images of a shard."""
        return range(shard * SHARD_IMAGES, min((shard + 1) * SHARD_IMAGES, self.number))

    def missing(self) -> list[int]:
        """The shards that are not there."""
        with storage.reading(self.folder):
            there = storage.retried(
                f"listing {self.folder}",
                lambda: {p.name for p in self.folder.iterdir()} if self.folder.is_dir() else set(),
            )
        return [shard for shard in range(self.shards) if self.file(shard).name not in there]

    def read(self, names: Sequence[str]) -> Iterator["Extracted"]:
        """All shards in order, with the network's outputs of these names; UsageError if one is damaged."""
        for shard in range(self.shards):
            path = self.file(shard)
            with storage.reading(path):
                content = storage.retried(f"reading {path}", path.read_bytes)
            try:
                with np.load(io.BytesIO(content), allow_pickle=False) as file:
                    values = {name: file[name] for name in names}
                    bad, pixels = file["bad"], file["pixels"].tobytes()
            except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
                raise UsageError(f"{path} is damaged ({error}); remove it and run the same command again.") from error
            numbers = np.array(self.numbers(shard))
            yield Extracted(numbers, ~np.isin(numbers, bad), values, pixels)


@dataclasses.dataclass(frozen=True)
class Extracted:
    """What a shard holds."""

    numbers_K: np.ndarray  # of its images
    mask_K: np.ndarray  # which of them could be read
    features: dict[str, np.ndarray]  # by name, (K, D) fp32
    pixels: bytes  # SHA-256 of the images


def hash_of(extracted: Iterable[Extracted]) -> str:
    """A hash of the pixels of all images, whatever file they come from: 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for shard in extracted:
        digest.update(shard.pixels)
    return digest.hexdigest()[:16]


def load_networks(features: str, weights: Sequence[str]) -> tuple[FeatureNetwork, ...]:
    """The feature networks that `--features` and `--feature-weights` name.

    Args:
      features: "inception,dinov2".
      weights: "NAME=FILE" for those whose weights are not where `load_features` looks.

    Raises:
      UsageError: one is not known or given twice, or its weights are not to be had.
    """
    names, known = [name.strip() for name in features.split(",")], ", ".join(FEATURES)
    for name in names:
        if name not in FEATURES:
            raise UsageError(f"--features={features}: {name!r} is not known; allowed: {known}.")
        if names.count(name) > 1:
            raise UsageError(f"--features={features} names {name} twice.")
    files = {}
    for text in weights:
        name, _, file = text.partition("=")
        if name not in names or not file or name in files:
            raise UsageError(f"--feature-weights={text} must be NAME=FILE, once for a NAME of --features={features}.")
        files[name] = file
    return tuple(load_features(name, files.get(name, "")) for name in names)


def extract(job: Job, extraction: Extraction, batch_size: int, what: str) -> None:
    """This process's share of the shards that are missing. To be called on all processes alike, as `Job.shards`.

    Args:
      job: it ends early when the job is told to stop.
      extraction: of what.
      batch_size: images at a time on this process's devices, rounded up to a multiple of them.
      what: the images, for people: "samples".

    Raises:
      UsageError: an image cannot be read.
    """
    missing = extraction.missing()  # perhaps other ones than another host sees, so all go on to `job.shards`
    mine, total = job.share(missing), extraction.number
    left = sum(len(extraction.numbers(shard)) for shard in missing)
    own = sum(len(extraction.numbers(shard)) for shard in mine)
    if missing:
        job.say(f"{extraction.network.name} looks at {left:,} of {total:,} {what}.")
    computed, made = _compute(extraction, mine, batch_size), 0
    with contextlib.closing(computed), contextlib.closing(Progress(total, "image", total - left, job.first)) as shown:
        for shard in job.shards(missing):
            with contextlib.suppress(Stopped):
                for seen in _write_shard(job, extraction, shard, computed):
                    made += seen
                    shown.update(total - left + round(made * left / own))  # others are as fast


def _compute(extraction: Extraction, shards: Sequence[int], batch_size: int) -> Iterator[tuple[np.ndarray, dict]]:
    """Of each batch of these shards its images and their features; one is read back while devices see the next."""
    network, layout = extraction.network, meshes.local_layout()
    batch_size = meshes.round_up(min(batch_size, extraction.number), layout.mesh)
    params = jax.device_put(network.params, meshes.replicated(layout.mesh))
    apply, sharding, under_way = jax.jit(network.apply), meshes.batch_sharding(layout.mesh), None
    with contextlib.closing(_read_ahead(extraction, shards, batch_size)) as batches:
        for images in batches:
            padded = np.zeros((batch_size, *images.shape[1:]), np.uint8)
            padded[: len(images)] = images
            with meshes.use_mesh(layout):
                following = images, apply(params, jax.device_put(padded, sharding))
            if under_way is not None:
                yield _read_back(*under_way)
            under_way = following
    if under_way is not None:
        yield _read_back(*under_way)


def _read_ahead(extraction: Extraction, shards: Sequence[int], batch_size: int) -> Iterator[np.ndarray]:
    """The images of these shards in batches, none of them across shards, read by a thread that is a little ahead."""
    spans = (
        (start, min(start + batch_size, numbers.stop))
        for numbers in map(extraction.numbers, shards)
        for start in range(numbers.start, numbers.stop, batch_size)
    )
    waiting: collections.deque[concurrent.futures.Future] = collections.deque()
    with concurrent.futures.ThreadPoolExecutor(1, "images") as thread:
        for span in itertools.islice(spans, AHEAD):
            waiting.append(thread.submit(extraction.images.read, *span))
        while waiting:
            images = waiting.popleft().result()
            if span := next(spans, None):
                waiting.append(thread.submit(extraction.images.read, *span))
            yield images


def _read_back(images: np.ndarray, features: dict[str, Array]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    return images, {name: np.asarray(value, np.float32)[: len(images)] for name, value in features.items()}


def _write_shard(job: Job, extraction: Extraction, shard: int, computed: Iterator) -> Iterator[int]:
    """One file, from as many batches as it takes; yields how many images each of them had."""
    numbers, seen, pixels, parts = extraction.numbers(shard), 0, hashlib.sha256(), collections.defaultdict(list)
    while seen < len(numbers):
        job.stop.check()
        images, features = next(computed)
        pixels.update(np.ascontiguousarray(images))
        for name, values in features.items():
            parts[name].append(values)
        seen += len(images)
        if seen < len(numbers):
            yield len(images)
    arrays = {name: np.concatenate(values) for name, values in parts.items()}
    arrays["bad"] = np.array(sorted(extraction.images.bad.intersection(numbers)), np.int64)
    arrays["pixels"] = np.frombuffer(pixels.digest(), np.uint8)
    path = extraction.file(shard)
    with storage.writing(path), storage.write_beside(path) as draft, draft.open("wb") as file:
        np.savez(file, **arrays)
        file.flush()
        os.fsync(file.fileno())
    yield len(images)


def remove(folder: AnyPath) -> None:
    """Removes a folder, if it is there."""
    if storage.is_remote(folder):
        storage.retried(f"removing {folder}", lambda: folder.rmtree(missing_ok=True))
    else:
        shutil.rmtree(folder, ignore_errors=True)
