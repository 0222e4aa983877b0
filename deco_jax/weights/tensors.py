"""Where a tensor of a weight file lies, and how its numbers get into memory: only when asked for, one at a time.

A file is mapped, never read as a whole. `Tensor.numpy` copies one tensor out of the map and lets go of the pages that
this brought in, since resident pages of a mapped file count as the process's memory.
"""

import contextlib
import math
import mmap
import os
import pathlib
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from deco_jax.errors import UsageError

MAX_DIMENSIONS = 32
MAX_ELEMENTS = 2**48  # of a shape whose zeros count as ones: NumPy and its callers multiply them

# PyTorch's name of an element type → ours.
DTYPES = {
    "float64": np.dtype(np.float64),
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    "float8_e5m2": np.dtype(ml_dtypes.float8_e5m2),
    "int64": np.dtype(np.int64),
    "int32": np.dtype(np.int32),
    "int16": np.dtype(np.int16),
    "int8": np.dtype(np.int8),
    "uint64": np.dtype(np.uint64),
    "uint32": np.dtype(np.uint32),
    "uint16": np.dtype(np.uint16),
    "uint8": np.dtype(np.uint8),
    "bool": np.dtype(np.bool_),
    "complex64": np.dtype(np.complex64),
    "complex128": np.dtype(np.complex128),
}


class MappedFile:
    """A regular file, mapped read-only. Nothing of it is in memory until its bytes are looked at.

    The file must not shrink while it is in use: the operating system ends a process that touches a mapped page whose
    file is gone (SIGBUS). Replacing a file by renaming another over it is safe.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = pathlib.Path(path)
        try:
            status = os.stat(path)
            if not stat.S_ISREG(status.st_mode):  # asked before opening, which waits for ever on a named pipe
                raise UsageError("not a regular file.")
            if status.st_size == 0:
                raise UsageError("the file is empty.")
            with open(path, "rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as e:
            if isinstance(e, UsageError):
                raise
            raise UsageError(f"cannot be opened: {getattr(e, 'strerror', None) or e}.") from None
        self.size = len(self._map)

    def window(self, start: int, stop: int) -> memoryview:
        """The bytes from `start` to `stop` where they lie, uncopied."""
        if not 0 <= start <= stop <= self.size:
            raise UsageError(f"bytes {start} to {stop} were asked for; the file ends at {self.size}: it is truncated.")
        return memoryview(self._map)[start:stop]

    def release(self, start: int, stop: int) -> None:
        """Lets go of the pages from `start` to `stop`; they are read again when next looked at."""
        start -= start % mmap.PAGESIZE
        if start < stop and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED, start, stop - start)


@dataclass(eq=False, slots=True)
class Storage:
    """A run of bytes that tensors look into, several perhaps. `start` is None until its place is known."""

    file: MappedFile
    key: str
    dtype: np.dtype
    nbytes: int
    start: int | None = None
    big_endian: bool = False


@dataclass(frozen=True, eq=False, slots=True)
class Tensor:
    """A tensor in a file. `strides` and `offset` count elements, as PyTorch does."""

    storage: Storage
    dtype: np.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the array that `numpy` returns."""
        return self.size * self.dtype.itemsize

    @property
    def place(self) -> tuple:
        """Equal for two tensors that are the same window on the same bytes (tied weights)."""
        return id(self.storage), str(self.dtype), self.shape, self.strides, self.offset

    def view(self) -> np.ndarray:
        """A read-only array on the mapped file, not copied (a big-endian file's is). Its pages stay until `release`."""
        if self.storage.big_endian:
            return self.numpy()
        return self._window()

    def numpy(self) -> np.ndarray:
        """Reads the tensor: a contiguous array of its own, in this machine's byte order. Keeps no page of the file."""
        array = np.array(self._window(), order="C")
        if self.storage.big_endian:
            width = self.dtype.itemsize // (2 if self.dtype.kind == "c" else 1)
            if array.size and width > 1:
                array.reshape(-1).view(f"u{width}").byteswap(inplace=True)
        self.release()
        return array

    def release(self) -> None:
        """Lets go of the file's pages that this tensor's views brought into memory; the views stay valid."""
        self.storage.file.release(*self._extent())

    def __repr__(self) -> str:
        return f"Tensor({self.dtype}, {self.shape}, in {self.storage.file.path})"

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        array = self.numpy()
        return array if dtype is None else array.astype(dtype, copy=False)

    def _extent(self) -> tuple[int, int]:
        """First and last byte in the file."""
        if self.size == 0:
            return 0, 0
        last = sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True))
        start = self.storage.start + self.offset * self.dtype.itemsize
        return start, start + (last + 1) * self.dtype.itemsize

    def _window(self) -> np.ndarray:
        with naming(self.storage.file.path):
            if self.size == 0:
                return np.empty(self.shape, self.dtype)
            strides = [s * self.dtype.itemsize for s in self.strides]
            return np.ndarray(self.shape, self.dtype, self.storage.file.window(*self._extent()), strides=strides)


