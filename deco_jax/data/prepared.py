"""Images that were cropped once and stored, without loss: what lies in their folder, and training from it.

    FOLDER/images-00000.array_record …  K records per file, in the order of the source
          /images-00000.json …          of that file: bytes, SHA-256, and which records could not be read
          /images.partial.json          what the images are of (`Contents`), until all files are there
          /images.json                  the same, and what the files' own .json say; written last

`deco prepare --images` writes it. A record is the label (int32, little-endian) and the bytes of the crop, row by row,
each pixel as the difference to the one on its left: those become smaller by ArrayRecord's zstd than pixels. A record
is empty where the image could not be read. Identity, labels, order and decoding are those of the source.
"""

import concurrent.futures
import dataclasses
import errno
import json
import os
import resource
import threading
from typing import Any

import numpy as np
from absl import logging
from array_record.python.array_record_module import ArrayRecordReader
from ml_collections import ConfigDict

from deco_jax import storage
from deco_jax.conditions import ClassLabels
from deco_jax.data.decode import check_centred
from deco_jax.data.reading import file_size, read_bytes
from deco_jax.data.records import Record, first_of, images_line
from deco_jax.errors import UsageError
from deco_jax.storage import AnyPath

VERSION = 1  # of the format
MANIFEST, PARTIAL = "images.json", "images.partial.json"
CROP, CODEC = "adm", "sub, zstd"
WRITING = "group_size:1,zstd:1"  # ArrayRecord's options: records are read one by one
READING = "readahead_buffer_size:0"
BUFFER = 2**15  # bytes that a reader keeps
LABEL = 4  # bytes of a record before the pixels
THREADS = 16  # files that are looked at together
SPARE_FILES = 256  # that a process opens beside these


