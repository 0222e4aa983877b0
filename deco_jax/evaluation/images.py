"""Which images does a user want looked at? Those of an .npz, of a folder of pictures, or a data set's as in training.

All are read a few at a time. A picture that cannot be read is an error here, which names it: a metric of the others
would be a metric of something else. Only of a data set, whose broken records training skips, are they skipped.
"""

import concurrent.futures
import dataclasses
import hashlib
import json
import os
import threading
import zipfile
import zlib
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
from ml_collections import ConfigDict
from PIL import UnidentifiedImageError

from deco_jax import storage
from deco_jax.data.decode import check_every_size, decode
from deco_jax.data.pipeline import BadRecords
from deco_jax.data.reading import list_files, read_bytes
from deco_jax.data.records import SUFFIXES
from deco_jax.data.sources import open_source
from deco_jax.errors import TransientError, UsageError
from deco_jax.sampling.settings import Sampling
from deco_jax.storage import AnyPath

ARRAY = "arr_0"  # of an .npz, as the ADM suite reads it
MADE = ("generation.json", "sample.json")  # how `deco generate` and `deco sample` drew the images beside it
THREADS = 8  # that read pictures


class Images(Protocol):
    """Images of one size, by number."""

    source: str  # where they are, for people
    identity: str  # changes when other images are there, as far as that shows without reading them
    image_size: tuple[int, int]  # height and width in pixels
    settings: dict[str, Any] | None  # how they were drawn, if that is said beside them
    bad: set[int]  # numbers of images that could not be read so far; (0, 0, 0) stands in their pixels

    def __len__(self) -> int: ...

    def read(self, start: int, stop: int) -> np.ndarray:
        """Images [start, stop): (K, H, W, 3) uint8. Quickest in rising order; from one thread at a time."""
        ...


def open_images(path: str) -> Images:
    """The images at `path`: NAME.npz, a folder of pictures (also below it), or one that `deco generate` has made.

    Raises:
      UsageError: there are none, or they are none that can be used.
    """
    where = storage.to_path(path)
    if where.name.endswith(".npz"):
        return ArrayImages(where)
    with storage.reading(where):
        if not storage.retried(f"looking at {where}", where.is_dir):
            raise UsageError(f"{path} is neither NAME.npz nor a folder of pictures.")
        names = storage.retried(f"listing {where}", lambda: {entry.name for entry in where.iterdir()})
    if "samples.npz" in names:
        return ArrayImages(where / "samples.npz")
    if "generation.json" in names:
        raise UsageError(f"{path} is not finished: it lacks samples.npz. Run the same `deco generate` again.")
    return FolderImages(where)


def holds_images(path: str) -> bool:
    """Whether `path` is for `open_images`: NAME.npz, or a folder that holds neither a run's checkpoints nor weights."""
    where = storage.to_path(path)
    if where.name.endswith(".npz"):
        return True
    with storage.reading(where):
        if not storage.retried(f"looking at {where}", where.is_dir):
            return False
        names = storage.retried(f"listing {where}", lambda: [entry.name for entry in where.iterdir()])
    if {"samples.npz", *MADE} & set(names):
        return True
    ours = {"checkpoints", "config.json", "metrics.jsonl", "_CHECKPOINT_METADATA"} & set(names)
    weights = any(name.endswith((".safetensors", ".bin", ".index.json")) for name in names)
    steps = where.name == "checkpoints" and any(name.isdigit() for name in names)
    return not (ours or weights or steps)


class ArrayImages:
    """`arr_0` of an .npz, compressed or not, of which nothing but the rows that are asked for is in memory."""

    def __init__(self, path: AnyPath):
        self.source, self.bad, self.lock = str(path), set(), threading.Lock()
        with storage.reading(path):
            if not path.exists():
                raise UsageError(f"{path} does not exist.")
        self.path = storage.local_copy(path)
        try:
            with storage.reading(path):
                self.archive = zipfile.ZipFile(self.path)
                self._open()
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, ValueError) as error:
            if isinstance(error, UsageError):
                raise
            raise UsageError(f"{path} is no .npz that can be read ({error}).") from error
        info = self.archive.getinfo(f"{ARRAY}.npy")
        self.identity = f"array {self.shape} crc32 {info.CRC:08x}"
        self.image_size = self.shape[1:3]
        self.settings = _settings_beside(path)

    def _open(self) -> None:
        """Opens the array's member, and reads its header."""
        names = [name.removesuffix(".npy") for name in self.archive.namelist()]
        if ARRAY not in names:
            raise UsageError(f"{self.source} holds {', '.join(names) or 'nothing'}; images are expected as {ARRAY}.")
        self.member = self.archive.open(f"{ARRAY}.npy")
        version = np.lib.format.read_magic(self.member)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        if version not in read:
            raise UsageError(f"{self.source}: {ARRAY} has version {version} of NumPy's header; 1 and 2 can be read.")
        self.shape, fortran, dtype = read[version](self.member)
        self.start = self.member.tell()
        _check_array(f"{self.source}: {ARRAY}", self.shape, dtype, fortran)

    def __len__(self) -> int:
        return self.shape[0]

    def read(self, start: int, stop: int) -> np.ndarray:
        """See `Images`."""
        height, width = self.image_size
        row = height * width * 3
        try:
            with self.lock, storage.reading(self.path):
                self.member.seek(self.start + start * row)
                content = self.member.read((stop - start) * row)
        except (zipfile.BadZipFile, EOFError, zipfile.zlib.error) as error:
            raise UsageError(f"{self.source} is damaged between images {start} and {stop} ({error}).") from error
        if len(content) != (stop - start) * row:
            raise UsageError(f"{self.source} ends within the images {start} to {stop}; it was not written to the end.")
        return np.frombuffer(content, np.uint8).reshape(-1, height, width, 3)


