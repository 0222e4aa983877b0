"""Does DeCo draw better images than a DiT of its size, and does its transformer leave high frequencies to the decoder?

python benchmarks/decoupling.py OUT                              digits, on a CPU
python benchmarks/decoupling.py OUT2 --lr 1e-3                   the same, at a rate at which no training fails
python benchmarks/decoupling.py OUT --recipe food                photos of food at 64², in patches of 8; on a CPU
python benchmarks/decoupling.py OUT2 --recipe food --steps 6000 --seeds 0 --systems baseline DeCo     trained for longer
python benchmarks/decoupling.py OUT --recipe food128             the same at 128², in patches of 16; for a GPU
python benchmarks/decoupling.py OUT --recipe fashion_mnist       photos of clothes at 64²; for a GPU

Four systems, DeCo and the baseline DiT with and without L_freq, are trained with the same parameters to 1 %, data,
seeds, steps, batches, noise and optimiser (untuned, but for the digits' batch size, tried on the baseline). Then each
draws images without guidance, with the classes in the data's proportions. Reported are, for each and as differences
seed by seed, with Student's 95 % interval of the mean:

- the Fréchet distance to the training images (there are no others: the sets are small), see judge.py;
- for digits, the share that a classifier takes for the digit that was asked for;
- the share that repeats a training image (judge.py);
- the spectra of tokens and velocity (deco_jax/evaluation/spectra.py): their last bin by the paper's measure and, as its
  logarithm depends on the tokens' scale, the plain share of fine detail in the energy; drawn for the first seed.

OUT/RECIPE gets one workdir per training, decoupling.json, pictures.png (one row per system, the same noise) and spectra
with and without L_freq. Started again, it goes on where it was. Needs the extra `eval`; `--help` says where the photos
are had. docs/decoupling.md has what came out, docs/numbers.md how long it took.
"""

import argparse
import dataclasses
import pathlib
import sys
import time
from typing import Any

import jax
import numpy as np
from judge import Judge
from ml_collections import ConfigDict
from small_runs import (
    System,
    keep_result,
    known_result,
    make_config,
    paired,
    parser_for,
    prepare,
    run,
    show_pair,
    workdir,
)

from deco_jax.config import build_model
from deco_jax.errors import UsageError
from deco_jax.evaluation.spectra import measure_spectra
from deco_jax.evaluation.spectra_report import Spectra, require_matplotlib, write_spectra
from deco_jax.generation.batches import generate
from deco_jax.models.build import parameter_shapes
from deco_jax.models.flops import forward_flops
from deco_jax.pretrained.load import load_pretrained
from deco_jax.sampling.pictures import make_grid, save_png
from deco_jax.sampling.settings import Sampling
from deco_jax.storage import write_json

RECIPES = ("digits", "food", "food128", "fashion_mnist")  # those in which all systems are of a size
SYSTEMS = {
    "baseline": System("baseline", 0.0),
    "baseline + L_freq": System("baseline", 1.0),
    "DeCo without L_freq": System("deco", 0.0),
    "DeCo": System("deco", 1.0),
}
PAIRS = {  # what is asked, and the two systems that answer it
    "DeCo against the baseline": ("DeCo", "baseline"),
    "the decoder, without L_freq": ("DeCo without L_freq", "baseline"),
    "the decoder, with L_freq": ("DeCo", "baseline + L_freq"),
    "L_freq for DeCo": ("DeCo", "DeCo without L_freq"),
    "L_freq for the baseline": ("baseline + L_freq", "baseline"),
}
SPECTRA_IMAGES = 128
SHOWN = 16  # images of each system


def size(config: ConfigDict) -> dict[str, float]:
    """Parameters, and operations of one forward pass on one image."""
    model, side = build_model(config.model), config.data.image_size
    parameters = sum(x.size for x in jax.tree.leaves(parameter_shapes(model)))
    return {"parameters": parameters, "forward_flops": forward_flops(model, side, side)}


