"""How good are these images? One evaluation, from its request to metrics.json, as a job that goes on after any end.

OUT/evaluation.json    what is evaluated; a folder that was begun with something else is refused
OUT/samples            of a network: what `deco generate` makes
OUT/features           of the images, and of those in an ADM reference, until the metrics are there; see `extract`
OUT/metrics.json       the numbers, and all that they depend on; and metrics.md, a row of Markdown
"""

import dataclasses
import datetime
import hashlib
import json
import time
from collections.abc import Mapping
from typing import Any

import jax

from deco_jax import storage
from deco_jax.config import build_model
from deco_jax.encoders.features import FeatureNetwork
from deco_jax.errors import UsageError
from deco_jax.evaluation.extract import Extraction, extract, hash_of, remove
from deco_jax.evaluation.images import Images, holds_images, open_images, size_text
from deco_jax.evaluation.results import METRICS_JSON, METRICS_MD, line_of, row_of
from deco_jax.generation.requests import Asked, read_requests
from deco_jax.generation.shards import generate_samples
from deco_jax.jobs import Job, open_job
from deco_jax.metrics.references import Reference, read_reference
from deco_jax.metrics.scores import Scores, warnings_for
from deco_jax.parallel import processes
from deco_jax.pretrained.load import as_now, open_pretrained
from deco_jax.sampling.settings import Sampling, parse_image_size
from deco_jax.storage import AnyPath
from deco_jax.version import __version__

EVALUATION = "evaluation.json"
NUM = 50_000  # images that are generated unless told otherwise, as FID is reported


@dataclasses.dataclass(frozen=True)
class Judge:
    """What images are seen by, and compared with."""

    networks: tuple[FeatureNetwork, ...]
    references: dict[str, Reference]  # by network
    path: str  # of their file
    images: Images | None  # that the file holds, if vectors are to be made of them

    @classmethod
    def open(cls, networks: tuple[FeatureNetwork, ...], path: str) -> "Judge":
        """With the statistics at `path` for each of the networks; UsageError if it lacks some."""
        references = {network.name: read_reference(path, network) for network in networks}
        needed = any(reference.vectors is None and reference.has_images for reference in references.values())
        return cls(networks, references, path, open_images(path) if needed else None)

    @property
    def image_size(self) -> tuple[int, int] | None:
        """Of the images that the statistics are of, if the file says it."""
        return next((r.image_size for r in self.references.values() if r.image_size is not None), None)

    @property
    def hash(self) -> str:
        """Of the statistics."""
        return "-".join(reference.hash for reference in self.references.values())


@dataclasses.dataclass(frozen=True)
class Request:
    """Which images are to be evaluated: those at `source`, or those that the network there draws."""

    source: str
    num: int | None = None
    labels: str | None = None
    prompt: tuple[str, ...] = ()
    prompts: str | None = None
    text_encoder: str | None = None
    seed: int = 0
    weights: str = "ema"
    dtype: str | None = None
    batch_size: int = 64
    sampling: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # image_size, fields of Sampling; or None

    @property
    def is_network(self) -> bool:
        """Whether there is a network, not images."""
        return not holds_images(self.source)


def _asked(request: Request) -> Asked:
    return Asked(
        request.num,
        labels=request.labels,
        prompt=request.prompt,
        prompts=request.prompts,
        text_encoder=request.text_encoder,
    )


@dataclasses.dataclass(frozen=True)
class Plan:
    """A request that was looked into."""

    asked: dict[str, Any]  # all that the metrics depend on, as evaluation.json keeps it
    images: Images | None  # None: of a network, which has yet to draw them
    number: int
    image_size: tuple[int, int]


