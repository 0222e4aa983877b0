"""`deco_jax.load_pretrained`: a network and its weights from wherever they are stored."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from ml_collections import ConfigDict

from deco_jax.errors import UsageError
from deco_jax.models import build_model
from deco_jax.training import checkpoint


def load_pretrained(path: str, weights: Literal["ema", "online"] = "ema") -> tuple[nn.Module, Any]:
    """Opens a workdir of `deco train` (its newest checkpoint) or one checkpoint in it.

    Args:
      path: `workdir`, or `workdir/checkpoints/<step>`.
      weights: the moving average, or the weights that were being trained.

    Returns:
      (model, params): for `model.apply({"params": params}, x, t, labels)` and `deco_jax.sample`.

    Raises:
      UsageError: there is no checkpoint, or no such weights.
    """
    if weights not in ("ema", "online"):
        raise UsageError(f"weights={weights!r} is not known; allowed: ema, online.")
    folder, step = checkpoint.find_checkpoint(path)
    config = ConfigDict(checkpoint.read_meta(folder, step)["config"]["model"])
    config.attention = "default"  # the run's choice may not exist on this machine
    model = build_model(config)
    params = checkpoint.restore_part(folder, step, _wanted(model, weights))
    return model, params["ema"] if weights == "ema" else params["params"]["network"]


def _wanted(model: nn.Module, weights: str) -> dict[str, Any]:
    """The part of a TrainState to read, as shapes on the first local device."""
    x, t, labels = jnp.zeros((1, model.patch_size, model.patch_size, 3)), jnp.zeros(1), jnp.zeros(1, jnp.int32)
    shapes = nn.meta.unbox(jax.eval_shape(model.init, jax.random.key(0), x, t, labels)["params"])
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=device), shapes)
    return {"ema": shapes} if weights == "ema" else {"params": {"network": shapes}}
