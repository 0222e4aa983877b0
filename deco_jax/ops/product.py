"""The product of a linear layer, and the one of its gradient; and rows of a table.

Tokens of all examples are one axis in both: XLA's CPU compiler is slow on a weight gradient that sums over two. Of a
kernel that lies on several devices, each of which works alone on its examples, a product gathers the parts itself, in
both passes, and sends each device its part of the gradient (FSDP). Written out so, because where XLA's partitioner is
to find it, compilers choose loops that gather, multiply and add up at a time, and move partial sums through memory.
"""

import contextlib
import contextvars
import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from flax.core import meta
from jax import Array
from jax.ad_checkpoint import checkpoint_name

_GRADIENT_DTYPE: contextvars.ContextVar[str | None] = contextvars.ContextVar("gradient_dtype", default=None)

Kept = tuple[tuple[str, ...], ...]  # of each axis of an array, the mesh axes that split it


@contextlib.contextmanager
def gradients_in(dtype: str) -> Iterator[None]:
    """Within it, weight gradients are products that come out in `dtype`; otherwise in that of their operands.

    In that dtype devices add them up.
    """
    token = _GRADIENT_DTYPE.set(dtype)
    try:
        yield
    finally:
        _GRADIENT_DTYPE.reset(token)


class Part(struct.PyTreeNode, meta.AxisMetadata):
    """A device's part of an array of which the others keep the rest; it stands among a network's parameters."""

    value: Array
    kept: Kept = struct.field(pytree_node=False)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole array."""
        sizes = zip(self.value.shape, self.kept, strict=True)
        return tuple(size * math.prod(map(jax.lax.axis_size, names)) for size, names in sizes)

    def unbox(self) -> Array:
        """The whole array, for readers that do not take a `Part`."""
        return gather(self.value, self.kept)

    def replace_boxed(self, val: Any) -> "Part":
        """See flax."""
        return self.replace(value=val)

    def add_axis(self, index: int, params: Mapping[Any, Any]) -> "Part":
        """See flax: a scan stacks parameters."""
        return self.replace(kept=(*self.kept[:index], (), *self.kept[index:]))

    def remove_axis(self, index: int, params: Mapping[Any, Any]) -> "Part":
        """See flax: a layer sees its own part of a stack."""
        return self.replace(kept=(*self.kept[:index], *self.kept[index + 1 :]))


def gather(part: Array, kept: Kept) -> Array:
    """A device's part of an array → the whole."""
    for axis, names in enumerate(kept):
        if names:
            shape = (*part.shape[:axis], -1, *part.shape[axis + 1 :])
            part = jax.lax.all_gather(_lined_up(part, axis), names, axis=axis, tiled=True).reshape(shape)
    return part


def scatter(whole: Array, kept: Kept) -> Array:
    """One device's term of a sum of whole arrays → its part of the sum over the devices that keep one."""
    for axis, names in enumerate(kept):
        if names:
            shape = (*whole.shape[:axis], -1, *whole.shape[axis + 1 :])
            sums = jax.lax.psum_scatter(_lined_up(whole, axis), names, scatter_dimension=axis, tiled=True)
            whole = sums.reshape(shape)
    return whole


def _lined_up(x: Array, axis: int) -> Array:
    """All that follows an axis as one, unless the partitioner splits one of these.

    TPUs keep and send the 72 channels of a head as 128.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.shape.get("tensor", 1) > 1 and "tensor" not in mesh.manual_axes:
        return x
    return x.reshape(*x.shape[: axis + 1], math.prod(x.shape[axis + 1 :]))


def look_up(table_RxD: Array | Part, rows: Array) -> Array:
    """Rows of a table: (B, …) → (B, …, D).

    Of a table whose columns lie on several devices, each looks up its columns of everybody's rows, and sends each
    device the columns of the rows that this one wants.
    """
    if not isinstance(table_RxD, Part):
        return jnp.take(table_RxD, rows, axis=0)
    unsplit, names = table_RxD.kept
    assert not unsplit, f"rows of a table are never split, but over {unsplit}"
    found = jnp.take(table_RxD.value, jax.lax.all_gather(rows, names, tiled=True), axis=0)
    return jax.lax.all_to_all(found, names, split_axis=0, concat_axis=found.ndim - 1, tiled=True)


def precision_of(dtype: Any) -> jax.lax.Precision | None:
    """Of products in `dtype`: of fp32, which TPUs would else multiply as bfloat16 and GPUs as TF32, the highest."""
    return jax.lax.Precision.HIGHEST if jnp.dtype(dtype) == jnp.float32 else None


def product(x: Array, kernel: Array | Part, dtype: jnp.dtype) -> Array:
    """x·kernel: (…, K) and (K, *features) → (…, *features), both multiplied in `dtype`."""
    fan_in, *features = kernel.shape
    rows = x.reshape(-1, fan_in).astype(dtype)
    part, kept = (kernel.value, kernel.kept) if isinstance(kernel, Part) else (kernel, ((),) * kernel.ndim)
    y = _product(rows, part, kept, dtype, _GRADIENT_DTYPE.get())
    return checkpoint_name(y, "product").reshape(*x.shape[:-1], *features)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _product(x_RxK: Array, part: Array, kept: Kept, dtype: jnp.dtype, gradient_dtype: str | None) -> Array:
    """(R, F), or (R, *features)."""
    return jnp.tensordot(x_RxK, _matrix(part, kept, dtype), 1, precision=precision_of(dtype))


def _matrix(part: Array, kept: Kept, dtype: jnp.dtype) -> Array:
    """(K, F), or (K, *features). Made in both passes, so that what is kept is the parameter and not a copy of it."""
    return _lined_up(gather(part.astype(dtype), kept), 0)


def _forward(x_RxK: Array, part: Array, kept: Kept, dtype: jnp.dtype, gradient_dtype: str | None) -> tuple:
    return _product(x_RxK, part, kept, dtype, gradient_dtype), (x_RxK, part)


def _backward(kept: Kept, dtype: jnp.dtype, gradient_dtype: str | None, saved: tuple, dy: Array) -> tuple[Array, Array]:
    x_RxK, part = saved
    kernel, features = _matrix(part, kept, dtype), tuple(range(1, dy.ndim))
    exact = precision_of(dtype)
    dx_RxK = jnp.tensordot(dy, kernel, axes=(features, features), precision=exact)
    dkernel = jnp.tensordot(x_RxK, dy, axes=(0, 0), precision=exact, preferred_element_type=gradient_dtype)
    return dx_RxK, scatter(dkernel.reshape(Part(part, kept).shape), kept).astype(part.dtype)


_product.defvjp(_forward, _backward)
