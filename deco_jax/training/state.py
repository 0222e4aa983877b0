"""What a run is at one moment: parameters, their moving average, and the optimiser's memory."""

from typing import Any

import flax.struct
import optax
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
