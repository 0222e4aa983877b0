"""Images in a folder of class folders."""

import collections
import hashlib
import os
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from deco_jax import storage
from deco_jax.conditions import ClassLabels
from deco_jax.data.decode import Decoder
from deco_jax.data.reading import list_files, read_bytes
from deco_jax.data.records import FEW, SUFFIXES, Record, first_of, images_line
from deco_jax.errors import UsageError


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
        lines = [images_line(len(self), self.class_names, np.bincount(self.labels_K).tolist())]
        if self.ignored:
            kinds = [f"{count:,} {kind}" for kind, count in self.ignored.most_common()]
            lines.append(f"Ignored: {self.ignored.total():,} files ({first_of(kinds)}).")
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
