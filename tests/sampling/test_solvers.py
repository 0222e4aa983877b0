"""Solvers, time grids and guidance against the recorded trajectories, exact methods in float64, and each other."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.polynomial import Polynomial

from deco_jax.sampling import solvers as module
from deco_jax.sampling.guidance import guided_slope
from deco_jax.sampling.sample import image_keys
from deco_jax.sampling.settings import Sampling
from deco_jax.sampling.solvers import SOLVERS, integrate
from tests.helpers import Golden, recorded_sampler, relative_error

# Recorded runs: the solver, and how far the whole trajectory may be off. Upstream forms the coefficients of Adams in
# fp32, where they lose digits; ours are exact.
CASES = {
    "euler_50": ("euler", 1e-5),
    "euler_100_cfg3.2_interval": ("euler", 1e-5),
    "euler_20_shift3": ("euler", 1e-5),
    "euler_10_laststep": ("euler", 1e-5),
    "sde_euler_15": ("euler_sde", 1e-5),
    "heun_10": ("heun", 1e-5),
    "heun_exact_10": ("heun_exact", 1e-5),
    "adam_lm_25_o2_shift3": ("adams2", 1e-5),
    "adam_lm_12_o3": ("adams3", 5e-5),
    "adam_lm_12_o4_interval": ("adams4", 1.1e-3),
}


def field(x, t, y, library=jnp):
    """The velocity field of the recorded runs (channels first or last: it acts element by element)."""
    return library.sin(3 * x + y[:, None, None, None]) - x * t[:, None, None, None]


def run(settings, noise, keys=None, trajectory=1):
    slope = guided_slope(field, jnp.array([1, 2]), jnp.array([5, 5]), settings.guidance, settings.guided_steps)
    guided, solver = settings.guided_steps, SOLVERS[settings.solver]
    x, states, _ = integrate(solver, slope, jnp.asarray(noise), settings.times, guided, keys, trajectory)
    return x, states


@pytest.mark.parametrize("case", CASES)
def test_trajectories_equal_the_recorded_ones(case, monkeypatch):
    """Every state on the way, with the recorded draws."""
    g, (solver, bound) = Golden("samplers"), CASES[case]
    settings, trajectory = recorded_sampler(json.loads(str(g[f"{case}:config"])), solver), g[f"{case}:trajectory"]
    np.testing.assert_allclose(settings.times, g[f"{case}:timesteps"], atol=1e-6)
    np.testing.assert_array_equal(settings._fp32_starts, g[f"{case}:timesteps"][:-1])
    if solver == "euler_sde":
        draws = jnp.pad(g[f"{case}:step_noise"], [(0, 1)] + [(0, 0)] * 4, constant_values=jnp.inf)
        draws = draws.at[-1].set(7.0)  # the last step draws none
        monkeypatch.setattr(module, "step_noise", lambda keys, number, shape: draws[number])
    x, states = run(settings, g[f"{case}:noise"])
    assert relative_error(states, trajectory) < bound
    np.testing.assert_array_equal(states[-1], x)
    if not solver.startswith("adams"):
        for k, (ours, theirs) in enumerate(zip(states, trajectory, strict=True)):
            assert relative_error(ours, theirs) < bound, f"state {k}"


def adams_by_hand(order, noise, times, guidance, low, high):
    """Adams–Bashforth in float64: Lagrange polynomials multiplied out around the step's start and integrated."""
    x, slopes, states = noise.astype(np.float64), [], [noise]
    y, null = np.array([1, 2]), np.array([5, 5])
    for k, (t, end) in enumerate(itertools.pairwise(times)):
        t_B = np.full(2, t)
        v, v_null = field(x, t_B, y, np), field(x, t_B, null, np)
        slopes.append(v_null + guidance * (v - v_null) if low < t < high else v)
        used = range(max(0, k + 1 - order), k + 1)
        for j in used:
            basis = Polynomial([1.0])
            for i in used:
                if i != j:
                    basis *= Polynomial([-(times[i] - t), 1.0]) / (times[j] - times[i])
            x = x + basis.integ()(end - t) * slopes[j]
        states.append(x)
    return np.stack(states)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize("shift, last", [(1.0, 0.0), (3.0, 0.02)])
