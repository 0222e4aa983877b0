"""How is a configuration saved, and how is one read that an older version saved? Nothing is dropped on the way."""

import json
import os
from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import ConfigDict

from deco_jax.config.fields import FIELDS, default_config, flatten
from deco_jax.errors import UsageError
from deco_jax.version import __version__

Flat = dict[str, Any]  # as `flatten` makes it
# version: what turns a configuration of that version into one of the next. A field that is younger than a saved
# configuration gets today's default; where that is not what the run did, a migration says what it did.
MIGRATIONS: dict[int, Callable[[Flat], Flat]] = {
    # Did not say its version. At their defaults, the fields added since then do nothing; None stood for any default.
    1: lambda flat: {name: value for name, value in flat.items() if value is not None},
    # Took pixels as they lay in the file, whatever its EXIF orientation or transparency.
    2: lambda flat: flat | {"data.orient": False, "data.background": ""},
    # Devices added up gradients in the dtype of the products; what is `auto` today was `default`.
    3: lambda flat: (
        flat
        | {"optimizer.gradient_dtype": flat.get("model.dtype", "bfloat16")}
        | ({"model.attention": "auto"} if flat.get("model.attention") == "default" else {})
    ),
}
CONFIG_VERSION = 4


def save_config(config: ConfigDict) -> dict[str, Any]:
    """What is saved of a configuration, for JSON: "config" and "config_version"."""
    return {"config": json.loads(config.to_json_best_effort()), "config_version": CONFIG_VERSION}


def restore_config(saved: Mapping[str, Any], where: str | os.PathLike = "the checkpoint") -> ConfigDict:
    """The whole configuration that was saved by `save_config`, by this version or by an older one. Ranges are not
    checked: data and devices may be elsewhere.

    Args:
      saved: "config", and "config_version" except in the oldest; whatever else there is is not looked at.
      where: it was saved, for messages.

    Raises:
      UsageError: it has a field that does not exist, or a value of another type, or is of a later version.
    """
    version, values = saved.get("config_version", 1), saved.get("config")
    if not isinstance(values, dict):
        raise UsageError(f"{where} holds no configuration.")
    if type(version) is not int or not 1 <= version <= CONFIG_VERSION:
        raise UsageError(
            f"{where} has a configuration of version {version!r:.20}; deco_jax {__version__} reads versions 1 to "
            f"{CONFIG_VERSION}. A newer deco_jax may have written it."
        )
    flat = flatten(values)
    for older in range(version, CONFIG_VERSION):
        flat = MIGRATIONS[older](flat)
    unknown = sorted(flat.keys() - FIELDS.keys())
    if unknown:
        raise UsageError(
            f"{where} has a configuration with fields that deco_jax {__version__} does not know: "
            f"{', '.join(unknown)[:500]}. Another version wrote it; read it with that one."
        )
    config = default_config()
    config.update_from_flattened_dict({name: _typed(name, value, where) for name, value in flat.items()})
    return config


def _typed(name: str, value: Any, where: str | os.PathLike) -> Any:
    """A value read from JSON, which has no tuples and may write floats as integers."""
    kind = type(FIELDS[name].default)
    if (kind, type(value)) in ((tuple, list), (float, int)):
        value = kind(value)
    if value is None:  # which stood for any default; files of configuration could say it up to version 4
        value = FIELDS[name].default
    elif type(value) is bool and kind is int:
        value = int(value)
    if type(value) is not kind:
        raise UsageError(f"{where} has a configuration with {name}={value!r:.100}; it must be of type {kind.__name__}.")
    return value
