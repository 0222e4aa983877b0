"""Networks that predict the image: what they return is the velocity to it, for every kind, solver and loss alike."""

import jax
import numpy as np
import pytest
from flax import linen as nn

import deco_jax
from deco_jax.config import build_model, default_config
from deco_jax.diffusion.flow import Draws
from deco_jax.errors import UsageError
from deco_jax.training.step import make_train_step
from tests.helpers import Golden, relative_error

CASES = {"deco": "deco_c2i", "baseline": "baseline_dit", "pixnerd": "pixnerd"}


def new_config(kind, prediction):
    config = default_config()
    config.model.update(
        kind=kind,
        prediction=prediction,
        num_classes=10,
        patch_size=4,
        width=16,
        depth=1,
        heads=2,
        decoder_width=8,
        decoder_depth=1,
        dtype="float32",
        remat="none",
    )
    config.loss.frequency_weight = 0.0
    return config


def painter(model):
    """Parameters with which the last layer puts out one image, whatever it is shown: (parameters, image 8×8)."""
    inputs = np.zeros((1, 8, 8, 3), np.float32), np.zeros(1, np.float32), np.zeros(1, np.int32)
    shapes = nn.meta.unbox(jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"])
    params = jax.tree.map(lambda a: np.zeros(a.shape, np.float32), shapes)
    last = params["out"] if "out" in params else params["decoder"]["out"]
    last["bias"] = np.random.default_rng(0).uniform(-1, 1, last["bias"].shape).astype(np.float32)
    patch_Cx4x4 = np.broadcast_to(last["bias"].reshape(3, -1), (3, 16)).reshape(3, 4, 4)  # the baseline's, or a colour
    return params, np.tile(np.moveaxis(patch_Cx4x4, 0, -1), (2, 2, 1))


@pytest.mark.parametrize("kind", CASES)
def test_the_output_is_the_velocity_to_the_recorded_one(kind):
    """The recorded network's output taken for an image, at its own times and at some beyond 0.95."""
    g = Golden(CASES[kind])
    layer, arguments = g.config["align_layer"], (g.image("x"), g["t"], g["y"].astype(np.int32))
    v, tokens = g.model(prediction="image").apply({"params": g.params()}, *arguments, hidden_layer=layer)
    scale = np.maximum(1 - g["t"].astype(float), 0.05)[:, None, None, None]
    assert v.dtype == np.float32
    assert relative_error(v, (g.image("out").astype(float) - g.image("x")) / scale) < 2e-5
    assert relative_error(tokens, g[f"hidden_after_block{layer}"]) < 2e-5, "only what is returned is another"
    late = g.image("x"), np.full_like(g["t"], 0.98), arguments[2]
    raw, v = (g.model(prediction=p).apply({"params": g.params()}, *late) for p in ("velocity", "image"))
    assert relative_error(v, (np.asarray(raw, float) - g.image("x")) / 0.05) < 1e-5


@pytest.mark.parametrize("kind", CASES)
def test_a_network_that_knows_the_image_is_sampled_into_it(kind):
    """Guards against the bug of following x̂ as if it were a velocity; guidance changes nothing where both agree."""
    model = build_model(new_config(kind, "image").model)
    params, image = painter(model)
    noise = np.random.default_rng(1).normal(size=(2, 8, 8, 3)).astype(np.float32)
    images = deco_jax.sample(model, params, [0, "null"], noise=noise, steps=10, guidance=2.0)
    np.testing.assert_allclose(images, np.stack([image, image]), atol=1e-5)
    followed = deco_jax.sample(model.clone(prediction="velocity"), params, [0, "null"], noise=noise, steps=10)
    np.testing.assert_allclose(followed, noise + image, atol=1e-5)


def test_many_steps_stop_short_by_what_the_limit_leaves():
    """Euler-50 written out in float64: beyond t = 0.95 a step goes 0.02/0.05 of the way, so 1.4 % of the noise stay."""
    model = build_model(new_config("baseline", "image").model)
    params, image = painter(model)
    noise = np.random.default_rng(1).normal(size=(1, 8, 8, 3)).astype(np.float32)
    x = noise.astype(float)
    for k in range(50):
        x += 0.02 * (image - x) / max(1 - k / 50, 0.05)
    images = deco_jax.sample(model, params, [3], noise=noise, steps=50)
    np.testing.assert_allclose(images, x, atol=1e-5)
    np.testing.assert_allclose(images - image, 0.0144 * (noise - image), atol=1e-5)


@pytest.mark.parametrize("kind", ["baseline", "deco"])
def test_training_learns_the_image(kind):
    """The loss of a run's own step and its gradient by the last bias, against the formula."""
    train_step = make_train_step(new_config(kind, "image"))
    params, painted = painter(train_step.network)
    rng = np.random.default_rng(2)
    images, noise = (rng.uniform(-1, 1, (4, 8, 8, 3)).astype(np.float32) for _ in range(2))
    t = np.array([0.1, 0.7, 0.94, 0.99], np.float32)
    draws = Draws(t, noise, np.zeros(4, bool))

    def loss(params):
        return train_step.loss({"network": params}, {"image": images, "label": np.arange(4)}, draws)[0]

    value, gradients = jax.jit(jax.value_and_grad(loss))(params)
    scale = np.maximum(1 - t.astype(float), 0.05)[:, None, None, None]
    np.testing.assert_allclose(value, np.mean(((painted - images) / scale) ** 2), rtol=1e-4)
    by_pixel = 2 * (painted - images) / scale**2 / images.size
    by_patch = by_pixel.reshape(4, 2, 4, 2, 4, 3).sum((0, 1, 3))  # (4, 4, 3)
    expected = np.moveaxis(by_patch, -1, 0).reshape(3, 16) if kind == "baseline" else by_patch.sum((0, 1))
    last = gradients["out"] if kind == "baseline" else gradients["decoder"]["out"]
    np.testing.assert_allclose(last["bias"], expected, rtol=1e-3, atol=1e-5)


def test_an_unknown_prediction_is_named():
    with pytest.raises(UsageError, match="model.prediction='noise' is not known; allowed: velocity, image"):
        build_model(new_config("deco", "noise").model)
