"""What of a network's work needs no image, and is done once, before a sampler's first step?

The embedding of the time, the condition, and what modulates every block (a third of the large networks' parameters are
the matrices that make it of the condition) are known for all steps when sampling starts. Done so, a step reads a few
vectors where it would read those matrices. With large batches that saves nothing, and the table of vectors gets large.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from jax import Array

from deco_jax.parallel import mesh as meshes
from deco_jax.weights.translate import stored_dtype

WORKSPACE = 12  # what the text's blocks need at once while they run, of the size of what comes out


def tabulate(model: nn.Module, params: Any, times_S: np.ndarray, conditions: Sequence[Any]) -> list[Any] | None:
    """What the network knows of each of these conditions, trees of arrays (K, …), at all times: see `Trunk`.

    The tables of all conditions may take as much memory, on each device, as the parameters do: with DeCo-XL in bfloat16
    and 100 steps 69 images and one null. Text that has passed its own blocks at all times is left out first. None where
    there is no room: the network is then told times and conditions at every step.
    """
    mesh = jax.sharding.get_abstract_mesh()
    room = _size(params) * (1 if mesh.empty else meshes.batch_devices(mesh))

    def make(refined: bool) -> list[Any]:
        know = functools.partial(model.apply, {"params": params}, times_S, refined=refined, method="conditioning")
        return [know(condition=condition) for condition in conditions]

    for refined in (True, False):
        tables = jax.eval_shape(functools.partial(make, refined))
        text = _size([table.text_BxTxD for table in tables])
        if _size(tables) - text + (text * (1 + WORKSPACE) if refined else 0) <= room:
            return make(refined)
    return None


def look_up(table: Any, number: Array | int) -> Any:
    """What a table says of the time with this number."""

    def row(rows: Array) -> Array:
        return rows[0] if len(rows) == 1 else jax.lax.dynamic_index_in_dim(rows, number, keepdims=False)

    return jax.tree.map(row, table)


@functools.partial(jax.jit, static_argnames="dtype")
def in_compute_dtype(params: Any, dtype: Any) -> Any:
    """Parameters as they are multiplied: matrices in `dtype`, the rest fp32.

    So are the decoder's small matrices, which its kernels first multiply with each other; not those that see tokens.
    """

    def cast(path: tuple[Any, ...], x: Array) -> Array:
        names = [entry.key for entry in path]
        is_small = names[0] == "decoder" and not {"condition", "generator"} & set(names)
        return x if is_small else x.astype(stored_dtype(path, dtype))

    return jax.tree_util.tree_map_with_path(cast, nn.meta.unbox(params))


def _size(tree: Any) -> int:
    """Bytes of all arrays in a tree."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
