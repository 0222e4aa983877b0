"""What a run is at one moment: parameters, their moving average, and the optimiser's memory."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax import Array


@flax.struct.dataclass
class TrainState:
    """All that a training step reads and writes. Randomness is not in it: it follows from the seed and `step`."""

    step: Array  # int32, batches consumed
    params: dict[str, Any]  # "network", and "projector" if representations are aligned; fp32
    ema: Any  # moving average of params["network"], fp32
    opt_state: optax.OptState
    skipped: Array  # int32, steps left out because the loss or a gradient was not finite
    skipped_in_a_row: Array  # int32, how many of them just now


def init_state(
    key: Array,
    network: nn.Module,
    projector: nn.Module | None,
    optimizer: optax.GradientTransformation,
    image_size: int,
) -> TrainState:
    """A fresh state, with logical axis names boxed around every parameter and everything shaped like one.

    Args:
      key: random key of the initialisation.
      network, projector: the modules; None for no representation alignment.
      optimizer: from `make_optimizer`.
      image_size: any side the network accepts; no parameter's shape depends on it.
    """
    network_key, projector_key = jax.random.split(key)
    x, t, condition = jnp.zeros((1, image_size, image_size, 3)), jnp.zeros(1), network.condition.example(1)
    params = {"network": network.init(network_key, x, t, condition)["params"]}
    if projector is not None:
        params["projector"] = projector.init(projector_key, jnp.zeros((1, 1, network.width)))["params"]
    return TrainState(
        step=jnp.int32(0),
        params=params,
        ema=jax.tree.map(jnp.copy, params["network"]),  # starts at the parameters, in buffers of its own
        opt_state=optimizer.init(params),
        skipped=jnp.int32(0),
        skipped_in_a_row=jnp.int32(0),
    )
