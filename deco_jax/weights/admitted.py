"""Which names may a weight file's pickle mention, and what stands for each here? This table is the whole list.

Nothing here is PyTorch's or NumPy's own unpickling code: every entry is a small function of ours that makes a tensor, a
plain container or a number, and checks what it is given. What is not in the table is refused by its name.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from deco_jax.errors import UsageError
from deco_jax.weights.tensors import DTYPES, Tensor, check_shape, short

if TYPE_CHECKING:
    from deco_jax.weights.pickles import Unpickler

MAX_PARTS = 1000  # of a path


@dataclass(frozen=True, eq=False)
class Admitted:
    """What a pickle gets when it mentions `name`. `call` None: it may be mentioned, not called."""

    name: str
    call: Callable[..., Any] | None = None
    arguments: tuple[int, int] = (0, 0)  # fewest and most
    dtype: np.dtype | None = None  # of a storage type

    def __call__(self, unpickler: "Unpickler", arguments: tuple) -> Any:
        """What REDUCE does."""
        fewest, most = self.arguments
        if self.call is None or not fewest <= len(arguments) <= most:
            raise UsageError(f"the pickle inside calls {self.name} with {len(arguments)} arguments: it is damaged.")
        return self.call(unpickler, *arguments)


class Attributes(dict):
    """Stands for an object that is nothing but its attributes (argparse.Namespace)."""


class Buildable:
    """A value that a pickle makes first and fills by BUILD."""

    def build(self, unpickler: "Unpickler", state: Any) -> None:
        """Takes the BUILD's argument."""
        raise NotImplementedError

    def plain(self, unpickler: "Unpickler") -> Any:
        """What the reader's caller gets."""
        raise NotImplementedError


# Tensors


def _tensor(u, storage, offset, shape, strides) -> Tensor:
    return u.tensor(storage, getattr(storage, "dtype", None), shape, strides, offset)


def _tensor_v2(u, storage, offset, shape, strides, requires_grad, hooks, metadata=None) -> Tensor:
    _refuse_metadata(metadata)
    return u.tensor(storage, getattr(storage, "dtype", None), shape, strides, offset)


def _tensor_v3(u, storage, offset, shape, strides, requires_grad, hooks, dtype, metadata=None) -> Tensor:
    _refuse_metadata(metadata)
    if not isinstance(dtype, str) or dtype.removeprefix("torch.") not in DTYPES:
        raise UsageError(f"a tensor's type is {short(dtype)}; the types read are {', '.join(DTYPES)}.")
    return u.tensor(storage, DTYPES[dtype.removeprefix("torch.")], shape, strides, offset)


def _refuse_metadata(metadata: Any) -> None:
    if metadata:
        raise UsageError("a tensor is lazily conjugated or negated; save it after .resolve_conj().resolve_neg().")


def _parameter(u, data, requires_grad, hooks, state=None) -> Tensor:
    if not isinstance(data, Tensor):
        raise UsageError(f"a parameter's data is {short(data)}: the file is damaged.")
    return data


def _from_type(u, function, kind, arguments, state) -> Tensor:
    """A tensor with Python attributes (left out); `kind` is its class."""
    if function not in _BUILDERS or kind not in _TENSOR_CLASSES or not isinstance(arguments, tuple):
        raise UsageError("a tensor of a class of its own is not admitted; save plain tensors.")
    return function(u, arguments)


_BUILDERS = tuple(
    Admitted(f"torch._utils.{name}", call, arguments)
    for name, call, arguments in (
        ("_rebuild_tensor", _tensor, (4, 4)),
        ("_rebuild_tensor_v2", _tensor_v2, (6, 7)),
        ("_rebuild_tensor_v3", _tensor_v3, (7, 8)),
        ("_rebuild_parameter", _parameter, (3, 3)),
        ("_rebuild_parameter_with_state", _parameter, (4, 4)),
    )
)
_TENSOR_CLASSES = (Admitted("torch.Tensor"), Admitted("torch.nn.parameter.Parameter"))

_STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
}


