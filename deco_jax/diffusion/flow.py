"""The probability path x_t = t·image + (1 − t)·noise, its times and its random draws (docs/model.md, 1).

t = 1 is data, t = 0 is noise, everywhere in this project. B examples, images (B, H, W, 3) in [-1, 1].
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

TIME_DISTRIBUTIONS = ("lognorm", "uniform")
PREDICTIONS = ("velocity", "image")  # what the last layer of a network puts out
NEAREST_TO_DATA = 0.05  # the smallest 1 − t that is divided by


class Draws(NamedTuple):
    """Everything random in one training step, example by example."""

    t_B: Array  # fp32, times in (0, 1)
    noise_BxHxWx3: Array  # fp32, N(0, 1)
    drop_B: Array  # bool, True where the condition is dropped


def example_keys(key: Array, step: Array, batch_size: int) -> Array:
    """One random key for each example of the global batch at `step`: (B,).

    An example's draws depend on the seed, the step and its place in the global batch, so neither the
    number of devices nor gradient accumulation changes them.
    """
    return jax.random.split(jax.random.fold_in(key, step), batch_size)


def draw(keys_B: Array, image_shape: tuple[int, int, int], distribution: str, shift: float, p_null: float) -> Draws:
    """Draws times, noise and which conditions are dropped, one example per key.

    Args:
      keys_B: see `example_keys`.
      image_shape: (H, W, 3).
      distribution: "lognorm" (u = sigmoid of a standard normal) or "uniform", of u before the shift.
      shift: time shift s, 1 for none.
      p_null: probability that an example loses its condition.
    """

    def one(key: Array) -> Draws:
        time_key, noise_key, drop_key = jax.random.split(key, 3)
        lognorm = distribution == "lognorm"
        u = jax.nn.sigmoid(jax.random.normal(time_key)) if lognorm else jax.random.uniform(time_key)
        noise = jax.random.normal(noise_key, image_shape)
        return Draws(shift_time(u, shift), noise, jax.random.bernoulli(drop_key, p_null))

    return jax.vmap(one)(keys_B)


def shift_time(u: Array, shift: float) -> Array:
    """Moves times towards noise: t = u / (u + (1 − u)·shift). shift = 1 leaves them. (SD3, eq. 23; t = 1 is data.)"""
    return u / (u + (1 - u) * shift)


def interpolate(image_BxHxWx3: Array, noise_BxHxWx3: Array, t_B: Array) -> tuple[Array, Array]:
    """Returns (x_t, v): the noised image t·image + (1 − t)·noise and its velocity image − noise."""
    t = t_B[:, None, None, None]
    return t * image_BxHxWx3 + (1 - t) * noise_BxHxWx3, image_BxHxWx3 - noise_BxHxWx3


def velocity_to(image_BxHxWx3: Array, x_BxHxWx3: Array, t_B: Array) -> Array:
    """The velocity from x_t to an image: (image − x_t)/max(1 − t, 0.05), fp32 (docs/model.md, 3).

    For the true image that is image − noise up to t = 0.95, and shorter beyond. A network that predicts images
    returns this of its prediction, and its loss compares that with this of the true image.
    """
    remaining = jnp.maximum(1 - t_B.astype(jnp.float32), NEAREST_TO_DATA)[:, None, None, None]
    return (image_BxHxWx3.astype(jnp.float32) - x_BxHxWx3.astype(jnp.float32)) / remaining


def to_float(image_uint8: Array) -> Array:
    """uint8 pixels to fp32 in [-1, 1]: x/127.5 − 1."""
    return image_uint8.astype(jnp.float32) / 127.5 - 1


def to_uint8(image: Array) -> Array:
    """Images in [-1, 1] to uint8 pixels: (x + 1)·127.5 + 0.5, clipped to [0, 255] and truncated."""
    return jnp.clip((image + 1) * 127.5 + 0.5, 0, 255).astype(jnp.uint8)
