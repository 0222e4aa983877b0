"""`deco_jax.sample` on the recorded network; what an image depends on; what the sampler refuses."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import deco_jax
from deco_jax.errors import UsageError
from deco_jax.sampling.sample import image_keys, image_noise
from deco_jax.sampling.settings import Sampling, check_image_size, parse_image_size
from tests.helpers import Golden, relative_error


def recorded_settings(config):
    return {
        "steps": config["num_steps"],
        "guidance": config["guidance"],
        "guidance_interval": (config["guidance_interval_min"], config["guidance_interval_max"]),
    }


def test_sampling_the_recorded_network():
    g, network = Golden("sample_deco_c2i"), Golden("deco_c2i")
    model, params, labels, noise = network.model(), network.params(), g["condition"], g.image("noise")
    settings = recorded_settings(g.config)
    images = deco_jax.sample(model, params, labels, noise=noise, **settings)
    assert relative_error(images, g.image("samples")) < 2e-5
    same = deco_jax.sample(model, params, labels, noise=noise, settings=Sampling(**settings))
    np.testing.assert_array_equal(images, same)
    same = deco_jax.sample(model, params, labels, noise=noise, negative=g["null_condition"], **settings)
    np.testing.assert_array_equal(images, same)


def test_sampling_the_recorded_network_as_on_a_gpu(monkeypatch):
    """There the blocks are not a loop."""
    monkeypatch.setattr(importlib.import_module("deco_jax.sampling.sample"), "platform", lambda: "gpu")
    g, network = Golden("sample_deco_c2i"), Golden("deco_c2i")
    model, params, labels, noise = network.model(scan=True), network.params(), g["condition"], g.image("noise")
    settings = recorded_settings(g.config)
    images = deco_jax.sample(model, params, labels, noise=noise, **settings)
    assert relative_error(images, g.image("samples")) < 2e-5


@pytest.mark.slow
def test_guidance_leads_away_from_the_negative_condition():
    """From the null class unless another is given; from the class itself, it changes nothing."""
    g = Golden("deco_c2i")
    model, params, key = g.model(), g.params(), jax.random.key(0)

    def draw(**settings):
        return deco_jax.sample(model, params, [3, 1], key, image_size=16, steps=3, **settings)

    guided, plain = draw(guidance=4.0), draw()
    np.testing.assert_array_equal(draw(guidance=4.0, negative=["null", "null"]), guided)
    assert relative_error(draw(guidance=4.0, negative=[3, 1]), plain) < 1e-5
    assert relative_error(draw(guidance=4.0, negative=[5, 2]), guided) > 1e-3


def test_an_image_depends_on_its_key_and_number_alone():
    key = jax.random.key(3)
    eight = image_noise(key, jnp.arange(8), (4, 4, 3))
    np.testing.assert_array_equal(image_noise(key, jnp.array([5, 2]), (4, 4, 3)), eight[jnp.array([5, 2])])
    assert len(np.unique(eight)) == eight.size


@pytest.mark.parametrize("solver", ["euler_sde", "heun", pytest.param("heun_exact", marks=pytest.mark.slow), "adams4"])
def test_solvers_draw_each_image_by_itself(solver):
    """Image 2 of four, and alone: also with draws on the way. Images are higher than wide."""
    g = Golden("deco_c2i")
    model, params, key = g.model(), g.params(), jax.random.key(0)
    settings = Sampling(3, solver, guidance=2.0)
    four, states = deco_jax.sample(
        model, params, [3, 1, 4, 1], key, image_size=(24, 8), trajectory=2, settings=settings
    )
    assert four.shape == (4, 24, 8, 3) and states.shape == (3, 4, 24, 8, 3) and np.isfinite(four).all()
    number = jnp.array([2])
    noise, keys = image_noise(key, number, (24, 8, 3)), image_keys(key, number)
    alone = deco_jax.sample(model, params, [4], noise=noise, keys=keys, settings=settings)
    assert relative_error(alone[0], four[2]) < 1e-5
    other = deco_jax.sample(model, params, [4], noise=noise, keys=image_keys(key, number + 1), settings=settings)
    assert (relative_error(other, alone) > 1e-2) == (solver == "euler_sde"), "draws have the image's key"


def test_draws_on_the_way_are_not_the_starting_noise():
    key, numbers = jax.random.key(0), jnp.arange(100)
    later = jax.vmap(lambda k: jax.random.normal(k, (4, 4, 3)))(image_keys(key, numbers))
    starts = image_noise(key, numbers, (4, 4, 3))
    assert len(set(np.asarray(later[:, 0, 0, 0]).tolist()) | set(np.asarray(starts[:, 0, 0, 0]).tolist())) == 200
    assert abs(np.corrcoef(later.ravel(), starts.ravel())[0, 1]) < 0.05, "4,800 pairs of independent numbers"


def test_image_sizes():
    assert parse_image_size("256") == parse_image_size(256) == (256, 256) and parse_image_size(None) is None
    assert parse_image_size("256x384") == parse_image_size(" 256X384 ") == (256, 384), "height × width"
    for text in ("", "256x", "x256", "a", "-8", "0", "8x0", "8x8x3", "1.5", "²"):
        with pytest.raises(UsageError, match=f"--size={text} is no image size; write a side as 256"):
            parse_image_size(text, "--size")
    check_image_size((8, 24), 8)
    for size, message in (((20, 20), "--image-size=20 must"), ((16, 20), "--image-size=16x20 must"), ((0, 8), "0x8")):
        with pytest.raises(UsageError, match=f"{message}.* be a positive multiple of the network's patch size, 8"):
            check_image_size(size, 8)


def test_how_often_the_network_runs():
    """Of ten steps, those from 0.3, …, 1 on are guided; exact Heun's last has one slope."""
    interval = {"guidance": 2.0, "guidance_interval": (0.25, 1.0)}
    found = {solver: Sampling(10, solver, **interval).evaluations for solver in ("euler", "heun", "heun_exact")}
    assert found == {"euler": 10 + 7, "heun": 10 + 6, "heun_exact": 19 + 13}


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
        ({"solver": "magic"}, "solver='magic' is not known; allowed: euler, euler_sde, heun, heun_exact, adams1"),
        ({"trajectory": -1}, "trajectory=-1 must be at least 0"),
        ({"keys": np.zeros((1, 2))}, r"keys has shape \(1, 2\); 1 labels need \(1,\)"),
        ({"noise": np.zeros((1, 8, 8, 3)), "key": None, "solver": "euler_sde"}, "solver='euler_sde' draws noise; with"),
        ({"last": 1.0}, "last=1.0 must be from 0 to below 1"),
        ({"last": 0.3}, "last=0.3 needs at least 2 steps"),
        ({"negative": [1, 2]}, "negative has 2 entries; 1 labels need as many"),
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
