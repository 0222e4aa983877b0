"""How far apart are two sets of images, seen as Gaussians of a network's features? (FID: Heusel et al., 1706.08500)"""

import flax
import numpy as np
from clu import metrics

from deco_jax.errors import UsageError


@flax.struct.dataclass
class Moments(metrics.Metric):
    """Mean and covariance of feature vectors, a metric of clu: batches are merged, and no vectors are kept.

    float64 and NumPy, so on the host, not within jit: merging batches loses no more digits than rounding does.
    """

    count: int
    mean_D: np.ndarray
    scatter_DxD: np.ndarray  # Σ (x − mean)(x − mean)ᵀ

    @classmethod
    def empty(cls) -> "Moments":
        """Of no vectors, whatever their length."""
        return cls(0, np.zeros(0), np.zeros((0, 0)))

    @classmethod
    def from_model_output(cls, features_KxD: np.ndarray, mask: np.ndarray | None = None, **_: object) -> "Moments":
        """Of a batch of K vectors; those that `mask` (K,) excludes, such as what fills up the last batch, do not count.

        Raises:
          UsageError: they are no vectors, or have numbers that are not finite.
        """
        x_KxD = np.asarray(features_KxD, np.float64)
        if x_KxD.ndim != 2:
            raise UsageError(f"features have shape {x_KxD.shape}; expected (K, D).")
        if mask is not None:
            x_KxD = x_KxD[np.asarray(mask, bool)]
        if not np.isfinite(x_KxD).all():
            raise UsageError("features are not finite; the images or the network that made them are broken.")
        if not len(x_KxD):
            return cls.empty()
        mean_D = x_KxD.mean(axis=0)
        x_KxD = x_KxD - mean_D
        return cls(len(x_KxD), mean_D, x_KxD.T @ x_KxD)

    def merge(self, other: "Moments") -> "Moments":
        """Of the vectors of both.

        Raises:
          UsageError: theirs have another length.
        """
        if not self.count or not other.count:
            return self if self.count else other
        if len(self.mean_D) != len(other.mean_D):
            raise UsageError(f"features of {len(self.mean_D)} and of {len(other.mean_D)} numbers do not go together.")
        total, step_D = self.count + other.count, other.mean_D - self.mean_D
        # Deviations from each part's own mean, and of the two means: no difference of large squares.
        between_DxD = np.outer(step_D, step_D) * (self.count * other.count / total)
        mean_D = self.mean_D + step_D * (other.count / total)
        return type(self)(total, mean_D, self.scatter_DxD + other.scatter_DxD + between_DxD)

    def compute(self) -> tuple[np.ndarray, np.ndarray]:
        """(mean (D,), unbiased covariance (D, D)), as `frechet_distance` takes them.

        Raises:
          UsageError: there are fewer than two vectors.
        """
        if self.count < 2:
            raise UsageError(f"a covariance needs at least 2 images; there are {self.count}.")
        return self.mean_D, self.scatter_DxD / (self.count - 1)


def frechet_distance(
    mean_a_D: np.ndarray, covariance_a_DxD: np.ndarray, mean_b_D: np.ndarray, covariance_b_DxD: np.ndarray
) -> float:
    """|μ_a − μ_b|² + tr A + tr B − 2 tr (A^½ B A^½)^½, the squared 2-Wasserstein distance of two Gaussians; ≥ 0.

    The last trace is taken as the sum of the singular values of A^½ B^½, which is the same and as exact for singular
    covariances (fewer images than features) as for others. From finite samples the distance comes out too large, the
    more so the fewer images: compare only distances from equal numbers.

    Args:
      mean_a_D, mean_b_D: means.
      covariance_a_DxD, covariance_b_DxD: covariances, symmetric and positive semi-definite.

    Raises:
      UsageError: the shapes do not fit, or a number is not finite.
    """
    arrays = [np.asarray(a, np.float64) for a in (mean_a_D, covariance_a_DxD, mean_b_D, covariance_b_DxD)]
    d, shapes = len(arrays[0]), [a.shape for a in arrays]
    if shapes != [(d,), (d, d)] * 2:
        raise UsageError(f"means and covariances have the shapes {shapes}; expected (D,), (D, D), (D,), (D, D).")
    if not all(np.isfinite(a).all() for a in arrays):
        raise UsageError("a mean or covariance is not finite; the features it was made from are broken.")
    mean_a, a, mean_b, b = arrays
    overlap = np.linalg.svd(_square_root(a) @ _square_root(b), compute_uv=False).sum()
    return max(float(((mean_a - mean_b) ** 2).sum() + np.trace(a) + np.trace(b) - 2 * overlap), 0.0)


def _square_root(matrix_DxD: np.ndarray) -> np.ndarray:
    """Of a positive semi-definite matrix; eigenvalues that rounding cannot tell from 0 count as 0."""
    values_D, vectors_DxD = np.linalg.eigh(matrix_DxD)
    smallest = len(values_D) * np.finfo(float).eps * values_D[-1]
    return (vectors_DxD * np.sqrt(np.where(values_D > smallest, values_D, 0))) @ vectors_DxD.T
