"""From noise to images along a velocity field: the solvers, and the one loop that drives them (docs/model.md, 7)."""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

State = tuple[Array, ...]
# (x (B,H,W,3), t and its number among all times, scalars) → (v (B,H,W,3), anything to collect)
Slope = Callable[[Array, Array, Array], tuple[Array, Any]]


class Step(NamedTuple):
    """What a solver is told about a step; in the loop each is a traced scalar, or a row of an array (steps, …)."""

    number: Any  # from 0 on
    t: Any  # the time it starts at
    dt: Any  # its length
    constants: Any  # of the solver, see `Solver.constants`


class Solver:
    """A way of integrating dx/dt = v. By default one slope per step, taken at the step's start."""

    draws_noise = False

    def guided(self, starts: np.ndarray, low: np.float32, high: np.float32) -> np.ndarray:
        """Which steps guide their slopes, (steps,) booleans; a step starts at starts[k], fp32."""
        return (starts > low) & (starts <= high)

    def evaluations(self, steps: int) -> np.ndarray:
        """Slopes that each step asks for, (steps,)."""
        return np.ones(steps, int)

    def constants(self, times: np.ndarray) -> Any:
        """What steps need beside t and dt: a tree of float64 or bool arrays (steps, …), of the times (steps + 1,)."""
        return ()

    def init(self, x_BxHxWx3: Array) -> State:
        """The state at the first time; the first entry is x at the next time, as far as it is known."""
        return (x_BxHxWx3,)

    def step(self, slope: Slope, state: State, now: Step, keys_B: Array | None) -> tuple[State, Array, Any]:
        """(the state after the step, x at its start, what the slope collected); keys are of the images."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Euler(Solver):
    """x ← x + dt·v(x, t)."""

    def step(self, slope: Slope, state: State, now: Step, keys_B: Array | None) -> tuple[State, Array, Any]:
        """See `Solver`."""
        (x,) = state
        v, seen = slope(x, now.t, now.number)
        return (x + now.dt * v,), x, seen


@dataclasses.dataclass(frozen=True)
class StochasticEuler(Solver):
    """x ← x + dt·(v + w·s) + √(2·w·dt)·z with z ~ N(0, I), the last step without z.

    With w = 1 − t and the linear path's score s = (t·v − x)/(1 − t), v + w·s is (1 + t)·v − x.
    """

    draws_noise = True

    def constants(self, times: np.ndarray) -> Any:
        """√(2·w·dt); 0 in the last step."""
        scale = np.sqrt(2 * (1 - times[:-1]) * np.diff(times))
        scale[-1] = 0
        return scale

    def step(self, slope: Slope, state: State, now: Step, keys_B: Array | None) -> tuple[State, Array, Any]:
        """See `Solver`."""
        (x,) = state
        v, seen = slope(x, now.t, now.number)
        drift = (1 + now.t) * v - x
        return (x + now.dt * drift + now.constants * step_noise(keys_B, now.number, x.shape[1:]),), x, seen


def step_noise(keys_B: Array, number: Array, shape: tuple[int, ...]) -> Array:
    """What a step adds to each image, (B, *shape) fp32: a function of the image's key and the step's number alone."""
    return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, number), shape))(keys_B)


@dataclasses.dataclass(frozen=True)
class Heun(Solver):
    """x ← x + dt·(v + v′)/2 with v′ at the end of x̂ = x + dt·v; v is the v′ of the step before.

    The first step takes v at the noise, the last is x̂ itself, so n steps ask for n slopes. A step of the loop takes
    the one slope at its start, where x̂ of the step before ends, and with it corrects x: the state is x̂, the x that it
    was predicted from, and its v.
    """

    def guided(self, starts: np.ndarray, low: np.float32, high: np.float32) -> np.ndarray:
        """A slope is guided as the step says at whose end it was to be taken; the first as its own."""
        guided = super().guided(starts, low, high)
        return np.append(guided[:1], guided[:-1])

    def constants(self, times: np.ndarray) -> Any:
        """Length of the step before; 0 in the first."""
        return np.append(0, np.diff(times)[:-1])

    def init(self, x_BxHxWx3: Array) -> State:
        """See `Solver`."""
        return x_BxHxWx3, x_BxHxWx3, jnp.zeros_like(x_BxHxWx3)

    def step(self, slope: Slope, state: State, now: Step, keys_B: Array | None) -> tuple[State, Array, Any]:
        """See `Solver`."""
        predicted, before, v_before = state
        v, seen = slope(predicted, now.t, now.number)
        x = before + now.constants * (v_before + v) / 2
        return (x + now.dt * v, x, v), x, seen


@dataclasses.dataclass(frozen=True)
class ExactHeun(Solver):
    """x ← x + dt·(v(x, t) + v(x + dt·v, t + dt))/2; the last step is Euler's."""

    def evaluations(self, steps: int) -> np.ndarray:
        """See `Solver`."""
        return np.where(np.arange(steps) < steps - 1, 2, 1)

    def constants(self, times: np.ndarray) -> Any:
        """The time at which a step ends, and whether it is the last."""
        return times[1:], np.arange(1, len(times)) == len(times) - 1

    def step(self, slope: Slope, state: State, now: Step, keys_B: Array | None) -> tuple[State, Array, Any]:
        """See `Solver`."""
        (x,), (end, is_last) = state, now.constants
        v, seen = slope(x, now.t, now.number)
        v_end = jax.lax.cond(is_last, lambda: v, lambda: slope(x + now.dt * v, end, now.number + 1)[0])
        return (x + now.dt * (v + v_end) / 2,), x, seen