def look_into(request: Request, judge: Judge) -> Plan:
    """Finds out what a request is about; nothing is computed yet.

    Raises:
      UsageError: it cannot be fulfilled, or the reference is of images of another size.
    """
    if request.batch_size < 1:
        raise UsageError(f"--batch-size={request.batch_size} must be at least 1.")
    images, number = None, request.num
    if number is not None and number < 2:
        raise UsageError(f"--num={number} must be at least 2, of which there is a covariance.")
    if request.is_network:
        found = open_pretrained(request.source, dtype=request.dtype)
        found.check_set(request.weights)
        changes = dict(request.sampling)
        size = parse_image_size(changes.pop("image_size", None)) or (found.config.data.image_size,) * 2
        settings = Sampling.from_config(found.config.sample, **changes)
        names, asked = found.class_names, _asked(request)
        wanted = read_requests(build_model(found.config.model).condition, names, asked)
        number = wanted.num
        asked = {"source": str(found), "fingerprint": found.fingerprint}
        asked |= {"weights": request.weights, "dtype": found.config.model.dtype}
        labels = str(wanted) if wanted.prompts else request.labels or "all"
        asked |= {"seed": request.seed, "labels": labels, "image_size": list(size)}
        asked |= {"text_encoder": request.text_encoder} if request.text_encoder else {}
        asked |= dataclasses.asdict(settings)
    else:
        of_networks = {
            "labels": request.labels,
            "prompt": request.prompt or None,
            "prompts": request.prompts,
            "text_encoder": request.text_encoder,
            **request.sampling,
        }
        given = [f"--{name.replace('_', '-')}" for name, value in of_networks.items() if value is not None]
        if given:
            raise UsageError(f"{', '.join(given)} is for networks; {request.source} holds images, already drawn.")
        images = open_images(request.source)
        size = images.image_size
        if number is not None and number > len(images):
            raise UsageError(f"--num={number} is more than the {len(images):,} images of {request.source}.")
        number = len(images) if number is None else number
        if number < 2:
            raise UsageError(f"{request.source} holds {number} image; of 2 or more there is a covariance.")
        asked = {"source": images.source, "images": images.identity}
    if judge.image_size not in (None, tuple(size)):
        raise UsageError(
            f"--reference={judge.path} is of images of {size_text(judge.image_size)} pixels, those of "
            f"{request.source} have {size_text(size)}; they must be equal."
        )
    asked |= {"num": number, "features": {n.name: n.digest for n in judge.networks}, "reference": judge.hash}
    return Plan(json.loads(json.dumps(asked)), images, number, tuple(size))


def measure(request: Request, judge: Judge, out: str, cache: AnyPath | None = None, keep: bool = True) -> bool:
    """Evaluates images into `out`/metrics.json and metrics.md, and prints them.

    Args:
      request: which images.
      judge: what they are seen by and compared with.
      out: the folder, on this machine or in a bucket; with several processes one they all see.
      cache: where features of the reference's images are kept for further evaluations; None = not kept.
      keep: the images that were drawn; else they are removed.

    Returns:
      Whether it is done; otherwise it was told to stop.

    Raises:
      BrokenRun: this process of several fails alone, or others went away.
      TransientError: storage does not answer; or this machine is about to be taken away.
      UsageError: images, network or folder are not to be had, do not fit the reference, or `out` holds the metrics of
        something else.
    """
    with open_job("--out", out) as job:
        plan = processes.agree(lambda: look_into(request, judge))
        text = json.dumps(plan.asked, sort_keys=True)
        processes.assert_equal("what is evaluated", hashlib.sha256(text.encode()).hexdigest())
        left_over = ("features", *(() if keep or plan.images is not None else ("samples",)))
        if processes.broadcast(processes.agree(lambda: _look_at(job, plan.asked))) == "done":
            if job.first:
                for name in left_over:  # an earlier start may have died before it was at that
                    remove(job.folder / name)
            job.say(f"{job.folder} is done:")
            _show(job)
            return True
        job.claim(lambda: storage.write_json(job.folder / EVALUATION, plan.asked))
        started, seconds, images = time.perf_counter(), {}, plan.images
        if images is None:
            images = _generate(request, plan, job)
            if images is None:
                return False
            seconds["generate"] = round(time.perf_counter() - started, 3)
        started, parts, real = time.perf_counter(), *_extractions(plan, judge, images, job.folder, cache)
        for what, extractions in (("images of the reference", real), ("images", parts)):
            for one in extractions.values():
                if not job.stopped:
                    extract(job, one, request.batch_size, what)
        seconds["extract"] = round(time.perf_counter() - started, 3)

        def missing() -> list[int]:
            return [shard for one in (*real.values(), *parts.values()) for shard in one.missing()]

        def complete() -> None:
            _write(job, _compute(plan, judge, images, parts, real, seconds))
            for name in left_over:
                remove(job.folder / name)

        if not job.finish(missing, complete):
            return False
        _show(job)
        return True


def _look_at(job: Job, asked: dict[str, Any]) -> str:
    """ "done" if the folder holds the metrics of this, else ""; UsageError if it holds something of something else."""

    def look() -> tuple[set[str], str]:
        names = {path.name for path in job.folder.iterdir()} if job.folder.is_dir() else set()
        return names, (job.folder / EVALUATION).read_text() if EVALUATION in names else ""

    if not job.first:
        return ""
    with storage.reading(job.folder):
        names, text = storage.retried(f"reading {job.folder}", look)
    made = names & {METRICS_JSON, "features", "samples"}
    if not made:
        return ""
    try:
        there = dict(json.loads(text))
    except ValueError as error:
        what = f"{min(made)}, and no {EVALUATION} that says of what"
        raise UsageError(f"{job.name} holds {what}; choose another folder.") from error
    there = as_now({"text_encoder": asked.get("text_encoder")} | there, asked)  # which was not kept once
    different = [
        f"{key}: {there.get(key)} there, {asked.get(key)} here"
        for key in dict.fromkeys([*there, *asked])
        if there.get(key) != asked.get(key)
    ]
    if different:
        raise UsageError(f"{job.name} evaluates something else ({'; '.join(different)}); choose another folder.")
    return "done" if METRICS_JSON in names else ""


