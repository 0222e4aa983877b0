"""What does the Inception-v3 of 2015 see in an image? The features of FID, sFID and the Inception Score.

This is the graph in `classify_image_graph_def.pb` as the ADM suite (openai/guided-diffusion, evaluations) runs it, and
no later Inception: average pools leave out the padding, and the last block has a max pool in place of one. Names of
layers are PyTorch's; mixed … mixed_10 of TensorFlow are Mixed_5b … Mixed_7c. Batch norms are folded into the
convolutions. Network: Szegedy et al., arXiv 1512.00567.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array, lax

from deco_jax.encoders.inception.resize import resize_like_tensorflow

SIDE = 299  # pixels along a side that images are resized to
CHANNELS = 7  # of the spatial features that count
CLASSES = 1008
SIZES = {"pool": 2048, "spatial": 17 * 17 * CHANNELS, "logits": CLASSES}

Params = Mapping[str, Mapping[str, np.ndarray]]  # layer → kernel HWIO and bias, the batch norm folded in; "fc" → kernel


@dataclasses.dataclass(frozen=True)
class Layer:
    """A convolution without bias, a batch norm and a ReLU."""

    tensorflow: str  # its scope in the graph
    kernel: tuple[int, int, int, int]  # height, width, channels in and out
    stride: int = 1
    padding: str = "SAME"


def features(params: Params, images_BxHxWx3: Array) -> dict[str, Array]:
    """uint8 pixels → what the ADM suite takes from the graph, fp32.

    Returns:
      pool: (B, 2048), `pool_3:0`, of FID, precision and recall.
      spatial: (B, 2023), `mixed_6/conv:0` (17, 17, 192), its first 7 channels, of sFID. That is the ReLU behind the 1×1
        branch of Mixed_6d; not Mixed_6e, and not pooled.
      logits: (B, 1008), of the Inception Score: pool times the kernel of the classes, without their bias.
    """
    x = (resize_like_tensorflow(images_BxHxWx3, SIDE, SIDE) - 128) / 128
    seen = activations(params, x)
    pool_BxD = seen["Mixed_7c"].mean(axis=(1, 2))
    spatial_Bx17x17x7 = seen["Mixed_6d.branch1x1"][..., :CHANNELS]
    return {
        "pool": pool_BxD,
        "spatial": spatial_Bx17x17x7.reshape(len(x), -1),
        "logits": pool_BxD @ params["fc"]["kernel"],
    }


def activations(params: Params, x_BxHxWx3: Array) -> dict[str, Array]:
    """The output of every layer before the blocks, of every block, and of Mixed_6d's 1×1 branch, by name, NHWC.

    Args:
      params: of `weights.read_inception`.
      x_BxHxWx3: images in [-1, 1], of 299².
    """
    seen: dict[str, Array] = {}
    x = x_BxHxWx3
    for name in STEM:
        x = seen[name] = _convolution(params, name)(x)
        if name in ("Conv2d_2b_3x3", "Conv2d_4a_3x3"):
            x = _max_pool(x)
    for name, (_, kind, _) in BLOCKS.items():

        def conv(branch: str, x: Array, block: str = name) -> Array:
            return _convolution(params, f"{block}.{branch}")(x)

        if name == "Mixed_6d":
            seen["Mixed_6d.branch1x1"] = conv("branch1x1", x)
        x = seen[name] = jnp.concatenate(list(kind.branches(conv, x)), axis=-1)
    return seen


Convolve = Callable[[str, Array], Array]  # (layer of a block, its input) → its output


def _convolution(params: Params, name: str) -> Callable[[Array], Array]:
    layer, weights = LAYERS[name], params[name]

    def apply(x: Array) -> Array:
        strides, order = (layer.stride,) * 2, ("NHWC", "HWIO", "NHWC")
        y = lax.conv_general_dilated(x, weights["kernel"], strides, layer.padding, dimension_numbers=order)
        return jax.nn.relu(y + weights["bias"])

    return apply


def _chain(conv: Convolve, x: Array, stem: str, length: int) -> Array:
    """The layers stem_1 … stem_length, one behind the other."""
    for i in range(length):
        x = conv(f"{stem}_{i + 1}", x)
    return x


def _max_pool(x: Array, stride: int = 2, padding: str = "VALID") -> Array:
    return nn.max_pool(x, (3, 3), (stride, stride), padding)


def _average_pool(x: Array) -> Array:
    """Of 3×3, stride 1; at the edges over the places that are there."""
    return nn.avg_pool(x, (3, 3), (1, 1), "SAME", count_include_pad=False)


def _branches_a(conv: Convolve, x: Array) -> Iterator[Array]:
    yield conv("branch1x1", x)
    yield _chain(conv, x, "branch5x5", 2)
    yield _chain(conv, x, "branch3x3dbl", 3)
    yield conv("branch_pool", _average_pool(x))


def _branches_b(conv: Convolve, x: Array) -> Iterator[Array]:
    yield conv("branch3x3", x)
    yield _chain(conv, x, "branch3x3dbl", 3)
    yield _max_pool(x)


def _branches_c(conv: Convolve, x: Array) -> Iterator[Array]:
    yield conv("branch1x1", x)
    yield _chain(conv, x, "branch7x7", 3)
    yield _chain(conv, x, "branch7x7dbl", 5)
    yield conv("branch_pool", _average_pool(x))


def _branches_d(conv: Convolve, x: Array) -> Iterator[Array]:
    yield _chain(conv, x, "branch3x3", 2)
    yield _chain(conv, x, "branch7x7x3", 4)
    yield _max_pool(x)


def _branches_e(conv: Convolve, x: Array, pool: Callable[[Array], Array] = _average_pool) -> Iterator[Array]:
    yield conv("branch1x1", x)
    h = conv("branch3x3_1", x)
    yield from (conv("branch3x3_2a", h), conv("branch3x3_2b", h))
    h = _chain(conv, x, "branch3x3dbl", 2)
    yield from (conv("branch3x3dbl_3a", h), conv("branch3x3dbl_3b", h))
    yield conv("branch_pool", pool(x))


def _branches_last(conv: Convolve, x: Array) -> Iterator[Array]:
    return _branches_e(conv, x, lambda x: _max_pool(x, 1, "SAME"))


def _layers_a(c: int, pool: int) -> dict[str, Layer]:
    return {
        "branch1x1": Layer("conv", (1, 1, c, 64)),
        "branch5x5_1": Layer("tower/conv", (1, 1, c, 48)),
        "branch5x5_2": Layer("tower/conv_1", (5, 5, 48, 64)),
        "branch3x3dbl_1": Layer("tower_1/conv", (1, 1, c, 64)),
        "branch3x3dbl_2": Layer("tower_1/conv_1", (3, 3, 64, 96)),
        "branch3x3dbl_3": Layer("tower_1/conv_2", (3, 3, 96, 96)),
        "branch_pool": Layer("tower_2/conv", (1, 1, c, pool)),
    }


def _layers_b(c: int) -> dict[str, Layer]:
    return {
        "branch3x3": Layer("conv", (3, 3, c, 384), 2, "VALID"),
        "branch3x3dbl_1": Layer("tower/conv", (1, 1, c, 64)),
        "branch3x3dbl_2": Layer("tower/conv_1", (3, 3, 64, 96)),
        "branch3x3dbl_3": Layer("tower/conv_2", (3, 3, 96, 96), 2, "VALID"),
    }


def _layers_c(c: int, inner: int) -> dict[str, Layer]:
    return {
        "branch1x1": Layer("conv", (1, 1, c, 192)),
        "branch7x7_1": Layer("tower/conv", (1, 1, c, inner)),
        "branch7x7_2": Layer("tower/conv_1", (1, 7, inner, inner)),
        "branch7x7_3": Layer("tower/conv_2", (7, 1, inner, 192)),
        "branch7x7dbl_1": Layer("tower_1/conv", (1, 1, c, inner)),
        "branch7x7dbl_2": Layer("tower_1/conv_1", (7, 1, inner, inner)),
        "branch7x7dbl_3": Layer("tower_1/conv_2", (1, 7, inner, inner)),
        "branch7x7dbl_4": Layer("tower_1/conv_3", (7, 1, inner, inner)),
        "branch7x7dbl_5": Layer("tower_1/conv_4", (1, 7, inner, 192)),
        "branch_pool": Layer("tower_2/conv", (1, 1, c, 192)),
    }


def _layers_d(c: int) -> dict[str, Layer]:
    return {
        "branch3x3_1": Layer("tower/conv", (1, 1, c, 192)),
        "branch3x3_2": Layer("tower/conv_1", (3, 3, 192, 320), 2, "VALID"),
        "branch7x7x3_1": Layer("tower_1/conv", (1, 1, c, 192)),
        "branch7x7x3_2": Layer("tower_1/conv_1", (1, 7, 192, 192)),
        "branch7x7x3_3": Layer("tower_1/conv_2", (7, 1, 192, 192)),
        "branch7x7x3_4": Layer("tower_1/conv_3", (3, 3, 192, 192), 2, "VALID"),
    }


def _layers_e(c: int) -> dict[str, Layer]:
    return {
        "branch1x1": Layer("conv", (1, 1, c, 320)),
        "branch3x3_1": Layer("tower/conv", (1, 1, c, 384)),
        "branch3x3_2a": Layer("tower/mixed/conv", (1, 3, 384, 384)),
        "branch3x3_2b": Layer("tower/mixed/conv_1", (3, 1, 384, 384)),
        "branch3x3dbl_1": Layer("tower_1/conv", (1, 1, c, 448)),
        "branch3x3dbl_2": Layer("tower_1/conv_1", (3, 3, 448, 384)),
        "branch3x3dbl_3a": Layer("tower_1/mixed/conv", (1, 3, 384, 384)),
        "branch3x3dbl_3b": Layer("tower_1/mixed/conv_1", (3, 1, 384, 384)),
        "branch_pool": Layer("tower_2/conv", (1, 1, c, 192)),
    }


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of block: its layers, and how they are joined."""

    layers: Callable[..., dict[str, Layer]]
    branches: Callable[[Convolve, Array], Iterator[Array]]


