"""The teacher of a run: where its weights are, whether they suit the run, and what it sees in a batch."""

import functools
import pathlib
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from deco_jax.encoders.dinov2.model import SIZES, DINOv2, forward_flops
from deco_jax.encoders.dinov2.weights import WHERE, read_dinov2
from deco_jax.encoders.frozen import Frozen, FrozenWeights
from deco_jax.errors import UsageError
from deco_jax.storage import write_beside

IMAGE_PATCH = 16  # pixels of the image along a side that one feature stands for


def load_teacher(config: ConfigDict) -> FrozenWeights:
    """The teacher that a run's configuration names; its weights are downloaded if they must be.

    Raises:
      UsageError: its weights are not to be had, are damaged, or those of a network of another size.
    """
    path = find_weights(config.teacher.weights, config.teacher.cache)
    module, params = read_dinov2(path)
    if module.width != config.loss.alignment_features:
        raise UsageError(
            f"teacher.weights={config.teacher.weights} has features of {module.width} channels, and "
            f"loss.alignment_features={config.loss.alignment_features}; they must be equal."
        )
    return FrozenWeights.of(teacher_of(module, config), params)


def default_teacher(config: ConfigDict) -> Frozen:
    """The published network with the run's `loss.alignment_features`, for planning without its weights.

    Raises:
      UsageError: no published size has so many.
    """
    features = config.loss.alignment_features
    sizes = next((sizes for sizes in SIZES.values() if sizes["width"] == features), None)
    if sizes is None:
        widths = ", ".join(f"{sizes['width']} ({name})" for name, sizes in SIZES.items())
        raise UsageError(f"loss.alignment_features={features} is no width of a published DINOv2; those are: {widths}.")
    return teacher_of(DINOv2(**sizes), config)


def teacher_of(module: DINOv2, config: ConfigDict) -> Frozen:
    """DINOv2 as the run's `model` part says (dtype, attention, scan): images in [-1, 1] → features (B, N, F), fp32."""
    attention = None if config.model.attention == "default" else config.model.attention
    module = module.clone(dtype=jnp.dtype(config.model.dtype), attention=attention, scan=config.model.scan)
    return Frozen(
        name="teacher",
        purpose=f"aligned to the teacher {config.teacher.weights}",
        module=module,
        reads="image",
        writes="features",
        example=jax.ShapeDtypeStruct((1, module.image_patch, module.image_patch, 3), np.float32),
        prepare=lambda image_BxHxWx3: (image_BxHxWx3 + 1) / 2,  # to [0, 1]
        forward_flops=functools.partial(forward_flops, module),
    )


def check_grids(config: ConfigDict) -> None:
    """Raises UsageError if the teacher's features would not lie on the network's tokens."""
    size, p = config.data.image_size, config.model.patch_size
    if size % IMAGE_PATCH:
        lower = max(size // IMAGE_PATCH, 1) * IMAGE_PATCH
        raise UsageError(
            f"data.image_size={size} is not divisible by {IMAGE_PATCH}, as the teacher needs; nearest: {lower} and "
            f"{lower + IMAGE_PATCH}. Without representation alignment it need not be: loss.alignment_weight=0."
        )
    if p != IMAGE_PATCH:
        raise UsageError(
            f"model.patch_size={p} gives {size // p}×{size // p} tokens, and the teacher "
            f"{size // IMAGE_PATCH}×{size // IMAGE_PATCH} features of data.image_size={size}; alignment needs "
            f"model.patch_size={IMAGE_PATCH}. loss.alignment_weight=0 trains without."
        )


def find_weights(weights: str, cache: str) -> pathlib.Path:
    """The file or folder that `teacher.weights` names: there, in the cache, or downloaded into it.

    Raises:
      UsageError: nowhere; says where to get it, and how to train without.
    """
    given, cached = pathlib.Path(weights).expanduser(), pathlib.Path(cache).expanduser() / weights
    for path in (given, cached):
        if weights and path.exists():
            return path
    problem = f"teacher.weights={weights!r} is no file or folder here, nor in teacher.cache={cache}"
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", weights) or given.suffix in (".pth", ".pt", ".safetensors"):
        raise UsageError(f"{problem}. {WHERE}")
    try:
        _download(weights, cached)
    except Exception as error:  # of a library that reports a missing network in many ways
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}" if str(error) else repr(error)
        raise UsageError(f"{problem}, and downloading it from Hugging Face failed ({reason}). {WHERE}") from error
    return cached


def _download(name: str, target: pathlib.Path) -> None:
    """A model's config.json and weights from Hugging Face to `target`, which appears when all is there."""
    from huggingface_hub import snapshot_download

    with write_beside(target, first_wins=True) as draft:
        snapshot_download(name, local_dir=draft, allow_patterns=["config.json", "model.safetensors"])
        shutil.rmtree(draft / ".cache", ignore_errors=True)
        if not (draft / "model.safetensors").exists():
            raise FileNotFoundError(f"{name} has no model.safetensors")
