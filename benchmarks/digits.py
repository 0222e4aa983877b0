"""Are the digits that a network draws the digits it was asked for?

    python benchmarks/digits.py WORKDIR

Draws 500 guided samples, 50 per class, and asks a classifier fitted on the real digits. Writes WORKDIR/samples.png
(rows = classes) and WORKDIR/digits.json. What has been measured for a checkpoint is not measured again.
"""

import json
import pathlib
import sys

import numpy as np
from scipy.ndimage import affine_transform  # scipy comes with jax
from scipy.spatial.distance import cdist

from deco_jax.checkpoints import store
from deco_jax.config import default_config
from deco_jax.data.digits import Digits
from deco_jax.generation.batches import generate
from deco_jax.pretrained.load import load_pretrained
from deco_jax.sampling.pictures import make_grid, save_png
from deco_jax.sampling.settings import Sampling
from deco_jax.storage import write_json

SAMPLES = 500
SHOWN_PER_CLASS = 12
EXPECTED = 0.95  # of the samples; docs/numbers.md has what was measured


class DigitClassifier:
    """Kernel ridge regression (Gaussian kernel) on deskewed digits."""

    gamma, ridge = 0.02, 0.01

    def __init__(self, images_KxHxW: np.ndarray, labels_K: np.ndarray):
        self.features = _features(images_KxHxW)
        targets = np.eye(10)[labels_K] - 0.1
        kernel = self._kernel(self.features) + self.ridge * np.eye(len(targets))
        self.weights = np.linalg.solve(kernel, targets)

    def __call__(self, images_KxHxW: np.ndarray) -> np.ndarray:
        """(K, 28, 28) uint8 → (K,) the digit each looks most like."""
        return (self._kernel(_features(images_KxHxW)) @ self.weights).argmax(axis=1)

    def _kernel(self, features: np.ndarray) -> np.ndarray:
        return np.exp(-self.gamma * cdist(features, self.features, "sqeuclidean"))


def _features(images_KxHxW: np.ndarray) -> np.ndarray:
    return np.stack([_deskew(image) for image in images_KxHxW]).reshape(len(images_KxHxW), -1)


def _deskew(image: np.ndarray) -> np.ndarray:
    """Centres a digit's ink and shears it until it stands upright; values in [0, 1]."""
    ink = image / 255
    weight = ink / max(ink.sum(), 1e-6)
    row, column = np.indices(ink.shape)
    centre = np.array([(weight * row).sum(), (weight * column).sum()])
    dr, dc = row - centre[0], column - centre[1]
    shear = (weight * dr * dc).sum() / max((weight * dr * dr).sum(), 1e-6)
    matrix = np.array([[1, 0], [shear, 1]])
    return affine_transform(ink, matrix, offset=centre - matrix @ ((np.array(ink.shape) - 1) / 2), order=1)


def measure(workdir: str) -> dict[str, float]:
    """Share of 500 guided samples that are recognised as the class asked for, and the classifier's own accuracy.

    Args:
      workdir: of a class-conditional network trained on the digits; gets samples.png.

    Returns:
      {"asked_class": …, "classifier_held_out": …}, shares of 1; the latter on 1,000 digits the classifier was
      not fitted on.
    """
    config = store.read_config(*store.find_checkpoint(workdir))
    model, params = load_pretrained(workdir)
    labels = np.arange(SAMPLES) % 10
    settings = Sampling.from_config(config.sample)
    images = np.stack(list(generate(model, params, labels, 0, config.data.image_size, 100, settings)))
    by_class = np.argsort(labels, kind="stable").reshape(10, -1)[:, :SHOWN_PER_CLASS].ravel()
    grid = make_grid(images[by_class], SHOWN_PER_CLASS).repeat(2, axis=0).repeat(2, axis=1)
    save_png(grid, pathlib.Path(workdir) / "samples.png")

    data = default_config().data
    data.update(source="digits", image_size=28)
    digits = Digits(data)
    held_out = np.arange(len(digits)) % 5 == 0
    classifier = DigitClassifier(digits.images_KxHxW[~held_out], digits.labels_K[~held_out])
    margin = (config.data.image_size - 28) // 2
    grey = images[:, margin : margin + 28, margin : margin + 28].mean(axis=-1)
    return {
        "asked_class": float((classifier(grey) == labels).mean()),
        "classifier_held_out": float((classifier(digits.images_KxHxW[held_out]) == digits.labels_K[held_out]).mean()),
    }


def main(workdir: str) -> None:
    """Measures, or repeats what was measured before for the same checkpoint, and says where everything is."""
    file = pathlib.Path(workdir) / "digits.json"
    folder, step = store.find_checkpoint(workdir)
    steps = store.read_config(folder, step).train.steps
    if step < steps:
        sys.exit(f"Training stopped at step {step} of {steps}; run the same command again to go on.")
    known = json.loads(file.read_text()) if file.exists() else {}
    if known.get("step") != step or not (pathlib.Path(workdir) / "samples.png").exists():
        known = {"step": step, **measure(workdir)}
        write_json(file, known)
    print(f"Of {SAMPLES} guided samples, {known['asked_class']:.1%} are recognised as the class asked for.")
    print(f"The classifier itself recognises {known['classifier_held_out']:.1%} of the real digits it has not seen.")
    if known["asked_class"] < EXPECTED:
        print(f"That is less than the {EXPECTED:.0%} expected: something is wrong with this installation or machine.")
    print(f"Samples:     {workdir}/samples.png (rows = classes)")
    print(f"Logs:        {workdir}/metrics.jsonl, and {workdir}/tensorboard for TensorBoard")
    print(f"Checkpoints: {workdir}/checkpoints; draw more: .venv/bin/deco sample --workdir {workdir} --out FOLDER")


if __name__ == "__main__":
    main(sys.argv[1])
