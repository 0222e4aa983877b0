"""Classifier-free guidance, and where along the way it acts (Ho & Salimans 2022; in an interval: Kynkäänniemi 2024)."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

Velocity = Callable[[Array, Array, Any], Array]  # (x (B,H,W,3), t (B,), condition, a tree of (B,…)) → v (B,H,W,3)


def guided_slope(
    velocity: Velocity, condition: Any, null: Any, guidance: float, guided_steps: np.ndarray
) -> Callable[..., tuple[Array, tuple]]:
    """The slope for `solvers.integrate`: guided on the steps that `guided_steps` (steps,) marks, plain on the others.

    Guided, it is v_null + guidance·(v_condition − v_null), both halves in one call of the network. The two halves of an
    example lie next to each other in the doubled batch, so a batch sharded over devices needs no communication.

    Args:
      velocity: the network.
      condition, null: what each image shows, and what guidance leads away from: trees of arrays (B, …). Where the null
        has one row it is that of all images; where the condition has one, it and the null are the same.
      guidance: weight of the guidance.
      guided_steps: see `Sampling.guided_steps`.
    """

    def plain(x: Array, t_B: Array) -> Array:
        return velocity(x, t_B, condition)

    def guided(x: Array, t_B: Array) -> Array:
        def double(a: Array, b: Array) -> Array:
            return jnp.stack(jnp.broadcast_arrays(a, b), axis=1).reshape(-1, *a.shape[1:]) if len(a) == len(x) else a

        v = velocity(double(x, x), double(t_B, t_B), jax.tree.map(double, condition, null))
        v_condition, v_null = jnp.moveaxis(v.reshape(-1, 2, *v.shape[1:]), 1, 0)
        return v_null + guidance * (v_condition - v_null)

    def slope(x: Array, t_B: Array, is_guided: Array, number: Array | None = None) -> tuple[Array, tuple]:
        if guided_steps.all():
            return guided(x, t_B), ()
        if not guided_steps.any():
            return plain(x, t_B), ()
        return jax.lax.cond(is_guided, guided, plain, x, t_B), ()

    return slope
