"""How do the images of a job become PNGs beside samples.npz, also when asked for later? In one of three layouts.

    png      png/00000.png, …                                   one per image
    geneval  00000/metadata.jsonl, 00000/samples/0000.png, …    a folder per prompt, as GenEval's scorer reads it
    dpg      dpg/NAME.png, …                                    a picture per prompt file, 2 × 2 images without a gap

GenEval (Ghosh et al., 2023; github.com/djghosh13/geneval) takes OUT, and metadata.jsonl as its prompt file says it.
DPG-Bench (Hu et al., 2024; github.com/TencentQQGYLab/ELLA, dpg_bench) takes OUT/dpg.
"""

import concurrent.futures
import dataclasses
import itertools
import math
from collections.abc import Sequence

import numpy as np

from deco_jax import storage
from deco_jax.data.reading import list_files
from deco_jax.errors import UsageError
from deco_jax.generation.npz import open_array
from deco_jax.generation.prompts import Prompt
from deco_jax.generation.requests import Requests
from deco_jax.jobs import Job
from deco_jax.sampling.pictures import save_png
from deco_jax.storage import AnyPath

BENCHMARKS = ("geneval", "dpg")
LAYOUTS = ("npz", "png", *BENCHMARKS)
USUAL = 4  # images of a prompt with the benchmarks' layouts
WRITERS = 8  # threads that write pictures
BLOCK_BYTES = 2**26  # of images that are read at a time, at most, unless a picture has more


@dataclasses.dataclass(frozen=True)
class Layout:
    """Which pictures there are, where they lie, and of which images each is made."""

    kind: str  # of LAYOUTS, but for npz
    wanted: Requests

    @property
    def images(self) -> int:
        """Of a picture."""
        return self.wanted.each if self.kind == "dpg" else 1

    @property
    def pictures(self) -> int:
        """How many there are."""
        return self.wanted.num // self.images

    @property
    def top(self) -> str | None:
        """The folder of all pictures; None if there are many."""
        return None if self.kind == "geneval" else self.kind

    def name(self, picture: int) -> str:
        """Where it lies in the job's folder."""
        if self.kind == "geneval":
            prompt, sample = divmod(picture, self.wanted.each)
            return f"{prompt:05d}/samples/{sample:04d}.png"
        return f"dpg/{self.wanted.prompts[picture].name}.png" if self.kind == "dpg" else f"png/{picture:05d}.png"

    @property
    def beside(self) -> list[tuple[str, str]]:
        """Files that belong to the pictures: where they lie, and what stands in them."""
        prompts = self.wanted.prompts if self.kind == "geneval" else ()
        return [(f"{k:05d}/metadata.jsonl", f"{prompt.line}\n") for k, prompt in enumerate(prompts)]


def choose_layout(kind: str, png: bool, wanted: Requests, image_size: tuple[int, int]) -> Layout | None:
    """The layout of this kind; None = no pictures. `png`: whether --png is given.

    Raises:
      UsageError: there is no such layout, or it does not fit what is drawn.
    """
    if kind not in LAYOUTS:
        raise UsageError(f"--layout={kind} is not known; allowed: {', '.join(LAYOUTS)}.")
    if png and kind != "png":
        raise UsageError(f"--png contradicts --layout={kind}; give one of them.")
    option, each, prompts = f"--layout={kind}", wanted.each, wanted.prompts
    if kind in BENCHMARKS:
        if not prompts or wanted.num != each * len(prompts):
            raise UsageError(f"{option} has as many images of each prompt: --prompts and --per-prompt, without --num.")
        without = [k for k, prompt in enumerate(prompts, 1) if not {"tag", "prompt"} <= prompt.values.keys()]
        if kind == "geneval" and without:
            raise UsageError(f"{option} takes GenEval's prompts, JSON lines with a tag; prompt {without[0]} has none.")
        if kind == "dpg" and not all(prompt.name for prompt in prompts):
            raise UsageError(f"{option} takes DPG-Bench's prompts, a folder of .txt with one in each.")
        if kind == "dpg" and each not in (1, 4):
            raise UsageError(f"{option} takes 4 images of a prompt, or 1; --per-prompt={each} is neither.")
        if kind == "dpg" and image_size[0] != image_size[1]:
            raise UsageError(f"{option} takes square images, not {image_size[0]}×{image_size[1]}.")
    return None if kind == "npz" else Layout(kind, wanted)