def test_adams_is_exact(order, shift, last):
    """On even and uneven grids; 0.5 is a time of the even grid, so an interval that is closed above would show."""
    noise = Golden("samplers")["adam_lm_12_o3:noise"]
    settings = Sampling(12, f"adams{order}", 2.5, (0.25, 0.5), shift, last)
    exact = adams_by_hand(order, noise, settings.times, 2.5, 0.25, 0.5)
    assert relative_error(run(settings, noise)[1], exact) < 1e-5
    even = np.array([-9, 37, -59, 55]) / 24
    if (order, shift) == (4, 1.0):
        np.testing.assert_allclose(SOLVERS["adams4"].constants(settings.times)[-1], even[::-1] / 12, rtol=1e-12)


@pytest.mark.parametrize(
    "solver, order",
    [("euler", 1), ("heun", 2), ("heun_exact", 2), ("adams1", 1), ("adams2", 2)],  # Adams 3 and 4 start with less
)
def test_a_solver_has_its_order(solver, order):
    """On dx/dt = cos(4t)·x in float64: four times the steps leave 4^order less of the error."""
    errors = []
    with jax.enable_x64(True):
        for steps in (16, 64):
            times = np.linspace(0, 1, steps + 1)
            errors.append(abs(float(_scalar(SOLVERS[solver], times)) - np.exp(np.sin(4.0) / 4)))
    found = np.log(errors[0] / errors[1]) / np.log(4)
    assert found > order - 0.35, f"{solver} converges with order {found:.2f}"


def _scalar(solver, times):
    """x(1) from x(0) = 1, step by step with the solver's own functions in float64."""
    state = solver.init(jnp.ones((1, 1, 1, 1)))
    for k in range(len(times) - 1):
        constants = jax.tree.map(lambda c: jnp.asarray(c[k]), solver.constants(times))  # noqa: B023
        now = module.Step(k, times[k], times[k + 1] - times[k], constants)
        state, _, _ = solver.step(lambda x, t, _: (jnp.cos(4 * t) * x, ()), state, now, None)
    return state[0].squeeze()


def test_draws_depend_on_the_images_key_and_the_step_alone():
    keys = image_keys(jax.random.key(0), jnp.arange(4))
    draws = np.stack([module.step_noise(keys, k, (2, 2, 3)) for k in range(3)])
    assert len(np.unique(draws)) == draws.size, "images or steps share draws"
    np.testing.assert_array_equal(module.step_noise(keys[2:3], 1, (2, 2, 3))[0], draws[1, 2])


def test_the_stochastic_solver_keeps_the_distribution():
    """Data N(0, 0.5²): with the exact velocity the result has its spread; without draws, or with other ones, not."""
    x = jax.random.normal(jax.random.key(1), (64, 8, 8, 3))

    def slope(x, t_B, *_):
        t = t_B[:, None, None, None]
        return x * (0.25 * t - (1 - t)) / (0.25 * t**2 + (1 - t) ** 2), ()

    s = Sampling(200, "euler_sde", last=0.001)
    keys = image_keys(jax.random.key(0), jnp.arange(64))
    drawn, _, _ = integrate(SOLVERS["euler_sde"], slope, x, s.times, s.guided_steps, keys)
    assert abs(float(drawn.std()) - 0.5) < 0.02
    assert abs(np.corrcoef(drawn.ravel(), x.ravel())[0, 1]) < 0.9, "the way is a random one"


@pytest.mark.parametrize(
    "solver, every, states",
    [(solver, 2, [0, 2, 4, 5]) for solver in SOLVERS] + [("heun", 5, [0, 5]), ("heun", 99, [0, 5])],
)
def test_every_kth_state_is_kept_and_the_last(solver, every, states):
    settings, noise = Sampling(5, solver, guidance=2.0), Golden("samplers")["heun_10:noise"]
    keys = image_keys(jax.random.key(0), jnp.arange(2))
    x, kept = run(settings, noise, keys, every)
    alone, none = run(settings, noise, keys, 0)
    _, everything = run(settings, noise, keys, 1)
    assert none is None and relative_error(x, alone) < 1e-6
    np.testing.assert_array_equal(kept[0], noise)
    assert relative_error(kept, everything[jnp.array(states)]) < 1e-6


