"""How are many images drawn from a network: in batches, over all devices, reproducible one by one?"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array

from deco_jax.diffusion.flow import to_uint8
from deco_jax.encoders.text import TextEncoder
from deco_jax.errors import UsageError
from deco_jax.parallel import mesh as meshes
from deco_jax.sampling.sample import image_keys, image_noise, sample
from deco_jax.sampling.settings import Sampling


def generate(
    model: nn.Module,
    params: Any,
    labels: Sequence[int | str],
    seed: int,
    image_size: int | tuple[int, int],
    batch_size: int,
    settings: Sampling,
    numbers: Iterable[int] | None = None,
    negative: int | str | None = None,
    encoder: TextEncoder | None = None,
) -> Iterator[np.ndarray]:
    """Yields the images with these numbers, (H, W, 3) uint8, in order.

    Image i depends on `seed` and i alone, and shows label i modulo their number. Batches are split over all local
    devices, which work on the next one while a batch is read back.

    Args:
      model, params: see `load_pretrained`.
      labels: classes or prompts, see `deco_jax.sample`.
      seed: of the noise.
      image_size: side or (height, width) in pixels.
      batch_size: images at a time, rounded up to a multiple of the devices.
      settings: of the sampler.
      numbers: of the images; None = one for each label.
      negative: the label or prompt that guidance leads away from; None = no class, or the empty prompt.
      encoder: of prompts.

    Raises:
      UsageError: an image is not finite.
    """
    conditions = make_conditions(model, labels, negative, encoder)
    params = jax.device_put(params, meshes.replicated(meshes.local_layout().mesh))
    numbers = range(len(labels)) if numbers is None else numbers
    key, under_way = jax.random.key(seed), None
    for indices, noise, count in noise_batches(numbers, seed, image_size, batch_size):
        numbers_B = np.asarray(indices)
        asked, away = conditions(numbers_B)
        keys = image_keys(key, indices)
        images = sample(model, params, asked, noise=noise, keys=keys, negative=away, settings=settings)
        shown = [labels[i % len(labels)] for i in numbers_B[:count]]
        following = numbers_B[:count], shown, *_to_pixels(images)
        if under_way is not None:
            yield from _read_back(*under_way)
        under_way = following
    if under_way is not None:
        yield from _read_back(*under_way)


def make_conditions(
    model: nn.Module, labels: Sequence[int | str], negative: int | str | None, encoder: TextEncoder | None
) -> Callable[[np.ndarray], tuple[Any, Any]]:
    """A function from the numbers of images, (B,), to what `sample` takes of them as labels and as `negative`."""

    def shown(numbers_B: np.ndarray) -> list[int | str]:
        return [labels[i % len(labels)] for i in numbers_B]

    if encoder is None:
        return lambda numbers_B: (shown(numbers_B), None if negative is None else [negative] * len(numbers_B))
    away_1xLxE = encoder([model.condition.nothing if negative is None else negative])
    return lambda numbers_B: (encoder(shown(numbers_B)), jnp.repeat(away_1xLxE, len(numbers_B), axis=0))


@jax.jit
def _to_pixels(images_BxHxWx3: Array) -> tuple[Array, Array]:
    """uint8 pixels, and which images are finite: (B,) booleans."""
    return to_uint8(images_BxHxWx3), jnp.isfinite(images_BxHxWx3).all(axis=(1, 2, 3))


def _read_back(numbers: np.ndarray, shown: Sequence[int | str], pixels: Array, finite: Array) -> np.ndarray:
    """The first images of a batch, as many as there are numbers: (K, H, W, 3) uint8."""
    for i in np.flatnonzero(~np.asarray(finite)[: len(numbers)])[:1]:
        raise UsageError(
            f"Image {numbers[i]}, of label {shown[i]}, is not finite; try --dtype=float32, less guidance, or other "
            "weights."
        )
    return np.asarray(pixels)[: len(numbers)]


def noise_batches(
    numbers: Iterable[int], seed: int, image_size: int | tuple[int, int], batch_size: int
) -> Iterator[tuple[Array, Array, int]]:
    """Yields numbers of images (B,) and their noise, split over all local devices; and how many of them count.

    Batches are rounded up to a multiple of the devices, and the last one is filled up with some of its numbers.
    """
    mesh, numbers, padded = meshes.local_layout().mesh, iter(numbers), 0
    batch_size = meshes.round_up(batch_size, mesh)
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    key, shape = jax.random.key(seed), (*size, 3)
    while batch := list(itertools.islice(numbers, batch_size)):
        padded = padded or meshes.round_up(len(batch), mesh)  # of all batches alike, so that one program does
        indices = jax.device_put(np.resize(np.array(batch, np.int32), padded), meshes.batch_sharding(mesh))
        yield indices, image_noise(key, indices, shape), len(batch)
