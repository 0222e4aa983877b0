"""Which names may a weight file's pickle mention, and what stands for each here? `ADMITTED`, at the end, is the list.

Nothing here is PyTorch's or NumPy's own unpickling code: every entry is a small function of ours that makes a tensor, a
plain container or a number, and checks what it is given. What is not in the table is refused by its name.
"""

import contextlib
import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from deco_jax.errors import UsageError
from deco_jax.weights.budget import Budget
from deco_jax.weights.tensors import DTYPES, Tensor, check_shape, short


@dataclass(frozen=True, eq=False)
class Admitted:
    """What a pickle gets when it mentions `name`. `make` None: it may be mentioned, not called."""

    name: str
    make: Callable[..., Any] | None = None  # (budget, *the pickle's arguments) → value
    dtype: np.dtype | None = None  # of a storage type

    @functools.cached_property
    def _signature(self) -> inspect.Signature:
        return inspect.signature(self.make)

    def __call__(self, budget: Budget, arguments: tuple) -> Any:
        """What the opcode REDUCE does.

        Raises:
          UsageError: it is not to be called, not with so many arguments, or not with these.
        """
        try:
            self._signature.bind(budget, *arguments)
        except TypeError:  # also of None, which has no signature
            raise UsageError(
                f"the pickle inside calls {self.name} with {short(arguments)}, which is not admitted."
            ) from None
        return self.make(budget, *arguments)


class Attributes(dict):
    """Stands for an object that is nothing but its attributes (argparse.Namespace)."""


class Buildable:
    """A value that a pickle makes first and fills by the opcode BUILD, whose argument `build(budget, state)` takes."""

    plain: Any  # what the reader's caller gets


def _expect(value: Any, kind: Any, what: str) -> Any:
    """`value`, if it is of this kind."""
    if not isinstance(value, kind):
        raise UsageError(f"{what} is {short(value)}: the file is damaged.")
    return value


# Tensors


def _tensor(budget, storage, offset, shape, strides) -> Tensor:
    return budget.tensor(storage, getattr(storage, "dtype", None), shape, strides, offset)


def _tensor_v2(budget, storage, offset, shape, strides, requires_grad, hooks, metadata=None) -> Tensor:
    _refuse_metadata(metadata)
    return _tensor(budget, storage, offset, shape, strides)


def _tensor_v3(budget, storage, offset, shape, strides, requires_grad, hooks, dtype, metadata=None) -> Tensor:
    _refuse_metadata(metadata)
    if not isinstance(dtype, str) or dtype.removeprefix("torch.") not in DTYPES:
        raise UsageError(f"a tensor's type is {short(dtype)}; the types read are {', '.join(DTYPES)}.")
    return budget.tensor(storage, DTYPES[dtype.removeprefix("torch.")], shape, strides, offset)


def _refuse_metadata(metadata: Any) -> None:
    if metadata:
        raise UsageError("a tensor is lazily conjugated or negated; save it after .resolve_conj().resolve_neg().")


def _parameter(budget, data, requires_grad, hooks, state=None) -> Tensor:
    return _expect(data, Tensor, "a parameter's data")


def _from_type(budget, function, kind, arguments, state) -> Tensor:
    """A tensor with Python attributes (left out); `kind` is its class."""
    known = function in _TENSORS.values() and kind in _TENSOR_CLASSES.values()
    if not known or not isinstance(arguments, tuple):
        raise UsageError("a tensor of a class of its own is not admitted; save plain tensors.")
    return function(budget, arguments)


# Containers and numbers. `budget.spend` pays for what is copied.


def _items(budget, items: Any) -> Any:
    budget.spend(len(_expect(items, list | tuple | set | frozenset, "what a container is made from")))
    return items


def _dict(budget, items=()) -> dict:
    if isinstance(items, dict):
        budget.spend(len(items))
        return dict(items)
    pairs = _items(budget, items)
    if not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs):
        raise UsageError("a dict is made from what are not pairs: the file is damaged.")
    return {budget.key(key): value for key, value in pairs}


def _default_dict(budget, factory=None, items=()) -> dict:
    return _dict(budget, items)


def _attributes(budget, items=()) -> Attributes:
    return Attributes(_dict(budget, items))


def _list(budget, items=()) -> list:
    return list(_items(budget, items))


def _set(budget, items=()) -> set:
    return {budget.key(item) for item in _items(budget, items)}


def _frozenset(budget, items=()) -> frozenset:
    return frozenset(_set(budget, items))


def _size(budget, shape=()) -> tuple:
    return check_shape(shape)[0]


