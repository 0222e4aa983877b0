"""How does somebody watch an image come about? The sampler of `sample`, one step per call, which may be left early.

Everything but the solver and the images' number and size is an input of the compiled step, so other steps, times or
guidance compile nothing anew.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array

from deco_jax.parallel import mesh as meshes
from deco_jax.sampling.conditioning import in_compute_dtype
from deco_jax.sampling.guidance import guided_slope
from deco_jax.sampling.sample import Inputs, fill_up, round_batch
from deco_jax.sampling.settings import Sampling
from deco_jax.sampling.solvers import SOLVERS, State, Step, list_steps


def sample_stepwise(model: nn.Module, params: Any, inputs: Inputs, settings: Sampling) -> Iterator[Array]:
    """Yields steps + 1 states (B, H, W, 3) fp32, from the noise to the images, each once it is computed.

    The states are those of `sample(…, trajectory=1)`, to fp32 rounding. Item k comes when k + 1 steps are done, as
    solvers may correct where a step started; the images come after the last of these at once.

    Args:
      model, params, settings: see `sample`.
      inputs: of `read_inputs`.
    """
    solver, step = SOLVERS[settings.solver], compiled_step(model, settings.solver)
    steps, guided, number = list_steps(solver, settings.times), settings.guided_steps, len(inputs.noise_BxHxWx3)
    params = in_compute_dtype(params, model.dtype)
    if len(inputs.noise_BxHxWx3.devices()) == 1:
        inputs = fill_up(inputs, round_batch(number))
    state = solver.init(inputs.noise_BxHxWx3.astype(jnp.float32))
    for k in range(settings.steps):
        now = jax.tree.map(lambda values, k=k: values[k], steps)
        with meshes.use_mesh_of(state[0]):
            state, x = step(params, state, now, inputs, np.float32(settings.guidance), is_guided=bool(guided[k]))
        yield jax.block_until_ready(x)[:number]
    yield state[0][:number]


@functools.lru_cache(maxsize=16)
def compiled_step(model: nn.Module, solver: str) -> Callable[..., tuple[State, Array]]:
    """The jitted step of a solver: (params, state, now, inputs, guidance, is_guided=…) → (state, x at its start)."""

    @functools.partial(jax.jit, static_argnames="is_guided")
    def run(
        params: Any, state: State, now: Step, inputs: Inputs, guidance: Array, *, is_guided: bool
    ) -> tuple[State, Array]:
        def velocity(x: Array, t_B: Array, condition: Any) -> Array:
            return model.apply({"params": params}, x, t_B, condition)

        slope = guided_slope(velocity, inputs.condition, inputs.null, guidance, np.array([is_guided]))
        state, x, _ = SOLVERS[solver].step(
            lambda x, t, _: slope(x, jnp.full(x.shape[0], t), is_guided), state, now, inputs.keys_B
        )
        return state, x

    return run
