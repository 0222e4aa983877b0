"""The teacher of a run: found, checked, the same whatever its file, and part of the training step."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from huggingface_hub import constants, hf_api
from safetensors.numpy import save, save_file

from deco_jax import storage
from deco_jax.config import check_config, default_config
from deco_jax.encoders.dinov2 import model as dinov2
from deco_jax.encoders.dinov2.model import DINOv2
from deco_jax.encoders.dinov2.weights import from_tensors
from deco_jax.encoders.teacher import default_teacher, find_weights, load_teacher, teacher_of
from deco_jax.errors import TransientError, UsageError
from deco_jax.models.flops import forward_flops
from deco_jax.parallel import mesh as meshes
from deco_jax.storage import fetch
from deco_jax.training.step import make_train_step, step_flops
from tests.encoders import hugging_face
from tests.helpers import random_dinov2, relative_error

WIDTH = 64  # one head


@pytest.fixture
def aligned(tiny_config, tmp_path):
    """A tiny run of patches of 16 pixels with a teacher, fp32."""
    save_file(random_dinov2(), tmp_path / "teacher.safetensors")
    c = tiny_config
    c.model.update(patch_size=16, depth=1)
    c.data.image_size = 32
    c.loss.update(alignment_weight=0.5, alignment_layer=1, alignment_features=WIDTH)
    c.teacher.weights = str(tmp_path / "teacher.safetensors")
    check_config(c)
    return c


@pytest.mark.slow
def test_a_step_with_the_live_teacher_is_one_with_its_features(aligned):
    """Features by hand: the module on images in [0, 1], outside the step. Two accumulation parts against none."""
    teacher = load_teacher(aligned)
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (4, 32, 32, 3), np.uint8)
    batch = {"image": image, "label": np.arange(4, dtype=np.int32)}
    model, weights = from_tensors(random_dinov2())
    features = model.clone(dtype=jnp.float32).apply({"params": weights}, image.astype(np.float32) / 255)
    assert features.shape == (4, 4, WIDTH)

    stored = make_train_step(aligned)
    shapes = jax.eval_shape(lambda: nn.meta.unbox(stored.initial_state()))
    state = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
    params = jax.tree.map(lambda x: rng.normal(0, 0.1, x.shape).astype(np.float32), shapes.params)
    state = state.replace(params=params, ema=params["network"])
    expected_state, expected = jax.jit(stored)(state, batch | {"features": np.asarray(features)})
    aligned.optimizer.accumulation = 2
    live = make_train_step(aligned, [teacher.network])
    new_state, metrics = jax.jit(live)(state, batch, {"teacher": teacher.params})
    for name in ("loss", "loss_alignment", "gradient_norm"):
        assert relative_error(metrics[name], expected[name]) < 2e-6, name
    for a, b in zip(*(jax.tree.leaves(s.opt_state[0].mu) for s in (new_state, expected_state)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6 + 1e-5 * float(np.abs(b).max()))
    assert float(metrics["loss_alignment"]) > 0.1


def test_no_gradient_reaches_the_teacher(aligned):
    teacher = load_teacher(aligned)

    def total(params, image):
        return teacher.network(params, {"image": image})["features"].sum()

    gradients = jax.grad(total, (0, 1))(teacher.params, jnp.ones((1, 32, 32, 3)))
    assert all(not np.any(g) for g in jax.tree.leaves(gradients))


def test_its_linear_layers_are_kept_in_bfloat16_and_compute_the_same(aligned):
    """The module casts kernels anyway; positions, norms and factors stay fp32."""
    aligned.model.dtype = "bfloat16"
    teacher = load_teacher(aligned)
    kernel, positions = teacher.params["blocks"]["mlp"]["in"]["kernel"], teacher.params["positions"]
    assert (kernel.dtype, positions.dtype) == (jnp.bfloat16, np.float32)
    image = np.random.default_rng(0).uniform(-1, 1, (2, 32, 32, 3)).astype(np.float32)
    _, fp32 = from_tensors(random_dinov2())
    ours, exact = (teacher.network(params, {"image": image})["features"] for params in (teacher.params, fp32))
    np.testing.assert_array_equal(ours, exact)
    placed = teacher.place(meshes.make_layout(default_config().mesh))
    assert placed["blocks"]["mlp"]["in"]["kernel"].dtype == jnp.bfloat16


def test_the_digest_is_of_the_weights_not_of_the_file(aligned, tmp_path):
    torch = pytest.importorskip("torch")
    first = load_teacher(aligned).digest
    torch.save({name: torch.tensor(value) for name, value in random_dinov2().items()}, tmp_path / "teacher.pth")
    aligned.teacher.weights = str(tmp_path / "teacher.pth")
    assert load_teacher(aligned).digest == first
    save_file(random_dinov2(seed=1), tmp_path / "other.safetensors")
    aligned.teacher.weights = str(tmp_path / "other.safetensors")
    assert load_teacher(aligned).digest != first


def test_names_are_looked_up_in_the_cache(aligned, tmp_path):
    (tmp_path / "cache" / "facebook").mkdir(parents=True)
    for name in ("mine.pth", "facebook/dinov2-base"):
        (tmp_path / "cache" / name).touch()
        assert find_weights(name, str(tmp_path / "cache")) == tmp_path / "cache" / name
    assert find_weights(aligned.teacher.weights, "nowhere").samefile(aligned.teacher.weights)


@pytest.mark.parametrize("name", ["dinov2_vitb14_pretrain.pth", "gone/dinov2.pth", ""])
def test_absence_says_where_to_get_it_and_how_to_do_without(tmp_path, name):
    with pytest.raises(UsageError) as error:
        find_weights(name, str(tmp_path))
    for part in (
        f"teacher.weights={name!r}",
        f"teacher.cache={tmp_path}",
        "Apache-2.0",
        "https://",
        "alignment_weight=0",
    ):
        assert part in str(error.value)


@pytest.fixture
def hub(monkeypatch):
    """Hugging Face on this machine, for this process and those it starts."""
    with hugging_face.serve({"config.json": b"{}", "model.safetensors": save(random_dinov2())}) as hub:
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, hub.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(hf_api.api, "endpoint", hub.url)
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        yield hub


def test_a_download_is_tried_again_and_checked(hub, tmp_path):
    """Two answers of 503, then weights with one bit turned; what is in the cache is whole, and asked for once."""
    hub.fails, hub.damaged = 2, 1
    found = find_weights(hugging_face.NAME, str(tmp_path))
    assert {path.name: path.read_bytes() for path in found.iterdir()} == hub.files
    asked = dict(hub.asked)
    assert asked["GET model.safetensors"] == 2
    assert find_weights(hugging_face.NAME, str(tmp_path)) == found and hub.asked == asked


@pytest.mark.parametrize("status, error", [(503, TransientError), (401, UsageError), (404, UsageError)])
def test_a_download_that_fails_leaves_nothing(hub, tmp_path, monkeypatch, status, error):
    """Tried again by who started the run, where that may help; a wrong name is bad input."""
    monkeypatch.setenv("DECO_RETRY_SECONDS", "0.3")
    hub.fails, hub.status = 10**6, status
    with pytest.raises(error, match=r"teacher.weights='facebook/dinov2-base' is .* Hugging Face .*; or train without"):
        find_weights(hugging_face.NAME, str(tmp_path))
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.slow
def test_processes_that_start_together_download_once(hub, tmp_path):
    """Eight, on one machine."""
    arguments = f"{hugging_face.NAME!r}, {str(tmp_path)!r}"
    code = f"from deco_jax.encoders.teacher import find_weights; print(find_weights({arguments}))"
    command = [sys.executable, "-c", code]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(8)]
    outputs = {process.communicate(timeout=120)[0].strip() for process in started}
    assert outputs == {str(tmp_path / hugging_face.NAME)}
    assert hub.asked["GET model.safetensors"] == 1


def test_weights_may_be_in_a_bucket(bucket, tmp_path, monkeypatch, aligned):
    """Named there, or in a cache there, to which the first machine brings them."""
    monkeypatch.setattr(fetch, "CACHE", str(tmp_path / "copies"))
    teacher = load_teacher(aligned)
    folder = storage.to_path(f"{bucket.url}/teachers")
    (folder / "facebook/dinov2-small/model.safetensors").write_bytes(save(random_dinov2()))
    for weights, cache in ((f"{folder}/facebook/dinov2-small", "nowhere"), ("facebook/dinov2-small", str(folder))):
        aligned.teacher.update(weights=weights, cache=cache)
        assert load_teacher(aligned).digest == teacher.digest
    with pytest.raises(UsageError, match="teacher.weights='gs://bucket/teachers/none' is no file or folder"):
        find_weights(f"{folder}/none", "nowhere")


def test_what_is_downloaded_goes_into_a_cache_in_a_bucket(bucket, hub, tmp_path, monkeypatch):
    monkeypatch.setattr(fetch, "CACHE", str(tmp_path / "copies"))
    cache = storage.to_path(f"{bucket.url}/cache")
    found = find_weights(hugging_face.NAME, str(cache))
    assert {path.name: path.read_bytes() for path in found.iterdir()} == hub.files
    assert (cache / hugging_face.NAME / "config.json").exists()


def test_a_teacher_of_another_size_is_refused(aligned, tmp_path):
    save_file(random_dinov2(width=128), tmp_path / "wide.safetensors")
    aligned.teacher.weights = str(tmp_path / "wide.safetensors")
    with pytest.raises(UsageError, match="has features of 128 channels, and loss.alignment_features=64"):
        load_teacher(aligned)


@pytest.mark.parametrize(
    "part, changes, message",
    [
        (
            "data",
            {"image_size": 40},
            "data.image_size=40 is not divisible by 16, as the teacher needs; nearest: 32 and 48",
        ),
        ("model", {"patch_size": 8}, "model.patch_size=8 gives 4×4 tokens, and the teacher 2×2 features"),
        ("loss", {"alignment_layer": 2}, "loss.alignment_layer=2 does not exist; model.depth=1"),
        ("loss", {"alignment_layer": 0}, "loss.alignment_layer=0 does not exist"),
        ("loss", {"alignment_features": 0}, "loss.alignment_features=0 must be 1 or more"),
    ],
)
def test_what_cannot_be_aligned_is_named(aligned, part, changes, message):
    aligned[part].update(changes)
    with pytest.raises(UsageError) as error:
        check_config(aligned)
    assert message in str(error.value)


def test_planning_takes_the_published_network_of_that_width(aligned):
    aligned.loss.alignment_features = 768
    assert default_teacher(aligned).module.depth == 12
    aligned.loss.alignment_features = 64
    with pytest.raises(UsageError, match=r"alignment_features=64 is no width of a published DINOv2; .* 768 \(base\)"):
        default_teacher(aligned)


def test_flops_of_the_teacher_and_of_a_step(aligned):
    """46e9 per image at 256² for ViT-B/14, as published figures say, and XLA's own count of a small one."""
    base = DINOv2(**dinov2.SIZES["base"])
    assert dinov2.forward_flops(base, 256, 256) == pytest.approx(46e9, rel=0.02)
    image, counted = np.zeros((1, 64, 96, 3), np.float32), []
    for depth in (1, 2):  # the difference is a block: resizing the image is not counted
        small, params = from_tensors(random_dinov2(width=192, depth=depth))
        small = small.clone(dtype=jnp.float32, scan=False)
        counted.append(jax.jit(small.apply).lower({"params": params}, image).compile().cost_analysis()["flops"])
    ours = dinov2.forward_flops(small, 64, 96) - dinov2.forward_flops(small.clone(depth=1), 64, 96)
    assert ours == pytest.approx(counted[1] - counted[0], rel=0.1)
    train_step = make_train_step(aligned, [teacher_of(small, aligned)])
    expected = 3 * forward_flops(train_step.network, 32, 32) + dinov2.forward_flops(small, 32, 32)
    assert step_flops(train_step, 32) == expected
