"""From `config.model` to a network, with every field checked first."""

import jax.numpy as jnp
from ml_collections import ConfigDict

from deco_jax.diffusion.flow import PREDICTIONS
from deco_jax.errors import UsageError
from deco_jax.models.baseline import BaselineDiT
from deco_jax.models.deco import DeCo
from deco_jax.models.dit import REMAT_POLICIES
from deco_jax.models.pixel_decoder import INTERACTIONS
from deco_jax.models.pixnerd import PixNerd

Network = DeCo | BaselineDiT | PixNerd

_COMMON = ("num_classes", "patch_size", "width", "depth", "heads", "prediction")
_DECODER = ("decoder_width", "decoder_depth")
# kind: (its module, the fields that make it: two networks that differ in one are not the same). A kind ignores the
# other fields in a configuration.
KINDS: dict[str, tuple[type[Network], tuple[str, ...]]] = {
    "deco": (DeCo, (*_COMMON, *_DECODER, "decoder_patch", "decoder_interaction")),
    "baseline": (BaselineDiT, _COMMON),
    "pixnerd": (PixNerd, (*_COMMON, *_DECODER, "decoder_expansion")),
}
_CHOICES = {
    "kind": tuple(KINDS),
    "prediction": PREDICTIONS,
    "decoder_interaction": INTERACTIONS,
    "dtype": ("bfloat16", "float32"),
    "remat": tuple(REMAT_POLICIES),
    "attention": ("default", "xla", "cudnn"),
}


def build_model(config: ConfigDict) -> Network:
    """The Flax module that `config` (the `model` part of a configuration) describes.

    Parameters come from `model.init(key, x, t, labels)["params"]`.

    Raises:
      UsageError: a field is out of range.
    """
    for field, allowed in _CHOICES.items():
        if config[field] not in allowed:
            raise UsageError(f"model.{field}={config[field]!r} is not known; allowed: {', '.join(allowed)}.")
    module, fields = KINDS[config.kind]
    for field in fields:
        if field not in _CHOICES and config[field] < 1:
            raise UsageError(f"model.{field}={config[field]} must be at least 1.")
    if config.width % (4 * config.heads):
        raise UsageError(
            f"model.width={config.width} with model.heads={config.heads} gives heads of "
            f"{config.width / config.heads:g} channels; the 2-D rotary embedding needs a multiple of 4."
        )
    p = config.patch_size
    if "decoder_patch" in fields and p % config.decoder_patch:
        allowed = ", ".join(str(r) for r in range(1, p + 1) if p % r == 0)
        raise UsageError(
            f"model.decoder_patch={config.decoder_patch} does not divide model.patch_size={p}; allowed: {allowed}."
        )
    return module(
        **{field: config[field] for field in fields},
        dtype=jnp.dtype(config.dtype),
        remat=config.remat,
        scan=config.scan,
        attention=None if config.attention == "default" else config.attention,
    )
