"""What does a configuration file with overrides on the command line say, and where is it wrong?"""

import difflib
import pathlib
import re
from collections.abc import Sequence

from absl import flags
from ml_collections import ConfigDict, config_flags

from deco_jax.config.check import check_config
from deco_jax.config.fields import FIELDS, flatten
from deco_jax.errors import UsageError


def load_config(path: str, overrides: Sequence[str] = ()) -> ConfigDict:
    """Reads a configuration file, applies `--config.<part>.<field>=<value>` overrides, and checks the result.

    Args:
      path: a Python file with `get_config()`, or `file.py:argument` for `get_config(argument)`.
      overrides: what stood on the command line.

    Raises:
      UsageError: no such file or field, a value of the wrong type, or one out of range.
    """
    file = path.partition(":")[0]
    if not pathlib.Path(file).is_file():
        known = ", ".join(sorted(str(p) for p in pathlib.Path("configs").glob("*.py")))
        raise UsageError(f"--config={path} is no file." + (f" Here are: {known}." if known else ""))
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=["deco"])
    try:
        values(["deco", f"--config={path}"])
        config = values.config
    except (Exception, SystemExit) as error:  # the file is a program; whatever it raises is the answer to "why not"
        raise UsageError(f"{path}: {_last_line(error)}") from error
    if not isinstance(config, ConfigDict) or flatten(config).keys() != FIELDS.keys():
        raise UsageError(f"{path}: get_config() must start from deco_jax.config.default_config() and return it.")
    for override in overrides:
        config = _override(config, override)
    check_config(config)
    return config


def _override(config: ConfigDict, override: str) -> ConfigDict:
    name, equals, value = override.partition("=")
    if not name.startswith("--config.") or not equals:
        raise UsageError(f"{override} is not understood; settings are given as --config.<part>.<field>=<value>.")
    field, fields = name.removeprefix("--config."), flatten(config)
    if field not in fields:
        near = difflib.get_close_matches(field, fields, n=1, cutoff=0)
        raise UsageError(f"{name} does not exist; nearest: --config.{near[0]}.")
    values = flags.FlagValues()
    config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=["deco", override])
    try:
        values(["deco", override])
    except (flags.Error, TypeError, ValueError) as error:
        kind = type(fields[field]).__name__
        raise UsageError(f"{name}={value} is not of type {kind}; its value now is {fields[field]!r}.") from error
    return values.config


def _last_line(error: BaseException) -> str:
    """The library's message for a field that does not exist ends with "Did you mean …"; it arrives as a repr."""
    lines = [line.strip(" '") for line in str(error).replace("\\n", "\n").splitlines() if line.strip(" '")]
    return re.sub(r"^[\w.]+Error: ", "", lines[-1]) if lines else f"it raises {type(error).__name__}."
