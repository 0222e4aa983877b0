"""Networks inside the training step that are not trained: what they read from a batch, and where their weights lie.

The teacher of representation alignment is one, a text encoder another. Each turns fields of a batch into a new
field, before anything is differentiated. Their parameters are an argument of the compiled step, split by the same rules
as the trained ones, and belong to no checkpoint.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax import Array

from deco_jax.models.build import plainly
from deco_jax.parallel.mesh import Layout, is_boxed, state_shardings
from deco_jax.weights.translate import stored_dtype


@dataclasses.dataclass(frozen=True)
class Frozen:
    """A frozen network as a function from fields of a batch to another field."""

    name: str  # in the tree of the parameters, and beside the hash of its weights in checkpoints
    purpose: str  # what a run does with it, for people
    module: nn.Module
    writes: str  # the field that it adds
    example: Any  # shapes and dtypes of the module's input, to tell those of the parameters
    prepare: Callable[[Mapping[str, Array]], Any]  # from the batch to the module's input
    forward_flops: Callable[[int, int], float]  # (height, width) → floating-point operations per image

    def __call__(self, params: Any, batch: Mapping[str, Array]) -> dict[str, Array]:
        """The batch with the field that this network writes; no gradient passes it."""
        seen = self.module.apply({"params": params}, self.prepare(batch))
        return {**batch, self.writes: jax.lax.stop_gradient(seen)}

    def abstract_params(self, layout: Layout) -> Any:
        """Shapes, dtypes and shardings of the parameters."""
        boxed = jax.eval_shape(plainly(self.module).init, jax.random.key(0), self.example)["params"]

        def leaf(path: tuple[Any, ...], box: Any) -> jax.ShapeDtypeStruct:
            dtype = stored_dtype(path, self.module.dtype)
            return jax.ShapeDtypeStruct(box.value.shape, dtype, sharding=state_shardings(box, layout))

        return jax.tree_util.tree_map_with_path(leaf, boxed, is_leaf=is_boxed)


@dataclasses.dataclass(frozen=True, eq=False)
class FrozenWeights:
    """A frozen network and its weights on this host."""

    network: Frozen
    params: Any  # numpy; kernels in the module's dtype, the rest fp32
    digest: str  # of the weights, whatever file they lie in

    @classmethod
    def of(cls, network: Frozen, params: Any) -> "FrozenWeights":
        """From parameters, fp32 or of the dtype in which the network takes them."""
        dtype = network.module.dtype
        cast = jax.tree_util.tree_map_with_path(lambda path, x: np.asarray(x, stored_dtype(path, dtype)), params)
        return cls(network, cast, digest_of(params))

    def place(self, layout: Layout) -> Any:
        """The parameters as global arrays, every process giving the parts that its devices hold."""
        return jax.tree.map(
            lambda value, like: jax.make_array_from_callback(like.shape, like.sharding, lambda index: value[index]),
            self.params,
            self.network.abstract_params(layout),
        )


def digest_of(params: Any) -> str:
    """A hash of parameters as fp32 numbers, whatever they are kept in: 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for path, value in jax.tree_util.tree_leaves_with_path(params):
        digest.update(f"{jax.tree_util.keystr(path)} {value.shape}".encode())
        digest.update(np.ascontiguousarray(value, np.float32).view(np.uint8))
    return digest.hexdigest()[:16]