@dataclasses.dataclass(frozen=True)
class Contents:
    """What the images in a folder are of."""

    identity: str  # of the source: its records' names, labels and order
    records: int
    records_a_file: int  # K; the last file may hold fewer
    image_size: int  # pixels along a side
    orient: bool  # data.orient
    background: str  # data.background
    decoding: str  # of the source: how its files became images
    classes: int
    class_names: list[str]
    contents: dict[str, Any]  # of the source, for `compare`
    crop: str = CROP
    codec: str = CODEC
    version: int = VERSION

    @property
    def files(self) -> int:
        """How many there are when all are there."""
        return -(-self.records // self.records_a_file)

    def records_of(self, file: int) -> range:
        """Numbers of a file's records."""
        return range(file * self.records_a_file, min((file + 1) * self.records_a_file, self.records))


@dataclasses.dataclass(frozen=True)
class FileInfo:
    """What is known of a file."""

    bytes: int
    sha256: str
    bad: dict[str, str]  # number of a record that could not be read: its name

    def __post_init__(self):
        if not all(number.isdigit() for number in self.bad):
            raise ValueError(f"bad is {str(self.bad)[:50]!r}")


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What images.json says."""

    contents: Contents
    files: list[FileInfo]  # none while it is not complete

    @property
    def complete(self) -> bool:
        """Whether all files were made."""
        return len(self.files) == self.contents.files


def images_file(folder: AnyPath, file: int) -> AnyPath:
    """Where file number `file` lies."""
    return folder / f"images-{file:05d}.array_record"


def info_file(folder: AnyPath, file: int) -> AnyPath:
    """Where it stands what is known of it."""
    return folder / f"images-{file:05d}.json"


def missing_files(folder: AnyPath, contents: Contents) -> list[int]:
    """Numbers of the files that are not there yet."""
    there = storage.retried(f"listing {folder}", lambda: {path.name for path in folder.glob("images-*.array_record")})
    return [k for k in range(contents.files) if images_file(folder, k).name not in there]


def encode(image_HxWx3: np.ndarray) -> np.ndarray:
    """Of each pixel the difference to the one on its left, modulo 256; any axes before the last three."""
    differences = image_HxWx3.copy()
    differences[..., 1:, :] -= image_HxWx3[..., :-1, :]
    return differences


def decode(record: bytes, size: int) -> Record:
    """A record of a file as one of a source.

    Raises:
      ValueError: it is empty, or not of this size.
    """
    if not record:
        raise ValueError("its image was unreadable when the images were prepared")
    if len(record) != LABEL + 3 * size**2:
        raise ValueError(f"{len(record)} bytes, where {LABEL + 3 * size**2} are expected")
    (label,) = np.frombuffer(record, "<i4", 1)
    differences = np.frombuffer(record, np.uint8, offset=LABEL).reshape(size, size, 3)
    return {"image": np.add.accumulate(differences, axis=1, dtype=np.uint8), "label": np.int32(label)}


def read_manifest(folder: AnyPath) -> Manifest | None:
    """What a folder's images are of; None if nothing says so.

    Raises:
      UsageError: the file that says so is damaged, or of another version of the format.
    """
    paths = (folder / MANIFEST, folder / PARTIAL, folder / MANIFEST)  # once more: another one may just have completed
    path = storage.retried(f"looking at {folder}", lambda: next((path for path in paths if path.is_file()), None))
    if path is None:
        return None
    try:
        values = json.loads(read_bytes(str(path)))
        version = values.get("version")
    except (OSError, ValueError, AttributeError) as error:
        raise UsageError(f"{path} is damaged ({error}); prepare into another folder.") from error
    if version != VERSION:
        raise UsageError(f"{path} is of version {version!r}, and this deco_jax reads version {VERSION}.")
    try:
        contents = checked(Contents, values)
        files = [checked(FileInfo, one) for one in values.get("files", [])]
    except (ValueError, TypeError) as error:
        raise UsageError(f"{path} is damaged ({error}); prepare into another folder.") from error
    for what, there, expected in (
        ("files", len(files) or contents.files, contents.files),
        ("class names", len(contents.class_names), contents.classes),
        ("records of the source", contents.contents.get("records"), contents.records),
    ):
        if there != expected:
            raise UsageError(f"{path} is damaged ({there} {what}, not {expected}); prepare into another folder.")
    return Manifest(contents, files)


def read_info(folder: AnyPath, file: int) -> FileInfo:
    """What is known of a file that is there.

    Raises:
      UsageError: nothing, as what says so is damaged or gone.
    """
    path = info_file(folder, file)
    try:
        return checked(FileInfo, json.loads(read_bytes(str(path))))
    except (OSError, ValueError, AttributeError) as error:
        name = images_file(folder, file).name
        raise UsageError(f"{path} cannot be read ({error}); remove it and {name}, which is then made anew.") from error


def checked(kind: type, values: Any) -> Any:
    """A dataclass from JSON; ValueError if a field is missing or of another type, or a count is below 1."""
    if type(values) is not dict:
        raise ValueError(f"{str(values)[:50]!r} has no fields")
    types = {field.name: field.type for field in dataclasses.fields(kind)}
    found = {name: values.get(name) for name in types}
    for name, value in found.items():
        base = getattr(types[name], "__origin__", types[name])
        if type(value) is not base or (base is int and value < 1):
            raise ValueError(f"{name} is {str(value)[:50]!r}")
    return kind(**found)


class Prepared:
    """Images of a folder that `deco prepare --images` has made, in place of the source that they were made of."""

    def __init__(self, config: ConfigDict):
        where = f"data.path={config.path!r}"
        self.folder = storage.to_path(config.path)
        with storage.reading(self.folder):
            if not config.path or not storage.retried(f"looking at {self.folder}", self.folder.exists):
                raise UsageError(f"{where} is no folder; `deco prepare --images --out DIR` makes one.")
            manifest = read_manifest(self.folder)
            if manifest is None:
                raise UsageError(f"{where} holds no {MANIFEST}; `deco prepare --images --out DIR` makes such a folder.")
            contents = manifest.contents
            _check_fits(where, contents, config)
            missing = missing_files(self.folder, contents)
            if missing or not manifest.complete:
                left = f"{len(missing) or contents.files} of {contents.files} files are missing"
                raise UsageError(f"{where} is incomplete: {left}. {_makes(config.path, 'them')}")
            _check_sizes(where, self.folder, manifest, config.path)
        self.manifest, self.size = manifest, contents.image_size
        self.identity, self.decoding = contents.identity, contents.decoding
        self.class_names, self.condition = tuple(contents.class_names), ClassLabels(contents.classes)
        self._open_readers()

    def _open_readers(self) -> None:
        self._readers: dict[int, ArrayRecordReader] = {}
        self._lock = threading.Lock()
        _allow_open_files(self.manifest.contents.files + SPARE_FILES)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_readers", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._open_readers()

    def __len__(self) -> int:
        return self.manifest.contents.records

    def load(self, index: int, offset: float | None = None) -> Record:
        """See `Source`."""
        file, row = divmod(index, self.manifest.contents.records_a_file)
        record = storage.retried(f"reading {self.describe(index)}", lambda: self._read(file, row))
        found, classes = decode(record, self.size), self.condition.num_classes
        if not 0 <= found["label"] < classes:
            raise ValueError(f"its label is {found['label']}, and there are {classes} classes")
        return found

    def _read(self, file: int, row: int) -> bytes:
        try:
            reader = self._readers.get(file) or self._open_reader(file)
            return reader.read([row])[0]
        except Exception as error:
            if "hash mismatch" in str(error):
                makes = _makes(str(self.folder), "it anew", " --verify")
                raise ValueError(f"its bytes were altered. {makes}") from error
            self._readers.pop(file, None)  # a reader that failed once may fail for good
            path = images_file(self.folder, file)
            if not storage.is_remote(path) and not os.path.exists(path):
                if not os.path.isdir(self.folder):  # as one that is mounted may be for a while
                    raise OSError(errno.ESTALE, "its folder is gone", str(self.folder)) from error
                raise UsageError(f"{path} is not there any more. {_makes(str(self.folder), 'it anew')}") from error
            raise

    def _open_reader(self, file: int) -> ArrayRecordReader:
        with self._lock:  # several threads may need it at the same time
            if file not in self._readers:
                path = str(images_file(self.folder, file))
                self._readers[file] = ArrayRecordReader(path, READING, file_reader_buffer_size=BUFFER)
            return self._readers[file]

    def describe(self, index: int) -> str:
        """See `Source`."""
        file, row = divmod(index, self.manifest.contents.records_a_file)
        name = self.manifest.files[file].bad.get(str(index))
        return f"{images_file(self.folder, file)} record {row}" + (f", {name}" if name else "")

    def summary(self) -> list[str]:
        """See `Source`."""
        total = sum(file.bytes for file in self.manifest.files)
        kept = f"Prepared: {len(self.manifest.files):,} files, {total / 1e9:,.1f} GB, in {self.folder}."
        return [images_line(len(self), self.class_names), kept]

    def contents(self) -> dict[str, Any]:
        """See `Source`: of the one that the images were made of."""
        return self.manifest.contents.contents


def _check_fits(where: str, contents: Contents, config: ConfigDict) -> None:
    """Raises UsageError if the images are not what a run of `config` would make of the source."""
    check_centred(config.crop, where)
    if config.min_side:  # no error, as older versions took no notice of it
        logging.warning("data.min_side=%d does nothing: %s has the crops of all images.", config.min_side, where)
    for name, there, here in (("crop", contents.crop, CROP), ("codec", contents.codec, CODEC)):
        if there != here:
            raise UsageError(f"{where} was prepared with {name}={there!r}; this deco_jax reads {here!r}.")
    for name in ("image_size", "orient", "background"):
        there, here = getattr(contents, name), config[name]
        if there != here:
            raise UsageError(
                f"{where} was prepared with data.{name}={there!r}, and the run has {here!r}; they must be equal."
            )


def _check_sizes(where: str, folder: AnyPath, manifest: Manifest, path: str) -> None:
    """Raises UsageError if a file has not as many bytes as it must have."""

    def size(file: int) -> int:
        return file_size(str(images_file(folder, file)))

    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:  # buckets and network folders answer late
        sizes = list(pool.map(size, range(len(manifest.files))))
    wrong = [
        f"{images_file(folder, k).name} ({there:,} bytes of {file.bytes:,})"
        for k, (there, file) in enumerate(zip(sizes, manifest.files, strict=True))
        if there != file.bytes
    ]
    if wrong:
        raise UsageError(f"{where} has damaged files: {first_of(wrong)}. {_makes(path, 'them anew')}")


def _makes(path: str, what: str, flag: str = "") -> str:
    """The command, to which the data must be added, which a manifest does not name."""
    data = "--config.data.source=… --config.data.path=…"
    return f"This makes {what}: deco prepare --images --config FILE --out {path}{flag} {data}"


def _allow_open_files(wanted: int) -> None:
    """A reader keeps its file open, and there may be more than a process may open unless it asks."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, most), hard))
