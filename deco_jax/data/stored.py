"""Numbers of one shape for every record, stored in a folder: what lies in it, and reading them beside the images.

    FOLDER/KIND-00000.npy …       (K, N, F) numbers of two bytes, K rows per file, in the order of the data
          /KIND-00000.bad.json …  numbers of the records of that file that could not be read, where there are any
          /KIND.partial.json      what they are of (`Contents`), until all files are there
          /KIND.json              the same, and all unreadable records; written last

The kinds are a teacher's `features` and a text encoder's `states`; `prepare` writes them. What they are computed of is
not augmented, so they never change. The folder may be in a bucket: of a record's file just the record is read.
"""

import concurrent.futures
import dataclasses
import io
import json
import math
import threading
from collections.abc import Mapping
from typing import Any, ClassVar, Generic, Self, TypeVar

import numpy as np

from deco_jax import storage
from deco_jax.data.reading import file_size, read_bytes
from deco_jax.data.records import Source
from deco_jax.errors import UsageError
from deco_jax.storage import AnyPath

LONGEST_HEADER = 4096  # bytes of a file that are looked at; the header takes 128
_PARSING = threading.Lock()  # Python 3.11's parser, which NumPy takes for headers, fails if threads are in it together


@dataclasses.dataclass(frozen=True)
class Contents:
    """What the numbers in a folder are of. A kind adds fields, `version` of its format among them."""

    identity: str  # of the source: its records' names, labels or captions' places, and their order
    records: int
    records_a_file: int  # K; the last file may hold fewer
    tokens: int  # N
    features: int  # F, channels

    kind: ClassVar[str]  # as files are called
    option: ClassVar[str]  # of `deco prepare`, which makes them
    setting: ClassVar[str]  # of a run that reads them
    made_of: ClassVar[str]  # what a source may have others of
    dtype: ClassVar[np.dtype]
    older: ClassVar[Mapping[str, Any]] = {}  # fields that older folders do not say, and what then counts

    @property
    def rows(self) -> int:
        """Of all files together."""
        return self.records

    @property
    def files(self) -> int:
        """How many there are when all are there."""
        return -(-self.rows // self.records_a_file)

    def shape(self, file: int) -> tuple[int, int, int]:
        """Of a file's array: (K, N, F)."""
        return min(self.records_a_file, self.rows - file * self.records_a_file), self.tokens, self.features

    def differences(self, there: Self, whole: bool) -> list[str]:
        """In words, what a folder's contents have otherwise; `whole`: all of its files are there."""
        del whole  # matters to kinds with older folders
        theirs, ours = dataclasses.asdict(there), dataclasses.asdict(self)
        return [f"{name}: {theirs[name]} there, {ours[name]} here" for name in ours if theirs[name] != ours[name]]


C = TypeVar("C", bound=Contents)


class Damaged(UsageError):
    """A file has another header or size than it must have."""


def array_file(kind: str, folder: AnyPath, file: int) -> AnyPath:
    """Where file number `file` lies."""
    return folder / f"{kind}-{file:05d}.npy"


def bad_file(path: AnyPath) -> AnyPath:
    """Where the unreadable records of the file at `path` are named, if there are any."""
    return path.with_suffix(".bad.json")


def about_file(kind: str, folder: AnyPath, complete: bool = True) -> AnyPath:
    """Where it says what the numbers are of, when all files are there, and until then."""
    return folder / (f"{kind}.json" if complete else f"{kind}.partial.json")


def stored_as(dtype: np.dtype) -> np.dtype:
    """Of the numbers in the files. What NumPy's format does not know, such as bfloat16, lies there as integers."""
    return dtype if dtype.kind == "f" else np.dtype("<u2")


def missing_files(folder: AnyPath, contents: Contents) -> list[int]:
    """Numbers of the files that are not there yet."""
    kind = contents.kind
    there = storage.retried(f"listing {folder}", lambda: {path.name for path in folder.glob(f"{kind}-*.npy")})
    return [k for k in range(contents.files) if array_file(kind, folder, k).name not in there]


def read_contents(kind: type[C], folder: AnyPath) -> tuple[C, list[int], bool] | None:
    """What a folder's numbers are of, the unreadable records, and whether it is complete; None if nothing says so.

    Raises:
      UsageError: the file that says so is damaged, or of another version of the format.
    """
    paths = [about_file(kind.kind, folder, complete) for complete in (True, False)]
    path = storage.retried(f"looking at {folder}", lambda: next((path for path in paths if path.is_file()), None))
    if path is None:
        return None
    try:
        values = json.loads(read_bytes(str(path)))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read ({error}); prepare into another folder.") from error
    values = dict(kind.older) | (values if isinstance(values, dict) else {})
    version = kind.version
    if values.get("version", version) != version:
        raise UsageError(
            f"{path} is of version {values['version']!r}, and this deco_jax reads version {version}; "
            "prepare into another folder."
        )
    kinds, bad = {field.name: field.type for field in dataclasses.fields(kind)}, values.get("bad", [])
    fields = {name: values.get(name) for name in kinds}
    wrong = [k for k, value in fields.items() if type(value) is not kinds[k] or (kinds[k] is int and value < 1)]
    if type(bad) is not list or not all(type(record) is int for record in bad):
        wrong.append("bad")
    if wrong:
        raise UsageError(f"{path} is damaged: {', '.join(wrong)}; prepare into another folder.")
    return kind(**fields), bad, path == paths[0]


class Stored(Generic[C]):
    """The numbers of every record, read as they are asked for. No file stays open: there may be many."""

    kind: ClassVar[type[Contents]]

    def __init__(self, folder: AnyPath):
        """Opens a folder of which all files are there, and looks at each file's header and size.

        Raises:
          UsageError: a file is damaged.
          TransientError: the storage still fails after a while.
        """
        self.folder = folder
        self.contents, bad, _ = read_contents(self.kind, folder)
        self.bad = frozenset(bad)
        with concurrent.futures.ThreadPoolExecutor(16) as threads:  # buckets and network folders answer late
            self._starts = list(
                threads.map(lambda file: check_file(folder, file, self.contents), range(self.contents.files))
            )

    def __getitem__(self, record: int) -> np.ndarray:
        """Of one record: (N, F).

        Raises:
          ValueError: there are none, since what they are computed of could not be read.
          TransientError: the storage still fails after a while.
        """
        kind = self.contents.kind
        if record in self.bad:
            raise ValueError(f"it has no stored {kind}: it was unreadable when they were made")
        file, row = divmod(record, self.contents.records_a_file)
        _, *shape = self.contents.shape(file)
        count, dtype = math.prod(shape), self.contents.dtype
        offset = self._starts[file] + row * count * dtype.itemsize
        content = read_bytes(str(array_file(kind, self.folder, file)), offset, count * dtype.itemsize)
        return np.frombuffer(content, dtype).reshape(shape)


def check_file(folder: AnyPath, file: int, contents: Contents) -> int:
    """The byte at which the numbers of a file begin.

    Raises:
      Damaged: its header or size is not what it must be, or it is not there.
      UsageError: it may not be read.
    """
    path, shape, expected = array_file(contents.kind, folder, file), contents.shape(file), stored_as(contents.dtype)
    anew = f"This makes it anew: {_command(folder, contents)}"
    try:
        content, size = read_bytes(str(path), 0, LONGEST_HEADER), file_size(str(path))
    except FileNotFoundError as error:
        raise Damaged(f"{path} is not there. {anew}") from error
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error}). {anew}") from error
    try:
        stream = io.BytesIO(content)
        if (version := np.lib.format.read_magic(stream)) != (1, 0):
            raise ValueError(f"version {version} of the format")
        with _PARSING:
            there, _, dtype = np.lib.format.read_array_header_1_0(stream)
        start = stream.tell()
        if there != shape or dtype != expected:
            problem = f"holds {there} {dtype}, not {shape} {expected}"
        elif size != start + math.prod(shape) * dtype.itemsize:
            problem = f"has {size} bytes, not what its header says"
        else:
            return start
    except ValueError as error:
        problem = f"cannot be read ({error})"
    raise Damaged(f"{path} {problem}. {anew}")


