"""A teacher's features of every image, stored in a folder: what lies in it, and reading it beside the images.

    FOLDER/features-00000.npy …       (K, N, F) float16, K records per file, in the order of the data; NaN if unreadable
          /features-00000.bad.json …  numbers of the records of that file that could not be read, where there are any
          /features.partial.json      what the features are of (`Contents`), until all files are there
          /features.json              the same, and all unreadable records; written last

`prepare` writes it. Images are not augmented, so their features never change. The folder may be in a bucket: of a
record's file just the record is read.
"""

import concurrent.futures
import dataclasses
import io
import json
import math
import threading

import numpy as np
from absl import logging
from ml_collections import ConfigDict

from deco_jax import storage
from deco_jax.data.reading import file_size, read_bytes
from deco_jax.data.records import Source
from deco_jax.errors import UsageError
from deco_jax.storage import AnyPath

VERSION = 1  # of the format
COMPLETE, PARTIAL = "features.json", "features.partial.json"
LONGEST_HEADER = 4096  # bytes of a file that are looked at; the header takes 128
UNKNOWN = "unknown"
_PARSING = threading.Lock()  # Python 3.11's parser, which NumPy takes for headers, fails if threads are in it together
OLD_DECODING = "not turned, transparency dropped (data.orient=False data.background='')"


