"""DeCo, frequency-decoupled pixel diffusion, in JAX: build a network, load its weights, draw images.

A public name loads its module, and JAX with it, only when it is used. `__init__.pyi` says the same to type checkers.
"""

import importlib
from typing import Any

from deco_jax.version import __version__

_MODULES = {
    "build_model": "deco_jax.config",
    "load_pretrained": "deco_jax.pretrained.load",
    "load_text_encoder": "deco_jax.encoders.text",
    "sample": "deco_jax.sampling.sample",
}
__all__ = ["__version__", "build_model", "load_pretrained", "load_text_encoder", "sample"]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_MODULES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
