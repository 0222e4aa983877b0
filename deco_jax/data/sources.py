"""Where do images and what is known about them come from? One table."""

from ml_collections import ConfigDict

from deco_jax.data.digits import Digits
from deco_jax.data.folder import Folder
from deco_jax.data.records import Source
from deco_jax.data.tfds import TFDS

SOURCES = {"digits": Digits, "folder": Folder, "tfds": TFDS}


def open_source(config: ConfigDict) -> Source:
    """The source that `config` (the `data` part of a configuration) names.

    Raises:
      UsageError: it is not there, or holds nothing to train on.
    """
    return SOURCES[config.source](config)