def benchmark_of(wanted: Requests, image_size: tuple[int, int]) -> str:
    """The layout of the benchmark whose prompts these are, as far as what is drawn fits it; else "npz"."""
    prompts, each = wanted.prompts, wanted.each
    if not prompts or wanted.num != each * len(prompts):
        return "npz"
    if all({"tag", "include", "prompt"} <= prompt.values.keys() for prompt in prompts):
        return "geneval"
    fits = each in (1, 4) and image_size[0] == image_size[1]
    return "dpg" if fits and all(prompt.name for prompt in prompts) else "npz"


def looks_like(prompts: Sequence[Prompt]) -> str:
    """The benchmark whose prompts these seem to be, whether they fit its layout or not; "" if of none."""
    if any("tag" in prompt.values for prompt in prompts):
        return "geneval"
    return "dpg" if prompts and all(prompt.name for prompt in prompts) else ""


def save(folder: AnyPath, layout: Layout, picture: int, images_KxHxWx3: np.ndarray) -> None:
    """Writes a picture of uint8 images.

    Raises:
      UsageError: it cannot be written.
    """
    path = folder / layout.name(picture)
    with storage.writing(path):
        storage.retried(f"writing {path}", lambda: save_png(_tiled(images_KxHxWx3), path))


def write_beside(folder: AnyPath, layout: Layout) -> None:
    """Writes what belongs to the pictures, where it is not there as it must be; the prompts' file may have changed."""
    with concurrent.futures.ThreadPoolExecutor(WRITERS) as pool:
        for _ in pool.map(lambda file: write_text(folder / file[0], file[1]), layout.beside):
            pass


def write_text(path: AnyPath, text: str) -> None:
    """Writes a small file, unless it is there and says so already; raises UsageError if it cannot be written."""
    with storage.writing(path):
        same = storage.retried(f"reading {path}", lambda: path.is_file() and path.read_bytes() == text.encode())
        if not same:
            storage.write_bytes(path, text.encode())


def _tiled(images_KxHxWx3: np.ndarray) -> np.ndarray:
    """One image as it is, four as two rows of two."""
    if len(images_KxHxWx3) == 1:
        return images_KxHxWx3[0]
    return np.concatenate([np.concatenate(list(row), axis=1) for row in np.split(images_KxHxWx3, 2)], axis=0)


def missing(folder: AnyPath, layout: Layout) -> list[int]:
    """Which of the pictures are not there, in order."""
    where = folder if layout.top is None else folder / layout.top
    with storage.reading(where):
        names = set(list_files(where)) if where.is_dir() else set()
    before = "" if layout.top is None else f"{layout.top}/"
    return [k for k in range(layout.pictures) if layout.name(k).removeprefix(before) not in names]


def fill(job: Job, layout: Layout, samples: AnyPath) -> None:
    """Writes those that are missing, as earlier starts did not make them, from `samples`; and what belongs to them.

    Raises:
      Stopped: this process is told to stop.
      UsageError: they cannot be written, or `samples` cannot be read.
    """
    write_beside(job.folder, layout)
    numbers = missing(job.folder, layout)
    if not numbers:
        return
    job.say(f"Writing {len(numbers):,} pictures into {job.folder / (layout.top or '')}.")
    images, k = open_array(samples, "arr_0"), layout.images
    block = max(BLOCK_BYTES // math.prod(images.shape[1:]) // k, 1)  # pictures
    with concurrent.futures.ThreadPoolExecutor(WRITERS) as pool:
        for _, group in itertools.groupby(numbers, lambda number: number // block):
            job.stop.check()
            chosen = list(group)
            pixels = images.rows(chosen[0] * k, (chosen[-1] + 1) * k)
            parts = [pixels[(n - chosen[0]) * k :][:k] for n in chosen]
            list(pool.map(save, itertools.repeat(job.folder), itertools.repeat(layout), chosen, parts))
