"""Every setting of a run: the table of fields, configuration files, saved configurations, and building the network.

A file in `configs/` starts from `default_config()` and sets what its run needs. The tree is locked: a field that does
not stand in the table is an error that names the nearest one, and a value of another type is refused.
"""

from deco_jax.config.check import build_model, check_config
from deco_jax.config.fields import FIELDS, Field, default_config, flatten
from deco_jax.config.load import load_config
from deco_jax.config.saved import CONFIG_VERSION, restore_config, save_config

__all__ = [
    "CONFIG_VERSION",
    "FIELDS",
    "Field",
    "build_model",
    "check_config",
    "default_config",
    "flatten",
    "load_config",
    "restore_config",
    "save_config",
]
