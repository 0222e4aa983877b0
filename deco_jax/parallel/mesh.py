"""How is a run laid out over devices? The mesh, its presets, and the rules that map logical axes of arrays to it."""

import contextlib
import dataclasses
import enum
import itertools
import math
import pathlib
import runpy
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from jax import Array
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from deco_jax.errors import UsageError

AXES = ("data", "fsdp", "tensor")
Rules = tuple[tuple[str, str | tuple[str, ...] | None], ...]

# Logical axis → mesh axes. A logical axis that does not stand here is not split.
RULES: Rules = (
    ("batch", ("data", "fsdp")),
    ("width", "fsdp"),
    ("heads", "tensor"),
    ("heads_out", "tensor"),
    ("mlp", "tensor"),
    ("pixels", "tensor"),
)
# All that arrays' axes are called; those of activations begin with batch, tokens or activation_.
LOGICAL_AXES = {"batch", "tokens", "activation_width", "width", "width_out", "heads", "heads_out", "head_dim", "mlp"}
LOGICAL_AXES |= {"modulation", "layers", "patch", "pixels", "decoder_width", "decoder_width_out", "generated"}
LOGICAL_AXES |= {"classes", "frequency", "text", "text_features"}
SMALL = 2**16  # parameters with fewer elements are copied to every device: splitting them costs more than it saves

# Sizes of the axes; −1 = the rest, of slices: as many as the devices lie in.
PRESETS = {
    # Every device holds the whole state (16 bytes per parameter: 7 GB for L, 11 GB for XL) and works on its share of
    # the batch. The only communication is the sum of the gradients.
    "data": {"slices": -1, "data": -1, "fsdp": 1, "tensor": 1},
    # Every device holds a part of the state, and gathers a layer's parameters to use them. The choice for XL on chips
    # with 16 to 40 GB. The number of devices must divide the network's width; with more, mesh.fsdp=64 and mesh.data=-1.
    "fsdp": {"slices": 1, "data": 1, "fsdp": -1, "tensor": 1},
    # FSDP, and attention heads and MLP channels split over neighbours. For more devices than images in the batch, and
    # for latency when sampling. Every block adds up activations over the tensor axis, which must divide the heads.
    "fsdp_tensor": {"slices": 1, "data": 1, "fsdp": -1, "tensor": 2},
    # Several TPU slices, or GPU nodes: FSDP within one, where links are fast, and data parallelism between them. The
    # slower network sees the sum of the gradients once per step, of which each device sends its own part.
    "hybrid": {"slices": -1, "data": 1, "fsdp": -1, "tensor": 1},
    # ZeRO-1: every device keeps a part of the state and, while it computes, a whole copy of the parameters in the dtype
    # of the products (1.4 GB for XL). Parameters are gathered once per step, gradients are sent once.
    "zero1": {"slices": 1, "data": 1, "fsdp": -1, "tensor": 1, "compute": "whole"},
}


@dataclasses.dataclass(frozen=True)
class Layout:
    """Devices as a mesh, and the rules by which arrays are split over it."""

    mesh: Mesh
    rules: Rules = RULES  # of all that is kept between steps: parameters in fp32, moments, moving average
    whole: bool = False  # all parameters are gathered once per step, and gradients added up once; otherwise layers of
    # a stack gather their own matrices and send the gradients


def axis_sizes(config: ConfigDict) -> dict[str, int]:
    """The sizes of "slices", "data", "fsdp" and "tensor" that `config` (a configuration's `mesh` part) asks for.

    Raises:
      UsageError: no such preset, it names an unknown axis, or a size is not one.
    """
    names = ("slices", *AXES)
    preset, _, _ = _preset(config.preset)
    unknown = sorted(set(preset) - set(names))
    if unknown:
        raise UsageError(
            f"mesh.preset={config.preset} names the axis {unknown[0]!r}, which does not exist; there are: "
            f"{', '.join(names)}."
        )
    sizes = {name: config[name] or preset.get(name, 1) for name in names}
    text = ", ".join(f"mesh.{name}={size}" for name, size in sizes.items())
    wrong = [size for size in sizes.values() if not isinstance(size, int) or size == 0 or size < -1]
    if wrong or [sizes[axis] for axis in AXES].count(-1) > 1:
        raise UsageError(f"{text}: sizes are positive, and one of {', '.join(AXES)} may be -1 for the rest.")
    return sizes


