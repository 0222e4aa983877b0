"""How does a user get a trained network? `deco_jax.load_pretrained`, from wherever it is stored."""

from typing import Any, Literal

import jax
from flax import linen as nn

from deco_jax.checkpoints import store
from deco_jax.config import build_model
from deco_jax.errors import UsageError
from deco_jax.models.build import parameter_shapes
from deco_jax.pretrained import networks


def load_pretrained(
    path: str, weights: Literal["ema", "online"] = "ema", prediction: Literal["velocity", "image"] | None = None
) -> tuple[nn.Module, Any]:
    """Opens a trained network, wherever it comes from; architecture and sizes are in the file.

    Args:
      path: a workdir of `deco train` (its newest checkpoint), `workdir/checkpoints/<step>`, an upstream Lightning
        `.ckpt`, a PyTorch state dict (`.pt`, `.pth`), `.safetensors`, an index of several of these, or a Hugging Face
        folder. Neither torch nor any code in a file is used (docs/security.md).
      weights: the moving average, or the weights that were being trained; the same where a file does not
        say which it holds.
      prediction: what the network predicts, for files that do not say. Ours do; others are taken for velocity, but
        for a baseline it must be given, as upstream trains it both ways. Whatever it is, `model` returns velocities.

    Returns:
      (model, params): for `model.apply({"params": params}, x, t, labels)` and `deco_jax.sample`.

    Raises:
      UsageError: there is nothing to open, no such weights, tensors are missing, left over or misshapen, or the file
        says that it predicts something else.
    """
    if weights not in ("ema", "online"):
        raise UsageError(f"weights={weights!r} is not known; allowed: ema, online.")
    if networks.is_weight_file(path):
        stored = networks.open_networks(path, prediction)
        model, params = build_model(networks.model_config(stored)), networks.read_network(stored, weights)
        return model, jax.tree.map(lambda x: jax.device_put(x, may_alias=True), params)
    folder, step = store.find_checkpoint(path)
    config = store.read_config(folder, step).model
    networks.settle_prediction(path, [config.prediction], prediction)
    config.attention = "default"  # the run's choice may not exist on this machine
    model = build_model(config)
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), parameter_shapes(model))
    if weights == "ema":
        return model, store.restore_part(folder, step, {"ema": shapes})["ema"]
    return model, store.restore_part(folder, step, {"params": {"network": shapes}})["params"]["network"]
