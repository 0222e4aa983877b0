"""torch-fidelity's Inception-v3, whose package imports torchvision, which is not needed here; and random weights."""

import contextlib
import functools
import importlib
import importlib.util
import sys

import numpy as np
import pytest

from deco_jax.encoders.inception.model import CLASSES, LAYERS, SIZES


def torch_fidelity(module):
    """A module of torch-fidelity, without what its package imports beside it."""
    pytest.importorskip("torch")
    spec = importlib.util.find_spec("torch_fidelity")
    if spec is None:
        pytest.skip("torch-fidelity is not installed")
    sys.modules.setdefault("torch_fidelity", importlib.util.module_from_spec(spec))
    return importlib.import_module(f"torch_fidelity.{module}")


@functools.cache
def random_tensors(seed=0):
    """PyTorch name → array: nothing is zero or one, and activations keep their size from layer to layer."""
    rng = np.random.default_rng(seed)

    def normal(*shape, scale=1.0, mean=0.0):
        return mean + np.float32(scale) * rng.standard_normal(shape, np.float32)

    tensors = {"fc.weight": normal(CLASSES, SIZES["pool"], scale=0.03), "fc.bias": normal(CLASSES)}
    for name, layer in LAYERS.items():
        h, w, c, o = layer.kernel
        tensors[f"{name}.conv.weight"] = normal(o, c, h, w, scale=np.sqrt(2 / (c * h * w)))
        tensors[f"{name}.bn.weight"] = normal(o, scale=0.2, mean=1.0)
        tensors[f"{name}.bn.bias"] = normal(o, scale=0.3)
        tensors[f"{name}.bn.running_mean"] = normal(o, scale=0.3)
        tensors[f"{name}.bn.running_var"] = np.exp(normal(o, scale=0.3))
    return {name: np.asarray(value, np.float32) for name, value in tensors.items()}


def their_network(file):
    """torch-fidelity's module with the weights in `file`; every output that it has."""
    names = ["64", "192", "768", "2048", "logits_unbiased", "logits"]
    module = torch_fidelity("feature_extractor_inceptionv3").FeatureExtractorInceptionV3
    return module("inception", names, feature_extractor_weights_path=str(file)).eval()


@contextlib.contextmanager
def recorded(module):
    """{name: its output, NHWC} of every layer and block of `module` that runs within."""
    outputs = {}

    def note(name, output):
        if output.ndim == 4:
            outputs[name] = output.detach().numpy().transpose(0, 2, 3, 1).copy()

    handles = [
        part.register_forward_hook(lambda _, __, output, name=name: note(name, output))
        for name, part in module.named_modules()
        if name
    ]
    yield outputs
    for handle in handles:
        handle.remove()


def write_graph(path, tensors, listed=()):
    """The same tensors as a frozen TensorFlow graph; those that are `listed` as lists of numbers, not as bytes."""
    from tensorboardX.proto.graph_pb2 import GraphDef

    graph = GraphDef()
    graph.node.add(name="DecodeJpeg/contents", op="Placeholder")

    def add(name, value):
        node = graph.node.add(name=name, op="Const")
        node.attr["dtype"].type = 1
        tensor = node.attr["value"].tensor
        tensor.dtype = 1
        for n in value.shape:
            tensor.tensor_shape.dim.add(size=n)
        if name in listed:
            tensor.float_val.extend(value.reshape(-1).tolist())
        else:
            tensor.tensor_content = np.ascontiguousarray(value, "<f4").tobytes()

    for name, layer in LAYERS.items():
        scope = layer.tensorflow
        add(f"{scope}/conv2d_params", tensors[f"{name}.conv.weight"].transpose(2, 3, 1, 0))
        for theirs, ours in (
            ("gamma", "weight"),
            ("beta", "bias"),
            ("moving_mean", "running_mean"),
            ("moving_variance", "running_var"),
        ):
            add(f"{scope}/batchnorm/{theirs}", tensors[f"{name}.bn.{ours}"])
    add("softmax/weights", tensors["fc.weight"].T)
    add("softmax/biases", tensors["fc.bias"])
    path.write_bytes(graph.SerializeToString())
    return path
