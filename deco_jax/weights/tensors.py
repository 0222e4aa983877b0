"""Where does a tensor of a weight file lie, and how do its numbers get into memory? Only when asked for, one at a time.

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

# PyTorch's name of an element type, safetensors' name, and the class that PyTorch's pickles give its storages.
TYPES = (
    ("float64", "F64", "DoubleStorage"),
    ("float32", "F32", "FloatStorage"),
    ("float16", "F16", "HalfStorage"),
    ("bfloat16", "BF16", "BFloat16Storage"),
    ("float8_e4m3fn", "F8_E4M3", None),
    ("float8_e5m2", "F8_E5M2", None),
    ("int64", "I64", "LongStorage"),
    ("int32", "I32", "IntStorage"),
    ("int16", "I16", "ShortStorage"),
    ("int8", "I8", "CharStorage"),
    ("uint64", "U64", None),
    ("uint32", "U32", None),
    ("uint16", "U16", None),
    ("uint8", "U8", "ByteStorage"),
    ("bool", "BOOL", "BoolStorage"),
    ("complex64", "C64", "ComplexFloatStorage"),
    ("complex128", None, "ComplexDoubleStorage"),
)
DTYPES = {name: np.dtype(getattr(ml_dtypes, name, name)) for name, _, _ in TYPES}  # by PyTorch's name


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
                self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as e:
            if isinstance(e, UsageError):
                raise
            raise UsageError(f"cannot be opened: {getattr(e, 'strerror', None) or e}.") from None
        self.size = len(self.map)

    def window(self, start: int, stop: int) -> memoryview:
        """The bytes from `start` to `stop` where they lie, uncopied."""
        if not 0 <= start <= stop <= self.size:
            raise UsageError(f"bytes {start} to {stop} were asked for; the file ends at {self.size}: it is truncated.")
        return memoryview(self.map)[start:stop]


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
    def nbytes(self) -> int:
        """Bytes of the array that `numpy` returns."""
        return math.prod(self.shape) * self.dtype.itemsize

    def numpy(self) -> np.ndarray:
        """Reads the tensor: a contiguous array of its own, in this machine's byte order. Keeps no page of the file."""
        if self.nbytes == 0:
            return np.empty(self.shape, self.dtype)
        file, itemsize = self.storage.file, self.dtype.itemsize
        last = sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True))
        start = self.storage.start + self.offset * itemsize
        stop = start + (last + 1) * itemsize
        strides = [s * itemsize for s in self.strides]
        array = np.array(np.ndarray(self.shape, self.dtype, file.window(start, stop), strides=strides), order="C")
        start -= start % mmap.PAGESIZE
        file.map.madvise(mmap.MADV_DONTNEED, start, stop - start)  # they are read again when next looked at
        return array.byteswap(inplace=True) if self.storage.big_endian else array

    def row(self, index: int) -> "Tensor":
        """One entry of the first axis."""
        return Tensor(self.storage, self.dtype, self.shape[1:], self.strides[1:], self.offset + index * self.strides[0])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        array = self.numpy()
        return array if dtype is None else array.astype(dtype, copy=False)


def make_tensor(
    storage: Storage, dtype: np.dtype, shape: Sequence[int], strides: Sequence[int] | None = None, offset: int = 0
) -> Tensor:
    """A tensor, once its shape, strides and offset are known to stay inside its storage; dense if no strides are given.

    Raises:
      UsageError: they do not.
    """
    if not isinstance(shape, tuple | list) or not all(type(n) is int for n in shape[:MAX_DIMENSIONS]):
        raise UsageError(f"a shape is {short(shape)}, not a list of numbers: the file is damaged.")
    if len(shape) > MAX_DIMENSIONS or any(n < 0 for n in shape) or math.prod(max(n, 1) for n in shape) > MAX_ELEMENTS:
        raise UsageError(
            f"a shape is {short(shape)}; at most {MAX_DIMENSIONS} axes, none negative, and {MAX_ELEMENTS} elements are "
            "read: the file is damaged."
        )
    shape = tuple(shape)
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
    if math.prod(shape) and (last + 1) * dtype.itemsize > storage.nbytes:
        raise UsageError(
            f"{where} ({dtype}) needs {short((last + 1) * dtype.itemsize)} bytes of storage {short(storage.key)}, "
            f"which has {storage.nbytes}: the file is damaged."
        )
    return Tensor(storage, dtype, shape, strides, offset)


def short(value: Any, limit: int = 80) -> str:
    """`value` for an error message: one line, printable, of bounded length, whatever a file makes of it."""
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 256:
        return f"an integer of {value.bit_length()} bits"
    if isinstance(value, str | bytes):
        text = repr(value[: limit + 1])
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
    """Puts the file's name before the message of a UsageError."""
    try:
        yield
    except UsageError as e:
        raise UsageError(f"{path}: {e}") from None
