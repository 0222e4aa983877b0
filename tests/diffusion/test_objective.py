"""The loss of networks that predict velocities and of those that predict images, against the formulas in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deco_jax.diffusion.flow import Draws, velocity_to
from deco_jax.diffusion.objective import Objective
from tests.helpers import relative_error

TIMES = np.array([0.0, 0.3, 0.95, 0.96, 0.999, 1.0], np.float32)  # beyond 0.95, 1 − t counts as 0.05


def new_objective(prediction, **weights):
    off = {"frequency_weight": 0.0, "alignment_weight": 0.0}
    fixed = {"frequency_quality": 85, "frequency_mode": "inv_gamma", "frequency_gamma": 1.0, "alignment_layer": 1}
    return Objective(**off | fixed | weights, prediction=prediction)


@pytest.fixture(scope="module")
def arrays():
    """(images, noise, x̂): what is shown, its noise, and what a network might take the image for."""
    rng = np.random.default_rng(0)
    return [rng.normal(size=(len(TIMES), 8, 8, 3)).astype(np.float32) for _ in range(3)]


def no_drop(times, noise):
    return Draws(times, noise, np.zeros(len(times), bool))


def written_out(image, x, t):
    """(image − x_t)/max(1 − t, 0.05), in float64, one example at a time."""
    return np.stack([(a.astype(float) - b) / max(1 - float(s), 0.05) for a, b, s in zip(image, x, t, strict=True)])


def test_the_velocity_to_an_image_is_the_formula(arrays):
    image, noise, _ = arrays
    x = np.float32([t * a + (1 - t) * b for t, a, b in zip(TIMES, image, noise, strict=True)])
    v = velocity_to(image, x, TIMES)
    assert v.dtype == jnp.float32 and relative_error(v, written_out(image, x, TIMES)) < 1e-5
    assert relative_error(v[:3], (image - noise)[:3]) < 1e-5, "up to 0.95 it is the velocity of the path"
    assert relative_error(v[3], 0.04 / 0.05 * (image - noise)[3]) < 1e-5, "beyond, a part of it"
    half = velocity_to(jnp.asarray(image, jnp.bfloat16), jnp.asarray(x), jnp.asarray(TIMES))
    assert half.dtype == jnp.float32, "bfloat16 would lose what dividing by 0.05 makes large"


@pytest.mark.parametrize("prediction", ["velocity", "image"])
def test_the_flow_loss_is_the_formula(arrays, prediction):
    """Of a network made by hand, which knows what it should say: x̂, or the velocity that is as far off."""
    image, noise, guess = arrays
    seen = {}

    def network(x, t, labels):
        seen.update(x=x, t=t, labels=labels)
        return velocity_to(guess, x, t) if prediction == "image" else guess - noise

    loss, terms = new_objective(prediction)(network, None, image, np.arange(6), no_drop(TIMES, noise), None)
    scale = np.maximum(1 - TIMES.astype(float), 0.05) if prediction == "image" else np.ones(6)
    expected = np.mean(((guess.astype(float) - image) / scale[:, None, None, None]) ** 2)
    assert abs(float(loss) / expected - 1) < 1e-5 and terms.keys() == {"loss", "loss_flow"}
    np.testing.assert_array_equal(seen["labels"], np.arange(6))
    np.testing.assert_allclose(seen["x"][2], 0.95 * image[2] + 0.05 * noise[2], atol=1e-6)


def test_a_perfect_network_has_no_loss(arrays):
    """Beyond t = 0.95 as well, where the velocity to the image is not image − noise."""
    image, noise, _ = arrays
    objective = new_objective("image", frequency_weight=1.0)
    loss, _ = objective(
        lambda x, t, _: velocity_to(image, x, t), None, image, np.arange(6), no_drop(TIMES, noise), None
    )
    assert float(loss) == 0
    wrong, _ = objective(lambda *_: image - noise, None, image, np.arange(6), no_drop(TIMES, noise), None)
    assert float(wrong) > 0.01


@pytest.mark.parametrize("t", [0.25, 0.98])
def test_every_term_sees_the_same_error(arrays, t):
    """At one time the losses of an image are those of a velocity that is as far off, over max(1 − t, 0.05)²."""
    image, noise, guess = arrays
    draws, labels = no_drop(np.full(6, t, np.float32), noise), np.arange(6)
    _, ours = new_objective("image", frequency_weight=1.0)(
        lambda x, t, _: velocity_to(guess, x, t), None, image, labels, draws, None
    )
    _, theirs = new_objective("velocity", frequency_weight=1.0)(
        lambda *_: guess - noise, None, image, labels, draws, None
    )
    assert ours.keys() == theirs.keys() == {"loss", "loss_flow", "loss_frequency"}
    for name in ours:
        np.testing.assert_allclose(ours[name], theirs[name] / max(1 - t, 0.05) ** 2, rtol=1e-4)


def test_the_gradient_is_the_formula(arrays):
    """∂L/∂x̂ = 2(x̂ − x)/max(1 − t, 0.05)² over the number of values."""
    image, noise, guess = arrays
    draws = no_drop(TIMES, noise)

    def loss(guess):
        return new_objective("image")(lambda x, t, _: velocity_to(guess, x, t), None, image, np.arange(6), draws, None)[
            0
        ]

    scale = np.maximum(1 - TIMES.astype(float), 0.05)[:, None, None, None]
    expected = 2 * (guess.astype(float) - image) / scale**2 / guess.size
    np.testing.assert_allclose(jax.grad(loss)(guess), expected, rtol=1e-4, atol=1e-7)
