"""The Inception-v3 of 2015 against torch-fidelity's, block by block; TensorFlow 1's resize; readers of its weights."""

import jax
import numpy as np
import pytest
from absl import logging

from deco_jax.encoders.inception import model, weights
from deco_jax.encoders.inception.resize import resize_like_tensorflow
from deco_jax.errors import UsageError
from tests.encoders.inception_reference import random_tensors, recorded, their_network, torch_fidelity, write_graph
from tests.helpers import relative_error

TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def graph(tmp_path_factory):
    """A frozen graph with random weights, of which two tensors are lists of numbers."""
    listed = ("conv/conv2d_params", "mixed_10/tower_2/conv/batchnorm/gamma")
    return write_graph(tmp_path_factory.mktemp("inception") / "random.pb", random_tensors(), listed)


@pytest.fixture(scope="module")
def params(graph):
    return weights.read_inception(graph)


@pytest.fixture(scope="module")
def torch_file(tmp_path_factory):
    torch = pytest.importorskip("torch")
    path = tmp_path_factory.mktemp("inception") / weights.TORCH
    torch.save({name: torch.tensor(value) for name, value in random_tensors().items()}, path)
    return path


def random_images(height, width, number=1):
    return np.random.default_rng(height).integers(0, 256, (number, height, width, 3), dtype=np.uint8)


def test_every_block_is_that_of_torch_fidelity(params, torch_file):
    """And what the metrics take: their '768' is a pooled Mixed_6e, and not what sFID is defined by."""
    torch = pytest.importorskip("torch")
    theirs, images = their_network(torch_file), random_images(32, 48)
    with torch.no_grad(), recorded(theirs) as outputs:
        _, _, mixed_6e, pool, logits, _ = (out.numpy() for out in theirs(torch.tensor(images.transpose(0, 3, 1, 2))))

    @jax.jit
    def ours(params, images):
        x = (resize_like_tensorflow(images, 299, 299) - 128) / 128
        return model.activations(params, x), model.features(params, images)

    seen, features = ours(params, images)
    assert set(seen) == {*model.STEM, *model.BLOCKS, "Mixed_6d.branch1x1"}
    errors = {name: relative_error(value, outputs[name]) for name, value in seen.items()}
    print(", ".join(f"{name} {error:.1e}" for name, error in errors.items()))
    assert max(errors.values()) < TOLERANCE, errors

    assert {name: value.shape for name, value in features.items()} == {n: (1, size) for n, size in model.SIZES.items()}
    assert relative_error(features["pool"], pool) < TOLERANCE
    assert relative_error(features["logits"], logits) < TOLERANCE, "logits have no bias"
    spatial = outputs["Mixed_6d.branch1x1"][..., :7].reshape(1, -1)
    assert relative_error(features["spatial"], spatial) < TOLERANCE
    assert mixed_6e.shape == (1, 768) and outputs["Mixed_6e.branch1x1"].shape == (1, 17, 17, 192)
    assert relative_error(features["spatial"], outputs["Mixed_6e.branch1x1"][..., :7].reshape(1, -1)) > 0.1


def by_definition(image_HxWx3, new_height, new_width):
    """Bilinear in float64, at places that TensorFlow rounds to fp32."""
    image, axes = np.float64(image_HxWx3), []
    for size, new_size in zip(image.shape[:2], (new_height, new_width), strict=True):
        places = np.float32(size / new_size) * np.arange(new_size, dtype=np.float32)
        low = places.astype(int)
        axes.append((low, np.minimum(low + 1, size - 1), np.float64(places - low)))
    (top, bottom, down), (left, right, across) = axes
    down, across = down[:, None, None], across[None, :, None]
    upper = image[top][:, left] * (1 - across) + image[top][:, right] * across
    lower = image[bottom][:, left] * (1 - across) + image[bottom][:, right] * across
    return upper * (1 - down) + lower * down


@pytest.mark.parametrize(
    "size", [(28, 28), (32, 32), (256, 256), (299, 299), (512, 512), (64, 299), (300, 128), (1, 1)]
)
def test_resizing_is_that_of_tensorflow_1(size):
    images = random_images(*size, number=2)
    ours = np.asarray(resize_like_tensorflow(images, 299, 299))
    expected = np.stack([by_definition(image, 299, 299) for image in images])
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-4)
    np.testing.assert_array_equal(ours[:, 0, 0], images[:, 0, 0])  # no half-pixel centres

    theirs = torch_fidelity("interpolate_compat_tensorflow").interpolate_bilinear_2d_like_tensorflow1x
    torch = pytest.importorskip("torch")
    pixels = torch.tensor(images.transpose(0, 3, 1, 2)).float()
    theirs = theirs(pixels, size=(299, 299), align_corners=False).numpy().transpose(0, 2, 3, 1)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=5e-5)