def _check_array(name: str, shape: tuple[int, ...], dtype: np.dtype, fortran: bool) -> None:
    expected = "expected uint8 (N, height, width, 3)"
    if dtype.hasobject:
        raise UsageError(f"{name} holds Python objects, which are not read; {expected}.")
    if len(shape) != 4 or 3 not in (shape[1], shape[3]):
        raise UsageError(f"{name} has the shape {shape}; {expected}.")
    if shape[3] != 3:
        raise UsageError(f"{name} has the shape {shape}, channels first; {expected}: save x.transpose(0, 2, 3, 1).")
    if dtype != np.uint8:
        hint = "; of values in [-1, 1], save ((x + 1) * 127.5).round().clip(0, 255).astype(np.uint8)"
        raise UsageError(f"{name} is {dtype}; {expected}{hint if dtype.kind == 'f' else ''}.")
    if fortran:
        raise UsageError(f"{name} lies column by column; save np.ascontiguousarray(x).")
    if min(shape) < 1:
        raise UsageError(f"{name} has the shape {shape}, and so no images.")


class FolderImages:
    """Pictures below a folder in the order of their names, as eight-bit RGB, upright, on white (`data.decode`)."""

    def __init__(self, root: AnyPath):
        self.source, self.bad = str(root), set()
        self.settings = _settings_beside(root / "any")
        self.names = [name for name in _pictures(root) if not (self.settings and name == "grid.png")]
        if not self.names:
            endings = ", ".join(SUFFIXES)
            raise UsageError(f"{root} holds no pictures, with names that end with {endings}; nor is it a network.")
        self.image_size = self._load(0).shape[:2]
        digest = hashlib.sha256(chr(0).join(self.names).encode()).hexdigest()[:16]
        self.identity = f"folder of {len(self.names)} pictures, names {digest}"

    def __len__(self) -> int:
        return len(self.names)

    def _load(self, number: int) -> np.ndarray:
        path = f"{self.source.rstrip('/')}/{self.names[number]}"
        try:
            return np.asarray(decode(read_bytes(path), orient=True, background="white"))
        except (TransientError, UsageError, MemoryError):
            raise
        except Exception as error:  # whatever a decoder throws at a broken file
            unknown = isinstance(error, UnidentifiedImageError)  # whose message names an object
            reason = "it is no picture" if unknown else f"{type(error).__name__}: {error}"
            raise UsageError(f"{path} cannot be read ({reason}); mend or remove it.") from error

    def read(self, start: int, stop: int) -> np.ndarray:
        """See `Images`; UsageError if a picture is broken or has another size than the first."""
        with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
            images = list(pool.map(self._load, range(start, stop)))
        for number, image in enumerate(images, start):
            if image.shape[:2] != self.image_size:
                raise UsageError(
                    f"{self.source} holds images of several sizes: {self.names[0]} has {size_text(self.image_size)} "
                    f"pixels, and {self.names[number]} {size_text(image.shape[:2])}; all must have one size."
                )
        return np.stack(images)


class SourceImages:
    """A data set as training sees it: the same crop, every record once and in order; the unreadable ones are skipped.

    Raises UsageError at more of these than `data.max_bad_records` and `data.max_bad_share` allow.
    """

    settings = None

    def __init__(self, config: ConfigDict, beside: AnyPath | None = None):
        """`config`: the `data` part of a configuration; `beside`: see `open_source`."""
        check_every_size(config.min_side, "statistics of data")
        self.records, self.image_size = open_source(config, beside), (config.image_size, config.image_size)
        self.limit = BadRecords(self.records, config)
        where = {"digits": "digits", "tfds": f"{config.name}/{config.split}"}
        self.source = where.get(config.source, config.path)
        self.identity = f"{self.records.identity} {config.image_size} {self.records.decoding}".strip()

    @property
    def bad(self) -> set[int]:
        """See `Images`."""
        return self.limit.seen

    def __len__(self) -> int:
        return len(self.records)

    def _load(self, number: int) -> np.ndarray | None:
        try:
            return self.records.load(number)["image"]
        except (TransientError, UsageError, MemoryError):  # say nothing about the record
            raise
        except Exception:  # whatever a decoder throws at a broken file; `limit` says what
            return None

    def read(self, start: int, stop: int) -> np.ndarray:
        """See `Images`."""
        with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
            images = list(pool.map(self._load, range(start, stop)))
        unreadable = [number for number, image in enumerate(images, start) if image is None]
        self.limit.check(np.array(unreadable, int))
        black = np.zeros((*self.image_size, 3), np.uint8)
        return np.stack([black if image is None else image for image in images])


def size_text(image_size: tuple[int, int]) -> str:
    """(28, 32) → "28×32": height and width."""
    return "{}×{}".format(*image_size)


def _pictures(root: AnyPath) -> Iterator[str]:
    """Names of the pictures below a folder, in order; nothing hidden."""
    with storage.reading(root):
        for name in list_files(root):
            parts = name.split("/")
            if os.path.splitext(name)[1].lower() in SUFFIXES and not any(part.startswith(".") for part in parts):
                yield name


def _settings_beside(path: AnyPath) -> dict[str, Any] | None:
    """What generation.json or sample.json beside a file says; None if there is none of ours."""
    needed = {"source", "seed", "labels", *(field.name for field in dataclasses.fields(Sampling))}
    for name in MADE:
        file = path.parent / name
        with storage.reading(file):
            text = storage.retried(f"reading {file}", lambda file=file: file.read_text() if file.exists() else "")
        try:
            said = json.loads(text or "null")
        except ValueError:  # of somebody else
            said = None
        if isinstance(said, dict) and needed <= said.keys():
            return said
    return None