def _generate(request: Request, plan: Plan, job: Job) -> Images | None:
    """The images that the network draws, in OUT/samples; None if told to stop."""
    path = generate_samples(
        plan.asked["source"],  # request.source may be a run that has gone on since
        f"{job.folder / 'samples'}",
        num=plan.number,
        labels=request.labels,
        prompt=request.prompt,
        prompts=request.prompts,
        text_encoder=request.text_encoder,
        layout="npz",
        seed=request.seed,
        weights=request.weights,
        dtype=request.dtype,
        batch_size=request.batch_size,
        part="0/1",  # all of it, also in a task of a SLURM array
        **request.sampling,
    )
    if path is None:
        return None
    storage.wait_until(path.exists)  # another host may have packed it
    return processes.agree(lambda: open_images(f"{path}"))


def _extractions(
    plan: Plan, judge: Judge, images: Images, folder: AnyPath, cache: AnyPath | None
) -> tuple[dict[str, Extraction], dict[str, Extraction]]:
    """By network: of the images, and of the reference's images where the reference has no vectors."""
    parts, real = {}, {}
    for network in judge.networks:
        weights, reference = f"{network.name}-{network.digest}", judge.references[network.name]
        parts[network.name] = Extraction(images, plan.number, network, folder / "features" / weights)
        if reference.vectors is None and judge.images is not None:
            kept = (folder / "features" if cache is None else cache) / f"reference-{weights}-{reference.hash}"
            real[network.name] = Extraction(judge.images, len(judge.images), network, kept)
    return parts, real


def _compute(
    plan: Plan,
    judge: Judge,
    images: Images,
    parts: dict[str, Extraction],
    real: dict[str, Extraction],
    seconds: dict[str, float],
) -> dict[str, Any]:
    """The content of metrics.json, from features that are all there."""
    started, metrics, warnings = time.perf_counter(), {}, []
    for network in judge.networks:
        reference = judge.references[network.name]
        if network.name in real:
            reference = dataclasses.replace(reference, vectors=scores_of(real[network.name], ("pool",)).ordered())
        scores = scores_of(parts[network.name], tuple(network.sizes))
        metrics |= scores.compute(reference)
        told = warnings_for(scores, reference)
        warnings += [f"{network.name}: {text}" for text in told] if len(judge.networks) > 1 else told
    first = judge.references[judge.networks[0].name]
    result = {
        "metrics": metrics,
        "warnings": warnings,
        "images": plan.number,
        "image_size": list(images.image_size),
        "images_hash": hash_of(next(iter(parts.values())).read(())),
        "source": plan.asked["source"],
        "settings": images.settings,
        "features": {network.name: network.digest for network in judge.networks},
        "reference": {"path": judge.path, "hash": judge.hash, "source": first.source, "images": first.count},
        "deco_jax": __version__,
        "jax": jax.__version__,
        "device": f"{jax.device_count()} × {jax.devices()[0].device_kind}",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }
    seconds = seconds | {"compute": round(time.perf_counter() - started, 3)}
    return {**result, "line": line_of(result), "seconds": seconds}


def scores_of(extraction: Extraction, names: tuple[str, ...]) -> Scores:
    """What a network sees in all images that can be read, from features that are all there."""
    scores = Scores.empty(extraction.network.name)
    for shard in extraction.read(names):
        seen = Scores.from_model_output(
            network=extraction.network.name, numbers=shard.numbers_K, mask=shard.mask_K, **shard.features
        )
        scores = scores.merge(seen)
    return scores


def _write(job: Job, result: dict[str, Any]) -> None:
    storage.write_bytes(job.folder / METRICS_MD, row_of(result).encode())
    storage.write_json(job.folder / METRICS_JSON, result)


def _show(job: Job) -> None:
    """Prints what the folder holds, on process 0."""
    if job.first:
        result = read_result(job.folder)
        job.say(f"\n{row_of(result)}")
        for warning in result["warnings"]:
            job.say(f"Note: {warning}")
        job.say(f"\n{result['line']}\n\n{METRICS_JSON} and {METRICS_MD} are in {job.folder}.")


def read_result(folder: AnyPath) -> dict[str, Any]:
    """metrics.json of an evaluation that is done."""
    path = folder / METRICS_JSON
    with storage.reading(path):
        text = storage.retried(f"reading {path}", path.read_text)
    try:
        return json.loads(text)
    except ValueError as error:
        raise UsageError(f"{path} is damaged ({error}); remove it and run the same command again.") from error
