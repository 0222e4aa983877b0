"""Captioned images in parquet files, as Hugging Face keeps data sets: which row of which file is which record?"""

import collections
import concurrent.futures
import dataclasses
import hashlib
import json
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from deco_jax import storage
from deco_jax.conditions import Captions
from deco_jax.data.decode import Decoder
from deco_jax.data.reading import file_size, list_files, read_bytes
from deco_jax.data.records import FEW, Record, first_of
from deco_jax.data.wording import Wording, captions_line
from deco_jax.errors import UsageError

ENDING = ".parquet"
IMAGE = "image"  # the column: bytes, or a struct of which one field has this name:
BYTES = "bytes"
THREADS = 16  # files whose ends are read together
GROUPS, FOOTERS, MOST_BYTES = 4, 256, 2**28  # of files, that a process keeps; and of its groups together
EXPECTED = (
    f"expected is a folder of {ENDING} files with the column {IMAGE!r}, bytes of a file, and one of captions, "
    "which data.caption_field names"
)


@dataclasses.dataclass(frozen=True)
class Rows:
    """A group of rows, of which one is read only with all others."""

    number: int  # among all groups
    file: int
    group: int  # its number in the file
    first: int  # row in the file
    rows: int


class Parquet:
    """Parquet files at any depth of a folder in the order of their names, or one file; one record per row.

    To read a row is to read its group; a process keeps the last few. So files with small groups are read much faster
    in a shuffled order. A row without image or caption is an unreadable record. The files may be in a bucket.
    """

    class_names = ()

    def __init__(self, config: ConfigDict):
        _pyarrow()
        where = f"data.path={config.path!r}"
        path = storage.to_path(config.path)
        self.decoder, self.wording = Decoder.from_config(config), Wording.from_config(config)
        self.condition, self.decoding = Captions(), str(self.decoder)
        with storage.reading(path):
            if not config.path or not storage.retried(f"looking at {path}", path.exists):
                raise UsageError(f"{where} does not exist; {EXPECTED}.")
            if storage.retried(f"looking at {path}", path.is_dir):
                root, found = path, list_files(path)
                self.files = [name for name in found if name.endswith(ENDING) and not _is_hidden(name)]
            else:
                root, found, self.files = path.parent, [path.name], [path.name]
            if not self.files:
                holds = f"holds files like {first_of(found[:3])}" if found else "is empty"
                raise UsageError(f"{where} {holds}; {EXPECTED}.")
            self.root, self.ignored = str(root).rstrip("/"), len(found) - len(self.files)
            with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
                ends = list(pool.map(self._look_at, self.files))
        self.groups = []
        for file, (rows, *_) in enumerate(ends):
            firsts = np.cumsum([0, *rows]).tolist()
            for k, count in enumerate(rows):
                self.groups += [Rows(len(self.groups), file, k, firsts[k], count)] if count else []
        self.starts = np.cumsum([0, *(group.rows for group in self.groups)])
        if not len(self):
            raise UsageError(f"{where} holds {len(self.files):,} files without a row; {EXPECTED}.")
        self.bytes = sum(size for _, size, _ in ends)
        per_file = [[name, sum(rows), size] for name, (rows, _, size) in zip(self.files, ends, strict=True)]
        self._sizes = [size for *_, size in ends]
        self._digest = hashlib.sha256(json.dumps([self.wording.field, per_file]).encode()).hexdigest()
        self.identity = f"parquet {self._digest}"
        self._groups, self._texts = Kept(GROUPS), Kept(GROUPS)
        self._footers = Kept(FOOTERS)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def load(self, index: int, offset: float | None = None) -> Record:
        """See `Source`."""
        group, row = self._place(index)
        table = self._groups.get(group.number, lambda: self._read(group, IMAGE, self.wording.field))
        content = table[IMAGE][row].as_py()
        if isinstance(content, dict):
            content = content[BYTES]
        if content is None:
            raise ValueError("it has no image")
        return {"image": self.decoder(content, offset), "caption": self.wording(table[self.wording.field][row].as_py())}

    def caption(self, index: int) -> str:
        """Of a record, whose image is not read; raises as `load` does."""
        group, row = self._place(index)
        table = self._texts.get(group.number, lambda: self._read(group, self.wording.field))
        return self.wording(table[self.wording.field][row].as_py())

    def describe(self, index: int) -> str:
        """See `Source`."""
        group, row = self._place(index)
        return f"{self.root}/{self.files[group.file]}: row {group.first + row}"

    def summary(self) -> list[str]:
        """See `Source`."""
        ignored = [f"Ignored: {self.ignored:,} files (no {ENDING})."] if self.ignored else []
        rows, size = len(self) / len(self.groups), self.bytes / len(self.groups) / 1e6
        groups = (
            f"Parquet: {len(self.files):,} files, {len(self.groups):,} groups of about {rows:,.0f} rows and "
            f"{size:,.1f} MB, each read as a whole."
        )
        return [captions_line(len(self), self.caption), *ignored, groups]

    def contents(self) -> dict[str, Any]:
        """See `Source`."""
        names = [f"{file}: row {row}" for file, row in self._rows()] if len(self) <= FEW else []
        return {"source": "parquet", "records": len(self), "classes": {}, "names": names, "captions": self._digest[:8]}

    def _rows(self) -> list[tuple[str, int]]:
        return [(self.files[g.file], g.first + row) for g in self.groups for row in range(g.rows)]

    def _place(self, index: int) -> tuple[Rows, int]:
        """A record's group, and its row therein."""
        number = int(np.searchsorted(self.starts, index, "right")) - 1
        return self.groups[number], int(index - self.starts[number])

    def _read(self, group: Rows, *columns: str) -> Any:
        path, size = f"{self.root}/{self.files[group.file]}", self._sizes[group.file]
        try:
            footer = self._footers.get(group.file, lambda: _open(path, size).metadata)
            with _open(path, size, footer) as file:
                return file.read_row_group(group.group, list(columns), use_threads=False)
        except FileNotFoundError as error:  # no fault of the record
            raise UsageError(f"{path} is not there any more.") from error

    def _look_at(self, name: str) -> tuple[list[int], int, int]:
        """Of a file: rows of each group, bytes of all, and its size; raises UsageError if it has not the columns."""
        path = f"{self.root}/{name}"
        size = file_size(path)
        try:
            with _open(path, size) as file:
                schema, about = file.schema_arrow, file.metadata
        except (_pyarrow().ArrowException, OSError) as error:
            if getattr(error, "errno", None):  # of the storage, not pyarrow's
                raise
            raise UsageError(f"{path} is no whole parquet file ({str(error)[:100]}); get it anew.") from error
        columns = ", ".join(schema.names)
        if IMAGE not in schema.names:
            raise UsageError(f"{path} has the columns {columns}, and none is called {IMAGE!r}; {EXPECTED}.")
        if self.wording.field not in schema.names:
            raise UsageError(
                f"{path} has the columns {columns}; data.caption_field={self.wording.field!r} is none of them."
            )
        if about.num_rows:  # without any, a column may have no type
            _check_types(path, schema, self.wording.field)
        groups = [about.row_group(k) for k in range(about.num_row_groups)]
        return [group.num_rows for group in groups], sum(group.total_byte_size for group in groups), size


