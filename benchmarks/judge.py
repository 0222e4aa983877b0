"""How near are drawn images to those that a network was trained with? For small sets of images."""

import jax
import numpy as np
from digits import DigitClassifier
from ml_collections import ConfigDict

from deco_jax.data.digits import Digits
from deco_jax.data.sources import open_source
from deco_jax.diffusion.flow import to_uint8
from deco_jax.encoders.features import load_features
from deco_jax.metrics.frechet import Moments, frechet_distance
from deco_jax.sampling.sample import image_noise

REAL_IMAGES = 10_000  # at most, for the Fréchet distance
AT_A_TIME = 100


class Judge:
    """Knows the training images, and compares others with them.

    The Fréchet distance is on EfficientNet-Lite0's last block, averaged over places. Its 320 features are fewer than
    the images (but for the halves of food), so covariances have full rank; the usual 1,280 or 2,048 would need tens of
    thousands of images. It is not comparable with FIDs elsewhere, and rewards a network that copies what it has seen,
    which `copied` is there to show.
    """

    def __init__(self, data: ConfigDict):
        source = open_source(data)
        chosen = np.random.default_rng(0).permutation(len(source))[:REAL_IMAGES]
        records = [source.load(int(i)) for i in chosen]
        self.labels_K = np.sort([record["label"] for record in records])
        network = load_features("efficientnet")
        self.params, self.see = network.params, jax.jit(network.apply)
        self.real_KxHxWx3 = np.stack([record["image"] for record in records])
        self.real_KxD = self.features(self.real_KxHxWx3)
        self.classifier = None
        if data.source == "digits":
            plain = ConfigDict(data)
            plain.image_size = 28
            digits = Digits(plain)
            self.classifier = DigitClassifier(digits.images_KxHxW, digits.labels_K)

    def labels(self, images: int) -> np.ndarray:
        """One label per image, (images,), each as frequent as in the data."""
        return self.labels_K[np.arange(images) * len(self.labels_K) // images]

    def features(self, images_KxHxWx3: np.ndarray) -> np.ndarray:
        """(K, H, W, 3) uint8 → (K, 320) fp32."""
        missing = -len(images_KxHxWx3) % AT_A_TIME
        filled = np.concatenate([images_KxHxWx3, np.repeat(images_KxHxWx3[-1:], missing, axis=0)])
        parts = [self.see(self.params, filled[i : i + AT_A_TIME])["pool"] for i in range(0, len(filled), AT_A_TIME)]
        return np.concatenate(parts)[: len(images_KxHxWx3)]

    def frechet(self, images_KxHxWx3: np.ndarray) -> float:
        """Distance of these images to the training images."""
        return _distance(self.features(images_KxHxWx3), self.real_KxD)

    def copied(self, images_KxHxWx3: np.ndarray) -> float:
        """Share of images that repeat a training image; see `share_copied`."""
        return share_copied(images_KxHxWx3, self.real_KxHxWx3)

    def recognised(self, images_KxHxWx3: np.ndarray, labels_K: np.ndarray) -> float | None:
        """Share of digits that look like the one asked for; None for other images."""
        if self.classifier is None:
            return None
        margin = (images_KxHxWx3.shape[1] - 28) // 2
        grey = images_KxHxWx3[:, margin : margin + 28, margin : margin + 28].mean(axis=-1)
        return float((self.classifier(grey) == labels_K).mean())

    def scale(self, images: int, side: int) -> dict[str, float]:
        """What distances are to be seen beside: that between halves of the real images, and that of noise."""
        noise = to_uint8(image_noise(jax.random.key(0), np.arange(images), (side, side, 3)))
        halves = _distance(self.real_KxD[::2], self.real_KxD[1::2])
        found = {"halves": halves, "noise": self.frechet(np.asarray(noise)), "real_images": len(self.real_KxD)}
        print("Fréchet distance: {halves:.1f} between halves of the real images, {noise:.0f} to noise.".format(**found))
        return found


def share_copied(drawn_KxHxWx3: np.ndarray, real_KxHxWx3: np.ndarray) -> float:
    """Share of drawn images that are at least three times nearer to one training image than to every other, in pixels.

    So Yoon et al. 2023 and Gu et al. 2023 (arXiv 2310.02664) tell memorised images. Equal training images count as one.
    """
    real_RxP = np.unique(real_KxHxWx3.reshape(len(real_KxHxWx3), -1), axis=0).astype(np.float32)
    drawn_KxP = drawn_KxHxWx3.reshape(len(drawn_KxHxWx3), -1).astype(np.float32)
    mean_P = real_RxP.mean(axis=0)
    real_RxP, drawn_KxP = real_RxP - mean_P, drawn_KxP - mean_P
    squares_KxR = (drawn_KxP**2).sum(axis=1)[:, None] + (real_RxP**2).sum(axis=1) - 2 * drawn_KxP @ real_RxP.T
    nearest_K, second_K = np.partition(squares_KxR, 1, axis=1)[:, :2].T
    return float((nearest_K < second_K / 9).mean())


def _distance(features_a_KxD: np.ndarray, features_b_KxD: np.ndarray) -> float:
    a, b = (Moments.from_model_output(features) for features in (features_a_KxD, features_b_KxD))
    return frechet_distance(*a.compute(), *b.compute())