# Containers and numbers. `u.spend` pays for what is copied.


def _items(u, items: Any) -> Any:
    if not isinstance(items, list | tuple | set | frozenset):
        raise UsageError(f"a container is made from {short(items)}: the file is damaged.")
    u.spend(len(items))
    return items


def _dict(u, items=()) -> dict:
    if isinstance(items, dict):
        u.spend(len(items))
        return dict(items)
    pairs = _items(u, items)
    if not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs):
        raise UsageError("a dict is made from what are not pairs: the file is damaged.")
    return {u.key(key): value for key, value in pairs}


def _attributes(u, *items) -> Attributes:
    return Attributes(_dict(u, *items))


def _default_dict(u, factory=None, items=()) -> dict:
    return _dict(u, items)


def _list(u, items=()) -> list:
    return list(_items(u, items))


def _set(u, items=()) -> set:
    return {u.key(item) for item in _items(u, items)}


def _frozenset(u, items=()) -> frozenset:
    return frozenset(_set(u, items))


def _size(u, shape=()) -> tuple:
    return check_shape(shape)[0]


def _encode(u, text, encoding="latin1") -> bytes:
    """How Python 3 writes bytes in protocol 2."""
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise UsageError(f"bytes are made from {short(text)} in {short(encoding)}: the file is damaged.")
    u.spend(len(text) // 64)
    try:
        return text.encode("latin1")
    except UnicodeEncodeError:
        raise UsageError(f"bytes are made from {short(text)}: the file is damaged.") from None


def _bytes(u, data=b"", encoding="latin1") -> bytes:
    return data if isinstance(data, bytes) else _encode(u, data, encoding)


def _complex(u, real, imaginary) -> complex:
    if type(real) is not float or type(imaginary) is not float:
        raise UsageError(f"a complex number is made from {short(real)} and {short(imaginary)}: the file is damaged.")
    return complex(real, imaginary)


def _text(u, text) -> str:
    if not isinstance(text, str):
        raise UsageError(f"a text is made from {short(text)}: the file is damaged.")
    return text


def _device(u, kind, index=None) -> str:
    if not isinstance(kind, str) or not (index is None or type(index) is int):
        raise UsageError(f"a device is {short(kind)}:{short(index)}: the file is damaged.")
    return _joined(u, ":", [kind] if index is None else [kind, str(index)])


def _path(u, *parts) -> str:
    return _joined(u, "/", parts).replace("//", "/", 1)


def _joined(u, separator: str, parts: Any) -> str:
    if not all(isinstance(part, str) for part in parts):
        raise UsageError("a path has parts that are not text: the file is damaged.")
    u.spend(sum(len(part) for part in parts) // 64)
    return separator.join(parts)


# NumPy's numbers and arrays, which training scripts leave in metrics and in random states.


class _Dtype(Buildable):
    """numpy.dtype of a number."""

    def __init__(self, dtype: np.dtype):
        self.dtype = dtype

    def build(self, unpickler: "Unpickler", state: Any) -> None:
        order = state[1] if isinstance(state, tuple) and len(state) > 1 else None
        if not isinstance(order, str) or order not in ("<", ">", "=", "|"):
            raise UsageError(f"a NumPy type's state is {short(state)}: the file is damaged.")
        self.dtype = self.dtype.newbyteorder(order)

    def plain(self, unpickler: "Unpickler") -> str:
        return str(self.dtype)


class _Array(Buildable):
    """numpy.ndarray of numbers."""

    def __init__(self):
        self.array = np.empty(0)

    def build(self, unpickler: "Unpickler", state: Any) -> None:
        if not isinstance(state, tuple) or len(state) != 5 or not isinstance(state[2], _Dtype):
            raise UsageError(f"a NumPy array's state is {short(state)}; only arrays of numbers are admitted.")
        _, shape, kind, fortran, data = state
        shape, size = check_shape(shape)
        if not isinstance(data, bytes) or len(data) != size * kind.dtype.itemsize:
            raise UsageError(f"a NumPy array of shape {shape} lacks bytes: the file is damaged.")
        unpickler.spend(len(data) // 64)
        array = np.frombuffer(data, kind.dtype) if size else np.empty(0, kind.dtype)
        array = array.reshape(shape, order="F" if fortran else "C")
        self.array = array.astype(kind.dtype.newbyteorder("="))

    def plain(self, unpickler: "Unpickler") -> np.ndarray:
        return self.array


_NUMPY_TYPES = ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8", "c8", "c16")


def _numpy_dtype(u, code, align=False, copy=False) -> _Dtype:
    if not isinstance(code, str) or code not in _NUMPY_TYPES:
        raise UsageError(f"a NumPy type is {short(code)}; only numbers are admitted: {', '.join(_NUMPY_TYPES)}.")
    return _Dtype(np.dtype(code))


def _numpy_scalar(u, kind, data) -> Any:
    if not isinstance(kind, _Dtype) or not isinstance(data, bytes) or len(data) != kind.dtype.itemsize:
        raise UsageError(f"a NumPy number is made from {short(data)}: the file is damaged.")
    return np.frombuffer(data, kind.dtype)[0].item()


def _numpy_array(u, kind, shape, code) -> _Array:
    return _Array()


def _table() -> dict[str, Any]:
    """ "module name" → stand-in."""
    table: dict[str, Any] = {}

    def add(modules: tuple[str, ...], name: str, call: Callable | None, fewest: int = 0, most: int = 0) -> None:
        table.update({f"{m} {name}": Admitted(f"{m}.{name}", call, (fewest, most)) for m in modules})

    for one in (*_BUILDERS, *_TENSOR_CLASSES):
        table[" ".join(one.name.rsplit(".", 1))] = one
    table.update({f"torch {n}": Admitted(f"torch.{n}", dtype=DTYPES[dtype]) for n, dtype in _STORAGES.items()})
    table["torch.storage UntypedStorage"] = Admitted("torch.storage.UntypedStorage", dtype=DTYPES["uint8"])
    table.update({f"torch {dtype}": f"torch.{dtype}" for dtype in DTYPES})
    add(("torch._tensor",), "_rebuild_from_type_v2", _from_type, 4, 4)
    add(("torch",), "Size", _size, 0, 1)
    add(("torch",), "device", _device, 1, 2)
    add(("torch.torch_version",), "TorchVersion", _text, 1, 1)
    add(("torch.serialization",), "_get_layout", _text, 1, 1)

    add(("collections",), "OrderedDict", _dict, 0, 1)
    add(("collections",), "Counter", _dict, 0, 1)
    add(("collections",), "defaultdict", _default_dict, 0, 2)
    add(("argparse",), "Namespace", _attributes)
    lightning = ("lightning.pytorch.utilities.parsing", "pytorch_lightning.utilities.parsing")
    fabric = ("lightning.fabric.utilities.data", "lightning_fabric.utilities.data")
    add(lightning + fabric, "AttributeDict", _attributes, 0, 1)
    builtins = ("builtins", "__builtin__")
    add(builtins, "dict", _dict, 0, 1)
    add(builtins, "list", _list, 0, 1)
    add(builtins, "set", _set, 0, 1)
    add(builtins, "frozenset", _frozenset, 0, 1)
    add(builtins, "bytes", _bytes, 0, 2)
    add(builtins, "bytearray", _bytes, 0, 2)
    add(builtins, "complex", _complex, 2, 2)
    add(builtins, "int", None)  # a defaultdict's factory
    add(builtins, "float", None)
    add(("_codecs",), "encode", _encode, 1, 2)
    for name in ("PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath"):
        add(("pathlib", "pathlib._local"), name, _path, 0, MAX_PARTS)

    numpy = ("numpy.core.multiarray", "numpy._core.multiarray")
    add(("numpy",), "dtype", _numpy_dtype, 1, 3)
    add(("numpy",), "ndarray", None)
    add(numpy, "scalar", _numpy_scalar, 2, 2)
    add(numpy, "_reconstruct", _numpy_array, 3, 3)
    return table


ADMITTED = _table()
