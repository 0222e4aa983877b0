"""DeCo, frequency-decoupled pixel diffusion, in JAX: build a network, load its weights, draw images."""

from deco_jax.models import build_model
from deco_jax.pretrained.load import load_pretrained
from deco_jax.sampling.sample import sample
from deco_jax.version import __version__

__all__ = ["__version__", "build_model", "load_pretrained", "sample"]
