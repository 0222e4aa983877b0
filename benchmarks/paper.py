"""The paper's own figures, with the public weights: FID and its relatives of 50,000 images, ours beside theirs.

    python benchmarks/paper.py OUT --weights xl256-320=PATH … --reference 256=VIRTUAL_imagenet256_labeled.npz

Weights are whatever `load_pretrained` opens, named as in WEIGHTS below. Rows whose weights or reference are not given
are left out, and said so. A row that is done is not done again, so the same command goes on; with several processes it
is started like `deco evaluate`. What is compared: docs/evaluate.md.

`--rehearse SIDE` runs every row with any small network: images of SIDE pixels in at most four steps, EfficientNet's
features in place of Inception's, and a reference of `deco stats`. Its figures mean nothing.
"""

import argparse
import dataclasses
import os

import jax

from deco_jax.cli import HEARTBEAT_TIMEOUT, exit_codes
from deco_jax.errors import UsageError
from deco_jax.evaluation.evaluate import evaluate
from deco_jax.evaluation.measure import read_result
from deco_jax.parallel import processes
from deco_jax.pretrained.load import open_pretrained
from deco_jax.storage import to_path

NUM = 50_000
WEIGHTS = {
    "l256-40": "DeCo-L/16, 256², 200k steps (40 epochs)",
    "xl256-320": "DeCo-XL/16, 256², 320 epochs",
    "xl256-600": "DeCo-XL/16, 256², 600 epochs",
    "xl256-800": "DeCo-XL/16, 256², 800 epochs",
    "xl512": "DeCo-XL/16, 512²",
}


@dataclasses.dataclass(frozen=True)
class Row:
    """One figure of the paper's, and how its images were drawn."""

    weights: str  # of WEIGHTS
    side: int  # pixels
    theirs: dict[str, float]  # metric → the paper's value
    steps: int = 100
    solver: str = "euler"
    guidance: float = 1.0
    interval: tuple[float, float] = (0.1, 1.0)
    source: str = "Table 2"


ROWS = {
    "l-unguided": Row(
        "l256-40", 256, {"fid": 31.35, "sfid": 9.34, "inception_score": 48.35, "recall": 0.65}, 50, source="Table 1"
    ),
    "xl-320": Row("xl256-320", 256, {"fid": 1.90}, guidance=3.2),
    "xl-320-unguided": Row("xl256-320", 256, {"fid": 14.88}, source="others' measurement, not the paper's"),
    "xl-600-heun": Row("xl256-600", 256, {"fid": 1.69}, 50, "heun", guidance=3.0),
    "xl-800": Row("xl256-800", 256, {"fid": 1.71}, guidance=3.0),
    "xl-800-250": Row("xl256-800", 256, {"fid": 1.62}, 250, guidance=3.0),
    "xl-512": Row("xl512", 512, {"fid": 2.22}, guidance=5.0, interval=(0.0, 1.0)),
}
SHOWN = ("fid", "sfid", "inception_score", "precision", "recall")


def pairs(texts: list[str], allowed: list[str], option: str) -> dict[str, str]:
    """["a=x"] → {"a": "x"}; UsageError for a name that is not allowed."""
    found = dict(text.partition("=")[::2] for text in texts)
    for name, value in found.items():
        if name not in allowed or not value:
            raise UsageError(f"{option}={name}={value} must be NAME=PATH with a NAME of: {', '.join(allowed)}.")
    return found


def check(weights: dict[str, str], references: dict[str, str]) -> None:
    """Raises UsageError for a path that holds nothing, before the first row takes its hours."""
    for path in weights.values():
        open_pretrained(path)
    for side, path in references.items():
        if not to_path(path).exists():
            raise UsageError(f"--reference={side}={path} does not exist.")


def run(out: str, weights: dict[str, str], references: dict[str, str], rehearse: int | None, num: int) -> None:
    """Measures every row that it can, and prints the table after each."""
    processes.agree(lambda: check(weights, references))
    measured: dict[str, dict[str, float]] = {}
    for name, row in ROWS.items():
        side = rehearse or row.side
        missing = [f"--weights {row.weights}=PATH ({WEIGHTS[row.weights]})"] if row.weights not in weights else []
        missing += [f"--reference {side}=FILE"] if str(side) not in references else []
        if missing:
            say(f"{name} is left out; it needs {' and '.join(missing)}.")
            continue
        folder = os.path.join(out, name)
        done = evaluate(
            weights[row.weights],
            folder,
            references[str(side)],
            features="efficientnet" if rehearse else "inception",
            num=num,
            image_size=str(side),
            solver=row.solver,
            steps=min(row.steps, 4) if rehearse else row.steps,
            guidance=row.guidance,
            guidance_interval=row.interval,
            shift=1.0,
            last=0.0,
        )
        if not done:  # it was told to stop
            return
        if jax.process_index() == 0:
            measured[name] = read_result(to_path(folder))["metrics"]
            say(table(measured, num, rehearse))


def table(measured: dict[str, dict[str, float]], num: int, rehearse: int | None) -> str:
    """Markdown: ours, and the paper's in brackets."""
    names = SHOWN if not rehearse else sorted({metric for values in measured.values() for metric in values})
    title = "A REHEARSAL, whose figures mean nothing; " if rehearse else ""
    lines = [
        f"{title}{num:,} images each; in brackets the paper's:",
        "",
        f"| row | weights | sampler | {' | '.join(names)} |",
        f"|---|---|---|{'---|' * len(names)}",
    ]
    for name, values in measured.items():
        row = ROWS[name]
        guided = f", g = {row.guidance} on ({row.interval[0]}, {row.interval[1]}]" if row.guidance != 1 else ""
        cells = []
        for metric in names:
            ours = f"{values[metric]:.4g}" if metric in values else "–"
            cells.append(f"{ours} ({row.theirs[metric]})" if metric in row.theirs else ours)
        lines.append(f"| {name} | {WEIGHTS[row.weights]} | {row.solver}-{row.steps}{guided} | {' | '.join(cells)} |")
    return "\n".join(lines)


def say(text: str) -> None:
    if jax.process_index() == 0:
        print(text, flush=True)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", metavar="OUT", help="gets a folder for each row")
    more = {"action": "append", "default": []}
    parser.add_argument("--weights", **more, metavar="NAME=PATH", help=", ".join(WEIGHTS))
    parser.add_argument("--reference", **more, metavar="SIDE=FILE", help="of 256 and of 512 pixels")
    parser.add_argument("--num", type=int, default=NUM, help="images for each row (default: 50000)")
    parser.add_argument("--rehearse", type=int, metavar="SIDE", help="run all with a small network")
    given = parser.parse_args(arguments)
    with exit_codes():
        processes.initialize(HEARTBEAT_TIMEOUT)
        sides = ["256", "512"] if given.rehearse is None else [str(given.rehearse)]
        weights = pairs(given.weights, list(WEIGHTS), "--weights")
        run(given.out, weights, pairs(given.reference, sides, "--reference"), given.rehearse, given.num)


if __name__ == "__main__":
    main()
