"""From noise to images: the time grid, classifier-free guidance in an interval, and the solvers (SPEC section 7)."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from deco_jax.diffusion.flow import shift_time
from deco_jax.errors import UsageError

Velocity = Callable[[Array, Array, Array], Array]  # (x (B,H,W,3), t (B,), condition (B,…)) → v (B,H,W,3)


def time_grid(steps: int, shift: float = 1.0, last: float | None = None) -> np.ndarray:
    """The times a solver visits, (steps + 1,), float64: from 0 = noise to 1 = data.

    linspace(0, 1 − last, steps), then 1, shifted towards noise by `shift`; `last`, the length of the last
    step before the shift, is 1/steps unless given.
    """
    last = 1 / steps if last is None else last
    return shift_time(np.append(np.linspace(0, 1 - last, steps), 1.0), shift)


def guided_steps(times: np.ndarray, guidance: float, interval: tuple[float, float]) -> np.ndarray:
    """Which steps use guidance: those that start at t with interval[0] < t ≤ interval[1]; none if guidance is 1.

    So the first step, from t = 0, is never guided. Compared in fp32, as PyTorch compares its fp32 grid.
    """
    low, high = np.float32(interval)
    starts = times[:-1].astype(np.float32)
    return (starts > low) & (starts <= high) & (guidance != 1)


def guide(velocity: Velocity, guidance: float) -> Velocity:
    """Classifier-free guidance: v_null + guidance·(v_cond − v_null), both halves in one call of the network.

    The result takes a pair (condition, null) for its condition. The two halves of an example lie next to each
    other in the doubled batch, so a batch sharded over devices needs no communication.
    """

    def double(a: Array, b: Array) -> Array:
        return jnp.stack([a, b], axis=1).reshape(-1, *a.shape[1:])

    def guided(x: Array, t_B: Array, conditions: tuple[Array, Array]) -> Array:
        condition, null = conditions
        v = velocity(double(x, x), double(t_B, t_B), double(condition, null))
        v_condition, v_null = jnp.moveaxis(v.reshape(-1, 2, *v.shape[1:]), 1, 0)
        return v_null + guidance * (v_condition - v_null)

    return guided


def euler(
    velocity: Velocity,
    noise_BxHxWx3: Array,
    condition: Array,
    null: Array,
    times: np.ndarray,
    guidance: float = 1.0,
    interval: tuple[float, float] = (0.0, 1.0),
) -> Array:
    """Integrates dx/dt = v from noise to data by Euler steps.

    Args:
      velocity: the network.
      noise_BxHxWx3: x at times[0].
      condition, null: the condition of each example, and what stands for none of it.
      times: see `time_grid`.
      guidance: weight of classifier-free guidance; 1 is none.
      interval: see `guided_steps`.

    Returns:
      x at times[-1], (B, H, W, 3), fp32, not clipped.
    """
    guided = guided_steps(times, guidance, interval)

    def slope_plain(x: Array, t_B: Array) -> Array:
        return velocity(x, t_B, condition)

    def slope_guided(x: Array, t_B: Array) -> Array:
        return guide(velocity, guidance)(x, t_B, (condition, null))

    def step(x: Array, inputs: tuple[Array, Array, Array]) -> tuple[Array, None]:
        t, dt, is_guided = inputs
        t_B = jnp.full(x.shape[0], t)
        if guided.all():
            v = slope_guided(x, t_B)
        elif not guided.any():
            v = slope_plain(x, t_B)
        else:
            v = jax.lax.cond(is_guided, slope_guided, slope_plain, x, t_B)
        return x + dt * v, None

    t, dt = jnp.asarray(times[:-1], jnp.float32), jnp.asarray(np.diff(times), jnp.float32)
    x, _ = jax.lax.scan(step, noise_BxHxWx3.astype(jnp.float32), (t, dt, jnp.asarray(guided)))
    return x


SOLVERS = {"euler": euler}
SETTINGS = ("steps", "guidance", "guidance_interval", "shift", "solver")  # what `deco_jax.sample` can be told


def check_sampling(
    steps: int, guidance: float, guidance_interval: tuple[float, float], shift: float, solver: str
) -> None:
    """Raises UsageError if a setting of the sampler is out of range."""
    if steps < 1:
        raise UsageError(f"steps={steps} must be at least 1.")
    if not math.isfinite(guidance):
        raise UsageError(f"guidance={guidance} must be a finite number; 1 is none.")
    numbers = len(guidance_interval) == 2 and all(isinstance(t, int | float) for t in guidance_interval)
    if not numbers or not 0 <= guidance_interval[0] <= guidance_interval[1] <= 1:
        raise UsageError(f"guidance_interval={guidance_interval} must be (low, high) with 0 ≤ low ≤ high ≤ 1.")
    if not 0 < shift < math.inf:
        raise UsageError(f"shift={shift} must be positive; 1 is no shift.")
    if solver not in SOLVERS:
        raise UsageError(f"solver={solver!r} is not known; allowed: {', '.join(SOLVERS)}.")
