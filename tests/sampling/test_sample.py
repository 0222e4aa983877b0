"""Euler trajectories, guidance and its interval against the recorded ones; what the sampler refuses."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import deco_jax
from deco_jax.errors import UsageError
from deco_jax.sampling.sample import image_noise
from deco_jax.sampling.solvers import euler, guided_steps, time_grid
from tests.helpers import Golden, relative_error

EULER = ["euler_50", "euler_100_cfg3.2_interval", "euler_20_shift3", "euler_10_laststep"]


def field(x, t, y):
    """The velocity field of the recorded runs (channels first or last: it acts element by element)."""
    return jnp.sin(3 * x + y[:, None, None, None]) - x * t[:, None, None, None]


@pytest.mark.parametrize("case", EULER)
def test_trajectories_equal_the_recorded_ones(case):
    g = Golden("samplers")
    config, trajectory = json.loads(str(g[f"{case}:config"])), g[f"{case}:trajectory"]
    times = time_grid(config["num_steps"], config.get("timeshift", 1.0), config.get("last_step"))
    np.testing.assert_allclose(times, g[f"{case}:timesteps"], atol=1e-6)
    interval = (config.get("guidance_interval_min", 0.0), config.get("guidance_interval_max", 1.0))
    # A prefix of the grid ends at that state of the trajectory.
    for k in (1, 2, len(times) // 2, len(times) - 1):
        x = euler(
            field,
            g[f"{case}:noise"],
            jnp.array([1, 2]),
            jnp.array([5, 5]),
            times[: k + 1],
            config["guidance"],
            interval,
        )
        assert relative_error(x, trajectory[k]) < 2e-5, f"state {k}"


def test_sampling_the_recorded_network():
    g, network = Golden("sample_deco_c2i"), Golden("deco_c2i")
    images = deco_jax.sample(
        network.model(),
        network.params(),
        g["condition"],
        noise=g.image("noise"),
        steps=g.config["num_steps"],
        guidance=g.config["guidance"],
        guidance_interval=(g.config["guidance_interval_min"], g.config["guidance_interval_max"]),
    )
    assert relative_error(images, g.image("samples")) < 2e-5


def test_guidance_interval_is_open_below_and_closed_above():
    times = time_grid(10)
    np.testing.assert_array_equal(np.flatnonzero(guided_steps(times, 2.0, (0.0, 1.0))), range(1, 10))
    np.testing.assert_array_equal(np.flatnonzero(guided_steps(times, 2.0, (0.2, 0.5))), [3, 4, 5])
    assert not guided_steps(times, 1.0, (0.0, 1.0)).any()


def test_an_image_depends_on_its_key_and_number_alone():
    key = jax.random.key(3)
    eight = image_noise(key, jnp.arange(8), (4, 4, 3))
    np.testing.assert_array_equal(image_noise(key, jnp.array([5, 2]), (4, 4, 3)), eight[jnp.array([5, 2])])
    assert len(np.unique(eight)) == eight.size


@pytest.mark.parametrize(
    "change, message",
    [
        ({"labels": [3, 10, 11]}, "labels 10, 11 do not exist; the network has the classes 0 to 9"),
        ({"labels": [-1]}, "labels -1 do not exist"),
        ({"labels": [0.5]}, "labels 0.5 do not exist"),
        ({"guidance": float("nan")}, "guidance=nan must be a finite number"),
        ({"steps": 0}, "steps=0 must be at least 1"),
        ({"shift": 0.0}, "shift=0.0 must be positive"),
        ({"guidance_interval": (0.5, 0.1)}, r"guidance_interval=\(0.5, 0.1\)"),
        ({"solver": "magic"}, "solver='magic' is not known; allowed: euler"),
        ({"image_size": None}, "needs noise=…, or key=… together with image_size"),
        ({"noise": np.zeros((2, 8, 8, 3))}, r"noise has shape \(2, 8, 8, 3\); 1 labels need \(1, H, W, 3\)"),
        ({"image_size": 20}, "height=20 is not divisible by model.patch_size=8"),
    ],
)
def test_bad_arguments_are_named(change, message):
    g = Golden("deco_c2i")
    arguments = {"labels": [1], "key": jax.random.key(0), "image_size": 8, "steps": 1} | change
    with pytest.raises(UsageError, match=message):
        deco_jax.sample(g.model(), g.params(), arguments.pop("labels"), arguments.pop("key"), **arguments)
