"""How does a user get a trained network? `deco_jax.load_pretrained`, from wherever it is stored."""

import dataclasses
import hashlib
import importlib.resources
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import linen as nn
from jax import Array
from ml_collections import ConfigDict

from deco_jax import storage
from deco_jax.checkpoints import store
from deco_jax.config import FIELDS, build_model, default_config
from deco_jax.errors import UsageError
from deco_jax.models.build import parameter_shapes
from deco_jax.pretrained import networks
from deco_jax.storage import AnyPath, resolved
from deco_jax.weights.tensors import naming
from deco_jax.weights.translate import check_finite

Dtype = Literal["bfloat16", "float32"]
SMALL = 2**16  # numbers of a tensor that a fingerprint reads whole
ROWS = 8  # of a larger one


def load_pretrained(
    path: str,
    weights: Literal["ema", "online"] = "ema",
    prediction: Literal["velocity", "image"] | None = None,
    dtype: Dtype | None = None,
) -> tuple[nn.Module, Any]:
    """Opens a trained network, wherever it comes from; architecture and sizes are in the file.

    Args:
      path: a workdir of `deco train` (its newest checkpoint), `workdir/checkpoints/<step>`, an upstream Lightning
        `.ckpt`, a PyTorch state dict (`.pt`, `.pth`), `.safetensors`, an index of several of these, a Hugging Face
        folder, or one of a whole diffusers pipeline; on this machine or in a bucket (gs://…). Neither torch nor any
        code in a file is used (docs/security.md).
      weights: the moving average, or the weights that were being trained; the same where a file does not
        say which it holds.
      prediction: what the network predicts, for files that do not say. Ours do; others are taken for velocity, but
        for a baseline it must be given, as upstream trains it both ways. Whatever it is, `model` returns velocities.
      dtype: of matrix products; parameters are fp32 either way. None: as the network was trained. Files that do not
        say are taken for bfloat16, as upstream trains, with a warning; a float32 network is then a little off.

    Returns:
      (model, params): for `model.apply({"params": params}, x, t, labels)` and `deco_jax.sample`.

    Raises:
      UsageError: there is nothing to open, no such weights, tensors are missing, left over, misshapen or not finite,
        or the file says that it predicts something else.
    """
    found = open_pretrained(path, prediction, dtype)
    if "dtype" in found.assumed:
        logging.warning("%s does not say in which dtype it was trained; bfloat16 is assumed (or give dtype=).", path)
    return build_model(found.config.model), found.read(weights)


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A trained network that was found, of which no number is read yet.

    Attributes:
      path: as its user wrote it.
      config: of the run that trained it, with the defaults where the source does not say.
      assumed: which of "dtype" and "image_size" are such defaults.
      stored: what is in a file or folder of PyTorch's, or None.
      checkpoint: of ours, its folder and step, or None.
    """

    path: str
    config: ConfigDict
    assumed: tuple[str, ...] = ()
    stored: networks.Stored | None = None
    checkpoint: tuple[AnyPath, int] | None = None

    def __str__(self) -> str:
        return str(resolved(self.path)) if self.checkpoint is None else "{}/{}".format(*self.checkpoint)

    @property
    def sets(self) -> tuple[str, ...]:
        """Which of "ema" and "online" there are."""
        return ("ema", "online") if self.stored is None else self.stored.sets

    @property
    def has_projector(self) -> bool:
        """Whether it is a checkpoint of ours that was trained with alignment."""
        aligned = self.checkpoint is not None and self.config.loss.alignment_weight
        return bool(aligned) and not store.read_meta(*self.checkpoint).get("weights_only")

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes 0, 1, …; () if nobody knows them.

        A checkpoint of ours has those of its data. WordNet ids, and the classes of a network of 1000 that has no
        names, become ImageNet's: "n02099601 golden retriever".
        """
        known = () if self.checkpoint is None else store.read_meta(*self.checkpoint).get("class_names", ())
        if not known and self.config.model.num_classes != 1000:
            return ()
        lines = imagenet_classes()
        by_id = {line.split(" ", 1)[0]: line for line in lines}
        return tuple(by_id.get(name, name) for name in known) or lines

    @property
    def text_digest(self) -> str | None:
        """The hash of the text encoder that it learned from; None where nobody says."""
        return None if self.checkpoint is None else store.frozen_digests(store.read_meta(*self.checkpoint)).get("text")

    @property
    def fingerprint(self) -> str:
        """Tells other weights in the same place apart without reading them all, in hexadecimal digits.

        Of a checkpoint it is a hash of its checksums, 16 digits; of a file one of its small tensors, and after that
        16 digits of some rows of the large ones.
        """
        digest, large = hashlib.sha256(), hashlib.sha256()
        if self.checkpoint is not None:
            folder = self.checkpoint[0] / str(self.checkpoint[1])
            for path in sorted([folder / "_CHECKPOINT_METADATA", *folder.glob("checksums.*.json")]):
                with storage.reading(path):
                    digest.update(storage.retried(f"reading {path}", path.read_bytes))
            return digest.hexdigest()[:16]
        for which, tensors in sorted(self.stored.networks.items()):
            for name, tensor in sorted(tensors.items()):
                digest.update(f"{which} {name} {tuple(tensor.shape)}".encode())
                if math.prod(tensor.shape) <= SMALL:
                    digest.update(np.ascontiguousarray(tensor.numpy()).view(np.uint8))
                else:
                    for row in np.linspace(0, tensor.shape[0] - 1, ROWS, dtype=int):
                        large.update(np.ascontiguousarray(tensor.row(int(row)).numpy()).view(np.uint8))
        return digest.hexdigest()[:16] + large.hexdigest()[:16]

    def check_set(self, weights: str) -> None:
        """Raises UsageError if there are no such `weights`."""
        if weights not in ("ema", "online"):
            raise UsageError(f"weights={weights!r} is not known; allowed: ema, online.")
        if self.stored is not None:
            self.stored.weights(weights)

    def read(self, weights: str, like: Any = None) -> Any:
        """The "ema" or "online" weights of the network, fp32.

        Args:
          weights: which.
          like: shapes and shardings to be read into (ShapeDtypeStructs); None = onto this process's first device.

        Raises:
          UsageError: there are none, they do not fit `like`, or some are not finite.
        """
        self.check_set(weights)
        if like is None:
            device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
            shapes = parameter_shapes(build_model(self.config.model))
            like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), shapes)
        if self.stored is not None:
            return jax.tree.map(_place, networks.read_network(self.stored, weights), like)
        if weights == "ema":
            return self.restore({"ema": like})["ema"]
        return self.restore({"params": {"network": like}})["params"]["network"]

    def restore(self, abstract: dict[str, Any]) -> dict[str, Any]:
        """The parts of a checkpoint's state that `abstract` names, see `store.restore_part`; all of them finite."""
        part = store.restore_part(*self.checkpoint, abstract)
        counts = jax.tree_util.tree_leaves_with_path(jax.device_get(_count_nonfinite(part)))
        with naming(str(self)):
            check_finite({jax.tree_util.keystr(k, simple=True, separator="/"): n for k, n in counts})
        return part