def test_a_trajectory_needs_the_memory_of_what_it_keeps():
    noise = jnp.zeros((2, 32, 32, 3))
    settings = Sampling(200)

    def memory(every):
        program = jax.jit(lambda noise: run(settings, noise, None, every)).lower(noise).compile()
        analysis = program.memory_analysis()
        return analysis.temp_size_in_bytes + analysis.output_size_in_bytes

    assert memory(100) < memory(0) + 10 * noise.nbytes < memory(1) / 10


def test_the_last_step_has_the_length_that_is_asked_for():
    times = Sampling(steps=4, last=0.1).times
    np.testing.assert_allclose(np.diff(times), [0.3, 0.3, 0.3, 0.1])
    np.testing.assert_allclose(np.diff(Sampling(steps=4).times), 0.25)


def test_guidance_interval_is_open_below_and_closed_above():
    """Adams: open on both sides. Heun, whose slopes are asked for at the end of a step: as that step's start says."""

    def guided(guidance, interval, solver="euler"):
        return np.flatnonzero(Sampling(10, solver, guidance, interval).guided_steps)

    np.testing.assert_array_equal(guided(2.0, (0.0, 1.0)), range(1, 10))
    assert not len(guided(1.0, (0.0, 1.0)))
    for solver, steps in {"euler": [3, 4, 5], "heun_exact": [3, 4, 5], "heun": [4, 5, 6], "adams2": [3, 4]}.items():
        np.testing.assert_array_equal(guided(2.0, (0.2, 0.5), solver), steps, err_msg=solver)


def test_a_bound_that_is_a_time_of_the_grid_is_compared_in_torchs_fp32():
    """There the last bit decides; in float64, or NumPy's fp32, each of these would have another first or last step."""

    def guided(steps, interval, solver="euler", **grid):
        return np.flatnonzero(Sampling(steps, solver, 2.5, interval, **grid).guided_steps).tolist()

    assert guided(50, (0.1, 0.9)) == list(range(6, 45))
    assert guided(15, (0.2, 1.0)) == list(range(3, 15))
    assert guided(10, (0.1, 0.8), "adams2") == list(range(2, 9))
    torch = pytest.importorskip("torch")
    for steps, last, shift in itertools.product([1, 2, 3, 7, 25, 50, 100, 251], [0.0, 0.02], [1.0, 2.0, 3.0]):
        if steps > 1 or not last:
            starts = torch.linspace(0, 1 - (last or 1 / steps), steps)
            starts = (starts / (starts + (1 - starts) * shift)).numpy()
            np.testing.assert_array_equal(Sampling(steps, shift=shift, last=last)._fp32_starts, starts)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("guidance, interval", [(3.0, (0.0, 0.0)), (3.0, (0.4, 1.0)), (1.0, (0.0, 1.0))])
def test_the_null_half_is_not_run_outside_the_interval(solver, guidance, interval):
    """Counts the examples that the network sees; with guidance they are doubled. The result is that of both halves."""
    seen = []

    def velocity(x, t_B, condition):
        jax.debug.callback(lambda: seen.append(x.shape[0]))
        return field(x, t_B, condition)

    s = Sampling(4, solver, guidance, interval)
    noise, keys = Golden("samplers")["heun_10:noise"], image_keys(jax.random.key(0), jnp.arange(2))
    condition, null = jnp.array([1, 2]), jnp.array([5, 5])
    slope = guided_slope(velocity, condition, null, s.guidance, s.guided_steps)
    x, _, _ = integrate(SOLVERS[solver], slope, noise, s.times, s.guided_steps, keys)
    jax.block_until_ready(x)
    jax.effects_barrier()
    calls = {"heun_exact": 7}.get(solver, 4)
    assert len(seen) == calls and sum(seen) == 2 * s.evaluations
    assert seen.count(4) > 0 if s.guided_steps.any() else set(seen) == {2}

    def both_halves(x, t_B, is_guided, _):
        v, v_null = field(x, t_B, condition), field(x, t_B, null)
        return jnp.where(is_guided, v_null + guidance * (v - v_null), v), ()

    both, _, _ = integrate(SOLVERS[solver], both_halves, noise, s.times, s.guided_steps, keys)
    assert relative_error(x, both) < 1e-6