@dataclasses.dataclass(frozen=True)
class Contents:
    """What the features in a folder are of."""

    identity: str  # of the source: its records' names, labels and order
    records: int
    records_a_file: int  # K; the last file may hold fewer
    tokens: int  # N
    features: int  # F, channels
    image_size: int  # pixels along a side
    patch: int  # pixels along the side that a token stands for
    teacher: str  # hash of its weights
    version: int = VERSION
    decoding: str = ""  # of the source: how its files became images; UNKNOWN in the oldest folders

    @property
    def files(self) -> int:
        """How many there are when all are there."""
        return -(-self.records // self.records_a_file)

    def shape(self, file: int) -> tuple[int, int, int]:
        """Of a file's array: (K, N, F)."""
        rows = min(self.records_a_file, self.records - file * self.records_a_file)
        return rows, self.tokens, self.features


def features_file(folder: AnyPath, file: int) -> AnyPath:
    """Where file number `file` lies."""
    return folder / f"features-{file:05d}.npy"


def bad_file(path: AnyPath) -> AnyPath:
    """Where the unreadable records of the file at `path` are named, if there are any."""
    return path.with_suffix(".bad.json")


def missing_files(folder: AnyPath, contents: Contents) -> list[int]:
    """Numbers of the files that are not there yet."""
    there = storage.retried(f"listing {folder}", lambda: {path.name for path in folder.glob("features-*.npy")})
    return [k for k in range(contents.files) if features_file(folder, k).name not in there]


def read_contents(folder: AnyPath) -> tuple[Contents, list[int], bool] | None:
    """What a folder's features are of, the unreadable records, and whether it is complete; None if nothing says so.

    Raises:
      UsageError: the file that says so is damaged, or of another version of the format.
    """
    paths = (folder / COMPLETE, folder / PARTIAL)
    path = storage.retried(f"looking at {folder}", lambda: next((path for path in paths if path.is_file()), None))
    if path is None:
        return None
    try:
        values = json.loads(read_bytes(str(path)))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read ({error}); prepare into another folder.") from error
    values = values if isinstance(values, dict) else {}
    if values.get("version", VERSION) != VERSION:
        raise UsageError(
            f"{path} is of version {values['version']!r}, and this deco_jax reads version {VERSION}; "
            "prepare into another folder."
        )
    kinds, bad = {field.name: field.type for field in dataclasses.fields(Contents)}, values.get("bad", [])
    values.setdefault("decoding", UNKNOWN)
    fields = {name: values.get(name) for name in kinds}
    wrong = [k for k, value in fields.items() if type(value) is not kinds[k] or (kinds[k] is int and value < 1)]
    if type(bad) is not list or not all(type(record) is int for record in bad):
        wrong.append("bad")
    if wrong:
        raise UsageError(f"{path} is damaged: {', '.join(wrong)}; prepare into another folder.")
    return Contents(**fields), bad, path.name == COMPLETE


class StoredFeatures:
    """The features of every record, read as they are asked for. No file stays open: there may be many."""

    def __init__(self, folder: AnyPath):
        """Opens a folder of which all files are there, and looks at each file's header and size.

        Raises:
          UsageError: a file is damaged.
          TransientError: the storage still fails after a while.
        """
        self.folder = folder
        self.contents, bad, _ = read_contents(folder)
        self.bad = frozenset(bad)
        with concurrent.futures.ThreadPoolExecutor(16) as threads:  # buckets and network folders answer late
            self._starts = list(
                threads.map(lambda file: _check_file(folder, file, self.contents), range(self.contents.files))
            )

    @property
    def digest(self) -> str:
        """A hash of the teacher's weights."""
        return self.contents.teacher

    def __getitem__(self, record: int) -> np.ndarray:
        """Of one record: (N, F) float16.

        Raises:
          ValueError: there are none, since its image could not be read.
          TransientError: the storage still fails after a while.
        """
        if record in self.bad:
            raise ValueError("it has no stored features: the image was unreadable when they were made")
        file, row = divmod(record, self.contents.records_a_file)
        _, *shape = self.contents.shape(file)
        count, dtype = math.prod(shape), np.dtype("<f2")
        offset = self._starts[file] + row * count * dtype.itemsize
        content = read_bytes(str(features_file(self.folder, file)), offset, count * dtype.itemsize)
        return np.frombuffer(content, dtype).reshape(shape)


def _check_file(folder: AnyPath, file: int, contents: Contents) -> int:
    """The byte at which the numbers of a file begin; UsageError if its header or size is not what it must be."""
    path, shape = features_file(folder, file), contents.shape(file)
    try:
        stream = io.BytesIO(read_bytes(str(path), 0, LONGEST_HEADER))
        if (version := np.lib.format.read_magic(stream)) != (1, 0):
            raise ValueError(f"version {version} of the format")
        with _PARSING:
            there, _, dtype = np.lib.format.read_array_header_1_0(stream)
        start, size = stream.tell(), file_size(str(path))
        if there != shape or dtype != np.float16:
            problem = f"holds {there} {dtype}, not {shape} float16"
        elif size != start + math.prod(shape) * dtype.itemsize:
            problem = f"has {size} bytes, not what its header says"
        else:
            return start
    except (OSError, ValueError) as error:
        problem = f"cannot be read ({error})"
    raise UsageError(f"{path} {problem}. Remove {path.name} and run again: {_command(folder)}")


def open_features(config: ConfigDict, source: Source) -> StoredFeatures:
    """The features in `config.teacher.stored`, which must be of `source` as the whole configuration `config` says.

    Raises:
      UsageError: they are not, or not all there, or damaged.
    """
    name = f"teacher.stored={config.teacher.stored}"
    folder = storage.to_path(config.teacher.stored)
    said = read_contents(folder)
    if said is None:
        what = "holds no features" if folder.exists() else "is no folder"
        raise UsageError(f"{name} {what}. Made by: {_command(folder)}. Or the teacher in every step: teacher.stored=''")
    contents, _, complete = said
    if contents.identity != source.identity or contents.records != len(source):
        raise UsageError(
            f"{name} holds features of other images, labels or another order: of {contents.records} records of "
            f"{contents.identity!r}; the data are {len(source)} of {source.identity!r}. Prepare into another folder."
        )
    if contents.decoding == UNKNOWN and source.decoding:
        logging.warning(
            "%s does not say how its images were decoded. Of those with an EXIF orientation or transparency, if there "
            "are any, the features are of other pixels; data.orient=False data.background='' trains as they are.",
            name,
        )
    elif contents.decoding not in (source.decoding, UNKNOWN):
        raise UsageError(
            f"{name} was made of images decoded otherwise: {contents.decoding or OLD_DECODING} there, "
            f"{source.decoding or OLD_DECODING} here. Set data.orient and data.background as they were, or prepare "
            "into another folder."
        )
    size, p, width = config.data.image_size, config.model.patch_size, config.loss.alignment_features
    tokens = (size // p) ** 2
    for field, there, here, setting in (
        ("image_size", contents.image_size, size, f"data.image_size={size}"),
        ("tokens", contents.tokens, tokens, f"{tokens}, with model.patch_size={p}"),
        ("features", contents.features, width, f"loss.alignment_features={width}"),
    ):
        if there != here:
            raise UsageError(f"{name} was made with {field}={there}, and the run has {setting}; they must be equal.")
    missing = missing_files(folder, contents)
    if missing or not complete:
        raise UsageError(
            f"{name} is incomplete: {len(missing)} of {contents.files} files are missing. "
            f"This goes on with them: {_command(folder)}"
        )
    return StoredFeatures(folder)


def _command(folder: AnyPath) -> str:
    return f"deco prepare --config FILE --teacher --out {folder}"
