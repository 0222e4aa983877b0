"""The networks; `deco_jax.config.build_model` builds them from a configuration."""

from deco_jax.models.baseline import BaselineDiT
from deco_jax.models.deco import DeCo
from deco_jax.models.pixnerd import PixNerd
from deco_jax.models.projector import Projector

__all__ = ["BaselineDiT", "DeCo", "PixNerd", "Projector"]