def _preset(name: str) -> tuple[dict[str, int], Rules, bool]:
    """(sizes, rules, whole) of a preset, or of the file of that name.

    Its get_config() may have among the sizes "rules", and "compute": "whole" (see `Layout`) or "split".
    """
    if name in PRESETS:
        sizes = dict(PRESETS[name])
        return sizes, RULES, sizes.pop("compute", "split") == "whole"
    if not name.endswith(".py") or not pathlib.Path(name).is_file():
        known = ", ".join(PRESETS)
        raise UsageError(f"mesh.preset={name!r} does not exist; there are: {known}, or a path to a file of yours.")
    try:
        sizes = dict(runpy.run_path(name)["get_config"]())
        replaced, compute = dict(sizes.pop("rules", {})), sizes.pop("compute", "split")
    except Exception as error:  # the file is a program; whatever it raises is the answer to "why not"
        raise UsageError(f"mesh.preset={name} has no get_config() that gives sizes: {error!r}") from error
    if compute not in ("split", "whole"):
        raise UsageError(f"mesh.preset={name} has compute={compute!r}; parameters compute split or whole.")
    allowed = sorted(LOGICAL_AXES - {"batch"})  # which stays split over data and fsdp
    for logical, axes in replaced.items():
        places = () if axes is None else (axes,) if isinstance(axes, str) else axes
        if logical not in allowed or not isinstance(places, tuple | list) or not set(places) <= set(AXES):
            raise UsageError(
                f"mesh.preset={name} has the rule {logical!r}: {axes!r}; a rule sends one of {', '.join(allowed)} to "
                f"None, or to some of {', '.join(AXES)}."
            )
        replaced[logical] = tuple(places)
    return sizes, tuple((dict(RULES) | replaced).items()), compute == "whole"


def make_layout(config: ConfigDict, devices: Sequence[Any] | None = None) -> Layout:
    """A mesh with the axes data, fsdp and tensor, data running over the slices first; and the preset's rules.

    Args:
      config: the `mesh` part of a configuration.
      devices: all of them unless given.

    Raises:
      UsageError: see `axis_sizes`; or the sizes do not multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = axis_sizes(config)
    text = ", ".join(f"mesh.{name}={size}" for name, size in sizes.items())
    groups = _slices(devices, sizes.pop("slices"))
    given = math.prod(size for size in sizes.values() if size != -1)
    rest = len(groups[0]) // given
    shape = tuple(rest if size == -1 else size for size in sizes.values())
    if math.prod(shape) != len(groups[0]):
        where = f"{len(devices)} devices here" if len(groups) == 1 else f"{len(groups[0])} devices of a slice"
        raise UsageError(f"{text} do not multiply to the {where}.")
    parts = np.concatenate([_lay_out(group, shape) for group in groups])
    _, rules, whole = _preset(config.preset)
    return Layout(Mesh(parts, AXES, axis_types=(AxisType.Auto,) * len(AXES)), rules, whole)


def local_layout() -> Layout:
    """Every device of this process holds a copy of everything, and works on its share of a batch."""
    devices = jax.local_devices()
    mesh = Mesh(np.array(devices).reshape(-1, 1, 1), AXES, axis_types=(AxisType.Auto,) * len(AXES))
    return Layout(mesh)


def _lay_out(devices: list[Any], shape: tuple[int, ...]) -> np.ndarray:
    """Devices as an array, neighbours in it being neighbours in the machine."""
    if len({_slice_of(device) for device in devices}) > 1:
        return np.array(devices).reshape(shape)
    return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)


def _slice_of(device: Any) -> int:
    """The TPU slice or NVLink domain of a device; where the backend does not say, a process stands for one.

    TPUs of a single slice do not say either.
    """
    for name in ("partition_index", "slice_index"):
        if hasattr(device, name):
            return getattr(device, name)
    return 0 if device.platform == "tpu" else device.process_index


def _slices(devices: list[Any], wanted: int) -> list[list[Any]]:
    """The devices in `wanted` equal groups with fast links within each; −1 = as many as there are."""
    devices = sorted(devices, key=_slice_of)
    if wanted == 1:
        return [devices]
    groups = [list(group) for _, group in itertools.groupby(devices, _slice_of)]
    if wanted == -1 or wanted == len(groups):
        if len({len(group) for group in groups}) > 1:
            raise UsageError(
                f"mesh.slices={wanted}: the slices here have {[len(g) for g in groups]} devices, not equal."
            )
        return groups
    if len(groups) > 1 or len(devices) % wanted:
        raise UsageError(f"mesh.slices={wanted}: the {len(devices)} devices here lie in {len(groups)} slices.")
    return [list(part) for part in np.split(np.array(devices), wanted)]


@contextlib.contextmanager
def use_mesh(layout: Layout) -> Iterator[None]:
    """Within it, programs are traced for the mesh: logical axes in the networks become shardings."""
    with jax.set_mesh(layout.mesh), nn.logical_axis_rules(layout.rules):
        yield


def use_mesh_of(x: Array) -> contextlib.AbstractContextManager[None]:
    """`use_mesh` of the devices that `x` is split over by one of our meshes, unless one is in use already.

    Programs that are traced without a mesh cannot split their kernels over devices.
    """
    mesh = getattr(x.sharding, "mesh", None)
    if mesh is None or mesh.axis_names != AXES or mesh.size == 1 or not jax.sharding.get_abstract_mesh().empty:
        return contextlib.nullcontext()
    return use_mesh(Layout(mesh))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Splits the first axis over all devices that hold different examples."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def replicated(mesh: Mesh) -> NamedSharding:
    """A copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_devices(mesh: Mesh) -> int:
    """Into how many parts a batch is split."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def round_up(batch_size: int, mesh: Mesh) -> int:
    """The next multiple of the parts into which a batch is split."""
    parts = batch_devices(mesh)
    return -(-batch_size // parts) * parts


def host_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
    """Which rows of a global batch this process's devices hold, in rising order."""
    slices = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([np.arange(batch_size)[rows] for (rows,) in slices]))


