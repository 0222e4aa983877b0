"""The path and its random draws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from deco_jax.diffusion.flow import draw, example_keys, interpolate, shift_time, to_float, to_uint8

SHAPE = (4, 4, 3)


def draws(count=4000, step=0, distribution="lognorm", shift=1.0, p_null=0.1):
    return draw(example_keys(jax.random.key(0), jnp.int32(step), count), SHAPE, distribution, shift, p_null)


def test_path_leads_from_noise_to_data_at_constant_velocity():
    x, noise = np.ones((3, *SHAPE), np.float32), np.full((3, *SHAPE), 3, np.float32)
    x_t, v = interpolate(x, noise, jnp.array([0.0, 1.0, 0.25]))
    np.testing.assert_array_equal(x_t[:, 0, 0, 0], [3, 1, 2.5])
    assert (v == -2).all()


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_times_follow_their_distribution(shift):
    """Kolmogorov–Smirnov against the law written out by hand: logit(t) ~ N(−ln s, 1), or t = u/(u + (1 − u)s)."""
    t = np.asarray(draws(shift=shift).t_B, np.float64)
    assert stats.kstest(np.log(t / (1 - t)), stats.norm(-np.log(shift), 1).cdf).pvalue > 1e-3
    t = np.asarray(draws(distribution="uniform", shift=shift).t_B, np.float64)
    assert stats.kstest(t, lambda q: q * shift / (1 - q + q * shift)).pvalue > 1e-3


def test_every_example_and_step_has_its_own_draws():
    """Guards against drawing with a replicated key: equal noise for all, or again at every step."""
    d, later = draws(64), draws(64, step=1)
    assert len(np.unique(np.concatenate([d.t_B, later.t_B]))) == 128
    noises = np.concatenate([d.noise_BxHxWx3, later.noise_BxHxWx3]).reshape(128, -1)
    assert len(np.unique(noises, axis=0)) == 128
    assert np.abs(np.corrcoef(noises) - np.eye(128)).max() < 0.7
    assert stats.kstest(noises.ravel().astype(float), stats.norm.cdf).pvalue > 1e-3
    assert abs(np.corrcoef(np.asarray(draws().t_B), np.asarray(draws().noise_BxHxWx3)[:, 0, 0, 0])[0, 1]) < 0.05


@pytest.mark.parametrize("p, tolerance", [(0.0, 0), (0.25, 0.03), (1.0, 0)])
def test_labels_are_dropped_at_the_given_rate(p, tolerance):
    assert abs(float(draws(p_null=p).drop_B.mean()) - p) <= tolerance


def test_shift_moves_towards_noise_and_keeps_the_ends():
    u = jnp.linspace(0, 1, 11)
    np.testing.assert_allclose(shift_time(u, 1.0), u, atol=1e-7)
    assert (shift_time(u, 3.0)[1:-1] < u[1:-1]).all()
    assert shift_time(u, 3.0)[0] == 0 and shift_time(u, 3.0)[-1] == 1


def test_pixels_survive_the_way_there_and_back():
    pixels = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(to_uint8(to_float(pixels)), pixels)
    np.testing.assert_array_equal(to_uint8(jnp.array([-9.0, -1, 0, 1, 9])), [0, 0, 128, 255, 255])
