"""The teacher of a run: where its weights are, whether they suit the run, and what it sees in a batch."""

import fnmatch
import functools
import hashlib
import os
import pathlib
import re
import shutil
import tempfile
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from deco_jax import storage
from deco_jax.encoders.dinov2.model import SIZES, DINOv2, forward_flops
from deco_jax.encoders.dinov2.weights import WHERE, read_dinov2
from deco_jax.encoders.frozen import Frozen, FrozenWeights
from deco_jax.errors import TransientError, UsageError
from deco_jax.storage import AnyPath, is_transient

WEIGHTS = ("config.json", "model.safetensors")  # as Hugging Face calls them
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
    # Our kernel takes the network's tokens, but not always these, which are one more.
    attention = "auto" if config.model.attention in ("default", "pallas") else config.model.attention
    module = module.clone(dtype=jnp.dtype(config.model.dtype), attention=attention, scan=config.model.scan)
    return Frozen(
        name="teacher",
        purpose=f"aligned to the teacher {config.teacher.weights}",
        module=module,
        writes="features",
        example=jax.ShapeDtypeStruct((1, module.image_patch, module.image_patch, 3), np.float32),
        prepare=lambda batch: (batch["image"] + 1) / 2,  # to [0, 1]
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


def find_weights(
    weights: str, cache: str, field: str = "teacher.weights", where: str = WHERE, files: Sequence[str] = WEIGHTS
) -> pathlib.Path:
    """The file or folder of this machine that `teacher.weights` names: there, in the cache, or downloaded into it.

    Both may be addresses in a bucket, which is then copied once per machine; so is what is downloaded.

    Args:
      weights: a file, a folder, or a name.
      cache: a folder.
      field: what a user calls `weights`, for messages.
      where: what a message says on where to get them.
      files: patterns of what is downloaded, the last of them that of the weights.

    Raises:
      TransientError: Hugging Face, or the bucket, does not answer.
      UsageError: nowhere; says where to get it, and how to train without.
    """
    given, cached = storage.to_path(weights), storage.to_path(cache) / weights
    for path in (given,) if storage.is_remote(weights) else (given, cached):
        if weights and _exists(path):
            return storage.local_copy(path)
    problem = f"{field}={weights!r} is no file or folder here, nor in {field.partition('.')[0]}.cache={cache}"
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", weights) or given.suffix in (".pth", ".pt", ".safetensors"):
        raise UsageError(f"{problem}. {where}")
    lock = pathlib.Path(tempfile.gettempdir(), f"deco_jax_{os.getuid()}", f"{cached}".replace("/", "_"))
    what, end = f"downloading {weights} from Hugging Face", time.monotonic() + storage.patience()
    try:
        with storage.host_lock(lock):  # the first process of a machine downloads, the others wait
            if not _exists(cached):
                storage.retried(what, lambda: _download(weights, cached, files), end - time.monotonic())
    except TransientError as error:
        raise TransientError(f"{problem}, and {error}. {where}") from error
    except Exception as error:  # of a library that reports a wrong name in many ways
        if is_transient(error):
            raise
        reason = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"
        raise UsageError(f"{problem}, and downloading it from Hugging Face failed ({reason}). {where}") from error
    return storage.local_copy(cached)


def _exists(path: AnyPath) -> bool:
    with storage.reading(path):
        return storage.retried(f"looking for {path}", path.exists)


def _download(name: str, target: AnyPath, files: Sequence[str]) -> None:
    """A model's files from Hugging Face to `target`, which appears when all is there and checked."""
    import huggingface_hub

    try:
        known = huggingface_hub.model_info(name, files_metadata=True)
    except huggingface_hub.errors.OfflineModeIsEnabled as error:  # a setting of the user's, which does not pass
        raise UsageError(f"HF_HUB_OFFLINE={os.environ.get('HF_HUB_OFFLINE')} forbids it") from error
    wanted = {f.rfilename: f for f in known.siblings if any(fnmatch.fnmatch(f.rfilename, x) for x in files)}
    if not fnmatch.filter(wanted, files[-1]):
        raise FileNotFoundError(f"{name} has no {files[-1]}")
    with storage.write_beside(target, first_wins=True) as draft:
        for file in wanted:
            huggingface_hub.hf_hub_download(name, file, revision=known.sha, local_dir=draft)
        shutil.rmtree(draft / ".cache", ignore_errors=True)
        for file in fnmatch.filter(wanted, files[-1]):
            with (draft / file).open("rb") as content:
                digest = hashlib.file_digest(content, "sha256").hexdigest()
            if wanted[file].lfs is not None and digest != wanted[file].lfs.sha256:
                raise ConnectionError(f"{file} arrived with the hash {digest}, not {wanted[file].lfs.sha256}")
