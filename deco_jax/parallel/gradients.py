"""How do gradients get from the devices that compute them to those that keep them? Every device works alone.

It sees its own examples and whole parameters, differentiates, adds up what it found over the parts of its batch, and
sends it to where it is kept. Matrices of stacked layers may stay parts until a layer reads them (`Part`): then they
are gathered, and their gradients sent, layer by layer. That is FSDP, and gathering all of them first is ZeRO-1.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax import linen as nn
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec

from deco_jax.ops.product import Kept, Part, gather, scatter
from deco_jax.parallel.mesh import AXES, Layout, Rules, batch_devices

BATCH_AXES = ("data", "fsdp")  # over which a batch is split
IsMatrix = Callable[[tuple[Any, ...]], bool]  # of a parameter's path
Means = tuple[Any, Any]  # of examples: the gradients, and further numbers


def work_apart(
    differentiate: Callable[[Any, Any, Any], Means],
    params: Any,
    frozen: Any,
    examples: Any,
    layout: Layout,
    shardings: tuple[Any, Any],
    *,
    whole: bool,
    is_matrix: IsMatrix,
    compute_dtype: str,
    gradient_dtype: str,
) -> Means:
    """Means over all examples: every device works on its own alone, then their gradients are added up.

    Args:
      differentiate: (parameters, frozen ones, a device's examples) → means over these: gradients shaped like the
        parameters, and scalars. Within it every array but those in a `Part` is a whole of its own.
      params: as they are kept, fp32.
      frozen: further parameters, without gradients.
      examples: arrays with the examples of the global batch as leading axis.
      layout: of the mesh that is in use.
      shardings: a pair, for `params` and for `frozen`: how each is kept. Gradients come back like the first, fp32.
      whole: gather all of `params` at once, and add up all gradients at the end. Else layers gather their matrices in
        their own dtype and send the gradients, as frozen layers always do.
      is_matrix: of a parameter's path, whether it is gathered in `compute_dtype` and its gradient crosses devices in
        `gradient_dtype`; else both are fp32.
    """
    mesh = layout.mesh
    # The rest, if any, is left to the partitioner. With nothing left it does not look into the function at all.
    manual = BATCH_AXES if mesh.shape["tensor"] > 1 else AXES
    specs_of_params, specs_of_frozen = specs = jax.tree.map(_over_batch, shardings)
    map_leaves = functools.partial(jax.tree_util.tree_map_with_path, is_leaf=lambda x: isinstance(x, Part))

    def read(whole: bool, path: tuple[Any, ...], part: Array, spec: PartitionSpec) -> Array | Part:
        kept = _kept(spec, part.ndim)
        if not any(kept):
            return part
        if not whole and not kept[0] and _is_read_in_parts(path):
            return Part(part, kept)
        return gather(part.astype(compute_dtype) if is_matrix(path) else part, kept)

    def add_up(path: tuple[Any, ...], gradient: Array | Part, spec: PartitionSpec) -> Array:
        dtype = gradient_dtype if is_matrix(path) else "float32"
        if isinstance(gradient, Part):  # the layer has scattered it
            total = gradient.value
        else:
            total = scatter(gradient.astype(dtype), _kept(spec, gradient.ndim))
        kept = [name for names in spec for name in _names(names)]
        if rest := [name for name in BATCH_AXES if name not in kept and mesh.shape[name] > 1]:
            total = jax.lax.psum(total.astype(dtype), rest)
        return total.astype("float32") / batch_devices(mesh)

    def on_device(params: Any, frozen: Any, examples: Any) -> Means:
        params = map_leaves(functools.partial(read, whole), params, specs_of_params)
        frozen = map_leaves(functools.partial(read, False), frozen, specs_of_frozen)
        with nn.logical_axis_rules(_rules_of_rest(layout.rules, manual)):
            gradients, numbers = differentiate(params, frozen, examples)
        return map_leaves(add_up, gradients, specs_of_params), jax.lax.pmean(numbers, BATCH_AXES)

    run = jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=(*specs, PartitionSpec(BATCH_AXES)),
        out_specs=(specs_of_params, PartitionSpec()),
        axis_names=set(manual),
        check_vma=False,
    )
    gradients, numbers = run(params, frozen, examples)
    return jax.lax.with_sharding_constraint(gradients, shardings[0]), numbers


def _is_read_in_parts(path: tuple[Any, ...]) -> bool:
    """Whether who reads a parameter takes a `Part`: the linear layers of stacked layers, and who looks up rows."""
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    in_stack = "/layers/" in name or "/blocks/" in name  # the latter are DINOv2's
    return name.endswith("/table") or (in_stack and name.endswith("/kernel"))


def _kept(spec: PartitionSpec, ndim: int) -> Kept:
    """The mesh axes of each of an array's axes."""
    return tuple(_names(part) for part in (*spec, *[None] * (ndim - len(spec))))


def _names(axes: str | Sequence[str] | None) -> tuple[str, ...]:
    """The mesh axes that split one axis."""
    return () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)


def _over_batch(sharding: NamedSharding) -> PartitionSpec:
    """What a sharding says of those of BATCH_AXES that have several places."""
    wanted = [name for name in BATCH_AXES if sharding.mesh.shape[name] > 1]
    return PartitionSpec(*[tuple(name for name in _names(part) if name in wanted) or None for part in sharding.spec])


def _rules_of_rest(rules: Rules, manual: Sequence[str]) -> Rules:
    """The rules within a function that sees one place of the `manual` axes: nothing is split over these."""
    if set(manual) == set(AXES):
        return ()
    rest = [(logical, [name for name in _names(axes) if name not in manual]) for logical, axes in rules]
    return tuple((logical, tuple(names) or None) for logical, names in rest)