def table(rows: dict[str, dict[str, Any]]) -> str:
    """The systems as Markdown: means, and in brackets the smallest and the largest of the seeds."""

    def spread(runs: list[dict[str, Any]], key: str, digits: str) -> str:
        values = [run[key] for run in runs]
        if None in values:
            return "–"
        return f"{np.mean(values):{digits}} ({min(values):{digits}}–{max(values):{digits}})"

    lines = [
        "| system | parameters | forward MFLOPs | Fréchet distance by seed | mean | recognised | copied | tokens: fine "
        "| last bin | velocity: fine | last bin |",
        "|---|--:|--:|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for name, row in rows.items():
        runs = row["runs"]
        cells = [name, f"{row['parameters']:,}", f"{row['forward_flops'] / 1e6:.1f}"]
        cells.append(", ".join(f"{run['frechet']:.0f}" for run in runs))
        cells.append(f"{np.mean([run['frechet'] for run in runs]):.0f}")
        cells += [spread(runs, "recognised", ".1%"), spread(runs, "copied", ".1%")]
        for part in ("tokens", "velocity"):
            cells += [spread(runs, f"{part}_fine", ".1%"), spread(runs, f"{part}_last", ".3f")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def compare_pairs(rows: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """What the systems differ by: {question: {"frechet" and so on: see `paired`}}."""
    pairs = {}
    for question, (first, second) in PAIRS.items():
        if first not in rows or second not in rows:
            continue
        a, b = rows[first]["runs"], rows[second]["runs"]
        keys = [key for key in ("frechet", "recognised", "tokens_fine", "tokens_last") if a[0][key] is not None]
        pairs[question] = {key: paired(a, b, key) for key in keys}
    return pairs


def pairs_table(pairs: dict[str, dict[str, Any]], seeds: int) -> str:
    """The differences as Markdown, the first system's less the second's; ± is Student's 95 % interval."""
    lines = [
        "| first less second | Fréchet distance | smaller with | recognised, points | tokens: fine, points "
        "| last bin |",
        "|---|--:|---|--:|--:|--:|",
    ]
    for question, pair in pairs.items():
        cells = [question, show_pair(pair["frechet"]), f"{pair['frechet']['smaller']} of {seeds} seeds"]
        cells.append(show_pair(pair["recognised"], 100, 1) if "recognised" in pair else "–")
        cells += [show_pair(pair["tokens_fine"], 100, 1), show_pair(pair["tokens_last"], digits=3)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def spectra_of(folder: pathlib.Path, config: ConfigDict) -> Spectra:
    """The network's spectra; what has been measured is read from the workdir."""
    fields = known_result(folder / "spectra.json", config)
    if fields is None or fields["images"] != SPECTRA_IMAGES:
        spectra = measure_spectra(
            *load_pretrained(str(folder)),
            images=SPECTRA_IMAGES,
            seed=0,
            image_size=config.data.image_size,
            batch_size=SPECTRA_IMAGES // 2,
            steps=config.sample.steps,
        )
        fields = {name: np.asarray(value).tolist() for name, value in dataclasses.asdict(spectra).items()}
        keep_result(folder / "spectra.json", config, fields)
    return Spectra(**fields | {name: np.array(fields[name]) for name in fields if name.endswith("_64")})


def summary(spectra: Spectra) -> dict[str, float]:
    """The last bins by the paper's measure, and which share of the energy beyond bin 0 is in the later half of them."""
    numbers = {"tokens_last": spectra.transformer[-1], "velocity_last": spectra.velocity[-1]}
    for name, energy in (("tokens_fine", spectra.transformer_energy_64), ("velocity_fine", spectra.velocity_energy_64)):
        numbers[name] = energy[32:].sum() / energy[1:].sum()
    return {name: float(value) for name, value in numbers.items()}


def picture(config: ConfigDict, folders: list[pathlib.Path], labels: np.ndarray) -> np.ndarray:
    """One row of images for each network, all from the same noise and labels."""
    settings, rows = Sampling.from_config(config.sample), []
    for folder in folders:
        model, params = load_pretrained(str(folder))
        rows += generate(model, params, labels, config.seed, config.data.image_size, len(labels), settings)
    return make_grid(np.stack(rows), len(labels))


def compare(args: argparse.Namespace) -> None:
    """Everything, in the order in which it is worth having."""
    first, out = args.seeds[0], args.out / args.recipe
    systems = {name: SYSTEMS[name] for name in args.systems}
    rows = {name: size(make_config(args, system, first)) | {"runs": []} for name, system in systems.items()}
    config = make_config(args, SYSTEMS["DeCo"], first)
    judge = Judge(config.data)
    report = {"recipe": args.recipe, "scale": judge.scale(config.sample.num, config.data.image_size), "systems": rows}
    for seed in args.seeds:
        for name, system in systems.items():
            its, folder = make_config(args, system, seed), workdir(args, system, seed)
            measured = run(its, folder, judge) | summary(spectra_of(folder, its))
            rows[name]["runs"].append({"seed": seed} | measured)
            print(
                f"{name}, seed {seed}: Fréchet distance {measured['frechet']:.1f}, of the energy beyond bin 0 "
                f"{measured['tokens_fine']:.1%} of tokens' and {measured['velocity_fine']:.1%} of v̂'s is fine",
                flush=True,
            )
    report["pairs"] = compare_pairs(rows)
    write_json(out / "decoupling.json", report)
    print(table(rows), pairs_table(report["pairs"], len(args.seeds)), sep="\n\n")
    shown = picture(config, [workdir(args, system, first) for system in systems.values()], judge.labels(SHOWN))
    save_png(shown, out / "pictures.png")
    for folder, weight in (("spectra", 1.0), ("spectra_without_L_freq", 0.0)):
        spectra = {
            name: spectra_of(workdir(args, system, first), make_config(args, system, first))
            for name, system in systems.items()
            if system.weight == weight
        }
        if spectra:
            (out / folder).mkdir(exist_ok=True)
            print(write_spectra(out / folder, spectra))


def main() -> None:
    parser = parser_for(__doc__.splitlines()[0], RECIPES)
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS), help="to be compared")
    args = parser.parse_args()
    start = time.perf_counter()
    try:
        require_matplotlib()
        prepare(args)
        compare(args)
    except UsageError as error:
        sys.exit(str(error))
    print(f"{time.perf_counter() - start:.0f} s in all, on {jax.device_count()} {jax.devices()[0].device_kind}.")


if __name__ == "__main__":
    main()
