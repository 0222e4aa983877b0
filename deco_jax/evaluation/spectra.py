"""At which frequencies lies the energy of the transformer, and of the velocity? (paper, Figure 4; docs/model.md, 8)

A network draws images by Euler steps. At every step the tokens after its last block, laid out as an image of D
channels, and the velocity it predicts are cut into 8×8 blocks and transformed by the DCT; the squares are added up.
`deco spectra` does this for several networks and puts them side by side.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array

from deco_jax import jobs, storage
from deco_jax.conditions import Text
from deco_jax.config import build_model
from deco_jax.diffusion.frequency import BLOCK, block_dct
from deco_jax.encoders.text import TextEncoder
from deco_jax.errors import UsageError
from deco_jax.evaluation.spectra_report import FILES, Spectra, ZIGZAG_64x2, require_matplotlib, write_spectra
from deco_jax.generation.batches import make_conditions, noise_batches
from deco_jax.generation.folder import check_folder
from deco_jax.generation.prompts import open_encoder
from deco_jax.parallel import mesh as meshes
from deco_jax.pretrained.load import Pretrained, open_pretrained
from deco_jax.sampling.settings import Sampling, check_image_size, parse_image_size, write_image_size
from deco_jax.sampling.solvers import SOLVERS, integrate

MIN_SIDE = BLOCK // 2 + 1  # a shorter side cannot be reflected into a block of 8


def measure_spectra(
    model: nn.Module,
    params: Any,
    *,
    images: int,
    seed: int,
    image_size: int | tuple[int, int],
    batch_size: int,
    steps: int,
    shift: float = 1.0,
    prompts: Sequence[str] = (),
    encoder: TextEncoder | None = None,
) -> Spectra:
    """Energies of tokens and velocities along the way from noise to `images` images, without guidance.

    Image i starts from the noise that `deco sample` gives it and shows class, or prompt, i modulo their number, so
    neither `batch_size` nor the number of local devices, over which a batch is split, changes the result beyond
    rounding. Energies are computed in fp32 whatever the network's dtype, and added up over images in fp64.

    Args:
      model, params: see `load_pretrained`.
      images: how many.
      seed: of the noise.
      image_size: side or (height, width) in pixels.
      batch_size: images at a time, see `noise_batches`.
      steps: of the Euler solver.
      shift: time shift of its grid.
      prompts, encoder: of a network that is told text.

    Raises:
      UsageError: steps or shift are out of range, or the network diverges.
    """
    run = _compiled(model, Sampling(steps, shift=shift))
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    params = jax.device_put(params, meshes.replicated(meshes.local_layout().mesh))
    labels = prompts if encoder is not None else range(model.condition.num_classes)
    conditions = make_conditions(model, labels, None, encoder)
    energy_2x64 = np.zeros((2, len(ZIGZAG_64x2)))
    with contextlib.closing(jobs.Progress(images, "image")) as progress:
        for indices, noise, count in noise_batches(range(images), seed, image_size, batch_size):
            asked = jax.tree.map(jnp.asarray, model.condition.read(conditions(np.asarray(indices))[0]))
            with meshes.use_mesh_of(noise):
                energies_2xBx64 = np.asarray(run(params, noise, asked), np.float64)
            energy_2x64 += energies_2xBx64[:, :count].sum(axis=1)
            progress.update(progress.done + count)
    if not np.isfinite(energy_2x64).all():
        raise UsageError(f"With steps={steps} the network's output is not finite; its weights cannot be analysed.")
    blocks = [math.ceil(height / p / BLOCK) * math.ceil(width / p / BLOCK) for p in (model.patch_size, 1)]
    transformer_energy_64, velocity_energy_64 = energy_2x64 / (images * steps * np.array(blocks)[:, None])
    size = height if height == width else (height, width)
    return Spectra(transformer_energy_64, velocity_energy_64, images, seed, size, steps, float(shift))


@functools.lru_cache(maxsize=16)
def _compiled(model: nn.Module, settings: Sampling) -> Callable[..., Array]:
    """The jitted way from noise to images; (params, noise, condition) → energies of tokens and velocity, (2, B, 64)."""

    @jax.jit
    def run(params: Any, noise_BxHxWx3: Array, condition: Any) -> Array:
        b, h, w, _ = noise_BxHxWx3.shape
        grid = (h // model.patch_size, w // model.patch_size)

        def slope(x: Array, t_B: Array, *_: Array) -> tuple[Array, Array]:
            v, tokens_BxNxD = model.apply({"params": params}, x, t_B, condition, hidden_layer=model.depth)
            return v, jnp.stack([zigzag_energy(tokens_BxNxD.reshape(b, *grid, -1)), zigzag_energy(v)])

        solver = SOLVERS[settings.solver]
        _, _, energies_Sx2xBx64 = integrate(solver, slope, noise_BxHxWx3, settings.times, settings.guided_steps)
        return energies_Sx2xBx64.sum(axis=0)

    return run


def zigzag_energy(x_BxHxWxC: Array) -> Array:
    """Squared coefficients of the 8×8 block DCT, summed over blocks and channels: (B, 64), fp32, in zig-zag order."""
    squares_Bx8x8 = jnp.sum(jnp.square(block_dct(x_BxHxWxC.astype(jnp.float32))), axis=(1, 2, 5))
    return squares_Bx8x8[:, ZIGZAG_64x2[:, 0], ZIGZAG_64x2[:, 1]]


def spectra_to_folder(
    checkpoint: str,
    out: str,
    *,
    against: Sequence[str],
    num: int,
    seed: int,
    steps: int | None,
    shift: float | None,
    image_size: str | int | None,
    batch_size: int,
    weights: str,
    dtype: str | None,
    overwrite: bool,
) -> None:
    """Measures networks, writes spectra.json, .csv and .png into `out`, and prints a short reading.

    Args:
      checkpoint: anything that `load_pretrained` opens; a network is named by the last parts of its path.
      out: a folder, on this machine or in a bucket; must not hold such files yet unless `overwrite`.
      against: more of them, to put beside the first.
      num, seed, batch_size: see `measure_spectra`.
      steps, shift, image_size: None = as the run's configuration says; 50, 1 and 256 for a file that has none. A size
        is that of squares, or height and width as in "256x384".
      weights: "ema" or "online".
      dtype: of matrix products, "bfloat16" or "float32"; None = each as trained.
      overwrite: replace what is there.

    Raises:
      UsageError: an argument is out of range, a source cannot be opened, `out` holds such files, or matplotlib is
        missing.
    """
    require_matplotlib()
    folder = check_folder(out, num, batch_size, seed)
    with storage.reading(folder):
        if not overwrite and any((folder / name).exists() for name in FILES):
            raise UsageError(f"--out={out} already holds spectra; choose another folder or pass --overwrite.")
    sources = [checkpoint, *against]
    names, networks = _names(sources), [open_pretrained(source, dtype=dtype) for source in sources]
    settings = [_settings(found, weights, steps, shift, image_size) for found in networks]
    probe = folder / ".writable"
    storage.write_bytes(probe, b"")
    with storage.writing(folder):
        probe.unlink()
    spectra = {}
    for name, found, chosen in zip(names, networks, settings, strict=True):
        drawn = f"{'×'.join(map(str, chosen['image_size']))} pixels, {chosen['steps']} steps, shift {chosen['shift']:g}"
        print(f"{name}: {num} images of {drawn}, in {found.config.model.dtype}", flush=True)
        model = build_model(found.config.model)
        if isinstance(model.condition, Text):
            chosen |= {"prompts": found.config.sample.prompts, "encoder": open_encoder(found, None)}
        measured = measure_spectra(model, found.read(weights), images=num, seed=seed, batch_size=batch_size, **chosen)
        origin = f"{found.path}, {weights} weights, in {found.config.model.dtype}"
        spectra[name] = dataclasses.replace(measured, origin=origin)
    print(write_spectra(folder, spectra))
    print(f"{', '.join(FILES)} are in {folder}.")


def _settings(
    found: Pretrained, weights: str, steps: int | None, shift: float | None, image_size: str | int | None
) -> dict[str, Any]:
    """steps, shift and image_size for a network, checked as far as that goes without its weights."""
    found.check_set(weights)
    p, sampler, option = found.config.model.patch_size, found.config.sample, f"{found.path}: image_size"
    size = parse_image_size(image_size, option) or (found.config.data.image_size,) * 2
    steps = sampler.steps if steps is None else steps
    shift = sampler.shift if shift is None else shift
    Sampling(steps, shift=shift)
    check_image_size(size, p, option)
    if min(size) < MIN_SIDE * p:
        raise UsageError(
            f"{option}={write_image_size(size)} gives {size[0] // p}×{size[1] // p} tokens, too few for an 8×8 block; "
            f"the smallest image_size that works is {MIN_SIDE * p}."
        )
    return {"steps": steps, "shift": shift, "image_size": size}


def _names(sources: Sequence[str]) -> list[str]:
    """As many last parts of the paths as tell them apart."""
    parts = [storage.resolved(source).parts for source in sources]
    twice = next((source for i, source in enumerate(sources) if parts[i] in parts[:i]), None)
    if twice is not None:
        raise UsageError(f"--against={twice} is given twice; every network is measured once.")
    depth = next(n for n in range(1, 1 + max(map(len, parts))) if len({p[-n:] for p in parts}) == len(parts))
    return ["/".join(p[-depth:]) for p in parts]
