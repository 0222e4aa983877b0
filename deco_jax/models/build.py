"""Which networks are there, which fields make each, and which shapes do its parameters have?"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from deco_jax.models.baseline import BaselineDiT
from deco_jax.models.deco import DeCo, TextDeCo
from deco_jax.models.pixnerd import PixNerd

Network = DeCo | TextDeCo | BaselineDiT | PixNerd

KINDS: dict[str, type[Network]] = {"deco": DeCo, "deco_text": TextDeCo, "baseline": BaselineDiT, "pixnerd": PixNerd}
# Fields of every module that do not make another network of it: how it is computed, and Flax's own.
_NOT_OF_THE_NETWORK = ("dtype", "remat", "scan", "attention", "decoder_implementation", "parent", "name")


def network_fields(kind: str) -> tuple[str, ...]:
    """The fields of `config.model` that make a network of this kind: two networks that differ in one are not the same.

    A kind ignores the other fields in a configuration.
    """
    return tuple(f.name for f in dataclasses.fields(KINDS[kind]) if f.name not in _NOT_OF_THE_NETWORK)


def plainly(module: nn.Module) -> nn.Module:
    """The same network without kernels: to initialise it, which may happen where none can run."""
    names = {field.name for field in dataclasses.fields(module)}
    return module.clone(**{name: "xla" for name in ("attention", "decoder_implementation") if name in names})


def parameter_shapes(model: Network) -> Any:
    """Shapes of a network's parameters, without computing any."""
    p = model.patch_size

    def init() -> Any:
        x, t = jnp.zeros((1, p, p, 3)), jnp.zeros(1)
        return plainly(model).init(jax.random.key(0), x, t, model.condition.example(1))["params"]

    return nn.meta.unbox(jax.eval_shape(init))
