"""The teacher of a run: where its weights are, whether they suit the run, and what it sees in a batch."""

import dataclasses
import hashlib
import pathlib
import re
import shutil
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh
from ml_collections import ConfigDict

from deco_jax.encoders.dinov2.model import SIZES, DINOv2
from deco_jax.encoders.dinov2.weights import WHERE, read_dinov2
from deco_jax.errors import UsageError
from deco_jax.parallel import mesh as meshes

IMAGE_PATCH = 16  # pixels of the image along a side that one feature stands for


@dataclasses.dataclass(frozen=True)
class Teacher:
    """A frozen network that representation alignment looks up to."""

    module: DINOv2
    params: Any  # numpy, on this host; kernels in the module's dtype, the rest fp32
    digest: str  # of its weights, whatever file they lie in


def load_teacher(config: ConfigDict) -> Teacher:
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
    module = _for_run(module, config)
    return Teacher(module, _cast(params, module.dtype), _digest(params))


def default_teacher(config: ConfigDict) -> DINOv2:
    """The published network with the run's `loss.alignment_features`, for planning without its weights.

    Raises:
      UsageError: no published size has so many.
    """
    features = config.loss.alignment_features
    sizes = next((sizes for sizes in SIZES.values() if sizes["width"] == features), None)
    if sizes is None:
        widths = ", ".join(f"{sizes['width']} ({name})" for name, sizes in SIZES.items())
        raise UsageError(f"loss.alignment_features={features} is no width of a published DINOv2; those are: {widths}.")
    return _for_run(DINOv2(**sizes), config)


def _for_run(module: DINOv2, config: ConfigDict) -> DINOv2:
    """The network as the run's `model` part says: dtype, attention, scan."""
    attention = None if config.model.attention == "default" else config.model.attention
    return module.clone(
        dtype=jnp.dtype(config.model.dtype), attention=attention, scan=config.model.scan, image_patch=IMAGE_PATCH
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


def teacher_features(module: DINOv2, params: Any, image_BxHxWx3: Array) -> Array:
    """What the teacher sees in images in [-1, 1]: (B, N, F), fp32, one feature a token, without gradient."""
    return jax.lax.stop_gradient(module.apply({"params": params}, (image_BxHxWx3 + 1) / 2))


def abstract_params(module: DINOv2, mesh: Mesh) -> Any:
    """Shapes, dtypes and shardings of the teacher's parameters on `mesh`."""
    image = jax.ShapeDtypeStruct((1, module.image_patch, module.image_patch, 3), np.float32)
    boxed = jax.eval_shape(module.init, jax.random.key(0), image)["params"]

    def leaf(path: tuple[Any, ...], box: Any) -> jax.ShapeDtypeStruct:
        dtype, sharding = _dtype(path, module.dtype), meshes.state_shardings(box, mesh)
        return jax.ShapeDtypeStruct(box.value.shape, dtype, sharding=sharding)

    return jax.tree_util.tree_map_with_path(leaf, boxed, is_leaf=meshes.is_boxed)


def place(teacher: Teacher, mesh: Mesh) -> Any:
    """Its parameters as global arrays, every process giving the parts that its devices hold."""
    return jax.tree.map(
        lambda value, like: jax.make_array_from_callback(like.shape, like.sharding, lambda index: value[index]),
        teacher.params,
        abstract_params(teacher.module, mesh),
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

    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as folder:
        draft = pathlib.Path(folder) / "model"
        snapshot_download(name, local_dir=draft, allow_patterns=["config.json", "model.safetensors"])
        shutil.rmtree(draft / ".cache", ignore_errors=True)
        if not (draft / "model.safetensors").exists():
            raise FileNotFoundError(f"{name} has no model.safetensors")
        try:
            draft.rename(target)
        except OSError:
            if not target.exists():  # else another process of this run was faster
                raise


def _dtype(path: tuple[Any, ...], dtype: jnp.dtype) -> jnp.dtype:
    """Linear layers multiply in `dtype` whatever they are stored in, so they are stored in it."""
    return dtype if jax.tree_util.keystr(path, simple=True, separator="/").endswith("/kernel") else jnp.dtype("float32")


def _cast(params: Any, dtype: jnp.dtype) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, x: np.asarray(x, _dtype(path, dtype)), params)


def _digest(params: Any) -> str:
    digest = hashlib.sha256()
    for path, value in jax.tree_util.tree_leaves_with_path(params):
        digest.update(f"{jax.tree_util.keystr(path)} {value.shape}".encode())
        digest.update(np.ascontiguousarray(value).view(np.uint8))
    return digest.hexdigest()[:16]