def make_tensor(
    storage: Storage, dtype: np.dtype, shape: Sequence[int], strides: Sequence[int] | None = None, offset: int = 0
) -> Tensor:
    """A tensor, once its shape, strides and offset are known to stay inside its storage; dense if no strides are given.

    Raises:
      UsageError: they do not.
    """
    shape, size = check_shape(shape)
    if strides is None:
        strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    where = f"a tensor of shape {shape}"
    strides_fit = isinstance(strides, tuple | list) and len(strides) == len(shape)
    if not strides_fit or not all(type(s) is int for s in (*strides, offset)):
        raise UsageError(f"{where} has no stride for every axis, or no offset: the file is damaged.")
    if offset < 0 or any(s < 0 for s in strides):
        raise UsageError(f"{where} has a negative stride or offset: the file is damaged.")
    strides = tuple(0 if n <= 1 else s for n, s in zip(shape, strides, strict=True))  # never stepped along
    last = offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    if size and (last + 1) * dtype.itemsize > storage.nbytes:
        raise UsageError(
            f"{where} ({dtype}) needs {short((last + 1) * dtype.itemsize)} bytes of storage {short(storage.key)}, "
            f"which has {storage.nbytes}: the file is damaged."
        )
    return Tensor(storage, dtype, shape, strides, offset)


def check_shape(shape: Any) -> tuple[tuple[int, ...], int]:
    """(`shape` as a tuple, number of elements), once it is a shape that a tensor can have."""
    if not isinstance(shape, tuple | list) or not all(type(n) is int for n in shape[:MAX_DIMENSIONS]):
        raise UsageError(f"a shape is {short(shape)}, not a list of numbers: the file is damaged.")
    if len(shape) > MAX_DIMENSIONS or any(n < 0 for n in shape) or math.prod(max(n, 1) for n in shape) > MAX_ELEMENTS:
        raise UsageError(
            f"a shape is {short(shape)}; at most {MAX_DIMENSIONS} axes, none negative, and {MAX_ELEMENTS} elements are "
            "read: the file is damaged."
        )
    return tuple(shape), math.prod(shape)


def short(value: Any, limit: int = 80) -> str:
    """`value` for an error message: one line, printable, of bounded length, whatever a file makes of it."""
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 256:
        return f"an integer of {value.bit_length()} bits"
    if isinstance(value, str):
        text = repr(value[: limit + 1])
    elif isinstance(value, bytes):
        text = repr(bytes(value[: limit + 1]))
    elif isinstance(value, tuple | list):
        inner = ", ".join(short(v, 20) if not isinstance(v, tuple | list) else "[…]" for v in value[:9])
        text = f"({inner}{', …' if len(value) > 9 else ''})"
    elif value is None or isinstance(value, int | float):
        text = repr(value)
    else:
        text = type(value).__name__
    return text if len(text) <= limit else text[: limit - 1] + "…"


@contextlib.contextmanager
def naming(path: str | os.PathLike) -> Iterator[None]:
    """Puts the file's name before the message of a UsageError, once."""
    try:
        yield
    except UsageError as e:
        if str(e).startswith(f"{path}: "):
            raise
        raise UsageError(f"{path}: {e}") from None
