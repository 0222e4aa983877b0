"""The networks, and the one function that builds them from a configuration."""

from deco_jax.models.build import build_model
from deco_jax.models.deco import DeCo
from deco_jax.models.projector import Projector

__all__ = ["DeCo", "Projector", "build_model"]
