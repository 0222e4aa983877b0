"""What the loop does beside training: grids of samples, and a profile of a few steps."""

import contextlib
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from ml_collections import ConfigDict

from deco_jax.diffusion.flow import to_uint8
from deco_jax.parallel import mesh as meshes
from deco_jax.parallel.mesh import Layout
from deco_jax.sampling.pictures import make_grid
from deco_jax.sampling.sample import image_keys, image_noise, sample
from deco_jax.sampling.settings import Sampling

GRID_COLUMNS = 8
PROFILED_STEPS = 5


class SampleGrids:
    """Grids of images from the EMA weights, from the same noise every time; every row shows one condition."""

    def __init__(self, config: ConfigDict, network: nn.Module, layout: Layout, text_PxLxE: np.ndarray | None = None):
        """`text_PxLxE`: states of the rows' prompts, and last of the empty one; None: each row shows a class."""
        self.text_PxLxE = text_PxLxE
        self.network, self.mesh, self.number = network, layout.mesh, config.sample.num
        self.settings = Sampling.from_config(config.sample)
        self.seed, self.side = config.seed, config.data.image_size

    def __call__(self, ema: Any) -> np.ndarray:
        """One grid, (H, W, 3) uint8, on every process."""
        rows = -(-self.number // GRID_COLUMNS)
        drawn = meshes.round_up(rows * GRID_COLUMNS, self.mesh)
        row_N = np.arange(drawn) // GRID_COLUMNS
        if self.text_PxLxE is None:
            requests, negative = np.take(self.network.condition.spread(rows), row_N % rows), None
        else:
            requests = self.text_PxLxE[row_N % (len(self.text_PxLxE) - 1)]
            negative = np.broadcast_to(self.text_PxLxE[-1], requests.shape)
        draw = jax.jit(self._draws, static_argnums=0, out_shardings=meshes.batch_sharding(self.mesh))
        noise, keys = draw(drawn)
        images = sample(self.network, ema, requests, noise=noise, keys=keys, negative=negative, settings=self.settings)
        return make_grid(meshes.fetch(to_uint8(images), self.mesh)[: self.number], GRID_COLUMNS)

    def _draws(self, number: int) -> tuple[jax.Array, jax.Array]:
        """What the images of a grid start from, (number, H, W, 3), and their keys (number,)."""
        key, numbers = jax.random.key(self.seed), jnp.arange(number)
        return image_noise(key, numbers, (self.side, self.side, 3)), image_keys(key, numbers)


class Profile:
    """A profile of the five steps from `train.profile_at` on, in FOLDER/profile; 0 = none."""

    def __init__(self, config: ConfigDict, folder: pathlib.Path):
        self.at = config.train.profile_at
        # Hosts may have the same name.
        self.folder = folder / "profile" / f"process_{jax.process_index()}"
        self.running = contextlib.ExitStack()

    def __call__(self, step: int) -> None:
        """Starts or ends the profile before `step`, if it is time."""
        if self.at and step == self.at:
            self.running.enter_context(jax.profiler.trace(str(self.folder)))
        elif step >= self.at + PROFILED_STEPS:
            self.running.close()
