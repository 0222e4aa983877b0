"""Where are the Inception-v3's weights, and which numbers are in them? Read without TensorFlow and without torch.

Two files are known: the frozen graph of 2015, of which only the constants are looked at, and PyTorch's copy of these,
which pytorch-fid and torch-fidelity use. Both give the same parameters.
"""

import hashlib
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from absl import logging

from deco_jax import storage
from deco_jax.encoders.inception.model import CLASSES, LAYERS, SIZES, Params
from deco_jax.errors import UsageError
from deco_jax.weights.files import open_weights
from deco_jax.weights.tensors import MappedFile, naming
from deco_jax.weights.translate import check_finite

GRAPH, TORCH = "classify_image_graph_def.pb", "pt_inception-2015-12-05-6726825d.pth"
FILES = (GRAPH, TORCH, "weights-inception-2015-12-05-6726825d.pth")  # the last is torch-fidelity's name of the second
TORCH_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
WHERE = (
    f"Take https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{TORCH} (SHA-256 {TORCH_SHA256}), or "
    f"https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/{GRAPH} (the same file as in "
    "http://download.tensorflow.org/models/image/imagenet/inception-2015-12-05.tgz; its SHA-256 is not known here)."
)
NORM_EPS = 1e-3
MAX_GRAPH = 2**30  # bytes; the published one has 10⁸


def find_inception(weights: str, cache: str) -> storage.AnyPath:
    """The file that `weights` names, here or in `cache`; "" takes a published one in `cache`.

    Raises:
      UsageError: there is none; says where to get it, and its SHA-256.
    """
    folder = storage.to_path(cache)
    names = [storage.to_path(weights), folder / weights] if weights else [folder / name for name in FILES]
    for path in names:
        with storage.reading(path):
            if storage.retried(f"looking for {path}", path.is_file):
                return path
    given = f"inception={weights!r} is no file here, nor in" if weights else f"none of {', '.join(FILES)} is in"
    raise UsageError(f"the weights of inception are missing: {given} {cache}. {WHERE}")


def read_inception(path: str | os.PathLike) -> Params:
    """The parameters in a frozen graph (.pb) or in a file of PyTorch's; fp32, batch norms folded in in float64.

    A file of PyTorch's that is not the published one is read with a warning: people convert them.

    Raises:
      UsageError: it is damaged, or its tensors are not those of this network; they are listed.
    """
    path = pathlib.Path(storage.local_copy(storage.to_path(path)))
    if path.suffix == ".pb":
        with naming(path):
            return _params(graph_constants(path), _in_tensorflow, transposed=False)
    tensors = open_weights(path).tensors
    with naming(path):
        params = _params(tensors, _in_torch, transposed=True)
    with path.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    if digest != TORCH_SHA256:
        logging.warning(
            "%s has the SHA-256 %s, not that of the published weights, %s; features of others are not comparable.",
            path,
            digest,
            TORCH_SHA256,
        )
    return params


def graph_constants(path: pathlib.Path) -> dict[str, np.ndarray]:
    """Name → array of every fp32 constant in a TensorFlow graph; nothing of the graph is run.

    Raises:
      UsageError: it is no graph, or a truncated one.
    """
    from google.protobuf.message import DecodeError
    from tensorboardX.proto.graph_pb2 import GraphDef  # takes longer to import than all the rest
    from tensorboardX.proto.types_pb2 import DT_FLOAT

    file, graph = MappedFile(path), GraphDef()
    if file.size > MAX_GRAPH:
        raise UsageError(f"it has {file.size} bytes; a graph of at most {MAX_GRAPH} is read.")
    try:
        graph.ParseFromString(bytes(file.window(0, file.size)))
    except DecodeError:
        raise UsageError(f"it is no TensorFlow graph, or a truncated one. {WHERE}") from None
    tensors = {node.name: node.attr["value"].tensor for node in graph.node if node.op == "Const"}
    return {name: _array(name, tensor) for name, tensor in tensors.items() if tensor.dtype == DT_FLOAT}


def _array(name: str, tensor: Any) -> np.ndarray:
    """A TensorProto as an array: its bytes, or a list of numbers of which the last one repeats."""
    shape = tuple(dim.size for dim in tensor.tensor_shape.dim)
    size = math.prod(shape) if all(n >= 0 for n in shape) else -1
    if len(tensor.tensor_content) == 4 * size:
        return np.frombuffer(tensor.tensor_content, "<f4").reshape(shape)
    listed = np.asarray(tensor.float_val, np.float32)
    if tensor.tensor_content or not 0 < len(listed) <= size <= MAX_GRAPH // 4:
        raise UsageError(f"the constant {name} of shape {shape} does not have as many numbers: the file is damaged.")
    return np.append(listed, np.broadcast_to(listed[-1], size - len(listed))).reshape(shape)


def _in_tensorflow(name: str) -> tuple[str, ...]:
    """A layer's kernel, and scale, shift, mean and variance of its batch norm, in the graph."""
    if name == "fc":
        return ("softmax/weights",)
    scope = LAYERS[name].tensorflow
    norm = (f"{scope}/batchnorm/{part}" for part in ("gamma", "beta", "moving_mean", "moving_variance"))
    return f"{scope}/conv2d_params", *norm


def _in_torch(name: str) -> tuple[str, ...]:
    """The same in PyTorch's state dict."""
    if name == "fc":
        return ("fc.weight",)
    return f"{name}.conv.weight", *(f"{name}.bn.{part}" for part in ("weight", "bias", "running_mean", "running_var"))


def _params(tensors: Mapping[str, Any], names: Any, transposed: bool) -> Params:
    """The parameters, from tensors under `names`; `transposed` if kernels are (out, in, height, width)."""
    kernels = {name: layer.kernel for name, layer in LAYERS.items()} | {"fc": (SIZES["pool"], CLASSES)}
    problems, nonfinite = [], {}
    for name, kernel in kernels.items():
        shapes = [(*kernel[:1:-1], *kernel[:2]) if len(kernel) == 4 else kernel[::-1]] if transposed else [kernel]
        for tensor, shape in zip(names(name), shapes + [kernel[-1:]] * 4, strict=False):
            if tensor not in tensors:
                problems.append(f"missing {tensor} {shape}")
            elif tuple(tensors[tensor].shape) != shape:
                problems.append(f"{tensor} has shape {tuple(tensors[tensor].shape)}, not {shape}")
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise UsageError(f"no Inception-v3 of 2015: {'; '.join(problems[:5])}{more}. {WHERE}")
    params = {}
    for name in kernels:
        stored, *norm = (np.asarray(tensors[tensor], np.float64) for tensor in names(name))
        for tensor, value in zip(names(name), (stored, *norm), strict=True):
            nonfinite[tensor] = value.size - np.count_nonzero(np.isfinite(value))
        if name == "fc":
            params[name] = {"kernel": np.ascontiguousarray(stored.T if transposed else stored, np.float32)}
            continue
        kernel_HWIO = stored.transpose(2, 3, 1, 0) if transposed else stored
        params[name] = _fold(kernel_HWIO, *norm)
    check_finite(nonfinite)
    return params


def _fold(
    kernel_HWIO: np.ndarray, scale: np.ndarray, shift: np.ndarray, mean: np.ndarray, variance: np.ndarray
) -> dict[str, np.ndarray]:
    """A convolution and the batch norm behind it as one convolution with bias."""
    factor = scale / np.sqrt(variance + NORM_EPS)
    kernel = np.ascontiguousarray(kernel_HWIO * factor, np.float32)
    return {"kernel": kernel, "bias": np.float32(shift - mean * factor)}
