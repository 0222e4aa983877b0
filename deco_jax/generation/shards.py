"""How are very many images drawn, by all devices and hosts, and packed into one file? `deco generate`.

    OUT/generation.json      how they are drawn; a folder that was begun in another way is refused
    OUT/samples-00000.npy …  shards, uint8 (S, H, W, 3), images k·S to (k + 1)·S − 1; until samples.npz is whole
    OUT/samples.npz          arr_0: the images, uint8 (N, H, W, 3); arr_1: their labels, int64 (N,)
    OUT/prompts.jsonl        of a network that is told text: the prompts, whose lines arr_1 then has
    OUT/png/00000.png …      on request, or in the layout of a benchmark (`pictures`)

A shard gets its name when it is whole, and so does samples.npz; only then shards are removed. So whatever a killed
start has left, the same command makes what is missing and nothing else.
"""

import concurrent.futures
import contextlib
import functools
import itertools
import json
import math
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import numpy as np

from deco_jax import storage
from deco_jax.encoders.frozen import digest_of
from deco_jax.encoders.text import TextEncoder
from deco_jax.errors import Stopped, UsageError
from deco_jax.generation import packing, pictures
from deco_jax.generation.batches import generate
from deco_jax.generation.packing import SAMPLES, npy_header, shard_file
from deco_jax.generation.plan import Plan, make_plan, summary
from deco_jax.generation.requests import Asked
from deco_jax.jobs import Job, Progress, find_part, open_job
from deco_jax.jobs.job import GO_ON, WHOLE
from deco_jax.parallel import mesh as meshes
from deco_jax.parallel import processes
from deco_jax.pretrained.load import as_now
from deco_jax.storage import AnyPath

SETTINGS, OTHER = "generation.json", "choose another folder"
# What a killed start leaves of a shard, of a picture, or of the other files.
DRAFT = re.compile(r"\.(?:samples-(\d+)\.npy|(\d+)\.png|.*\.png|samples\.npz|generation\.json|.*\.jsonl)\.")