def _bytes(budget, data=b"", encoding="latin1") -> bytes:
    """Bytes, or the text as which Python 3 writes them in protocol 2."""
    if isinstance(data, bytes):
        return data
    budget.spend(len(_expect(data, str, "what bytes are made from")) // 64)
    if encoding in ("latin1", "latin-1"):
        with contextlib.suppress(UnicodeEncodeError):
            return data.encode("latin1")
    raise UsageError(f"bytes are made from {short(data)} in {short(encoding)}: the file is damaged.")


def _complex(budget, real, imaginary) -> complex:
    return complex(*(_expect(part, float, "a part of a complex number") for part in (real, imaginary)))


def _text(budget, text) -> str:
    return _expect(text, str, "a text")


def _device(budget, kind, index=None) -> str:
    _expect(index, int | None, "a device's number")
    return _joined(budget, ":", (kind,) if index is None else (kind, str(index)))


def _path(budget, *parts) -> str:
    return _joined(budget, "/", parts).replace("//", "/", 1)


def _joined(budget, separator: str, parts: tuple) -> str:
    budget.spend(sum(len(_expect(part, str, "a part of a path or device")) for part in parts) // 64)
    return separator.join(parts)


# NumPy's numbers and arrays, which training scripts leave in metrics and in random states.


class _Dtype(Buildable):
    """numpy.dtype of a number."""

    def __init__(self, dtype: np.dtype):
        self.plain, self.dtype = str(dtype), dtype

    def build(self, budget: Budget, state: Any) -> None:
        order = state[1] if isinstance(state, tuple) and len(state) > 1 else None
        if not isinstance(order, str) or order not in ("<", ">", "=", "|"):
            raise UsageError(f"a NumPy type's state is {short(state)}: the file is damaged.")
        self.__init__(self.dtype.newbyteorder(order))


class _Array(Buildable):
    """numpy.ndarray of numbers."""

    plain = np.empty(0)

    def build(self, budget: Budget, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) != 5 or not isinstance(state[2], _Dtype):
            raise UsageError(f"a NumPy array's state is {short(state)}; only arrays of numbers are admitted.")
        _, shape, kind, fortran, data = state
        shape, size = check_shape(shape)
        if not isinstance(data, bytes) or len(data) != size * kind.dtype.itemsize:
            raise UsageError(f"a NumPy array of shape {shape} lacks bytes: the file is damaged.")
        budget.spend(len(data) // 64)
        array = np.frombuffer(data, kind.dtype) if size else np.empty(0, kind.dtype)
        self.plain = array.reshape(shape, order="F" if fortran else "C").astype(kind.dtype.newbyteorder("="))


_NUMPY_TYPES = ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8", "c8", "c16")


def _numpy_dtype(budget, code, align=False, copy=False) -> _Dtype:
    if not isinstance(code, str) or code not in _NUMPY_TYPES:
        raise UsageError(f"a NumPy type is {short(code)}; only numbers are admitted: {', '.join(_NUMPY_TYPES)}.")
    return _Dtype(np.dtype(code))


def _numpy_scalar(budget, kind, data) -> Any:
    if not isinstance(kind, _Dtype) or not isinstance(data, bytes) or len(data) != kind.dtype.itemsize:
        raise UsageError(f"a NumPy number is made from {short(data)}: the file is damaged.")
    return np.frombuffer(data, kind.dtype)[0].item()


def _numpy_array(budget, kind, shape, code) -> _Array:
    return _Array()


# The table. A pickle spells names "module attribute".


def _admit(modules: str, functions: dict[str, Callable | None]) -> dict[str, Admitted]:
    """Stand-ins for these attributes of each of the modules."""
    return {f"{m} {name}": Admitted(f"{m}.{name}", make) for m in modules.split() for name, make in functions.items()}


_TENSORS = _admit(
    "torch._utils",
    {
        "_rebuild_tensor": _tensor,
        "_rebuild_tensor_v2": _tensor_v2,
        "_rebuild_tensor_v3": _tensor_v3,
        "_rebuild_parameter": _parameter,
        "_rebuild_parameter_with_state": _parameter,
    },
)
_TENSOR_CLASSES = _admit("torch", {"Tensor": None}) | _admit("torch.nn.parameter", {"Parameter": None})
_STORAGES = {
    "torch DoubleStorage": "float64",
    "torch FloatStorage": "float32",
    "torch HalfStorage": "float16",
    "torch BFloat16Storage": "bfloat16",
    "torch LongStorage": "int64",
    "torch IntStorage": "int32",
    "torch ShortStorage": "int16",
    "torch CharStorage": "int8",
    "torch ByteStorage": "uint8",
    "torch BoolStorage": "bool",
    "torch ComplexFloatStorage": "complex64",
    "torch ComplexDoubleStorage": "complex128",
    "torch.storage UntypedStorage": "uint8",
}
_BUILTINS = {
    "dict": _dict,
    "list": _list,
    "set": _set,
    "frozenset": _frozenset,
    "bytes": _bytes,
    "bytearray": _bytes,
    "complex": _complex,
    "int": None,  # a defaultdict's factory
    "float": None,
}
_PATHS = dict.fromkeys(("PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath"), _path)

ADMITTED: dict[str, Admitted | str] = {
    **_TENSORS,
    **_TENSOR_CLASSES,
    **{name: Admitted(name.replace(" ", "."), dtype=DTYPES[dtype]) for name, dtype in _STORAGES.items()},
    **{f"torch {dtype}": f"torch.{dtype}" for dtype in DTYPES},
    **_admit("torch._tensor", {"_rebuild_from_type_v2": _from_type}),
    **_admit("torch", {"Size": _size, "device": _device}),
    **_admit("torch.torch_version", {"TorchVersion": _text}),
    **_admit("torch.serialization", {"_get_layout": _text}),
    **_admit("collections", {"OrderedDict": _dict, "Counter": _dict, "defaultdict": _default_dict}),
    **_admit("argparse", {"Namespace": _attributes}),
    **_admit("lightning.pytorch.utilities.parsing pytorch_lightning.utilities.parsing", {"AttributeDict": _attributes}),
    **_admit("lightning.fabric.utilities.data lightning_fabric.utilities.data", {"AttributeDict": _attributes}),
    **_admit("builtins __builtin__", _BUILTINS),
    **_admit("_codecs", {"encode": _bytes}),
    **_admit("pathlib pathlib._local", _PATHS),
    **_admit("numpy", {"dtype": _numpy_dtype, "ndarray": None}),
    **_admit("numpy.core.multiarray numpy._core.multiarray", {"scalar": _numpy_scalar, "_reconstruct": _numpy_array}),
}