def open_contents(kind: type[C], value: str, source: Source) -> tuple[AnyPath, C, bool]:
    """A folder, which a run's setting names, what its numbers are of, and whether it is complete.

    Args:
      kind: of the numbers.
      value: of the setting.
      source: what they must be of.

    Raises:
      UsageError: there are none, or they are of other records.
    """
    name, folder = f"{kind.setting}={value}", storage.to_path(value)
    with storage.reading(folder):
        said = read_contents(kind, folder)
    if said is None:
        what = f"holds no {kind.kind}" if folder.exists() else "is no folder"
        raise UsageError(
            f"{name} {what}. Made by: {_command(folder, kind)}. Or computed in every step: {kind.setting}=''"
        )
    contents, _, complete = said
    if contents.identity != source.identity or contents.records != len(source):
        raise UsageError(
            f"{name} holds {kind.kind} of other {kind.made_of} or another order: of {contents.records} records of "
            f"{contents.identity!r}; the data are {len(source)} of {source.identity!r}. Prepare into another folder."
        )
    return folder, contents, complete


def check_sizes(name: str, contents: Contents, wanted: Mapping[str, tuple[int, str]]) -> None:
    """Raises UsageError if a field of `contents` has not the value that it must have, for a reason in words."""
    for field, (here, setting) in wanted.items():
        if (there := getattr(contents, field)) != here:
            raise UsageError(f"{name} was made with {field}={there}, and the run has {setting}; they must be equal.")


def check_complete(name: str, folder: AnyPath, contents: Contents, complete: bool) -> None:
    """Raises UsageError if not all files are there."""
    missing = missing_files(folder, contents)
    if missing or not complete:
        raise UsageError(
            f"{name} is incomplete: {len(missing)} of {contents.files} files are missing. "
            f"This goes on with them: {_command(folder, contents)}"
        )


def _command(folder: AnyPath, kind: Contents | type[Contents]) -> str:
    return f"deco prepare --config FILE {kind.option} --out {folder}"
