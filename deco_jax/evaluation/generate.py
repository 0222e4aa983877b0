"""Many images from a network: in batches, over all devices, reproducible one by one."""

import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from ml_collections import ConfigDict
from tqdm import tqdm

from deco_jax.diffusion.flow import to_uint8
from deco_jax.errors import UsageError
from deco_jax.evaluation.images import make_grid, save_png
from deco_jax.parallel import mesh as meshes
from deco_jax.pretrained import load_pretrained
from deco_jax.sampling import check_labels, image_noise, sample
from deco_jax.training import checkpoint

GRID_IMAGES = 256  # a grid shows the first ones only


def generate(
    model: nn.Module, params: Any, labels: np.ndarray, seed: int, image_size: int, batch_size: int, **settings: Any
) -> Iterator[np.ndarray]:
    """Yields one image a label, (H, W, 3) uint8, in order.

    Image i starts from noise that depends on `seed` and i alone. Every batch has the same shape (the last one is
    filled up), and batches are split over all local devices.

    Args:
      model, params: see `load_pretrained`.
      labels: (K,) integers.
      seed: of the noise.
      image_size: side in pixels.
      batch_size: images at a time, rounded up to a multiple of the devices.
      **settings: of `deco_jax.sample`: steps, guidance, guidance_interval, shift, solver.
    """
    mesh = meshes.make_mesh(ConfigDict({"data": -1, "fsdp": 1, "tensor": 1}), jax.local_devices())
    params = jax.device_put(params, meshes.replicated(mesh))
    batch_size = -(-min(batch_size, len(labels)) // mesh.size) * mesh.size
    key = jax.random.key(seed)
    for start in range(0, len(labels), batch_size):
        indices = np.arange(start, start + batch_size)
        noise = image_noise(key, jax.device_put(indices, meshes.batch_sharding(mesh)), (image_size, image_size, 3))
        images = sample(model, params, labels[indices % len(labels)], noise=noise, **settings)
        yield from np.asarray(to_uint8(images))[: len(labels) - start]


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
    **settings: Any,
) -> None:
    """Draws `num` images into `out`: 00000.png, …, and grid.png with a row for each label.

    Args:
      source: a workdir or checkpoint of ours.
      out: a folder; must not hold pictures yet unless `overwrite`.
      labels: as in "0,1,5-9", or "all"; image i shows label i modulo their number.
      num, seed, batch_size: see `generate`.
      weights: "ema" or "online".
      image_size: side in pixels; None = as trained.
      overwrite: replace what is there.
      **settings: replace those of the run's configuration.

    Raises:
      UsageError: an argument is out of range, or `out` holds pictures.
    """
    folder = pathlib.Path(out).expanduser()
    if num < 1 or batch_size < 1:
        raise UsageError(f"--num={num} and --batch-size={batch_size} must be at least 1.")
    if not overwrite and any(folder.glob("*.png")):
        raise UsageError(f"--out={out} already holds pictures; choose another folder or pass --overwrite.")
    config = ConfigDict(checkpoint.read_meta(*checkpoint.find_checkpoint(source))["config"])
    model, params = load_pretrained(source, weights)
    chosen = parse_labels(labels, model.num_classes)
    names = ("steps", "guidance", "guidance_interval", "shift", "solver")
    settings = {name: config.sample[name] for name in names} | settings
    label_of = np.array(chosen)[np.arange(num) % len(chosen)].astype(np.int32)
    images = generate(model, params, label_of, seed, image_size or config.data.image_size, batch_size, **settings)
    shown = []
    for i, image in enumerate(tqdm(images, total=num, unit="image", disable=None)):
        save_png(image, folder / f"{i:05d}.png")
        if i < GRID_IMAGES:
            shown.append(image)
    by_label = np.argsort(np.arange(len(shown)) % len(chosen), kind="stable")
    columns = -(-len(shown) // len(chosen)) if len(chosen) > 1 else min(len(shown), 8)
    save_png(make_grid(np.stack(shown)[by_label], columns), folder / "grid.png")
    print(f"{num} images and grid.png are in {folder}.")


def parse_labels(text: str, num_classes: int) -> list[int]:
    """ "0,1,5-7" → [0, 1, 5, 6, 7]; "all" → every class.

    Raises:
      UsageError: the text is not understood, or names a class that does not exist.
    """
    if text == "all":
        return list(range(num_classes))
    labels: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdigit() or (dash and not last.isdigit()):
            raise UsageError(f"--labels={text} is not understood; write for instance 0,1,5-9 or all.")
        labels += range(int(first), int(last if dash else first) + 1)
    check_labels(np.array(labels), num_classes)
    return labels
