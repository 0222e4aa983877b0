"""The product of a linear layer, and the one of its gradient.

Tokens of all examples are one axis in both: XLA's CPU compiler is slow on a weight gradient that sums over two. The
weight gradient is where devices add up, so its dtype is that in which gradients cross devices.
"""

import contextlib
import contextvars
import functools
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name

_GRADIENT_DTYPE: contextvars.ContextVar[str | None] = contextvars.ContextVar("gradient_dtype", default=None)


@contextlib.contextmanager
def gradients_in(dtype: str) -> Iterator[None]:
    """Within it, weight gradients are products that come out in `dtype`; otherwise in that of their operands."""
    token = _GRADIENT_DTYPE.set(dtype)
    try:
        yield
    finally:
        _GRADIENT_DTYPE.reset(token)


def product(x: Array, kernel: Array, dtype: jnp.dtype) -> Array:
    """x·kernel: (…, K) and (K, *features) → (…, *features), both multiplied in `dtype`."""
    fan_in, *features = kernel.shape
    rows = x.reshape(-1, fan_in).astype(dtype)
    y = _product(rows, kernel, dtype, _GRADIENT_DTYPE.get())
    return checkpoint_name(y, "product").reshape(*x.shape[:-1], *features)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _product(x_RxK: Array, kernel: Array, dtype: jnp.dtype, gradient_dtype: str | None) -> Array:
    return jnp.matmul(x_RxK, _matrix(kernel).astype(dtype))


def _matrix(kernel: Array) -> Array:
    """(K, *features) → (K, F). Done in both passes, so that what is kept is the parameter and not a copy of it."""
    return kernel.reshape(kernel.shape[0], math.prod(kernel.shape[1:]))


def _forward(x_RxK: Array, kernel: Array, dtype: jnp.dtype, gradient_dtype: str | None) -> tuple:
    return _product(x_RxK, kernel, dtype, gradient_dtype), (x_RxK, kernel)


def _backward(dtype: jnp.dtype, gradient_dtype: str | None, saved: tuple, dy_RxF: Array) -> tuple[Array, Array]:
    x_RxK, kernel = saved
    dx_RxK = jnp.einsum("rf,kf->rk", dy_RxF, _matrix(kernel).astype(dtype))
    dkernel_KxF = jnp.einsum("rk,rf->kf", x_RxK, dy_RxF, preferred_element_type=gradient_dtype)
    return dx_RxK, dkernel_KxF.reshape(kernel.shape).astype(kernel.dtype)


_product.defvjp(_forward, _backward)
