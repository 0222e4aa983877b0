"""What does a feature network see in a data set? `deco stats` writes what `deco evaluate` compares with."""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from deco_jax import storage
from deco_jax.encoders.features import FeatureNetwork
from deco_jax.errors import UsageError
from deco_jax.evaluation.extract import Extraction, extract, hash_of, load_networks, remove
from deco_jax.evaluation.images import Images, SourceImages, open_images, size_text
from deco_jax.evaluation.measure import scores_of
from deco_jax.jobs import Job, open_job
from deco_jax.metrics.references import write_reference
from deco_jax.parallel import processes

REFERENCE, SETTINGS = "reference.npz", "stats.json"


def compute_stats(
    config: ConfigDict | None,
    images: str | None,
    out: str,
    features: str = "inception",
    feature_weights: Sequence[str] = (),
    batch_size: int = 64,
    num: int | None = None,
) -> None:
    """Writes `out`/reference.npz: means, covariances and up to 10,000 feature vectors, for each feature network.

    The same command goes on where an earlier start ended, whatever ended it.

    Args:
      config: the whole configuration, whose data are taken: the crop of training, every record once and in order;
        unreadable ones are skipped up to `data.max_bad_records` and `data.max_bad_share`. Or None.
      images: see `open_images`, in place of `config`.
      out: the folder, on this machine or in a bucket; with several processes one they all see.
      features: networks that see the images, "inception,dinov2".
      feature_weights: "NAME=FILE", see `extract.load_networks`.
      batch_size: images at a time on each process.
      num: the first images only; None = all.

    Raises:
      BrokenRun: this process of several fails alone, or others went away.
      TransientError: storage does not answer; or this machine is about to be taken away.
      UsageError: the images or weights are not to be had, or `out` holds statistics of something else.
    """
    with open_job("--out", out) as job:

        def look() -> tuple[Images, int, tuple[FeatureNetwork, ...]]:
            if batch_size < 1:
                raise UsageError(f"--batch-size={batch_size} must be at least 1.")
            networks = load_networks(features, feature_weights)
            found = SourceImages(config.data, job.folder) if images is None else open_images(images)
            if num is not None and not 2 <= num <= len(found):
                raise UsageError(f"--num={num} must be from 2 to {len(found)}, the images of {found.source}.")
            if len(found) < 2:
                raise UsageError(f"{found.source} holds {len(found)} image; of 2 or more there is a covariance.")
            return found, len(found) if num is None else num, networks

        found, number, networks = processes.agree(look)
        if number < len(found):
            job.say(
                f"Note: these are the first {number:,} of {len(found):,} images in the data's order, which is class by "
                "class in many data sets."
            )
        asked = {"images": found.identity, "num": number, "features": {n.name: n.digest for n in networks}}
        text = json.dumps(asked, sort_keys=True)
        processes.assert_equal("what statistics are of", hashlib.sha256(text.encode()).hexdigest())
        if processes.broadcast(processes.agree(lambda: _look_at(job, asked))) == "done":
            job.say(f"{job.folder / REFERENCE} is done.")
            return
        job.claim(lambda: storage.write_json(job.folder / SETTINGS, asked))
        parts = [
            Extraction(found, number, network, job.folder / "features" / f"{network.name}-{network.digest}")
            for network in networks
        ]
        for part in parts:
            if not job.stopped:
                extract(job, part, batch_size, f"images of {size_text(found.image_size)}, {found.source}")

        def complete() -> None:
            _write(job, found, parts)
            remove(job.folder / "features")

        if job.finish(lambda: [shard for part in parts for shard in part.missing()], complete):
            path = job.folder / REFERENCE
            options = f"--reference={path} --features={features}"
            job.say(f"{path} is done. To compare with it: deco evaluate SOURCE --out=DIR {options}")


def _look_at(job: Job, asked: dict[str, Any]) -> str:
    """ "done" if the folder holds these statistics, else ""; UsageError if it holds others."""
    if not job.first:
        return ""

    def look() -> tuple[set[str], str]:
        names = {path.name for path in job.folder.iterdir()} if job.folder.is_dir() else set()
        return names, (job.folder / SETTINGS).read_text() if SETTINGS in names else "{}"

    with storage.reading(job.folder):
        names, text = storage.retried(f"reading {job.folder}", look)
    if not names & {REFERENCE, "features"}:
        return ""
    try:
        there = dict(json.loads(text))
    except ValueError:
        there = {}
    different = [f"{k}: {there.get(k)} there, {asked[k]} here" for k in asked if there.get(k) != asked[k]]
    if different:
        raise UsageError(
            f"{job.name} holds statistics of something else ({'; '.join(different)}); choose another folder."
        )
    return "done" if REFERENCE in names else ""


def _write(job: Job, images: Images, parts: Sequence[Extraction]) -> None:
    """reference.npz, from features that are all there."""
    shards = list(parts[0].read(()))
    bad = np.concatenate([shard.numbers_K[~shard.mask_K] for shard in shards])
    if isinstance(images, SourceImages):
        images.limit.check(bad)  # what earlier starts and other processes met counts as well
    left_out = f", {len(bad)} unreadable ones left out" if len(bad) else ""
    source = f"{parts[0].number:,} images of {images.source}{left_out}, hash {hash_of(shards)}"
    references = []
    for part in parts:
        scores = scores_of(part, tuple(part.network.sizes))
        if scores.count < 2:
            raise UsageError(f"{images.source}: {scores.count} images can be read; of 2 or more there is a covariance.")
        references.append(scores.as_reference(part.network.digest, images.image_size, source))
    write_reference(job.folder / REFERENCE, references)
