"""The device mesh, and the one list of rules that maps logical axes of arrays to axes of the mesh."""

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from jax import Array
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from deco_jax.errors import UsageError

AXES = ("data", "fsdp", "tensor")

# Logical axis → mesh axes. A logical axis that does not stand here is not split.
RULES = (
    ("batch", ("data", "fsdp")),
    ("width", "fsdp"),
    ("heads", "tensor"),
    ("heads_out", "tensor"),
    ("mlp", "tensor"),
)
SMALL = 2**16  # parameters with fewer elements are copied to every device: splitting them costs more than it saves


def make_mesh(config: ConfigDict, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh with the axes data, fsdp and tensor.

    Args:
      config: the `mesh` part of a configuration: the size of each axis; one may be −1, the rest.
      devices: all of them unless given.

    Raises:
      UsageError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = {axis: config[axis] for axis in AXES}
    text = ", ".join(f"mesh.{axis}={size}" for axis, size in sizes.items())
    if any(size == 0 or size < -1 for size in sizes.values()) or list(sizes.values()).count(-1) > 1:
        raise UsageError(f"{text}: sizes are positive, and one may be -1 for the rest.")
    given = math.prod(size for size in sizes.values() if size != -1)
    rest = len(devices) // given
    shape = tuple(rest if size == -1 else size for size in sizes.values())
    if math.prod(shape) != len(devices):
        raise UsageError(f"{text} do not multiply to the {len(devices)} devices here.")
    return jax.make_mesh(shape, AXES, devices=devices, axis_types=(AxisType.Auto,) * len(AXES))


@contextlib.contextmanager
def use_mesh(mesh: Mesh) -> Iterator[None]:
    """Within it, programs are traced for `mesh`: logical axes in the networks become shardings."""
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        yield


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Splits the first axis over all devices that hold different examples."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def replicated(mesh: Mesh) -> NamedSharding:
    """A copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_devices(mesh: Mesh) -> int:
    """Into how many parts a batch is split."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def place_batch(batch: Any, mesh: Mesh) -> Any:
    """This host's share of a batch → global arrays split by `batch_sharding`."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), batch)


def fetch(x: Array, mesh: Mesh) -> np.ndarray:
    """A global array, however it is split, as a numpy array on every host."""
    return np.asarray(jax.jit(lambda x: x, out_shardings=replicated(mesh))(x))


def state_shardings(boxed: Any, mesh: Mesh) -> Any:
    """Shardings of a tree whose parameters are boxed with logical axis names (`jax.eval_shape` of an init).

    Axes that the mesh's do not divide, and parameters below SMALL elements, are not split.
    """

    def sharding(leaf: Any) -> NamedSharding:
        if not isinstance(leaf, nn.LogicallyPartitioned) or math.prod(leaf.value.shape) < SMALL:
            return replicated(mesh)
        spec = nn.logical_to_mesh_axes(leaf.names, RULES)
        parts = []
        for size, axes in zip(leaf.value.shape, spec, strict=True):
            axes = () if axes is None else (axes,) if isinstance(axes, str) else axes
            split = math.prod(mesh.shape[axis] for axis in axes)
            parts.append(axes if axes and size % split == 0 else None)
        return NamedSharding(mesh, PartitionSpec(*parts))

    return jax.tree.map(sharding, boxed, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))