def test_pytorchs_copy_and_the_graph_are_the_same_parameters(params, torch_file, monkeypatch):
    """A file that is not the published one is read, with a warning that names its hash."""
    warnings = []
    monkeypatch.setattr(logging, "warning", lambda message, *values: warnings.append(message % values))
    theirs = weights.read_inception(torch_file)
    jax.tree.map(np.testing.assert_array_equal, theirs, params)
    assert len(warnings) == 1 and weights.TORCH_SHA256 in warnings[0]
    # torchvision's without its auxiliary branch has 23,834,568: two per channel of a norm, and 1000 classes with bias.
    kernels = sum(layer["kernel"].size for name, layer in params.items() if name != "fc")
    assert kernels == 23_834_568 - 2 * 17_216 - 2049 * 1000


def test_batch_norms_are_folded_exactly(params):
    tensors, name = random_tensors(), "Mixed_7b.branch3x3_2a"
    _, scale, shift, mean, variance = (np.float64(tensors[tensor]) for tensor in weights._in_torch(name))
    np.testing.assert_allclose(params[name]["bias"], shift - mean * scale / np.sqrt(variance + 1e-3), rtol=1e-6)


def test_constants_of_a_graph_may_repeat_their_last_number(tmp_path):
    """As TensorFlow writes a tensor of equal numbers."""
    tensors = random_tensors() | {"Conv2d_1a_3x3.bn.weight": np.ones(32, np.float32)}
    path = write_graph(tmp_path / "ones.pb", tensors)
    from tensorboardX.proto.graph_pb2 import GraphDef

    graph = GraphDef.FromString(path.read_bytes())
    node = next(node for node in graph.node if node.name == "conv/batchnorm/gamma")
    node.attr["value"].tensor.tensor_content = b""
    node.attr["value"].tensor.float_val.append(1.0)
    path.write_bytes(graph.SerializeToString())
    np.testing.assert_array_equal(weights.graph_constants(path)["conv/batchnorm/gamma"], np.ones(32))


def write(path, content):
    path.write_bytes(content)
    return path


def torchvision_like(path):
    """torchvision's Inception has the same layers and 1000 classes."""
    return write_graph(path, random_tensors() | {"fc.weight": np.zeros((1000, 2048), np.float32)})


def with_nans(path):
    return write_graph(path, random_tensors() | {"Mixed_6d.branch1x1.bn.weight": np.full(192, np.nan, np.float32)})


@pytest.mark.parametrize(
    "damaged, message",
    [
        (lambda path, graph: write(path, graph.read_bytes()[:-1000]), "no TensorFlow graph, or a truncated one"),
        (lambda path, graph: write(path, b""), "the file is empty"),
        (lambda path, graph: write(path, b"hello, world"), "no TensorFlow graph|missing conv/conv2d_params"),
        (lambda path, graph: torchvision_like(path), r"softmax/weights has shape \(2048, 1000\), not \(2048, 1008\)"),
        (lambda path, graph: with_nans(path), r"NaN .*: mixed_6/conv/batchnorm/gamma \(192 numbers\)"),
    ],
)
def test_damage_is_named(tmp_path, graph, damaged, message):
    path = damaged(tmp_path / "damaged.pb", graph)
    with pytest.raises(UsageError, match=message) as error:
        weights.read_inception(path)
    assert "damaged.pb" in str(error.value)


def test_another_network_in_pytorchs_file_is_refused(tmp_path):
    safetensors = pytest.importorskip("safetensors.numpy")
    safetensors.save_file({"fc.weight": np.zeros((1000, 2048), np.float32)}, tmp_path / "other.safetensors")
    with pytest.raises(UsageError, match=r"no Inception-v3 of 2015: missing Conv2d_1a_3x3.conv.weight \(32, 3, 3, 3\)"):
        weights.read_inception(tmp_path / "other.safetensors")


def test_files_are_looked_up_by_their_published_names(tmp_path):
    with pytest.raises(UsageError) as error:
        weights.find_inception("", str(tmp_path))
    for part in (str(tmp_path), weights.TORCH, weights.GRAPH, weights.TORCH_SHA256, "https://"):
        assert part in str(error.value)
    for name in reversed(weights.FILES):
        (tmp_path / name).touch()
        assert weights.find_inception("", str(tmp_path)) == tmp_path / name
    assert weights.find_inception(weights.TORCH, str(tmp_path)) == tmp_path / weights.TORCH
    assert weights.find_inception(str(tmp_path / weights.GRAPH), "nowhere") == tmp_path / weights.GRAPH
    with pytest.raises(UsageError, match="inception='gone.pth' is no file here"):
        weights.find_inception("gone.pth", str(tmp_path))