class Kept:
    """What was read last, so many of it, and of tables no more than `MOST_BYTES`, if it is more than one.

    Pickled, it is another process's own, and empty.
    """

    def __init__(self, most: int):
        self.most, self._kept, self._lock = most, collections.OrderedDict(), threading.Lock()
        self._reading: collections.defaultdict[int, threading.Lock] = collections.defaultdict(threading.Lock)

    def __reduce__(self) -> tuple[type["Kept"], tuple[int]]:
        return Kept, (self.most,)

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, key: int, read: Callable[[], Any]) -> Any:
        """What is kept under `key`, or is read now; by one thread, for which others that want the same wait."""
        with self._lock:
            reading = self._reading[key]
        with reading:
            with self._lock:
                if key in self._kept:
                    self._kept.move_to_end(key)
                    return self._kept[key]
            return self._keep(key, read())

    def _keep(self, key: int, found: Any) -> Any:
        with self._lock:
            self._kept[key] = found
            sizes = [getattr(each, "nbytes", 0) for each in self._kept.values()]
            while len(self._kept) > self.most or (len(self._kept) > 1 and sum(sizes) > MOST_BYTES):
                self._kept.popitem(last=False)
                sizes.pop(0)
        return found


def _check_types(path: str, schema: Any, field: str) -> None:
    """Raises UsageError if a column holds something else than what is read of it."""
    types = _pyarrow().types
    image, caption = schema.field(IMAGE).type, schema.field(field).type
    if types.is_struct(image):
        names = [image.field(k).name for k in range(image.num_fields)]
        image = image.field(names.index(BYTES)).type if BYTES in names else image
    if not (types.is_binary(image) or types.is_large_binary(image)):
        raise UsageError(
            f"{path}: the column {IMAGE!r} holds {image}, where bytes, or a struct with {BYTES!r}, are read."
        )
    if types.is_dictionary(caption):
        caption = caption.value_type
    if not (types.is_string(caption) or types.is_large_string(caption)):
        raise UsageError(f"{path}: data.caption_field={field!r} holds {caption}, where text is read.")


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))


def _pyarrow():
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise UsageError(
            "data.source=\"parquet\" needs the package pyarrow: pip install -e '.[t2i]' in the repository"
        ) from error
    return pyarrow


def _open(path: str, size: int, footer: Any = None):
    """A parquet file, of which what is asked for is read as all data are: again after errors that pass."""
    pyarrow = _pyarrow()
    return pyarrow.parquet.ParquetFile(pyarrow.PythonFile(_Bytes(path, size), "r"), metadata=footer)


class _Bytes:
    """The bytes of a file as a file object."""

    closed = False

    def __init__(self, path: str, size: int):
        self.path, self.position, self.size = path, 0, size

    def tell(self) -> int:
        return self.position

    def seek(self, position: int, whence: int = 0) -> int:
        self.position = position + (0, self.position, self.size)[whence]
        return self.position

    def read(self, size: int = -1) -> bytes:
        stop = self.size if size < 0 else min(self.position + size, self.size)
        content = read_bytes(self.path, self.position, max(stop - self.position, 0))
        self.position += len(content)
        return content

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def writable(self) -> bool:
        return False

    def flush(self) -> None:
        """Nothing was written."""

    def close(self) -> None:
        self.closed = True
