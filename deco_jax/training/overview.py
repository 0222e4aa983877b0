"""Which parameters does a run have, how are they split, and what of them lies on a device? A table of a dozen rows."""

import dataclasses
import math
import re
from collections import defaultdict
from typing import Any

from clu import parameter_overview
from flax import linen as nn

from deco_jax.parallel.mesh import Layout, state_shardings

OWN_ROW = 0.01  # share of all numbers from which on a parameter is not summed up with others


@dataclasses.dataclass(frozen=True)
class Row:
    """Of the table, one or several parameters; the fields are its columns."""

    name: str
    shape: str
    axes: str  # logical ones
    split: str  # the mesh axes over which each of them is split
    size: int
    bytes: int  # per device


def parameter_table(boxed_params: Any, layout: Layout) -> str:
    """A run's parameters as a table of names, shapes, logical axes, mesh axes, sizes and bytes per device.

    Equal parameters of numbered blocks share a row. Those below OWN_ROW are summed by the module of their layer.

    Args:
      boxed_params: shapes of the parameters, boxed with logical axis names (`jax.eval_shape` of an init).
      layout: how they are split.
    """
    every = [_row(name, leaf, layout) for name, leaf in parameter_overview.flatten_dict(boxed_params).items()]
    least = OWN_ROW * sum(row.size for row in every)
    large, small = defaultdict(list), defaultdict(list)
    for row in every:
        large[re.sub(r"_\d+(?=/)", "_*", row.name), row.shape].append(row)
    rows = []
    for (name, shape), equal in large.items():
        if sum(row.size for row in equal) >= least:
            rows.append(_sum(equal, name, shape if len(equal) == 1 else f"{len(equal)} of {shape}"))
            continue
        for row in equal:
            small["/".join(row.name.split("/")[:-2][:2])].append(row)
    for module, several in small.items():
        rows += several if len(several) == 1 else [_sum(several, f"{module}/*", f"{len(several)} small ones")]
    return "\n".join(
        [
            parameter_overview.make_table(rows),
            f"A row that ends in * sums up parameters that have less than {OWN_ROW:.0%} of all numbers each.",
            f"Parameters: {sum(row.bytes for row in every):,} bytes per device; EMA and both moments are as large and "
            "split alike.",
        ]
    )


def _row(name: str, leaf: nn.LogicallyPartitioned, layout: Layout) -> Row:
    sharding, shape = state_shardings(leaf, layout), leaf.value.shape
    parts = [part if isinstance(part, str) else "+".join(part or "·") for part in sharding.spec]
    return Row(
        name,
        "×".join(map(str, shape)),
        ", ".join(axis or "·" for axis in leaf.names),
        ", ".join(parts) if any(sharding.spec) else "copied",
        math.prod(shape),
        leaf.value.dtype.itemsize * math.prod(sharding.shard_shape(shape)),
    )


def _sum(rows: list[Row], name: str, shape: str) -> Row:
    """Several parameters as one row; axes that are not the same in all are left out."""
    axes, split = ({getattr(row, column) for row in rows} for column in ("axes", "split"))
    return Row(
        name,
        shape,
        axes.pop() if len(axes) == 1 else "",
        split.pop() if len(split) == 1 else "in part",
        sum(row.size for row in rows),
        sum(row.bytes for row in rows),
    )