def generate_samples(
    source: str,
    out: str,
    num: int | None = None,
    per_class: int | None = None,
    labels: str | None = None,
    label_file: str | None = None,
    prompt: Sequence[str] = (),
    prompts: str | None = None,
    per_prompt: int | None = None,
    text_encoder: str | None = None,
    negative: str | None = None,
    png: bool = False,
    layout: str | None = None,
    seed: int = 0,
    weights: str = "ema",
    dtype: str | None = None,
    batch_size: int = 64,
    part: str | None = None,
    **sampling: Any,
) -> AnyPath | None:
    """Draws images into `out`/samples.npz, in shards that processes and parts share.

    Image i depends on the seed and i alone, and shows label i modulo their number, or its prompt.

    Args:
      source: anything that `load_pretrained` opens.
      out: the folder, on this machine or in a bucket; with several processes or parts, one they all see.
      num: images; None = 50,000, or one for each line of `label_file`, or each prompt.
      per_class: images of each label, in place of `num`.
      labels: as in "0,5-9,golden retriever,null"; None = all classes.
      label_file: a text file with one label on each line, in place of `labels`; image i shows line i.
      prompt, prompts: of a network that is told text, texts or their file, see `prompts.choose_prompts`.
      per_prompt: images of each prompt, one after the other, in place of `num`.
      text_encoder: of the prompts, see `load_text_encoder`; None = as the run's configuration says.
      negative: the label or text that guidance leads away from; None = no class, or the empty prompt.
      png: also `out`/png/00000.png, …
      layout: "npz", "png", "geneval" or "dpg", see `pictures`; None = as `png` and the prompts' file say.
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
    asked = Asked(num, negative, labels, label_file, per_class, tuple(prompt), prompts, per_prompt, text_encoder)
    with open_job("--out", out, find_part(part, os.environ)) as job:

        def look() -> Plan:
            return make_plan(source, out, asked, seed, weights, dtype, batch_size, layout, png, **sampling)

        plan = processes.agree(look)
        processes.assert_equal("what is to be generated", json.dumps(plan.how))
        processes.agree(lambda: _is_of(job, plan.how))  # before anything is written there
        job.claim(lambda: _begin(job, plan))

        missing = functools.partial(missing_shards, job.folder, plan)
        left = missing()
        if not left and plan.wanted.prompts:
            processes.agree(lambda: _check_encoder(job, plan))
        if processes.broadcast("draw" if left else "pack") == "draw":
            encoder = processes.agree(plan.open_encoder)
            job.say("\n".join([summary(plan, left), *plan.warnings(encoder)]))
            params = processes.agree(lambda: plan.found.read(plan.weights))
            digests = processes.agree(lambda: _settle(job, plan, params, encoder))
            processes.assert_equal("the hashes of the weights", digests)
            _make_shards(job, plan, params, encoder, left)
        if not job.finish(missing, lambda: packing.complete(job, plan)):
            return None
        path = job.folder / SAMPLES
        whole = path.exists() and not (plan.layout and pictures.missing(job.folder, plan.layout))
        if processes.broadcast("whole" if whole else "") != "whole":
            job.say(f"Stopped by {job.stop.by}; {path} is not made yet, all images are there. {GO_ON}")
            return None
        told = "" if plan.layout is None else f" {plan.layout.pictures:,} pictures are there, as {plan.layout.kind}."
        job.say(f"{path} is done: it holds {plan.num:,} images and their labels.{told}")
        return path


# --- the folder


def missing_shards(folder: AnyPath, plan: Plan) -> list[int]:
    """Those that are neither there nor in samples.npz."""

    def look() -> tuple[set[str], bool]:
        names = {path.name for path in folder.glob("samples-*.npy")}
        return names, (folder / SAMPLES).exists()  # in this order: another part may just remove what is in it

    with storage.reading(folder):
        names, whole = storage.retried(f"reading {folder}", look)
    return [] if whole else [k for k in range(plan.shards) if shard_file(folder, k).name not in names]


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
    images += [name for name in names if name in ("png", "dpg", "sample.json") or re.fullmatch("[0-9]{5}", name)]
    if not text:
        if images:
            raise UsageError(f"{job.name} holds {images[0]}, and no {SETTINGS} that says how it was made; {OTHER}.")
        return False
    try:
        there = dict(json.loads(text))
    except ValueError as error:
        raise UsageError(f"{job.folder / SETTINGS} is damaged ({error}); {OTHER}.") from error
    here = json.loads(json.dumps(how))
    there = as_now(there, here)
    different = [f"{key}: {there.get(key)} there, {here[key]} here" for key in here if there.get(key) != here[key]]
    if different and not images and job.part == WHOLE:  # nothing is drawn yet, and nobody else is about to
        return False
    if different:
        raise UsageError(f"{job.name} holds images that are drawn in another way ({'; '.join(different)}); {OTHER}.")
    return True


def _begin(job: Job, plan: Plan) -> None:
    """Removes what a start that was killed has left, and looks whether there is space for what is missing."""
    remote = storage.is_remote(job.folder)
    if not remote:
        with storage.writing(job.folder):
            places = (".*", "png/.*") + (("*/.*", "*/samples/.*") if job.part == WHOLE else ())
            for draft in itertools.chain(*map(job.folder.glob, places)):
                if found := DRAFT.match(draft.name):
                    shard = found[1] or (found[2] and int(found[2]) // plan.shard_images)
                    if job.part == WHOLE or (shard is not None and job.is_mine(int(shard))):  # others are at work
                        shutil.rmtree(draft, ignore_errors=True)
    if (job.folder / SAMPLES).exists():
        return
    image, left = 3 * math.prod(plan.image_size), missing_shards(job.folder, plan)
    npz, shards = image * plan.num, 0 if remote else image * sum(len(plan.numbers(k)) for k in left)
    pngs = npz if plan.layout is not None and not remote else 0
    where = pathlib.Path(tempfile.gettempdir()) if remote else job.folder
    usage = shutil.disk_usage(where)
    if usage.total and npz + shards + pngs > usage.free:  # some network folders say nothing
        asked = f"the folder for temporary files, {where} (TMPDIR)," if remote else f"{job.name}"
        raise UsageError(
            f"{asked} has {usage.free / 1e9:,.1f} GB free, and {plan.num:,} images take "
            f"{(npz + shards + pngs) / 1e9:,.1f} GB until {SAMPLES} is whole; choose another disk or fewer images."
        )


def _settle(job: Job, plan: Plan, params: Any, encoder: TextEncoder | None) -> str:
    """The hashes of the networks' numbers, which process 0 notes with all other settings; others are refused."""
    digests = {"weights_digest": digest_of(params)}
    digests |= {} if encoder is None else {"text_encoder_digest": encoder.weights.digest}
    how = plan.how | digests
    if job.first and not _is_of(job, how):
        name = {} if encoder is None else {"text_encoder": plan.encoder_name}
        storage.write_json(job.folder / SETTINGS, how | name)
    return str(digests)


