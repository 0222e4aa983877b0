"""How do arrays larger than the memory get into an .npz, and out of it again, a part at a time?"""

import dataclasses
import math
import os
import struct
import zipfile
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

from deco_jax import storage
from deco_jax.errors import UsageError
from deco_jax.storage import AnyPath

OLDEST = (1980, 1, 1, 0, 0, 0)  # date of every member, so that the same arrays are the same bytes
LOCAL_HEADER = struct.Struct("<26xHH")  # of a member of a zip file: 30 bytes that end with the lengths of what follows


class Parts(NamedTuple):
    """An array that comes in parts along its first axis."""

    shape: tuple[int, ...]
    dtype: str
    parts: Iterable[np.ndarray]


def write_npz(path: AnyPath, arrays: Mapping[str, Parts]) -> None:
    """Replaces `path` by an uncompressed .npz of these arrays, of which one part at a time is in memory.

    `np.load` opens it, and so does what reads members of the zip file one after the other, as the ADM suite does. The
    same arrays always make the same bytes.

    Args:
      path: on this machine or in a bucket; then the whole file is written into the temporary folder first.
      arrays: by name, in the order of the file.

    Raises:
      ValueError: parts do not fit their array.
    """
    with storage.write_beside(path) as draft, draft.open("wb") as file:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            for name, array in arrays.items():
                with archive.open(zipfile.ZipInfo(f"{name}.npy", OLDEST), "w", force_zip64=True) as member:
                    _write_array(member, name, array)
        file.flush()
        os.fsync(file.fileno())


def _write_array(member, name: str, array: Parts) -> None:
    dtype, rows = np.dtype(array.dtype), 0
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": array.shape}
    np.lib.format.write_array_header_1_0(member, header)
    for part in array.parts:
        if part.shape[1:] != array.shape[1:] or part.dtype != dtype:
            raise ValueError(f"{name}: a part is {part.shape} {part.dtype}, of an array {array.shape} {dtype}.")
        member.write(memoryview(np.ascontiguousarray(part)).cast("B"))
        rows += len(part)
    if rows != array.shape[0]:
        raise ValueError(f"{name}: the parts have {rows} rows of {array.shape[0]}.")


@dataclasses.dataclass(frozen=True)
class StoredArray:
    """An array of an uncompressed .npz, of which any rows can be read."""

    path: AnyPath
    shape: tuple[int, ...]
    dtype: np.dtype
    start: int  # byte of the file at which its numbers begin

    def rows(self, first: int, last: int) -> np.ndarray:
        """Rows [first, last), read again after errors that pass."""
        shape = (last - first, *self.shape[1:])
        row_bytes = math.prod(self.shape[1:]) * self.dtype.itemsize

        def read() -> bytes:
            with self.path.open("rb") as file:
                file.seek(self.start + first * row_bytes)
                return file.read(shape[0] * row_bytes)

        with storage.reading(self.path):
            content = storage.retried(f"reading {self.path}", read)
        return np.frombuffer(content, self.dtype).reshape(shape)


def open_array(path: AnyPath, name: str) -> StoredArray:
    """The array `name` of an .npz as `write_npz` makes it, on this machine or in a bucket.

    Raises:
      UsageError: it is none, is cut off, or lacks the array.
    """

    def look() -> StoredArray:
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            info = archive.getinfo(f"{name}.npy")
            if info.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"{info.filename} is compressed")
            with archive.open(info) as member:
                if np.lib.format.read_magic(member) != (1, 0):
                    raise ValueError(f"{info.filename} has another version of NumPy's header")
                shape, fortran, dtype = np.lib.format.read_array_header_1_0(member)
                header = member.tell()
            if fortran or dtype.hasobject:
                raise ValueError(f"{info.filename} is no plain array, row by row")
            file.seek(info.header_offset)
            following = LOCAL_HEADER.unpack(file.read(LOCAL_HEADER.size))
            return StoredArray(path, shape, dtype, info.header_offset + LOCAL_HEADER.size + sum(following) + header)

    try:
        with storage.reading(path):
            return storage.retried(f"reading {path}", look)
    except (zipfile.BadZipFile, ValueError, KeyError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"{path} cannot be read ({error}).") from error