_A, _B, _C = Kind(_layers_a, _branches_a), Kind(_layers_b, _branches_b), Kind(_layers_c, _branches_c)
_D, _E, _LAST = Kind(_layers_d, _branches_d), Kind(_layers_e, _branches_e), Kind(_layers_e, _branches_last)

STEM = {
    "Conv2d_1a_3x3": Layer("conv", (3, 3, 3, 32), 2, "VALID"),
    "Conv2d_2a_3x3": Layer("conv_1", (3, 3, 32, 32), padding="VALID"),
    "Conv2d_2b_3x3": Layer("conv_2", (3, 3, 32, 64)),
    "Conv2d_3b_1x1": Layer("conv_3", (1, 1, 64, 80)),
    "Conv2d_4a_3x3": Layer("conv_4", (3, 3, 80, 192), padding="VALID"),
}
# PyTorch's name: (TensorFlow's, kind, channels in and what else the kind asks for).
BLOCKS = {
    "Mixed_5b": ("mixed", _A, (192, 32)),
    "Mixed_5c": ("mixed_1", _A, (256, 64)),
    "Mixed_5d": ("mixed_2", _A, (288, 64)),
    "Mixed_6a": ("mixed_3", _B, (288,)),
    "Mixed_6b": ("mixed_4", _C, (768, 128)),
    "Mixed_6c": ("mixed_5", _C, (768, 160)),
    "Mixed_6d": ("mixed_6", _C, (768, 160)),
    "Mixed_6e": ("mixed_7", _C, (768, 192)),
    "Mixed_7a": ("mixed_8", _D, (768,)),
    "Mixed_7b": ("mixed_9", _E, (1280,)),
    "Mixed_7c": ("mixed_10", _LAST, (2048,)),
}
LAYERS = STEM | {
    f"{block}.{name}": dataclasses.replace(layer, tensorflow=f"{scope}/{layer.tensorflow}")
    for block, (scope, kind, sizes) in BLOCKS.items()
    for name, layer in kind.layers(*sizes).items()
}
