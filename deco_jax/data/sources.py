"""Where do images and what is known about them come from? One table."""

from ml_collections import ConfigDict

from deco_jax.data.captions import CaptionFolder
from deco_jax.data.digits import Digits
from deco_jax.data.folder import Folder
from deco_jax.data.parquet import Parquet
from deco_jax.data.prepared import Prepared
from deco_jax.data.records import Source
from deco_jax.data.tars import Tars
from deco_jax.data.tfds import TFDS
from deco_jax.data.webdataset import WebDataset
from deco_jax.storage import AnyPath

SOURCES = {
    "captions": CaptionFolder,
    "digits": Digits,
    "folder": Folder,
    "parquet": Parquet,
    "prepared": Prepared,
    "tars": Tars,
    "tfds": TFDS,
    "webdataset": WebDataset,
}
INDEXED = (CaptionFolder, Folder, Tars, WebDataset)  # make an index of their images at the first start


def open_source(config: ConfigDict, beside: AnyPath | None = None) -> Source:
    """The source that `config` (the `data` part of a configuration) names.

    Args:
      config: that part.
      beside: a folder of the job's; gets the index of the images where the folder of the data cannot be written.

    Raises:
      UsageError: it is not there, or holds nothing to train on.
    """
    kind = SOURCES[config.source]
    return kind(config, beside) if kind in INDEXED else kind(config)
