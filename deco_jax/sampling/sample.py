"""`deco_jax.sample`: images from a network, its parameters, and what they are to show."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from deco_jax.errors import UsageError
from deco_jax.sampling.guidance import guided_slope
from deco_jax.sampling.settings import Sampling
from deco_jax.sampling.solvers import SOLVERS, integrate


def sample(
    model: nn.Module,
    params: Any,
    labels: Array | Sequence[int | str],
    key: Array | None = None,
    *,
    noise: Array | None = None,
    image_size: int | tuple[int, int] | None = None,
    negative: Array | Sequence[int | str] | None = None,
    settings: Sampling = Sampling(),  # noqa: B008 (it is frozen)
    **changes: Any,
) -> Array:
    """Generates one image per label.

    Args:
      model, params: see `build_model` and `load_pretrained`.
      labels: (B,) what the images show, as the network's condition reads it: integers in [0, model.num_classes); the
        string "null" asks for the null class.
      key: of the starting noise; image i starts from `image_noise(key, i, …)` whatever the batch.
      noise: (B, H, W, 3), the starting noise itself; replaces key and image_size.
      image_size: side or (height, width) in pixels; needed with key.
      negative: (B,) what guidance leads away from, in place of the null class.
      settings: all settings of the sampler at once.
      **changes: fields of `settings` that differ: steps (50), solver ("euler"), guidance (1.0: none, and half the
        work), guidance_interval ((0.0, 1.0): guidance acts on steps that start at t with low < t ≤ high; 0 = noise,
        1 = data), shift (1.0; above 1 spends more steps near noise), last (0.0; length of the last step before the
        shift, 0 = 1/steps).

    Returns:
      (B, H, W, 3) fp32, data range [-1, 1], not clipped.

    Raises:
      UsageError: an argument is missing or out of range.
    """
    settings = dataclasses.replace(settings, **changes)
    number = len(labels)
    negative = [model.condition.nothing] * number if negative is None else negative
    if len(negative) != number:
        raise UsageError(f"negative has {len(negative)} entries; {number} labels need as many.")
    condition, null = (jax.tree.map(jnp.asarray, model.condition.read(requests)) for requests in (labels, negative))
    if noise is None:
        if key is None or image_size is None:
            raise UsageError("sample needs noise=…, or key=… together with image_size=….")
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        noise = image_noise(key, jnp.arange(number), (height, width, 3))
    if noise.ndim != 4 or noise.shape[0] != number or noise.shape[3] != 3:
        raise UsageError(f"noise has shape {noise.shape}; {number} labels need ({number}, H, W, 3).")
    return compiled_sampler(model, settings)(params, jnp.asarray(noise), condition, null)


@functools.partial(jax.jit, static_argnames="shape")
def image_noise(key: Array, indices: Array, shape: tuple[int, int, int]) -> Array:
    """Starting noise of the images with these indices, (K, *shape), fp32: a function of key and index alone."""
    return jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(key, i), shape))(indices)


@functools.lru_cache(maxsize=16)
def compiled_sampler(model: nn.Module, settings: Sampling) -> Callable[..., Array]:
    """The jitted sampler of these settings: (params, noise, condition, null) → images."""

    @jax.jit
    def run(params: Any, noise_BxHxWx3: Array, condition: Any, null: Any) -> Array:
        def velocity(x: Array, t_B: Array, condition: Any) -> Array:
            return model.apply({"params": params}, x, t_B, condition)

        slope = guided_slope(velocity, condition, null, settings.guidance, settings.guided_steps)
        images, _ = integrate(SOLVERS[settings.solver], slope, noise_BxHxWx3, settings.times, settings.guided_steps)
        return images

    return run