@dataclasses.dataclass(frozen=True)
class Adams(Solver):
    """Adams–Bashforth: x ← x + Σ_j c_j·v_j over the last `order` slopes, fewer at the start.

    c_j is the integral over the step of the Lagrange polynomial that is 1 at the time of slope j and 0 at the others'.
    """

    order: int  # 1 to 4

    def guided(self, starts: np.ndarray, low: np.float32, high: np.float32) -> np.ndarray:
        """Open on both sides, as in PyTorch's solver."""
        return (starts > low) & (starts < high)

    def constants(self, times: np.ndarray) -> Any:
        """The c_j, (steps, order), newest slope first; 0 where there is none yet.

        Gauss's rule of two points is exact for the polynomials, whose degree is at most 3. They are multiplied out
        nowhere, so nothing cancels.
        """
        c = np.zeros((len(times) - 1, self.order))
        for k, (start, end) in enumerate(itertools.pairwise(times)):
            nodes = times[max(0, k - self.order + 1) : k + 1][::-1]
            points = (start + end) / 2 + np.array([-0.5, 0.5]) * (end - start) / np.sqrt(3)
            for j, node in enumerate(nodes):
                others = np.delete(nodes, j)[:, None]
                c[k, j] = np.prod((points - others) / (node - others), axis=0).mean() * (end - start)
        return c

    def init(self, x_BxHxWx3: Array) -> State:
        """See `Solver`."""
        return x_BxHxWx3, *[jnp.zeros_like(x_BxHxWx3)] * (self.order - 1)

    def step(self, slope: Slope, state: State, now: Step, keys_B: Array | None) -> tuple[State, Array, Any]:
        """See `Solver`."""
        x, *older = state
        v, seen = slope(x, now.t, now.number)
        slopes = [v, *older]
        change = sum(now.constants[j] * v_j for j, v_j in enumerate(slopes))
        return (x + change, *slopes[:-1]), x, seen


SOLVERS: dict[str, Solver] = {
    "euler": Euler(),
    "euler_sde": StochasticEuler(),
    "heun": Heun(),
    "heun_exact": ExactHeun(),
    "adams1": Adams(1),
    "adams2": Adams(2),
    "adams3": Adams(3),
    "adams4": Adams(4),
}


def integrate(
    solver: Solver,
    slope: Callable[[Array, Array, Array, Array], tuple[Array, Any]],
    noise_BxHxWx3: Array,
    times: np.ndarray,
    guided_steps: np.ndarray,
    keys_B: Array | None = None,
    trajectory: int = 0,
) -> tuple[Array, Array | None, Any]:
    """Integrates dx/dt = v from x at times[0] to x at times[-1].

    Args:
      solver: one of SOLVERS.
      slope: (x, t (B,), whether this step is guided, the number of t among `times`; both traced) → (v, anything to
        collect).
      noise_BxHxWx3: x at times[0].
      times: (steps + 1,) rising, float64.
      guided_steps: (steps,) booleans, handed to `slope`.
      keys_B: of each image, for solvers that draw noise.
      trajectory: k > 0 keeps x at times[0], every k-th time after it, and the last.

    Returns:
      (x at times[-1], (B, H, W, 3) fp32, not clipped; the states that `trajectory` keeps, (S, B, H, W, 3) fp32, or
      None; what the first slope of each step collected, with the steps as leading axis).
    """
    steps, x0 = len(times) - 1, noise_BxHxWx3.astype(jnp.float32)
    kept = jnp.zeros((-(-steps // trajectory), *x0.shape)) if trajectory else None

    def step(carry: tuple[State, Array | None], inputs: tuple[Step, Array]) -> tuple[tuple[State, Array | None], Any]:
        (state, kept), (now, is_guided) = carry, inputs

        def slope_now(x: Array, t: Array, number: Array) -> tuple[Array, Any]:
            return slope(x, jnp.full(x.shape[0], t), is_guided, number)

        state, x, seen = solver.step(slope_now, state, now, keys_B)
        if kept is not None:
            place = jnp.where(now.number % trajectory == 0, now.number // trajectory, len(kept))
            kept = kept.at[place].set(x, mode="drop")
        return (state, kept), seen

    inputs = (list_steps(solver, times), jnp.asarray(guided_steps))
    (state, kept), seen = jax.lax.scan(step, (solver.init(x0), kept), inputs)
    return state[0], None if kept is None else jnp.concatenate([kept, state[0][None]]), seen


def list_steps(solver: Solver, times: np.ndarray) -> Step:
    """All steps between these times, (steps + 1,): arrays with the steps as leading axis, fp32 but for the numbers."""
    constants = jax.tree.map(lambda c: c if c.dtype == bool else c.astype(np.float32), solver.constants(times))
    return Step(np.arange(len(times) - 1), times[:-1].astype(np.float32), np.diff(times).astype(np.float32), constants)
