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

import numpy as np

from deco_jax import storage
from deco_jax.data.reading import list_files
from deco_jax.errors import UsageError
from deco_jax.generation.npz import open_array
from deco_jax.generation.requests import Requests
from deco_jax.jobs import Job
from deco_jax.sampling.pictures import save_png
from deco_jax.storage import AnyPath

LAYOUTS = ("npz", "png", "geneval", "dpg")
USUAL = 4  # images of a prompt with the benchmarks' layouts
WRITERS = 8  # threads that write pictures
BLOCK = 256  # images that are read at a time


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

    def beside(self, picture: int) -> tuple[str, str] | None:
        """A file that belongs to a picture, and what stands in it."""
        prompt, sample = divmod(picture, self.wanted.each)
        if self.kind != "geneval" or sample:
            return None
        return f"{prompt:05d}/metadata.jsonl", self.wanted.prompts[prompt].line + "\n"


def choose_layout(layout: str | None, png: bool, wanted: Requests, image_size: tuple[int, int]) -> Layout | None:
    """The layout that is asked for, or that the prompts' file is of; None = no pictures.

    Raises:
      UsageError: there is no such layout, or it does not fit what is drawn.
    """
    kind = layout or ("png" if png else benchmark_of(wanted))
    if kind not in LAYOUTS:
        raise UsageError(f"--layout={layout} is not known; allowed: {', '.join(LAYOUTS)}.")
    if png and kind != "png":
        raise UsageError(f"--png contradicts --layout={layout}; give one of them.")
    option, each, prompts = f"--layout={kind}", wanted.each, wanted.prompts
    if kind in ("geneval", "dpg"):
        if not prompts or wanted.num != each * len(prompts):
            raise UsageError(f"{option} has as many images of each prompt: --prompts and --per-prompt, without --num.")
        if kind == "geneval" and not all({"tag", "prompt"} <= prompt.values.keys() for prompt in prompts):
            raise UsageError(f"{option} takes GenEval's prompts, JSON lines with a tag; those of --prompts have none.")
        if kind == "dpg" and not all(prompt.name for prompt in prompts):
            raise UsageError(f"{option} takes DPG-Bench's prompts, a folder of .txt with one in each.")
        if kind == "dpg" and each not in (1, 4):
            raise UsageError(f"{option} takes 4 images of a prompt, or 1; --per-prompt={each} is neither.")
        if kind == "dpg" and image_size[0] != image_size[1]:
            raise UsageError(f"{option} takes square images, not {image_size[0]}×{image_size[1]}.")
    return None if kind == "npz" else Layout(kind, wanted)


def benchmark_of(wanted: Requests) -> str:
    """The layout of the benchmark whose prompts these are; "npz" if of none."""
    if wanted.prompts and all({"tag", "include", "prompt"} <= prompt.values.keys() for prompt in wanted.prompts):
        return "geneval"
    return "dpg" if wanted.prompts and all(prompt.name for prompt in wanted.prompts) else "npz"


def save(folder: AnyPath, layout: Layout, picture: int, images_KxHxWx3: np.ndarray) -> None:
    """Writes a picture of uint8 images, and what belongs to it.

    Raises:
      UsageError: it cannot be written.
    """
    path = folder / layout.name(picture)
    with storage.writing(path):
        if (file := layout.beside(picture)) is not None:
            storage.write_bytes(folder / file[0], file[1].encode())
        storage.retried(f"writing {path}", lambda: save_png(_tiled(images_KxHxWx3), path))


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
    """Writes those that are missing, as earlier starts did not make them, from `samples`.

    Raises:
      Stopped: this process is told to stop.
      UsageError: they cannot be written, or `samples` cannot be read.
    """
    numbers = missing(job.folder, layout)
    if not numbers:
        return
    job.say(f"Writing {len(numbers):,} pictures into {job.folder / (layout.top or '')}.")
    images, k = open_array(samples, "arr_0"), layout.images
    with concurrent.futures.ThreadPoolExecutor(WRITERS) as pool:
        for _, block in itertools.groupby(numbers, lambda number: number * k // BLOCK):
            job.stop.check()
            chosen = list(block)
            pixels = images.rows(chosen[0] * k, (chosen[-1] + 1) * k)
            parts = [pixels[(n - chosen[0]) * k :][:k] for n in chosen]
            list(pool.map(save, itertools.repeat(job.folder), itertools.repeat(layout), chosen, parts))
