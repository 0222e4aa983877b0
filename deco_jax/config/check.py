"""Do the values of a configuration fit each other, and which network do they describe?"""

import jax.numpy as jnp
from ml_collections import ConfigDict

from deco_jax.config.fields import FIELDS, flatten
from deco_jax.data.tokens import check_prompt
from deco_jax.encoders.teacher import check_grids
from deco_jax.errors import UsageError
from deco_jax.models.build import KINDS, Network, network_fields
from deco_jax.parallel.mesh import axis_sizes
from deco_jax.sampling.settings import Sampling
from deco_jax.weights.tensors import naming


def check_config(config: ConfigDict) -> None:
    """Raises UsageError for the first value that is out of range or does not fit another."""
    values = flatten(config)
    for name, field in FIELDS.items():
        if not name.startswith("model."):  # see build_model
            field.check(name, values[name])
    Sampling.from_config(config.sample)
    model, size, p = config.model, config.data.image_size, config.model.patch_size
    build_model(model)
    if config.data.caption_prefix and not config.data.short_caption:
        raise UsageError(
            f"data.caption_prefix={config.data.caption_prefix!r} is put before captions of fewer words than "
            "data.short_caption, which is 0; set both, or neither."
        )
    if model.kind == "deco_text":
        if not config.sample.prompts:
            raise UsageError("sample.prompts=() must name at least one prompt, for the rows of sample grids.")
        for prompt in config.sample.prompts:
            with naming("sample.prompts"):
                check_prompt(prompt)
    tensor = axis_sizes(config.mesh)["tensor"]
    if tensor > 0 and model.heads % tensor:
        raise UsageError(f"mesh.tensor={tensor} must divide model.heads={model.heads}.")
    if config.loss.alignment_weight:
        check_grids(config)
    if size % p:
        lower = max(size // p, 1) * p
        raise UsageError(
            f"data.image_size={size} is not divisible by model.patch_size={p}; nearest: {lower} and {lower + p}."
        )
    if config.loss.alignment_weight and not 1 <= config.loss.alignment_layer <= model.depth:
        raise UsageError(
            f"loss.alignment_layer={config.loss.alignment_layer} does not exist; "
            f"model.depth={model.depth} allows 1 to {model.depth}."
        )
    if config.data.batch_size % config.optimizer.accumulation:
        raise UsageError(
            f"data.batch_size={config.data.batch_size} is not divisible by "
            f"optimizer.accumulation={config.optimizer.accumulation}."
        )


def build_model(config: ConfigDict) -> Network:
    """The Flax module that `config` (the `model` part of a configuration) describes.

    Parameters come from `model.init(key, x, t, labels)["params"]`.

    Raises:
      UsageError: a field is out of range. Fields that this kind of network does not have are ignored.
    """
    FIELDS["model.kind"].check("model.kind", config.kind)
    fields = network_fields(config.kind)
    for field, value in config.items():
        name = f"model.{field}"
        if field in fields or FIELDS[name].choices:
            FIELDS[name].check(name, value)
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
    return KINDS[config.kind](
        **{field: config[field] for field in fields},
        dtype=jnp.dtype(config.dtype),
        remat=config.remat,
        scan=config.scan,
        **({"decoder_implementation": config.decoder} if config.kind in ("deco", "deco_text") else {}),
        attention="auto" if config.attention == "default" else config.attention,
    )