def place_batch(batch: Any, mesh: Mesh, rows: np.ndarray, batch_size: int) -> Any:
    """This process's rows (see `host_rows`) of a global batch → global arrays split by `batch_sharding`."""
    sharding = batch_sharding(mesh)

    def place(x: np.ndarray) -> Array:
        def shard(index: tuple[slice, ...]) -> np.ndarray:
            start, stop, _ = index[0].indices(batch_size)
            first = np.searchsorted(rows, start)
            return x[first : first + stop - start]

        return jax.make_array_from_callback((batch_size, *x.shape[1:]), sharding, shard)

    return jax.tree.map(place, batch)


class Flag(enum.IntFlag):
    """What a process may tell the others with a step, all known to all one step late (see `place_messages`)."""

    STOP = 1  # it was asked to stop
    SAVE = 2  # it is time to save
    ABSENT = 4  # it has no data; what stands in their place must not be trained on


def place_messages(flags: int, bad_R: np.ndarray, mesh: Mesh, rows: np.ndarray, batch_size: int) -> Array:
    """What this process tells the others: (devices, 1 + batch per device) int32, one row for each device.

    A row holds the process's flags, and the bad records among the device's rows of the batch. Every device has a row
    of its own: copies of one row on the tensor axis could differ, where that crosses processes.

    Args:
      flags: several `Flag`s, or 0.
      bad_R: of each of `rows`, the number of its record if that cannot be read, else −1.
      mesh, rows, batch_size: see `place_batch`.
    """
    size, tensor = batch_size // batch_devices(mesh), mesh.shape["tensor"]

    def row(index: tuple[slice, ...]) -> np.ndarray:
        device = index[0].indices(mesh.size)[0]
        first = np.searchsorted(rows, device // tensor * size)
        return np.concatenate([[flags], bad_R[first : first + size]])[None].astype(np.int32)

    return jax.make_array_from_callback((mesh.size, 1 + size), messages_sharding(mesh), row)


def messages_sharding(mesh: Mesh) -> NamedSharding:
    """One row on every device."""
    return NamedSharding(mesh, PartitionSpec(AXES))


def fetch(x: Array, mesh: Mesh) -> np.ndarray:
    """A global array, however it is split, as a numpy array on every host."""
    return np.asarray(jax.jit(lambda x: x, out_shardings=replicated(mesh))(x))


def is_boxed(leaf: Any) -> bool:
    """Whether it is a parameter with its logical axis names."""
    return isinstance(leaf, nn.LogicallyPartitioned)


def state_shardings(boxed: Any, layout: Layout) -> Any:
    """Shardings of a tree whose parameters are boxed with logical axis names (`jax.eval_shape` of an init).

    Axes that the mesh's do not divide, and parameters below SMALL elements, are not split.
    """
    mesh = layout.mesh

    def sharding(leaf: Any) -> NamedSharding:
        if not is_boxed(leaf) or math.prod(leaf.value.shape) < SMALL:
            return replicated(mesh)
        spec = nn.logical_to_mesh_axes(leaf.names, layout.rules)
        parts = []
        for size, axes in zip(leaf.value.shape, spec, strict=True):
            axes = () if axes is None else (axes,) if isinstance(axes, str) else axes
            split = math.prod(mesh.shape[axis] for axis in axes)
            parts.append(axes if axes and size % split == 0 else None)
        return NamedSharding(mesh, PartitionSpec(*parts))

    return jax.tree.map(sharding, boxed, is_leaf=is_boxed)
