"""Precision and recall of generated images (Kynkäänniemi et al. 2019): who lies among whose nearest neighbours?

By the ADM suite's reading: a set's manifold is the union of balls around its feature vectors, each as large as the
distance to the vector's third nearest neighbour in the set.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from deco_jax.errors import UsageError

NEIGHBOURS = 3
SPARE = 5  # further candidates for the nearest, as fp32 may take close ones in another order
ROUNDING = 1e-5  # of squared distances in fp32, relative to the vectors' squares
ROWS = 1_000  # of a block of distances: with 50,000 columns 0.2 GB


def precision_recall(real_NxD: np.ndarray, generated_MxD: np.ndarray) -> tuple[float, float]:
    """(share of the generated vectors on the real ones' manifold, share of the real ones on the generated ones').

    The boundary of a ball belongs to it. Distances are fp32 on the device, of vectors less their common mean, which
    changes no distance and keeps digits; radii, and what lies closer to a boundary than fp32 can tell, are float64.
    (The suite itself takes float16 where that does not overflow, so its last digits differ.)

    Args:
      real_NxD, generated_MxD: features; more than three vectors each. Both are on the device, besides one block.

    Raises:
      UsageError: there are too few vectors.
    """
    if min(len(real_NxD), len(generated_MxD)) <= NEIGHBOURS:
        raise UsageError(
            f"precision and recall need more than {NEIGHBOURS} images on either side; there are {len(real_NxD)} and "
            f"{len(generated_MxD)}."
        )
    centre_D = np.mean(real_NxD, axis=0, dtype=np.float64)
    real, generated = (_Vectors.of(x, centre_D) for x in (real_NxD, generated_MxD))
    real_radii, generated_radii = _radii(real), _radii(generated)
    return _share_within(generated, real, real_radii), _share_within(real, generated, generated_radii)


class _Vectors(NamedTuple):
    host_NxD: np.ndarray  # as they came
    device_NxD: Array  # fp32, around the origin

    @classmethod
    def of(cls, x_NxD: np.ndarray, centre_D: np.ndarray) -> "_Vectors":
        return cls(np.asarray(x_NxD), jnp.asarray(x_NxD - centre_D, jnp.float32))


def _radii(x: _Vectors) -> np.ndarray:
    """Of every vector the squared distance to its third nearest other one, (N,) float64."""
    number = min(NEIGHBOURS + SPARE, len(x.host_NxD) - 1)
    radii = []
    for first in range(0, len(x.host_NxD), ROWS):
        nearest_KxC = np.asarray(_block_nearest(x.device_NxD, x.device_NxD[first : first + ROWS], first, number))
        radii += [
            np.partition(_exact(x.host_NxD[near_C], x.host_NxD[first + row]), NEIGHBOURS - 1)[NEIGHBOURS - 1]
            for row, near_C in enumerate(nearest_KxC)
        ]
    return np.array(radii)


def _share_within(x: _Vectors, centres: _Vectors, radii_N: np.ndarray) -> float:
    """The share of `x` that lies in at least one ball."""
    radii, m = jnp.asarray(radii_N, jnp.float32), len(x.host_NxD)
    depth_M = np.concatenate(
        [np.asarray(_block_depth(x.device_NxD[k : k + ROWS], centres.device_NxD, radii)) for k in range(0, m, ROWS)]
    )
    inside_M = depth_M > 0
    unsure = ROUNDING * sum(float((v.device_NxD**2).sum(axis=1).max()) for v in (x, centres))
    close = np.flatnonzero(np.abs(depth_M) <= unsure)
    for k in range(0, len(close), ROWS):
        rows = close[k : k + ROWS]
        depths = np.asarray(_depths(x.device_NxD[rows], centres.device_NxD, radii))
        for row, depth_N in zip(rows, depths, strict=True):
            near = np.flatnonzero(depth_N >= -unsure)
            inside_M[row] = (_exact(centres.host_NxD[near], x.host_NxD[row]) <= radii_N[near]).any()
    return float(inside_M.mean())


def _exact(a_KxD: np.ndarray, b_D: np.ndarray) -> np.ndarray:
    """Squared distances in float64; the same bits whichever of two vectors is `b`."""
    return ((a_KxD.astype(np.float64) - b_D) ** 2).sum(axis=1)


@functools.partial(jax.jit, static_argnums=3)
def _block_nearest(x_NxD: Array, block_KxD: Array, first: int, number: int) -> Array:
    """For each of the block the places of its nearest others, (K, number)."""
    k = block_KxD.shape[0]
    own = jnp.arange(x_NxD.shape[0])[None] == first + jnp.arange(k)[:, None]
    return jax.lax.top_k(-jnp.where(own, jnp.inf, _distances(block_KxD, x_NxD)), number)[1]


@jax.jit
def _block_depth(block_KxD: Array, centres_NxD: Array, radii_N: Array) -> Array:
    return _depths(block_KxD, centres_NxD, radii_N).max(axis=1)


@jax.jit
def _depths(block_KxD: Array, centres_NxD: Array, radii_N: Array) -> Array:
    """How deep the vectors lie in the balls, in squared units; negative outside. (K, N)"""
    return radii_N[None] - _distances(block_KxD, centres_NxD)


def _distances(a_KxD: Array, b_NxD: Array) -> Array:
    """Squared distances, (K, N)."""
    product = jnp.matmul(a_KxD, b_NxD.T, precision=jax.lax.Precision.HIGHEST)
    squares = (a_KxD**2).sum(axis=1)[:, None] + (b_NxD**2).sum(axis=1)[None]
    return jnp.maximum(squares - 2 * product, 0)
