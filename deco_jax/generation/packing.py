"""How do shards become samples.npz and pictures? By whoever finishes last; then the shards go."""

import contextlib
import io
import json
import math
import shutil
from collections.abc import Iterator

import numpy as np

from deco_jax import storage
from deco_jax.errors import Stopped, UsageError
from deco_jax.generation import pictures
from deco_jax.generation.npz import Parts, write_npz
from deco_jax.generation.plan import Plan
from deco_jax.jobs import Job
from deco_jax.storage import AnyPath

SAMPLES, PROMPTS = "samples.npz", "prompts.jsonl"


def shard_file(folder: AnyPath, shard: int) -> AnyPath:
    """Where shard number `shard` lies."""
    return folder / f"samples-{shard:05d}.npy"


def npy_header(shape: tuple[int, ...]) -> bytes:
    """How an .npy file of uint8 begins."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return header.getvalue()


def complete(job: Job, plan: Plan) -> None:
    """samples.npz and missing pictures, unless told to stop; then the shards go."""
    with contextlib.suppress(Stopped):
        path = job.folder / SAMPLES
        if not path.exists():
            job.say(f"Packing {plan.num:,} images into {path}.")
            arrays = {
                "arr_0": Parts(plan.shape(plan.num), "uint8", read_shards(job, plan)),
                "arr_1": Parts((plan.num,), "int64", [_labels(plan)]),
            }
            try:
                with storage.writing(path):
                    write_npz(path, arrays)
            except UsageError:  # another part may have been faster, and has removed shards
                if not path.exists():
                    raise
        if plan.wanted.prompts:
            lines = [json.dumps({"prompt": prompt.text}, ensure_ascii=False) for prompt in plan.wanted.prompts]
            pictures.write_text(job.folder / PROMPTS, "".join(f"{line}\n" for line in lines))
        if plan.layout is not None:
            pictures.fill(job, plan.layout, path)
        for made in job.folder.glob("samples-*.npy"):
            remove(made)
        if not storage.is_remote(job.folder):
            for draft in job.folder.glob(f".{SAMPLES}.*"):  # of a killed part; or of one that now finds it made
                shutil.rmtree(draft, ignore_errors=True)


def _labels(plan: Plan) -> np.ndarray:
    """The class of every image, or the line of its prompt in prompts.jsonl: (N,) int64."""
    if not plan.wanted.prompts:
        return np.asarray(plan.model.condition.read(plan.wanted.shown), np.int64)
    return np.arange(plan.num) // plan.wanted.each % len(plan.wanted.prompts)


def remove(path: AnyPath) -> None:
    """Removes a file if it is there."""
    storage.retried(f"removing {path}", lambda: path.unlink(missing_ok=True))


def read_shards(job: Job, plan: Plan) -> Iterator[np.ndarray]:
    """One after the other; Stopped as soon as this process is told to stop."""
    for shard in range(plan.shards):
        job.stop.check()
        job.check()
        path, shape = shard_file(job.folder, shard), plan.shape(len(plan.numbers(shard)))
        with storage.reading(path):
            content = storage.retried(f"reading {path}", path.read_bytes)
        header, size = npy_header(shape), math.prod(shape)
        if len(content) != len(header) + size or not content.startswith(header):
            raise UsageError(f"{path} is damaged, it has {len(content):,} bytes; remove it and start again.")
        yield np.frombuffer(content, np.uint8, offset=len(header)).reshape(shape)