def _check_encoder(job: Job, plan: Plan) -> None:
    """Raises UsageError if images that are all drawn were told by another encoder; one of the same name is not read."""
    with storage.reading(job.folder):
        there = json.loads(storage.retried(f"reading {job.folder}", (job.folder / SETTINGS).read_text))
    if there.get("text_encoder") != plan.encoder_name:
        here, known = plan.open_encoder().weights.digest, there.get("text_encoder_digest")
        if here != known:
            raise UsageError(
                f"{job.name} holds images that are drawn in another way (text_encoder_digest: {known} there, {here} "
                f"here); {OTHER}."
            )


# --- the images


def _make_shards(job: Job, plan: Plan, params: Any, encoder: TextEncoder | None, missing: Collection[int]) -> None:
    """This process's share of the shards that are missing."""
    mine = job.share(missing)
    own, run = (sum(len(plan.numbers(k)) for k in shards) for shards in (mine, filter(job.is_mine, missing)))
    there = plan.num - sum(len(plan.numbers(k)) for k in missing)
    batch = meshes.round_up(plan.batch_size, meshes.local_layout().mesh)
    numbers = itertools.chain.from_iterable(_filled_up(plan.numbers(k), batch) for k in mine)
    args = plan.wanted.labels, plan.seed, plan.image_size, plan.batch_size, plan.settings, numbers
    images, made = generate(plan.model, params, *args, plan.wanted.negative, encoder), 0
    with contextlib.closing(images), contextlib.closing(Progress(there + run, "image", there, job.first)) as progress:
        for shard in job.shards(missing):
            with contextlib.suppress(Stopped):
                for written in _write_shard(job, plan, shard, batch, images):
                    progress.update(there + round((made + written) * run / own))  # others are as fast
                made += len(plan.numbers(shard))


def _filled_up(numbers: range, batch_size: int) -> Iterator[int]:
    """The numbers, the last one repeated until batches are full: so an image has the same place in every start."""
    return itertools.chain(numbers, itertools.repeat(numbers[-1], -len(numbers) % batch_size))


def _write_shard(job: Job, plan: Plan, shard: int, batch: int, images: Iterator[np.ndarray]) -> Iterator[int]:
    """One shard, and its pictures before it gets its name; yields after every batch how many images of it are made."""
    path, numbers = shard_file(job.folder, shard), plan.numbers(shard)
    with (
        storage.writing(path),
        storage.write_beside(path) as draft,
        draft.open("wb") as file,
        concurrent.futures.ThreadPoolExecutor(pictures.WRITERS) as pool,
    ):
        file.write(npy_header(plan.shape(len(numbers))))
        waiting = []
        for done, number in enumerate(numbers):
            job.stop.check()
            if done and done % batch == 0:
                yield done
            image_HxWx3 = next(images)
            file.write(np.ascontiguousarray(image_HxWx3))
            if plan.layout is not None and plan.layout.images == 1:  # others are made of samples.npz
                waiting.append(pool.submit(pictures.save, job.folder, plan.layout, number, image_HxWx3[None]))
        for _ in range(-len(numbers) % batch):
            next(images)
        for picture in waiting:
            picture.result()
        file.flush()
        os.fsync(file.fileno())
    yield len(numbers)
