"""Any set of TensorFlow Datasets with images and labels, without TensorFlow."""

import pickle
from collections.abc import Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from deco_jax import storage
from deco_jax.conditions import ClassLabels
from deco_jax.data.decode import Decoder
from deco_jax.data.records import Record, images_line
from deco_jax.errors import TransientError, UsageError


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

    def load(self, index: int, offset: float | None = None) -> Record:
        """See `Source`."""
        record = storage.retried(f"reading {self.describe(index)}", lambda: self._read(index))
        return {"image": self.decoder(record["image"], offset), "label": np.int32(record["label"])}

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
        return [images_line(len(self), self.class_names)]

    def contents(self) -> dict[str, Any]:
        """See `Source`."""
        return {"source": self.version, "records": len(self), "classes": {}, "names": []}


def _first_sentence(error: Exception) -> str:
    """Of what TFDS says over many lines, with the name that it takes for the one that was meant."""
    lines = [line.strip() for line in str(error).strip().splitlines()] or [type(error).__name__]
    meant = [line for line in lines if line.startswith("Did you mean")]
    return ". ".join([lines[0].partition(" Possible root causes")[0].rstrip(".:"), *meant])
