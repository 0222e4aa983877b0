"""`deco_jax.sample`: images from a network, its parameters and labels."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array

from deco_jax.errors import UsageError
from deco_jax.sampling.solvers import SOLVERS, check_sampling, time_grid


def sample(
    model: nn.Module,
    params: Any,
    labels: Array | Sequence[int | str],
    key: Array | None = None,
    *,
    noise: Array | None = None,
    image_size: int | tuple[int, int] | None = None,
    steps: int = 50,
    guidance: float = 1.0,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
    shift: float = 1.0,
    solver: str = "euler",
) -> Array:
    """Generates one image a label.

    Args:
      model, params: see `build_model` and `load_pretrained`.
      labels: (B,) integers in [0, model.num_classes); the string "null" asks for the null class.
      key: of the starting noise; image i starts from `image_noise(key, i, …)` whatever the batch.
      noise: (B, H, W, 3), the starting noise itself; replaces key and image_size.
      image_size: side or (height, width) in pixels; needed with key.
      steps: of the solver.
      guidance: weight of classifier-free guidance; 1 is none (and half the work).
      guidance_interval: guidance acts on steps that start at t with low < t ≤ high (0 = noise, 1 = data).
      shift: time shift; above 1 spends more steps near noise.
      solver: one of `diffusion.samplers.SOLVERS`.

    Returns:
      (B, H, W, 3) fp32, data range [-1, 1], not clipped.

    Raises:
      UsageError: an argument is missing or out of range.
    """
    check_sampling(steps, guidance, guidance_interval, shift, solver)
    labels_B = label_numbers(labels, model)
    if noise is None:
        if key is None or image_size is None:
            raise UsageError("sample needs noise=…, or key=… together with image_size=….")
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        noise = image_noise(key, jnp.arange(len(labels_B)), (height, width, 3))
    if noise.ndim != 4 or noise.shape[0] != len(labels_B) or noise.shape[3] != 3:
        raise UsageError(f"noise has shape {noise.shape}; {len(labels_B)} labels need ({len(labels_B)}, H, W, 3).")
    run = compiled_sampler(model, steps, float(guidance), tuple(map(float, guidance_interval)), float(shift), solver)
    return run(params, jnp.asarray(noise), jnp.asarray(labels_B, jnp.int32))


def label_numbers(labels: Array | Sequence[int | str], model: nn.Module) -> np.ndarray:
    """Labels as the network takes them, (B,) int32.

    Raises:
      UsageError: one is neither a class of the network nor "null".
    """
    values = list(np.asarray(labels) if hasattr(labels, "dtype") else labels)
    wrong = [
        value
        for value in values
        if not (isinstance(value, str) and value == "null")
        and not (isinstance(value, int | np.integer) and 0 <= value < model.num_classes)
    ]
    if wrong:
        shown = ", ".join(str(value) for value in wrong[:5])
        raise UsageError(
            f"labels {shown} do not exist; the network has the classes 0 to {model.num_classes - 1} "
            'and, by that name, "null".'
        )
    return np.array([model.null_label if isinstance(value, str) else value for value in values], np.int32)


@functools.partial(jax.jit, static_argnames="shape")
def image_noise(key: Array, indices: Array, shape: tuple[int, int, int]) -> Array:
    """Starting noise of the images with these indices, (K, *shape), fp32: a function of key and index alone."""
    return jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(key, i), shape))(indices)


@functools.lru_cache(maxsize=16)
def compiled_sampler(
    model: nn.Module, steps: int, guidance: float, interval: tuple[float, float], shift: float, solver: str
) -> Callable[..., Array]:
    """The jitted solver for these settings; (params, noise, labels) → images."""
    times = time_grid(steps, shift)

    @jax.jit
    def run(params, noise_BxHxWx3, labels_B):
        def velocity(x, t, labels):
            return model.apply({"params": params}, x, t, labels)

        null_B = jnp.full_like(labels_B, model.null_label)
        return SOLVERS[solver](velocity, noise_BxHxWx3, labels_B, null_B, times, guidance, interval)

    return run
