"""How do PyTorch's tensors become our parameters, and ours theirs? By a table of names that is read in both directions.

A table says: PyTorch name → path in our parameter tree. `{i}` counts the blocks of the transformer and `{t}` those of
the text refiner, which we stack along a leading axis; `{j}` counts the blocks of the pixel decoder, and `{i+j}` goes on
counting where `{i}` ends. The only transform is the one every linear layer needs: PyTorch stores (out, in), we store
(in, *features) with `out` split in row-major order. What PyTorch fuses (qkv, w12) is the first axis of the features
here; where others do not fuse it, their tensors' paths end with the place on that axis: "attention/qkv/kernel[1]".
"""

import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from deco_jax.errors import UsageError

MATRICES = ("/kernel", "table")  # how the paths of arrays end that are matrices


def expand(table: Mapping[str, str], counts: Mapping[str, int]) -> Iterator[tuple[str, str, int | None]]:
    """Every tensor that `table` stands for, in the order of PyTorch's modules.

    Args:
      table: see above.
      counts: how many blocks "i", "t" and "j" count.

    Yields:
      (PyTorch name, our path, index on our stacked axis or None).
    """
    for letter, entries in itertools.groupby(table.items(), lambda entry: _letter(entry[0])):
        entries = list(entries)
        for k in range(counts[letter] if letter else 1):
            for theirs, path in entries:
                name = theirs.replace("{i+j}", str(counts.get("i", 0) + k)).replace(f"{{{letter}}}", str(k))
                yield name, path.replace("{j}", str(k)), k if letter in ("i", "t") else None


def _letter(theirs: str) -> str | None:
    """What a name counts blocks with."""
    found = re.search(r"\{(?:i\+)?([itj])\}", theirs)
    return found[1] if found else None


def counts_of(table: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """How many blocks our parameters have, from their paths and shapes."""
    counts = {"i": 0, "t": 0, "j": 0}
    for theirs, path in table.items():
        for letter in "it":
            if f"{{{letter}}}" in theirs and path in shapes:
                counts[letter] = shapes[path][0]
        while path.replace("{j}", str(counts["j"])) in shapes and "{j}" in path:
            counts["j"] += 1
    return counts


def count_blocks(pattern: str, names: Iterable[str]) -> int:
    """One more than the largest number that `pattern` finds in PyTorch's names; gaps turn up as missing tensors."""
    return max((int(found[1]) + 1 for name in names if (found := re.match(pattern, name))), default=0)


def from_torch(
    table: Mapping[str, str],
    tensors: Mapping[str, Any],
    like: Any,
    watch: Callable[[Iterable], Iterable] = iter,
    matrices: Any = np.float32,
) -> Any:
    """Arranges PyTorch tensors as our parameters; whatever precision they have, ours is fp32, or what is asked for.

    Args:
      table: see above.
      tensors: PyTorch name → array, or a `tensors.Tensor`, which is read from disk here and then let go.
      like: the parameter tree to fill; only its shapes are read (`jax.eval_shape` of an init will do).
      watch: wraps the iteration over tensors, for a progress bar.
      matrices: dtype of kernels and tables; of frozen networks that multiply in another one than fp32.

    Returns:
      Nested dicts of numpy arrays shaped as `like`.

    Raises:
      UsageError: tensors are missing, left over or misshapen, and all of them are listed; or some are not finite.
    """
    shapes = {"/".join(path): leaf.shape for path, leaf in flatten_dict(like).items()}
    places = {name: _place(*place) for name, *place in expand(table, counts_of(table, shapes))}
    problems = [f"unexpected {name}" for name in sorted(set(tensors) - set(places))]
    for name, (path, index) in places.items():
        shape = _torch_shape(path, np.broadcast_to(0, shapes[path])[index].shape)
        if name not in tensors:
            problems.append(f"missing {name} {shape}")
        elif tuple(tensors[name].shape) != shape:
            problems.append(f"{name} has shape {tuple(tensors[name].shape)}, not {shape}")
        elif tensors[name].dtype.kind in "biuc":  # quantised, say, with its scale elsewhere
            problems.append(f"{name} has the dtype {tensors[name].dtype}, not one of floating point")
    if problems:
        raise UsageError("these tensors do not fit the model: " + "; ".join(problems) + ".")
    dtypes = {path: matrices if path.endswith(MATRICES) else np.float32 for path, _ in places.values()}
    ours, nonfinite = {path: aligned_empty(shapes[path], dtype) for path, dtype in dtypes.items()}, {}
    for name, (path, index) in watch(places.items()):
        target, value = ours[path][index], np.asarray(tensors[name])
        target[...] = (value.T if path.endswith("/kernel") else value).reshape(target.shape)
        nonfinite[name] = target.size - np.count_nonzero(np.isfinite(target))
    check_finite(nonfinite)
    return unflatten_dict({tuple(path.split("/")): value for path, value in ours.items()})


def stored_dtype(path: tuple[Any, ...], dtype: Any) -> np.dtype:
    """Of a parameter that is not trained: linear layers multiply in `dtype`, so they are stored in it, and tables too.

    Args:
      path: to the parameter, as of `jax.tree_util`.
      dtype: of the network's matrix products.
    """
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    return np.dtype(dtype) if name.endswith(MATRICES) else np.dtype(np.float32)


def check_finite(nonfinite: Mapping[str, int]) -> None:
    """Raises UsageError if a tensor has numbers that are NaN or infinite; `nonfinite` says how many, by name."""
    bad = [f"{name} ({count:,} numbers)" for name, count in nonfinite.items() if count]
    if bad:
        more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
        raise UsageError(f"weights that are NaN or infinite are of no use: {', '.join(bad[:5])}{more}.")


def aligned_empty(shape: tuple[int, ...], dtype: Any = np.float32) -> np.ndarray:
    """An array that JAX can take over on a CPU without a copy: it begins at a multiple of 64 bytes."""
    size = np.dtype(dtype).itemsize * math.prod(shape)
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)


def to_torch(table: Mapping[str, str], params: Any) -> dict[str, np.ndarray]:
    """Inverse of `from_torch`: our parameters under PyTorch's names and shapes."""
    arrays = {"/".join(path): np.asarray(leaf) for path, leaf in flatten_dict(params).items()}
    tensors = {}
    for name, *place in expand(table, counts_of(table, {path: array.shape for path, array in arrays.items()})):
        path, index = _place(*place)
        value = arrays[path][index]
        matrix = value.reshape(value.shape[0], -1).T if path.endswith("/kernel") else value
        tensors[name] = np.ascontiguousarray(matrix.reshape(_torch_shape(path, value.shape)))
    return tensors


def _place(path: str, layer: int | None) -> tuple[str, tuple[int | slice, ...]]:
    """(path of our array, index of the part of it that is one tensor of PyTorch's)."""
    path, _, part = path.removesuffix("]").partition("[")
    index: tuple[int | slice, ...] = () if layer is None else (layer,)
    if part:
        index += (slice(None), int(part)) if path.endswith("/kernel") else (int(part),)
    return path, index


def _torch_shape(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape PyTorch gives the parameter that we keep at `path` with `shape`."""
    if path.endswith("/kernel"):
        return (math.prod(shape[1:]), shape[0])
    if path.endswith("/bias"):
        return (math.prod(shape),)
    return tuple(shape)
