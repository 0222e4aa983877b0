"""All metrics that one feature network's view of images gives, as one mergeable state: features are extracted once."""

import flax
import numpy as np
from clu import metrics

from deco_jax.errors import UsageError
from deco_jax.metrics.frechet import Moments, frechet_distance
from deco_jax.metrics.inception_score import SPLIT, InceptionScore
from deco_jax.metrics.kernel import SIZE, kernel_distance
from deco_jax.metrics.neighbours import NEIGHBOURS, precision_recall
from deco_jax.metrics.references import Reference

ENOUGH = 50_000  # images, with which FID is reported
VECTORS = 10_000  # that a reference keeps, as the ADM suite's do


@flax.struct.dataclass
class Scores(metrics.Metric):
    """What images look like to a network: moments, the Inception Score's sums, and the vectors themselves.

    A metric of clu, on the host. Merged in any order it gives the same numbers, up to the rounding of float64.
    """

    network: str
    pool: Moments
    spatial: Moments
    inception: InceptionScore
    numbers: tuple[np.ndarray, ...]  # of the images, batch by batch
    vectors: tuple[np.ndarray, ...]  # (K, D) fp32 each, what `pool` is of

    @classmethod
    def empty(cls, network: str = "") -> "Scores":
        """Of no images."""
        return cls(network, Moments.empty(), Moments.empty(), InceptionScore.empty(), (), ())

    @classmethod
    def from_model_output(
        cls,
        network: str,
        numbers: np.ndarray,
        pool: np.ndarray,
        spatial: np.ndarray | None = None,
        logits: np.ndarray | None = None,
        mask: np.ndarray | None = None,
    ) -> "Scores":
        """Of a batch of K images.

        Args:
          network: whose features they are.
          numbers: (K,) of the images, which tell them apart and say in which split of the Inception Score each is.
          pool, spatial, logits: (K, D) features, see `encoders.features`; None where the network has none.
          mask: (K,) which images count; None = all.

        Raises:
          UsageError: a feature is not finite.
        """
        keep = np.ones(len(numbers), bool) if mask is None else np.asarray(mask, bool)
        numbers, vectors = np.asarray(numbers)[keep], np.asarray(pool, np.float32)[keep]
        moments = [
            Moments.empty() if x is None else Moments.from_model_output(np.asarray(x)[keep]) for x in (pool, spatial)
        ]
        inception = InceptionScore.empty()
        if logits is not None:
            inception = InceptionScore.from_model_output(np.asarray(logits)[keep], numbers)
        return cls(network, *moments, inception, (numbers,), (vectors,))

    def merge(self, other: "Scores") -> "Scores":
        """Of the images of both."""
        if self.network and other.network and self.network != other.network:
            raise UsageError(f"features of {self.network} and of {other.network} do not go together.")
        return Scores(
            self.network or other.network,
            self.pool.merge(other.pool),
            self.spatial.merge(other.spatial),
            self.inception.merge(other.inception),
            self.numbers + other.numbers,
            self.vectors + other.vectors,
        )

    @property
    def count(self) -> int:
        """Images so far."""
        return self.pool.count

    def ordered(self) -> np.ndarray:
        """(N, D) fp32, the vectors in the order of the images' numbers.

        Raises:
          UsageError: an image was counted twice.
        """
        numbers = np.concatenate(self.numbers)
        order = np.argsort(numbers, kind="stable")
        twice = np.flatnonzero(np.diff(numbers[order]) == 0)
        if len(twice):
            raise UsageError(f"image {numbers[order][twice[0]]} was counted twice.")
        return np.concatenate(self.vectors)[order]

    def compute(self, reference: Reference) -> dict[str, float]:
        """The metrics by name, those that can be computed (`warnings_for` names the others).

        For Inception fid, sfid, inception_score, precision, recall, kid; for another network fd_NAME, precision_NAME,
        recall_NAME, kid_NAME.

        Raises:
          UsageError: there are fewer than two images, or one was counted twice.
        """
        vectors, found = self.ordered(), {}
        is_inception = self.network == "inception"
        end = "" if is_inception else f"_{self.network}"
        found["fid" if is_inception else f"fd_{self.network}"] = frechet_distance(*self.pool.compute(), *reference.pool)
        if self.spatial.count and reference.spatial is not None:
            found["sfid"] = frechet_distance(*self.spatial.compute(), *reference.spatial)
        if len(self.inception.count_S):
            found["inception_score"] = self.inception.compute()
        if reference.vectors is not None:
            if min(len(vectors), len(reference.vectors)) > NEIGHBOURS:
                precision, recall = precision_recall(reference.vectors, vectors)
                found |= {f"precision{end}": precision, f"recall{end}": recall}
            if len(reference.vectors) > 1:
                found[f"kid{end}"] = kernel_distance(reference.vectors, vectors)
        return found

    def as_reference(self, digest: str, image_size: tuple[int, int], source: str) -> Reference:
        """These images as what others are compared with; at most 10,000 vectors are kept, evenly chosen."""
        vectors = self.ordered()
        chosen = np.linspace(0, len(vectors) - 1, min(len(vectors), VECTORS)).round().astype(int)
        spatial = self.spatial.compute() if self.spatial.count else None
        return Reference(
            network=self.network,
            pool=self.pool.compute(),
            spatial=spatial,
            vectors=vectors[chosen],
            digest=digest,
            count=self.count,
            image_size=image_size,
            source=source,
        )


def warnings_for(scores: Scores, reference: Reference) -> list[str]:
    """What about the metrics is unreliable, or missing, and why; one sentence each."""
    n, d, told = scores.count, len(scores.pool.mean_D), []
    if n < ENOUGH:
        told.append(f"{n:,} images: distances are larger than with {ENOUGH:,}; compare only with as many.")
    if n <= d:
        told.append(f"{n:,} images are fewer than the {d:,} features, so the covariance is singular.")
    if reference.count is not None and reference.count <= d:
        told.append(
            f"The reference is of {reference.count:,} images, fewer than the {d:,} features, and singular as well."
        )
    if scores.spatial.count and reference.spatial is None:
        told.append("The reference has no spatial statistics, so there is no sFID.")
    counts = scores.inception.count_S
    if len(counts) and n % SPLIT:
        told.append(f"The Inception Score is defined for splits of {SPLIT:,} images; the last has {counts[-1]:,}.")
    if reference.vectors is None:
        told.append("The reference has no feature vectors, so there is no precision, recall or KID.")
    else:
        if min(n, len(reference.vectors)) <= NEIGHBOURS:
            told.append(f"Precision and recall need more than {NEIGHBOURS} images.")
        if (smallest := min(n, len(reference.vectors))) < SIZE:
            told.append(f"KID is the mean over subsets of {SIZE:,} images; here they have {smallest:,}.")
        if len(reference.vectors) != VECTORS:
            told.append(
                f"The reference has {len(reference.vectors):,} feature vectors; published precision and recall are "
                f"with {VECTORS:,}."
            )
    if reference.digest is None:
        told.append("The reference does not say which weights its statistics are of.")
    return told
