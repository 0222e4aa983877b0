"""What is in a `.safetensors` file? Eight bytes of length, that many of JSON, then the tensors' bytes without a gap.

Read here rather than by the `safetensors` package, which knows bfloat16 only through torch.
"""

import json
import math
from typing import Any

from deco_jax.errors import UsageError
from deco_jax.weights.tensors import DTYPES, MappedFile, Storage, Tensor, make_tensor, naming, short

MAX_HEADER = 8 * 2**20  # bytes of JSON; some 70,000 tensors

# Safetensors' name of an element type → PyTorch's.
SAFETENSORS_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
    "C64": "complex64",
}


def is_safetensors(file: MappedFile) -> bool:
    """Whether the file starts as safetensors do."""
    return file.size > 8 and bytes(file.window(8, 9)) == b"{" and _header_length(file) <= file.size - 8


def read_safetensors(file: MappedFile) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(Tensors by name, the file's own metadata).

    Raises:
      UsageError: the file is damaged, or has types that are not read; the message names the file.
    """
    with naming(file.path):
        if file.size < 8 or _header_length(file) > file.size - 8:
            raise UsageError("a safetensors file whose header is cut short, or no safetensors file at all.")
        start = 8 + _header_length(file)
        if start > MAX_HEADER:
            raise UsageError(f"a safetensors header of {start - 8} bytes; at most {MAX_HEADER - 8} are read.")
        header = parse_json(bytes(file.window(8, start)), "the safetensors header")
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
            raise UsageError("the safetensors metadata maps a name to something other than a text.")
        tensors, places = {}, []
        for name, entry in header.items():
            tensors[name] = _tensor(file, name, entry, start)
            storage = tensors[name].storage
            places.append((storage.start, storage.start + storage.nbytes))
        end = start
        for first, last in sorted(places):
            if first != end:
                raise UsageError("a safetensors file whose tensors overlap or leave gaps: it is damaged.")
            end = last
        if end != file.size:
            raise UsageError(f"a safetensors file of {file.size} bytes whose tensors end at {end}: it is damaged.")
        return tensors, metadata


def parse_json(text: bytes, what: str) -> dict[str, Any]:
    """A JSON object, with every name once and every number finite."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise UsageError(f"{what} has a name twice.")
        return found

    def refuse(number: str) -> float:
        raise UsageError(f"{what} has the number {short(number)}.")

    def finite(number: str) -> float:
        return float(number) if math.isfinite(float(number)) else refuse(number)

    try:
        content = json.loads(text.decode(), object_pairs_hook=once, parse_constant=refuse, parse_float=finite)
        json.dumps(content, ensure_ascii=False).encode()  # fails on text that is not Unicode, which nobody could print
    except RecursionError:
        raise UsageError(f"{what} is nested too deep.") from None
    except ValueError as e:
        if isinstance(e, UsageError):
            raise
        raise UsageError(f"{what} is not JSON ({short(str(e))}): the file is damaged.") from None
    if not isinstance(content, dict):
        raise UsageError(f"{what} is not a JSON object.")
    return content


def _header_length(file: MappedFile) -> int:
    return int.from_bytes(file.window(0, 8), "little")


def _tensor(file: MappedFile, name: str, entry: Any, data: int) -> Tensor:
    fields = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = (fields.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or not isinstance(offsets, list) or [type(o) for o in offsets] != [int, int]:
        raise UsageError(f"{short(name)} is not described by dtype, shape and data_offsets: the file is damaged.")
    if dtype not in SAFETENSORS_DTYPES:
        raise UsageError(f"{short(name)} has the type {short(dtype)}; those read are {', '.join(SAFETENSORS_DTYPES)}.")
    first, last = offsets
    if not 0 <= first <= last <= file.size - data:
        raise UsageError(f"{short(name)} has its bytes from {short(first)} to {short(last)}, outside the file.")
    storage = Storage(file, name, DTYPES[SAFETENSORS_DTYPES[dtype]], last - first, data + first)
    tensor = make_tensor(storage, storage.dtype, shape)
    if tensor.nbytes != storage.nbytes:
        raise UsageError(f"{short(name)} of shape {tensor.shape} has {storage.nbytes} bytes, not {tensor.nbytes}.")
    return tensor
