"""`deco_jax.sample`: images from a network, its parameters, and what they are to show."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array

from deco_jax.errors import UsageError
from deco_jax.models.dit import unstacked
from deco_jax.ops.door import platform
from deco_jax.parallel import mesh as meshes
from deco_jax.sampling.conditioning import in_compute_dtype, look_up, tabulate
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
    keys: Array | None = None,
    image_size: int | tuple[int, int] | None = None,
    negative: Array | Sequence[int | str] | None = None,
    encoder: Callable[[Sequence[str]], Array] | None = None,
    trajectory: int = 0,
    settings: Sampling = Sampling(),  # noqa: B008 (it is frozen)
    **changes: Any,
) -> Array | tuple[Array, Array]:
    """Generates one image per label or prompt.

    Args:
      model, params: see `build_model` and `load_pretrained`.
      labels: (B,) what the images show, as the network's condition reads it: integers in [0, model.num_classes), where
        the string "null" asks for the null class. For a text-conditional network prompts, with their `encoder`; or an
        encoder's states, (B, L, E).
      key: of all draws; image i starts from `image_noise(key, i, …)` and draws with `image_keys(key, i)` whatever the
        batch. So that batches of any size share a few programs, one of them draws up to a half more (`round_batch`).
      noise: (B, H, W, 3), the starting noise itself; replaces key and image_size. B images are drawn, no more.
      keys: (B,), each image's key of the noise that the solver draws; needed with noise and solver="euler_sde".
      image_size: side or (height, width) in pixels; needed with key.
      negative: (B,) what guidance leads away from, in place of the null class or the empty prompt; or one for all.
      encoder: of prompts, see `load_text_encoder`.
      trajectory: k > 0 also returns states on the way: the noise, every k-th after it, and the image.
      settings: all settings of the sampler at once.
      **changes: fields of `settings` that differ: steps (50), solver ("euler"; or euler_sde, heun,
        heun_exact, adams1, … adams4), guidance (1.0: none, and half the
        work), guidance_interval ((0.0, 1.0): guidance acts on steps that start at t with low < t ≤ high; 0 = noise,
        1 = data), shift (1.0; above 1 spends more steps near noise), last (0.0; length of the last step before the
        shift, 0 = 1/steps).

    Returns:
      (B, H, W, 3) fp32, data range [-1, 1], not clipped; with `trajectory`, that and the states (S, B, H, W, 3) fp32.

    Raises:
      UsageError: an argument is missing or out of range.
    """
    settings = dataclasses.replace(settings, **changes)
    if trajectory < 0:
        raise UsageError(f"trajectory={trajectory} must be at least 0; 0 keeps no states.")
    inputs, number = read_inputs(model, labels, key, noise, keys, image_size, negative, encoder, settings), len(labels)
    if noise is None:
        inputs = fill_up(inputs, round_batch(number))
    else:
        own = jnp.array(inputs.noise_BxHxWx3, jnp.float32)  # the sampler takes it over
        inputs = inputs._replace(noise_BxHxWx3=own)
    with meshes.use_mesh_of(inputs.noise_BxHxWx3):
        drawn = compiled_sampler(model, settings, trajectory)(params, *inputs)
    if number == len(inputs.noise_BxHxWx3):
        return drawn
    return (drawn[0][:number], drawn[1][:, :number]) if trajectory else drawn[:number]


class Inputs(NamedTuple):
    """What a sampler gets of B images beside the parameters."""

    noise_BxHxWx3: Array
    keys_B: Array | None  # None where the solver draws no noise
    condition: Any  # trees of arrays (B, …)
    null: Any  # likewise, or (1, …) where it is the same for all


def read_inputs(
    model: nn.Module,
    labels: Array | Sequence[int | str],
    key: Array | None,
    noise: Array | None,
    keys: Array | None,
    image_size: int | tuple[int, int] | None,
    negative: Array | Sequence[int | str] | None,
    encoder: Callable[[Sequence[str]], Array] | None,
    settings: Sampling,
) -> Inputs:
    """The arguments of `sample`, checked and as arrays; errors as there."""
    number = len(labels)
    read = model.condition.read if encoder is None else functools.partial(model.condition.read, encoder=encoder)
    condition = jax.tree.map(jnp.asarray, read(labels))
    if negative is None and not settings.guided_steps.any():
        null = condition  # which nothing looks at
    else:
        negative = [model.condition.nothing] if negative is None else negative
        if isinstance(negative, str):
            raise UsageError(f"negative is a list with an entry for each image, or one for all; write [{negative!r}].")
        if len(negative) not in (1, number):
            raise UsageError(f"negative has {len(negative)} entries; {number} labels need as many, or one for all.")
        plain = all(isinstance(entry, int | str | np.integer) for entry in negative)
        is_same = plain and len(set(negative)) == 1
        null = jax.tree.map(jnp.asarray, read(negative[:1] if is_same else negative))
    if noise is None:
        if key is None or image_size is None:
            raise UsageError("sample needs noise=…, or key=… together with image_size=….")
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        noise = image_noise(key, jnp.arange(number), (height, width, 3))
    if noise.ndim != 4 or noise.shape[0] != number or noise.shape[3] != 3:
        raise UsageError(f"noise has shape {noise.shape}; {number} labels need ({number}, H, W, 3).")
    if SOLVERS[settings.solver].draws_noise and keys is None:
        if key is None:
            raise UsageError(f"solver={settings.solver!r} draws noise; with noise=… it needs keys=… as well.")
        keys = image_keys(key, jnp.arange(number))
    if keys is not None and keys.shape != (number,):
        raise UsageError(f"keys has shape {keys.shape}; {number} labels need ({number},) of jax.random.key.")
    return Inputs(jnp.asarray(noise), keys, condition, null)


def round_batch(number: int) -> int:
    """The next of 1, 2, 3, 4, 6, 8, 12, 16, 24, … images: compiled for these alone, programs are few."""
    power = 1 << (number - 1).bit_length()
    return power * 3 // 4 if number <= power * 3 // 4 else power


@functools.partial(jax.jit, static_argnames="number")
def fill_up(inputs: Inputs, number: int) -> Inputs:
    """Inputs of so many images: the given ones, and some of them again. An image depends on no other."""
    rows = np.arange(number) % len(inputs.noise_BxHxWx3)
    filled = jax.tree.map(lambda x: x[rows], inputs._replace(null=None))
    is_same = all(len(x) == 1 for x in jax.tree.leaves(inputs.null))
    return filled._replace(null=inputs.null if is_same else jax.tree.map(lambda x: x[rows], inputs.null))


@functools.partial(jax.jit, static_argnames="shape")
def image_noise(key: Array, indices: Array, shape: tuple[int, int, int]) -> Array:
    """Starting noise of the images with these indices, (K, *shape), fp32: a function of key and index alone."""
    return jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(key, i), shape))(indices)


@jax.jit
def image_keys(key: Array, indices: Array) -> Array:
    """Keys (K,) of what the images with these indices draw on their way: a function of key and index alone."""
    later = jax.random.fold_in(key, np.uint32(2**32 - 1))  # no image has this number, whose starting noise it would be
    return jax.vmap(lambda i: jax.random.fold_in(later, i))(indices)


@functools.lru_cache(maxsize=16)
def compiled_sampler(model: nn.Module, settings: Sampling, trajectory: int = 0) -> Callable[..., Any]:
    """The jitted sampler of these settings: (params, noise, keys, condition, null) → what `sample` returns.

    The memory of the noise becomes that of the images. keys (B,) may be None where the solver draws no noise; null may
    be one row for all.
    """

    @functools.partial(jax.jit, donate_argnames="noise_BxHxWx3")
    def run(params: Any, noise_BxHxWx3: Array, keys_B: Array | None, condition: Any, null: Any) -> Any:
        guided, solver = settings.guided_steps, SOLVERS[settings.solver]
        params = nn.meta.unbox(params)
        cast = in_compute_dtype(params, model.dtype)
        # On a GPU a loop of blocks in the loop of steps costs more than the blocks' own work.
        unrolled = platform() == "gpu"
        network = model.clone(scan=False) if unrolled else model
        network = functools.partial(network.apply, {"params": unstacked(cast) if unrolled else cast})
        times_S, conditions = settings.times[:-1].astype(np.float32), [condition, null][: 1 + guided.any()]
        tables = tabulate(model, params, times_S, conditions)

        def velocity(x: Array, t_B: Array, told: Any) -> Array:
            return network(x, t_B, told) if tables is None else network(x, t_B, None, given=told)

        def slope(x: Array, t_B: Array, is_guided: Array, number: Array) -> tuple[Array, tuple]:
            told = conditions if tables is None else [look_up(table, number) for table in tables]
            return guided_slope(velocity, told[0], told[-1], settings.guidance, guided)(x, t_B, is_guided)

        images, states, _ = integrate(solver, slope, noise_BxHxWx3, settings.times, guided, keys_B, trajectory)
        return (images, states) if trajectory else images

    return run
