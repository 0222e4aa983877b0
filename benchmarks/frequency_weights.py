"""When does L_freq help? DeCo with and without it, and with other qualities and weights.

python benchmarks/frequency_weights.py OUT --recipe food                              every setting
python benchmarks/frequency_weights.py OUT --recipe digits_patch8 --settings default  with and without alone

One DeCo for each setting and seed, compared with those without L_freq, seed by seed: the difference of the Fréchet
distances to the training images (judge.py) with Student's 95 % interval of its mean; "yes" and "no" where that leaves
out zero. With so many intervals one in twenty does so by chance, and all of a recipe share the runs without L_freq.
That one recipe says yes and another nothing is no proof that they differ; and they differ in more than one thing.

decoupling.py says how systems are trained, and may be given the same OUT, before or after: what it has trained is not
trained again. OUT/RECIPE gets frequency_weights.json. Needs the extra `eval`.
docs/decoupling.md has what has come out so far.
"""

import sys
from typing import Any

from judge import Judge
from small_runs import RECIPES, System, make_config, paired, parser_for, prepare, run, show_pair, workdir

from deco_jax.errors import UsageError
from deco_jax.storage import write_json

WITHOUT = System("deco", 0.0)
SETTINGS = {
    "default": System("deco", 1.0),  # weight 1, quality 85, as in the paper
    "weight0.5": System("deco", 0.5),
    "weight2": System("deco", 2.0),
    "quality50": System("deco", 1.0, quality=50),
    "quality100": System("deco", 1.0, quality=100),
}


def verdict(pair: dict[str, Any]) -> str:
    """Does it help, as far as these seeds can say?"""
    if pair["interval"] is None or abs(pair["mean"]) <= pair["interval"]:
        return "cannot say"
    return "yes" if pair["mean"] < 0 else "no"


def table(runs: dict[str, list[dict[str, Any]]], pairs: dict[str, dict[str, Any]]) -> str:
    """Fréchet distances by seed and what they say, as Markdown; ± is Student's 95 % interval."""
    lines = [
        "| L_freq | Fréchet distance by seed | less that without | smaller with | does it help? |",
        "|---|---|--:|---|---|",
    ]
    for name, its in runs.items():
        cells = [name, ", ".join(f"{run['frechet']:.0f}" for run in its), "", "", ""]
        if pair := pairs.get(name):
            cells[2:] = [show_pair(pair), f"{pair['smaller']} of {len(its)} seeds", verdict(pair)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = parser_for(__doc__.splitlines()[0], list(RECIPES))
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS), help="to be tried")
    args = parser.parse_args()
    systems = {"without": WITHOUT} | {name: SETTINGS[name] for name in args.settings}
    runs = {name: [] for name in systems}
    try:
        prepare(args)
        config = make_config(args, WITHOUT, args.seeds[0])
        judge = Judge(config.data)
        scale = judge.scale(config.sample.num, config.data.image_size)
        for seed in args.seeds:
            for name, system in systems.items():
                measured = run(make_config(args, system, seed), workdir(args, system, seed), judge)
                runs[name].append({"seed": seed} | measured)
                print(f"{name}, seed {seed}: Fréchet distance {measured['frechet']:.1f}", flush=True)
    except UsageError as error:
        sys.exit(str(error))
    pairs = {name: paired(runs[name], runs["without"], "frechet") for name in args.settings}
    report = {"recipe": args.recipe, "scale": scale, "runs": runs, "pairs": pairs}
    write_json(args.out / args.recipe / "frequency_weights.json", report)
    print(table(runs, pairs))


if __name__ == "__main__":
    main()
