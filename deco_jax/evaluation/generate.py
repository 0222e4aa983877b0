"""How are many images drawn from a network: in batches, over all devices, reproducible one by one?"""

import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from jax import Array
from tqdm import tqdm

from deco_jax.checkpoints import store
from deco_jax.diffusion.flow import to_uint8
from deco_jax.errors import UsageError
from deco_jax.parallel import mesh as meshes
from deco_jax.pretrained.load import load_pretrained
from deco_jax.sampling.pictures import make_grid, save_png
from deco_jax.sampling.sample import image_noise, sample
from deco_jax.sampling.settings import Sampling
from deco_jax.storage import local_folder

GRID_IMAGES = 256  # a grid shows the first ones only


def generate(
    model: nn.Module,
    params: Any,
    labels: Sequence[int | str],
    seed: int,
    image_size: int,
    batch_size: int,
    settings: Sampling,
) -> Iterator[np.ndarray]:
    """Yields one image per label, (H, W, 3) uint8, in order.

    Image i starts from noise that depends on `seed` and i alone. Batches are split over all local devices.

    Args:
      model, params: see `load_pretrained`.
      labels: one per image; see `deco_jax.sample`.
      seed: of the noise.
      image_size: side in pixels.
      batch_size: images at a time, rounded up to a multiple of the devices.
      settings: of the sampler.
    """
    params = jax.device_put(params, meshes.replicated(meshes.local_layout().mesh))
    for indices, noise in noise_batches(len(labels), seed, image_size, batch_size):
        numbers = np.asarray(indices)
        images = sample(model, params, [labels[i % len(labels)] for i in numbers], noise=noise, settings=settings)
        yield from np.asarray(to_uint8(images))[numbers < len(labels)]


def noise_batches(number: int, seed: int, image_size: int, batch_size: int) -> Iterator[tuple[Array, Array]]:
    """Yields the numbers (B,) of so many images and their noise, split over all local devices.

    Batches are rounded up to a multiple of the devices, and the last one is filled up: with numbers from `number` on.
    """
    mesh = meshes.local_layout().mesh
    batch_size = meshes.round_up(min(batch_size, number), mesh)
    key, shape = jax.random.key(seed), (image_size, image_size, 3)
    for start in range(0, number, batch_size):
        indices = np.arange(start, start + batch_size, dtype=np.int32)
        indices = jax.device_put(indices, meshes.batch_sharding(mesh))
        yield indices, image_noise(key, indices, shape)


def check_folder(
    out: str, num: int, batch_size: int, seed: int, overwrite: bool, files: str, what: str
) -> pathlib.Path:
    """The folder of `--out`, into which `num` images are drawn, or files about them.

    Raises:
      UsageError: a number is out of range, `out` is no folder, or it holds `files`, called `what`, and may not.
    """
    for name, value in (("num", num), ("batch-size", batch_size)):
        if value < 1:
            raise UsageError(f"--{name}={value} must be at least 1.")
    if not 0 <= seed < 2**32:
        raise UsageError(f"--seed={seed} must be from 0 to 2³² − 1.")
    folder = local_folder("--out", out)
    if not overwrite and any(folder.glob(files)):
        raise UsageError(f"--out={out} already holds {what}; choose another folder or pass --overwrite.")
    return folder


def generate_to_folder(
    source: str,
    out: str,
    *,
    labels: str,
    num: int,
    seed: int,
    weights: str,
    batch_size: int,
    image_size: int | None,
    overwrite: bool,
    **changes: Any,
) -> None:
    """Draws `num` images into `out`: 00000.png, …, and grid.png with a row for each label.

    Args:
      source: a workdir or checkpoint of ours.
      out: a folder; must not hold pictures yet unless `overwrite`.
      labels: as in "0,1,5-9,null", or "all"; image i shows label i modulo their number.
      num, seed, batch_size: see `generate`.
      weights: "ema" or "online".
      image_size: side in pixels; None = as trained.
      overwrite: replace what is there.
      **changes: fields of `Sampling`; None = as the run's configuration says.

    Raises:
      UsageError: an argument is out of range, or `out` holds pictures.
    """
    folder = check_folder(out, num, batch_size, seed, overwrite, "*.png", "pictures")
    config = store.read_config(*store.find_checkpoint(source))
    settings = Sampling.from_config(config.sample, **changes)
    model, params = load_pretrained(source, weights)
    size, p = config.data.image_size if image_size is None else image_size, model.patch_size
    if size < 1 or size % p:
        raise UsageError(f"--image-size={size} must be a positive multiple of the network's patch size, {p}.")
    chosen = model.condition.parse(labels)
    images = generate(model, params, [chosen[i % len(chosen)] for i in range(num)], seed, size, batch_size, settings)
    shown = []
    for i, image in enumerate(tqdm(images, total=num, unit="image", disable=None)):
        save_png(image, folder / f"{i:05d}.png")
        if i < GRID_IMAGES:
            shown.append(image)
    save_png(_grid_by_label(np.stack(shown), len(chosen)), folder / "grid.png")
    print(f"{num} images and grid.png are in {folder}.")


def _grid_by_label(images: np.ndarray, labels: int) -> np.ndarray:
    """A row for each label where every label has several images; eight in a row otherwise."""
    if labels == 1 or len(images) < 2 * labels:
        return make_grid(images, min(len(images), 8))
    columns = -(-len(images) // labels)
    missing = np.full((labels * columns - len(images), *images.shape[1:]), 255, np.uint8)
    rounds = np.concatenate([images, missing]).reshape(columns, labels, *images.shape[1:])
    return make_grid(rounds.swapaxes(0, 1).reshape(-1, *images.shape[1:]), columns)
