"""Inception Score (Salimans et al. 2016), by the ADM suite's reading: splits of 5,000 images, in their order."""

import flax
import numpy as np
from clu import metrics
from scipy.special import log_softmax

SPLIT = 5_000


@flax.struct.dataclass
class InceptionScore(metrics.Metric):
    """Sums per split over the classes' probabilities; a metric of clu, float64, on the host."""

    count_S: np.ndarray  # images in each split
    entropy_S: np.ndarray  # Σ over images and classes of p·log p
    sum_SxC: np.ndarray  # Σ over images of p

    @classmethod
    def empty(cls) -> "InceptionScore":
        """Of no images, whatever the number of classes."""
        return cls(np.zeros(0, np.int64), np.zeros(0), np.zeros((0, 0)))

    @classmethod
    def from_model_output(cls, logits_KxC: np.ndarray, numbers_K: np.ndarray, **_: object) -> "InceptionScore":
        """Of images with these numbers, which say in which split each is."""
        if not len(numbers_K):
            return cls.empty()
        log_p_KxC = log_softmax(np.asarray(logits_KxC, np.float64), axis=1)
        p_KxC, split_K = np.exp(log_p_KxC), np.asarray(numbers_K) // SPLIT
        entropy_K, splits = (p_KxC * log_p_KxC).sum(axis=1), int(split_K.max()) + 1
        sums = np.zeros((splits, p_KxC.shape[1]))
        for split in np.unique(split_K):
            sums[split] = p_KxC[split_K == split].sum(axis=0)
        return cls(np.bincount(split_K, minlength=splits), np.bincount(split_K, entropy_K, splits), sums)

    def merge(self, other: "InceptionScore") -> "InceptionScore":
        """Of the images of both."""
        if not len(self.count_S) or not len(other.count_S):
            return self if len(self.count_S) else other
        splits = max(len(self.count_S), len(other.count_S))

        def add(a: np.ndarray, b: np.ndarray) -> np.ndarray:
            total = np.zeros((splits, *a.shape[1:]), a.dtype)
            total[: len(a)] += a
            total[: len(b)] += b
            return total

        parts = ("count_S", "entropy_S", "sum_SxC")
        return InceptionScore(*(add(getattr(self, part), getattr(other, part)) for part in parts))

    def compute(self) -> float:
        """exp of the mean divergence of an image's classes from its split's, averaged over splits."""
        there = self.count_S > 0
        count_S, mean_SxC = self.count_S[there], self.sum_SxC[there] / self.count_S[there, None]
        with np.errstate(divide="ignore", invalid="ignore"):
            cross_S = np.where(mean_SxC > 0, mean_SxC * np.log(mean_SxC), 0).sum(axis=1)
        return float(np.exp(self.entropy_S[there] / count_S - cross_S).mean())
