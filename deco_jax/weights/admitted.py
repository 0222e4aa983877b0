"""Which names may a weight file's pickle mention, and what stands for each here? `ADMITTED`, at the end, is the list.

Nothing here is PyTorch's or NumPy's own unpickling code: every entry is a small function of ours that makes a tensor, a
dict, bytes or a number, and checks what it is given. Other objects that training scripts leave in checkpoints say
nothing about the weights: a `LeftOut` stands for each. What is not in the table is refused by its name.
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
from deco_jax.weights.tensors import DTYPES, TYPES, Tensor, short

_signature = functools.cache(inspect.signature)


@dataclass(frozen=True, eq=False)
class Admitted:
    """What a pickle gets when it mentions `name`. `make` None: it may be mentioned, not called."""

    name: str
    make: Callable[..., Any] | None = None  # (budget, *the pickle's arguments) → value
    dtype: np.dtype | None = None  # of a storage type

    def __call__(self, budget: Budget, arguments: tuple) -> Any:
        """What the opcode REDUCE does.

        Raises:
          UsageError: it is not to be called, not with so many arguments, or not with these.
        """
        try:
            _signature(self.make).bind(budget, *arguments)
        except TypeError:  # also of None, which has no signature
            raise UsageError(
                f"the pickle inside calls {self.name} with {short(arguments)}, which is not admitted."
            ) from None
        return self.make(budget, *arguments)


class LeftOut:
    """Stands for what nobody reads: made from anything, given any attributes, and none of it is kept.

    But for the `number` of a NumPy type: an optimiser's learning rate may have one.
    """

    def __init__(self, *made_from: Any, number: np.dtype | None = None):
        self.number = number

    def __repr__(self) -> str:
        return "<left out>"


# Tensors


def _tensor(budget, storage, offset, shape, strides, requires_grad=False, hooks=None, metadata=None) -> Tensor:
    _refuse_metadata(metadata)
    return budget.tensor(storage, getattr(storage, "dtype", None), shape, strides, offset)


def _tensor_v3(budget, storage, offset, shape, strides, requires_grad, hooks, dtype, metadata=None) -> Tensor:
    _refuse_metadata(metadata)
    if not isinstance(dtype, str) or dtype.removeprefix("torch.") not in DTYPES:
        raise UsageError(f"a tensor's type is {short(dtype)}; the types read are {', '.join(DTYPES)}.")
    return budget.tensor(storage, DTYPES[dtype.removeprefix("torch.")], shape, strides, offset)


def _refuse_metadata(metadata: Any) -> None:
    if metadata:
        raise UsageError("a tensor is lazily conjugated or negated; save it after .resolve_conj().resolve_neg().")


def _parameter(budget, data, requires_grad, hooks, state=None) -> Any:
    return data


def _from_type(budget, function, kind, arguments, state) -> Any:
    """A tensor with Python attributes (left out); `kind` is its class."""
    if function not in _TENSORS.values() or not isinstance(arguments, tuple):
        raise UsageError("a tensor of a class of its own is not admitted; save plain tensors.")
    return function(budget, arguments)


# Dicts, bytes and numbers. `budget.spend` pays for what is copied.


def _dict(budget, items=()) -> dict:
    pairs = list(items.items()) if isinstance(items, dict) else items
    if not isinstance(pairs, list | tuple) or not all(isinstance(p, list | tuple) and len(p) == 2 for p in pairs):
        raise UsageError("a dict is made from what are not pairs: the file is damaged.")
    budget.spend(len(pairs))
    return {budget.key(key): value for key, value in pairs}


def _default_dict(budget, factory=None) -> dict:
    return {}


def _bytes(budget, text="", encoding="latin1") -> bytes | LeftOut:
    """Bytes from the text as which Python 3 writes them in protocol 2."""
    if isinstance(text, str) and encoding in ("latin1", "latin-1"):
        budget.spend(len(text) // 64)
        with contextlib.suppress(UnicodeEncodeError):
            return text.encode("latin1")
    return LeftOut()


_NUMBERS = ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8")


def _numpy_type(budget, code, *arguments) -> LeftOut:
    return LeftOut(number=np.dtype(code) if code in _NUMBERS else None)


def _numpy_scalar(budget, kind, data=None) -> bool | int | float | LeftOut:
    number = kind.number if isinstance(kind, LeftOut) else None
    if number is None or not isinstance(data, bytes) or len(data) != number.itemsize:
        return LeftOut()
    return np.frombuffer(data, number)[0].item()


# The table. A pickle spells names "module attribute".


def _admit(modules: str, names: str, make: Callable | None = LeftOut) -> dict[str, Admitted]:
    """Stand-ins for all these names of all these modules."""
    return {f"{m} {name}": Admitted(f"{m}.{name}", make) for m in modules.split() for name in names.split()}


_TENSORS = {
    **_admit("torch._utils", "_rebuild_tensor _rebuild_tensor_v2", _tensor),
    **_admit("torch._utils", "_rebuild_tensor_v3", _tensor_v3),
    **_admit("torch._utils", "_rebuild_parameter _rebuild_parameter_with_state", _parameter),
}
_STORAGES = {f"torch {storage}": DTYPES[name] for name, _, storage in TYPES if storage}
_STORAGES["torch.storage UntypedStorage"] = DTYPES["uint8"]

ADMITTED: dict[str, Admitted | str] = {
    **_TENSORS,
    **_admit("torch", "Tensor", None),
    **_admit("torch.nn.parameter", "Parameter", None),
    **{name: Admitted(name.replace(" ", "."), dtype=dtype) for name, dtype in _STORAGES.items()},
    **{f"torch {dtype}": f"torch.{dtype}" for dtype in DTYPES},
    **_admit("torch._tensor", "_rebuild_from_type_v2", _from_type),
    **_admit("collections", "OrderedDict Counter", _dict),
    **_admit("collections", "defaultdict", _default_dict),
    **_admit("lightning.pytorch.utilities.parsing pytorch_lightning.utilities.parsing", "AttributeDict", _dict),
    **_admit("lightning.fabric.utilities.data lightning_fabric.utilities.data", "AttributeDict", _dict),
    **_admit("builtins __builtin__", "dict", _dict),
    **_admit("builtins __builtin__", "bytes", _bytes),
    **_admit("_codecs", "encode", _bytes),
    **_admit("numpy", "dtype", _numpy_type),
    **_admit("numpy.core.multiarray numpy._core.multiarray", "scalar", _numpy_scalar),
    # Left out: objects that nobody reads.
    **_admit("builtins __builtin__", "list set frozenset bytearray complex int float"),
    **_admit("argparse", "Namespace"),
    **_admit("pathlib pathlib._local", "PosixPath PurePosixPath WindowsPath PureWindowsPath"),
    **_admit("numpy", "ndarray"),
    **_admit("numpy.core.multiarray numpy._core.multiarray", "_reconstruct"),
    **_admit("torch", "Size device"),
    **_admit("torch.torch_version", "TorchVersion"),
    **_admit("torch.serialization", "_get_layout"),
}