def as_now(there: dict[str, Any], here: dict[str, Any]) -> dict[str, Any]:
    """Settings that a folder of results keeps, with the fingerprint as `here` where an older version knew less of it.

    Those of files had no rows of large tensors then; those of pictures were not kept.
    """
    old, new = str(there.get("fingerprint") or ""), here.get("fingerprint", "")
    return there | {"fingerprint": new} if new and len(old) in (0, 16) and new.startswith(old) else there


def open_pretrained(path: str, prediction: str | None = None, dtype: str | None = None) -> Pretrained:
    """Finds a trained network, and says what is known of it; arguments as in `load_pretrained`.

    Raises:
      UsageError: there is none, or it is another one than is said.
    """
    path = networks.within_pipeline(path)
    if networks.is_weight_file(path):
        stored = networks.open_networks(path, prediction)
        config = networks.run_config(stored)
        assumed = tuple(name for name in ("dtype", "image_size") if getattr(stored, name) is None)
        found = Pretrained(path, config, assumed, stored=stored)
    else:
        where, step = store.find_checkpoint(path)
        config = store.read_config(where, step)
        networks.settle_prediction(path, [config.model.prediction], prediction)
        found = Pretrained(path, config, checkpoint=(where, step))
    config.mesh = default_config().mesh  # neither the run's devices nor its way of computing may exist here
    config.model.attention = config.model.decoder = "auto"
    if dtype is None:
        return found
    FIELDS["model.dtype"].check("dtype", dtype)
    config.model.dtype = dtype
    return dataclasses.replace(found, assumed=tuple(name for name in found.assumed if name != "dtype"))


def imagenet_classes() -> tuple[str, ...]:
    """ImageNet's 1000 classes in the order of their labels: "n01440764 tench, Tinca tinca", …"""
    text = importlib.resources.files("deco_jax.pretrained").joinpath("imagenet_classes.txt").read_text("utf-8")
    return tuple(text.splitlines())


def _place(x: Any, like: jax.ShapeDtypeStruct) -> Array:
    """`x` as an array of the devices that `like` names; on a CPU without a copy."""
    return jax.make_array_from_callback(x.shape, like.sharding, lambda index: x[index])


@jax.jit
def _count_nonfinite(tree: Any) -> Any:
    return jax.tree.map(lambda x: jnp.sum(~jnp.isfinite(x)), tree)
