"""From noise to images along a velocity field: the solvers, and the one loop that drives them."""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

State = tuple[Array, ...]
Slope = Callable[[Array, Array], tuple[Array, Any]]  # (x (B,H,W,3), t (B,)) → (v (B,H,W,3), anything to collect)


class Solver(Protocol):
    """A way of integrating dx/dt = v."""

    def init(self, x_BxHxWx3: Array) -> State:
        """The state at the first time; x comes first."""
        ...

    def step(self, slope: Slope, state: State, t: Array, dt: Array, key: Array | None) -> tuple[State, Any]:
        """(the state at t + dt, what the slope collected); `key` is the step's own, for solvers that draw noise."""
        ...


@dataclasses.dataclass(frozen=True)
class Euler:
    """x ← x + dt·v(x, t)."""

    def init(self, x_BxHxWx3: Array) -> State:
        """See `Solver`."""
        return (x_BxHxWx3,)

    def step(self, slope: Slope, state: State, t: Array, dt: Array, key: Array | None) -> tuple[State, Any]:
        """See `Solver`."""
        (x,) = state
        v, seen = slope(x, jnp.full(x.shape[0], t))
        return (x + dt * v,), seen


SOLVERS: dict[str, Solver] = {"euler": Euler()}


def integrate(
    solver: Solver,
    slope: Callable[[Array, Array, Array], tuple[Array, Any]],
    noise_BxHxWx3: Array,
    times: np.ndarray,
    guided_steps: np.ndarray,
    key: Array | None = None,
) -> tuple[Array, Any]:
    """Integrates dx/dt = v from x at times[0] to x at times[-1].

    Args:
      solver: one of SOLVERS.
      slope: (x, t (B,), whether this step is guided, a traced boolean) → (v, anything to collect).
      noise_BxHxWx3: x at times[0].
      times: (steps + 1,) rising.
      guided_steps: (steps,) booleans, handed to `slope`.
      key: for solvers that draw noise.

    Returns:
      (x at times[-1], (B, H, W, 3) fp32, not clipped; what was collected, with the steps as leading axis).
    """

    def step(state: State, inputs: tuple[Array, Array, Array, Array]) -> tuple[State, Any]:
        k, t, dt, guided = inputs
        step_key = None if key is None else jax.random.fold_in(key, k)
        return solver.step(lambda x, t_B: slope(x, t_B, guided), state, t, dt, step_key)

    t, dt = jnp.asarray(times[:-1], jnp.float32), jnp.asarray(np.diff(times), jnp.float32)
    inputs = jnp.arange(len(times) - 1), t, dt, jnp.asarray(guided_steps)
    state, seen = jax.lax.scan(step, solver.init(noise_BxHxWx3.astype(jnp.float32)), inputs)
    return state[0], seen
