"""How do the images of a job become PNGs beside samples.npz, also when they are asked for later?"""

import concurrent.futures
import itertools

import numpy as np

from deco_jax import storage
from deco_jax.generation.npz import open_array
from deco_jax.jobs import Job
from deco_jax.sampling.pictures import save_png
from deco_jax.storage import AnyPath

FOLDER = "png"
WRITERS = 8  # threads that write them
BLOCK = 256  # images that are read at a time


def save(folder: AnyPath, number: int, image_HxWx3: np.ndarray) -> None:
    """Writes a uint8 image as `folder`/png/NUMBER.png.

    Raises:
      UsageError: it cannot be written.
    """
    path = folder / FOLDER / _name(number)
    with storage.writing(path):
        storage.retried(f"writing {path}", lambda: save_png(image_HxWx3, path))


def missing(folder: AnyPath, num: int) -> list[int]:
    """Which of the pictures 0 to num − 1 are not there, in order."""
    where = folder / FOLDER
    with storage.reading(where):
        names = {path.name for path in where.iterdir()} if where.is_dir() else set()
    return [number for number in range(num) if _name(number) not in names]


def fill(job: Job, samples: AnyPath, num: int) -> None:
    """Writes those that are missing, as earlier starts did not make them, from `samples`.

    Raises:
      Stopped: this process is told to stop.
      UsageError: they cannot be written, or `samples` cannot be read.
    """
    numbers = missing(job.folder, num)
    if not numbers:
        return
    job.say(f"Writing {len(numbers):,} pictures into {job.folder / FOLDER}.")
    images = open_array(samples, "arr_0")
    with concurrent.futures.ThreadPoolExecutor(WRITERS) as pool:
        for _, block in itertools.groupby(numbers, lambda number: number // BLOCK):
            job.stop.check()
            chosen = list(block)
            pixels = images.rows(chosen[0], chosen[-1] + 1)[np.array(chosen) - chosen[0]]
            list(pool.map(save, itertools.repeat(job.folder), chosen, pixels))


def _name(number: int) -> str:
    return f"{number:05d}.png"
