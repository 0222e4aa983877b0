"""The one door to kernels: the first implementation of a table that can run, or the one that was asked for by name.

What can run depends on the platform of the mesh that a program is traced for, not on this machine: plans are compiled
for hardware that is not here. A kernel sees one device's part of its arrays (`over_devices`), as the compiler does not
divide it.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from absl import logging
from flax import linen as nn
from jax import Array
from jax.sharding import PartitionSpec

from deco_jax.errors import UsageError

Axes = tuple[str | None, ...]  # logical names of an array's axes


@dataclasses.dataclass(frozen=True)
class Implementation:
    """One way of computing an operation."""

    name: str
    run: Callable[..., Any]  # all of an operation's take and return the same
    platforms: tuple[str, ...] = ()  # of JAX: cpu, gpu, tpu; none = all
    refuses: Callable[..., str] = lambda *arguments: ""  # why it cannot run with these arguments; "" if it can


def platform() -> str:
    """Where the program that is being traced will run: cpu, gpu or tpu."""
    device = jax.sharding.get_abstract_mesh().abstract_device or jax.config.jax_default_device
    name = jax.default_backend() if device is None else getattr(device, "platform", device)
    return "gpu" if name in ("cuda", "rocm") else name


def choose(operation: str, table: Sequence[Implementation], wanted: str, *arguments: Any) -> Implementation:
    """The implementation to run.

    Args:
      operation: its field in the configuration, for people: model.attention, say.
      table: in the order in which they are tried; the last one runs everywhere.
      wanted: "auto", or the name of one.
      arguments: of the operation, as `refuses` takes them.

    Raises:
      UsageError: the wanted one does not exist or cannot run.
    """
    here = platform()
    named = [candidate for candidate in table if wanted in ("auto", candidate.name)]
    refused = []
    for candidate in named:
        if candidate.platforms and here not in candidate.platforms:
            continue
        reason = candidate.refuses(*arguments)
        if not reason:
            _say(operation, candidate.name, tuple(refused))
            return candidate
        refused.append((candidate.name, reason))
    if named:
        platforms = [name.upper() for candidate in named for name in candidate.platforms]
        told = "; ".join(reason for _, reason in refused) or f"it needs a {' or a '.join(platforms)}"
        raise UsageError(f"{operation}={wanted!r} cannot run here: {told}. {operation}='auto' takes what can.")
    names = ", ".join(["auto", *(candidate.name for candidate in table)])
    raise UsageError(f"{operation}={wanted!r} does not exist; there are: {names}.")


@functools.cache
def _say(operation: str, name: str, refused: tuple[tuple[str, str], ...]) -> None:
    """Once per outcome: which one "auto" took, where one that was made for this platform could not run."""
    for better, reason in refused:
        logging.warning("%s: %s instead of %s: %s.", operation, name, better, reason)


def over_devices(function: Callable[..., Any], arguments: Sequence[Axes | None], results: Any) -> Callable[..., Any]:
    """`function`, called on every device with its parts of the arrays.

    Args:
      function: of arrays.
      arguments: logical names of each argument's axes; None for a tree whose leaves are whole on every device, and of
        which the gradient is summed over the devices.
      results: the names of the result, or a tuple of several such.

    Axes that the mesh does not divide are whole on every device. Without a mesh the function itself.
    """
    mesh = jax.sharding.get_abstract_mesh()
    free = [name for name in mesh.axis_names if name not in mesh.manual_axes]  # of the others this is one place already
    if math.prod(mesh.shape[name] for name in free) == 1:
        return function

    def spec(axes: Axes | None, shape: tuple[int, ...]) -> PartitionSpec:
        if axes is None:
            return PartitionSpec()
        parts = []
        for size, names in zip(shape, nn.logical_to_mesh_axes(axes), strict=True):
            names = () if names is None else (names,) if isinstance(names, str) else names
            parts.append(names if names and size % math.prod(mesh.shape[n] for n in names) == 0 else None)
        return PartitionSpec(*parts)

    def call(*arrays: Array | Any) -> Any:
        specs = tuple(spec(axes, getattr(array, "shape", ())) for axes, array in zip(arguments, arrays, strict=True))
        shapes = jax.eval_shape(function, *arrays)
        several = isinstance(shapes, tuple)
        out = tuple(spec(a, s.shape) for a, s in zip(results, shapes, strict=True)) if several else None
        out = out if several else spec(results, shapes.shape)
        run = jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=out, axis_names=set(free), check_vma=False)
        return run(*arrays)

    return call
