"""What is in a `.safetensors` file? The `safetensors` package reads and checks its header; the tensors stay on disk.

The package's own arrays are not used: without torch it cannot make those of bfloat16 and the 8-bit floats.
"""

import safetensors

from deco_jax.errors import UsageError
from deco_jax.weights.tensors import DTYPES, TYPES, MappedFile, Storage, Tensor, make_tensor, short

MAX_HEADER = 8 * 2**20  # bytes of JSON; some 70,000 tensors

_DTYPES = {theirs: DTYPES[name] for name, theirs, _ in TYPES if theirs}


def is_safetensors(file: MappedFile) -> bool:
    """Whether the file starts as safetensors do."""
    return file.size > 8 and bytes(file.window(8, 9)) == b"{" and _header_length(file) <= file.size - 8


def read_safetensors(file: MappedFile) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(Tensors by name in the order in which they lie in the file, the file's own metadata).

    Raises:
      UsageError: the file is damaged, or has types that are not read.
    """
    if file.size < 8 or _header_length(file) > file.size - 8:
        raise UsageError("a safetensors file whose header is cut short, or no safetensors file at all.")
    if _header_length(file) > MAX_HEADER:
        raise UsageError(f"a safetensors header of {_header_length(file)} bytes; at most {MAX_HEADER} are read.")
    try:
        with safetensors.safe_open(file.path, "numpy") as header:
            metadata = header.metadata() or {}
            listed = [(name, header.get_slice(name)) for name in header.offset_keys()]
            listed = [(name, entry.get_dtype(), entry.get_shape()) for name, entry in listed]
    except (safetensors.SafetensorError, OSError) as e:
        raise UsageError(f"a safetensors file that is damaged ({short(str(e), 200)}).") from None
    tensors, start = {}, 8 + _header_length(file)
    for name, dtype, shape in listed:  # the tensors' bytes follow each other without a gap, as was checked
        if dtype not in _DTYPES:
            raise UsageError(f"{short(name)} has the type {dtype!r}; those read are {', '.join(_DTYPES)}.")
        storage = Storage(file, name, _DTYPES[dtype], file.size - start, start)
        tensors[name] = make_tensor(storage, storage.dtype, shape)
        start += tensors[name].nbytes
    return tensors, metadata


def _header_length(file: MappedFile) -> int:
    return int.from_bytes(file.window(0, 8), "little")
