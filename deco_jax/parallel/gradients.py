"""How do gradients get from the devices that compute them to those that keep them? Summed there, then sent once.

Where parameters are whole while they compute (`Layout.whole`), a device needs nobody to work on its examples: it
gathers the parameters once, differentiates, adds up what it found, and sends it once, to where the state is kept. This
is ZeRO-1 (`sum_apart`). Elsewhere XLA's partitioner lays out the program, and each layer gathers its own matrices.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from flax import linen as nn
from flax import struct
from flax.core import meta
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec

from deco_jax.parallel.mesh import AXES, Layout, Rules, batch_devices

BATCH_AXES = ("data", "fsdp")  # over which a batch is split
IsMatrix = Callable[[tuple[Any, ...]], bool]  # of a parameter's path
Means = tuple[Any, Any]  # of examples: the gradients, and further numbers


def sum_apart(
    differentiate: Callable[[Any, Any], Means],
    params: Any,
    examples: Any,
    layout: Layout,
    shardings: Any,
    *,
    is_matrix: IsMatrix,
    compute_dtype: str,
    gradient_dtype: str,
) -> Means:
    """Means over all examples: every device works on its own alone, then their gradients are added up.

    Args:
      differentiate: (whole parameters, a device's examples) → means over these: gradients shaped like the parameters,
        and scalars. Within it no axis of an array is split over data or fsdp.
      params: as they are kept, fp32.
      examples: arrays with the examples of the global batch as leading axis.
      layout: of the mesh that is in use.
      shardings: of each parameter as it is kept; so come the gradients back, fp32.
      is_matrix: of a parameter's path, whether it is gathered in `compute_dtype` and its gradient crosses devices in
        `gradient_dtype`; else both are fp32.
    """
    mesh = layout.mesh
    # The rest, if any, is left to the partitioner. With nothing left it does not look into the function at all.
    manual = BATCH_AXES if mesh.shape["tensor"] > 1 else AXES
    specs = jax.tree.map(lambda sharding: _without(sharding, ("tensor",)), shardings)

    def on_device(params: Any, examples: Any) -> Means:
        def gather(path: tuple[Any, ...], part: Array, spec: PartitionSpec) -> Array:
            return _gather(part.astype(compute_dtype) if is_matrix(path) else part, spec)

        def add_up(path: tuple[Any, ...], gradient: Array, spec: PartitionSpec) -> Array:
            total = _add_up(gradient.astype(gradient_dtype if is_matrix(path) else "float32"), spec)
            return total.astype("float32") / batch_devices(mesh)

        whole = jax.tree_util.tree_map_with_path(gather, params, specs)
        with nn.logical_axis_rules(_rules_of_rest(layout.rules, manual)):
            gradients, numbers = differentiate(whole, examples)
        gradients = jax.tree_util.tree_map_with_path(add_up, gradients, specs)
        return gradients, jax.tree.map(lambda x: jax.lax.pmean(x, BATCH_AXES), numbers)

    batch = PartitionSpec(BATCH_AXES)
    run = jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=(specs, batch),
        out_specs=(specs, PartitionSpec()),
        axis_names=set(manual),
        check_vma=False,
    )
    gradients, numbers = run(params, examples)
    return jax.lax.with_sharding_constraint(gradients, shardings), numbers


class Gathered(struct.PyTreeNode, meta.AxisMetadata):
    """A frozen matrix that the layer which reads it gathers, in place of an array among a network's parameters.

    Left to itself the partitioner may add up products of parts over devices instead, which sends more.
    """

    value: Array
    kept: tuple[Any, ...] = struct.field(pytree_node=False)  # the mesh axes of each axis

    def unbox(self) -> Array:
        """The whole matrix."""
        whole = [tuple(name for name in _names(names) if name not in BATCH_AXES) or None for names in self.kept]
        return jax.lax.with_sharding_constraint(self.value, PartitionSpec(*whole))

    def replace_boxed(self, val: Any) -> "Gathered":
        """See flax."""
        return self.replace(value=val)

    def add_axis(self, index: int, params: Mapping[Any, Any]) -> "Gathered":
        """See flax: a scan stacks parameters."""
        return self.replace(kept=(*self.kept[:index], None, *self.kept[index:]))

    def remove_axis(self, index: int, params: Mapping[Any, Any]) -> "Gathered":
        """See flax: a layer sees its own part of a stack."""
        return self.replace(kept=(*self.kept[:index], *self.kept[index + 1 :]))


def gathered_by_layer(params: Any, shardings: Any, is_matrix: IsMatrix) -> Any:
    """Frozen parameters, of which those matrices that lie on several devices are `Gathered` when they are read."""

    def box(path: tuple[Any, ...], value: Array, sharding: NamedSharding) -> Array | Gathered:
        kept = (*sharding.spec, *[None] * (value.ndim - len(sharding.spec)))
        split = {name for names in kept for name in _names(names)} & set(BATCH_AXES)
        return Gathered(value, kept) if split and is_matrix(path) else value

    return jax.tree_util.tree_map_with_path(box, params, shardings)


def _names(axes: str | Sequence[str] | None) -> tuple[str, ...]:
    """The mesh axes that split one axis."""
    return () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)


def _without(sharding: NamedSharding, axes: Sequence[str]) -> PartitionSpec:
    """What a sharding says of the other axes."""
    return PartitionSpec(*[tuple(name for name in _names(part) if name not in axes) or None for part in sharding.spec])


def _rules_of_rest(rules: Rules, manual: Sequence[str]) -> Rules:
    """The rules within a function that sees one place of the `manual` axes: nothing is split over these."""
    if set(manual) == set(AXES):
        return ()
    rest = [(logical, [name for name in _names(axes) if name not in manual]) for logical, axes in rules]
    return tuple((logical, tuple(names) or None) for logical, names in rest)


def _gather(part: Array, spec: PartitionSpec) -> Array:
    """A device's part of a parameter → the whole."""
    for place, names in enumerate(spec):
        if names:
            part = jax.lax.all_gather(part, names, axis=place, tiled=True)
    return part


def _add_up(gradient: Array, spec: PartitionSpec) -> Array:
    """One device's gradient of a whole parameter → the sum over devices, of which each keeps its part."""
    rest = list(BATCH_AXES)
    for place, names in enumerate(spec):
        if names:
            gradient = jax.lax.psum_scatter(gradient, names, scatter_dimension=place, tiled=True)
            rest = [name for name in rest if name not in names]
    return jax.lax.psum(gradient, rest) if rest else gradient
