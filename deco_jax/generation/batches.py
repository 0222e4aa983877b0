"""How are many images drawn from a network: in batches, over all devices, reproducible one by one?"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from jax import Array

from deco_jax.diffusion.flow import to_uint8
from deco_jax.parallel import mesh as meshes
from deco_jax.sampling.sample import image_noise, sample
from deco_jax.sampling.settings import Sampling


def generate(
    model: nn.Module,
    params: Any,
    labels: Sequence[int | str],
    seed: int,
    image_size: int,
    batch_size: int,
    settings: Sampling,
    numbers: Iterable[int] | None = None,
) -> Iterator[np.ndarray]:
    """Yields the images with these numbers, (H, W, 3) uint8, in order.

    Image i starts from noise that depends on `seed` and i alone, and shows label i modulo their number. Batches are
    split over all local devices.

    Args:
      model, params: see `load_pretrained`.
      labels: see `deco_jax.sample`.
      seed: of the noise.
      image_size: side in pixels.
      batch_size: images at a time, rounded up to a multiple of the devices.
      settings: of the sampler.
      numbers: of the images; None = one for each label.
    """
    params = jax.device_put(params, meshes.replicated(meshes.local_layout().mesh))
    numbers = range(len(labels)) if numbers is None else numbers
    for indices, noise, count in noise_batches(numbers, seed, image_size, batch_size):
        shown = [labels[i % len(labels)] for i in np.asarray(indices)]
        yield from np.asarray(to_uint8(sample(model, params, shown, noise=noise, settings=settings)))[:count]


def noise_batches(
    numbers: Iterable[int], seed: int, image_size: int, batch_size: int
) -> Iterator[tuple[Array, Array, int]]:
    """Yields numbers of images (B,) and their noise, split over all local devices; and how many of them count.

    Batches are rounded up to a multiple of the devices, and the last one is filled up with some of its numbers.
    """
    mesh, numbers, padded = meshes.local_layout().mesh, iter(numbers), 0
    batch_size = meshes.round_up(batch_size, mesh)
    key, shape = jax.random.key(seed), (image_size, image_size, 3)
    while batch := list(itertools.islice(numbers, batch_size)):
        padded = padded or meshes.round_up(len(batch), mesh)  # of all batches alike, so that one program does
        indices = jax.device_put(np.resize(np.array(batch, np.int32), padded), meshes.batch_sharding(mesh))
        yield indices, image_noise(key, indices, shape), len(batch)
