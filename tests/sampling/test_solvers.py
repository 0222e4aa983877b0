"""Solvers, time grids and guidance against the recorded trajectories, and against each other."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deco_jax.sampling.guidance import guided_slope
from deco_jax.sampling.settings import Sampling
from deco_jax.sampling.solvers import SOLVERS, integrate
from tests.helpers import Golden, relative_error

EULER = ["euler_50", "euler_100_cfg3.2_interval", "euler_20_shift3", "euler_10_laststep"]


def field(x, t, y):
    """The velocity field of the recorded runs (channels first or last: it acts element by element)."""
    return jnp.sin(3 * x + y[:, None, None, None]) - x * t[:, None, None, None]


@pytest.mark.parametrize("case", EULER)
def test_trajectories_equal_the_recorded_ones(case):
    """Every state on the way: the slope collects the x it is asked at."""
    g = Golden("samplers")
    config, trajectory = json.loads(str(g[f"{case}:config"])), g[f"{case}:trajectory"]
    settings = Sampling(
        steps=config["num_steps"],
        guidance=config["guidance"],
        guidance_interval=(config.get("guidance_interval_min", 0.0), config.get("guidance_interval_max", 1.0)),
        shift=config.get("timeshift", 1.0),
        last=config.get("last_step") or 0.0,
    )
    np.testing.assert_allclose(settings.times, g[f"{case}:timesteps"], atol=1e-6)
    condition, null = jnp.array([1, 2]), jnp.array([5, 5])
    slope = guided_slope(field, condition, null, settings.guidance, settings.guided_steps)

    def collecting(x, t_B, guided):
        v, _ = slope(x, t_B, guided)
        return v, x

    x, states = integrate(
        SOLVERS[settings.solver], collecting, g[f"{case}:noise"], settings.times, settings.guided_steps
    )
    assert len(states) == len(trajectory) - 1
    for k, (ours, theirs) in enumerate(zip([*states, x], trajectory, strict=True)):
        assert relative_error(ours, theirs) < 1e-5, f"state {k}"


def test_the_last_step_has_the_length_that_is_asked_for():
    times = Sampling(steps=4, last=0.1).times
    np.testing.assert_allclose(np.diff(times), [0.3, 0.3, 0.3, 0.1])
    np.testing.assert_allclose(np.diff(Sampling(steps=4).times), 0.25)


def test_guidance_interval_is_open_below_and_closed_above():
    def guided(guidance, interval):
        return np.flatnonzero(Sampling(steps=10, guidance=guidance, guidance_interval=interval).guided_steps)

    np.testing.assert_array_equal(guided(2.0, (0.0, 1.0)), range(1, 10))
    np.testing.assert_array_equal(guided(2.0, (0.2, 0.5)), [3, 4, 5])
    assert not len(guided(1.0, (0.0, 1.0)))


@pytest.mark.parametrize("interval, calls", [((0.0, 0.0), {2}), ((0.5, 1.0), {2, 4})])
def test_the_null_half_is_not_run_outside_the_interval(interval, calls):
    """The number of examples that the network sees, step by step; with guidance it is doubled."""
    seen = []

    def velocity(x, t_B, condition):
        jax.debug.callback(lambda: seen.append(x.shape[0]))
        return -x

    s = Sampling(steps=4, guidance=3.0, guidance_interval=interval)
    slope = guided_slope(velocity, jnp.zeros(2), jnp.ones(2), s.guidance, s.guided_steps)
    x, _ = integrate(SOLVERS["euler"], slope, jnp.ones((2, 4, 4, 3)), s.times, s.guided_steps)
    jax.block_until_ready(x)
    jax.effects_barrier()
    assert len(seen) == 4 and set(seen) == calls and seen.count(4) == s.guided_steps.sum()
