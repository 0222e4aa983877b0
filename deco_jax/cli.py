"""The command line: `deco train`, `deco sample`. One clear line for bad input; `--debug` shows the traceback."""

import argparse
import sys
from collections.abc import Sequence

from deco_jax.errors import UsageError


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `deco` and `python -m deco_jax`."""
    parser = argparse.ArgumentParser(prog="deco", description="DeCo: frequency-decoupled pixel diffusion in JAX.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_train(commands)
    _add_sample(commands)
    args, rest = parser.parse_known_args(argv)
    if rest and args.command != "train":
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        args.run(args, rest)
    except KeyboardInterrupt:
        sys.exit(130)
    except UsageError as error:
        if args.debug:
            raise
        print(f"deco: error: {error}", file=sys.stderr)
        sys.exit(2)


def _add_command(commands, name: str, run, text: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.set_defaults(run=run)
    return parser


def _add_train(commands) -> None:
    parser = _add_command(commands, "train", _train, "Train a network, or go on training it.")
    parser.add_argument("--config", required=True, metavar="FILE", help="configs/NAME.py, or FILE:ARGUMENT")
    parser.add_argument(
        "--workdir", required=True, metavar="DIR", help="checkpoints, samples and logs; resumed if there"
    )
    parser.epilog = "Any setting of the file: --config.PART.FIELD=VALUE, for instance --config.optimizer.lr=2e-4"


def _train(args: argparse.Namespace, overrides: list[str]) -> None:
    from deco_jax.config import load_config
    from deco_jax.training.loop import train

    train(load_config(args.config, overrides), args.workdir)


def _add_sample(commands) -> None:
    parser = _add_command(commands, "sample", _sample, "Draw images from a trained network.")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--workdir", metavar="DIR", help="of `deco train`; its newest checkpoint is used")
    where.add_argument("--checkpoint", metavar="PATH", help="one checkpoint: WORKDIR/checkpoints/STEP")
    parser.add_argument("--out", required=True, metavar="DIR", help="gets grid.png and one PNG an image")
    parser.add_argument(
        "--labels", default="all", help="as in 0,1,5-9,null; image i shows label i modulo their number (default: all)"
    )
    parser.add_argument("--num", type=int, default=64, help="images (default: 64)")
    parser.add_argument("--seed", type=int, default=0, help="image i depends on the seed and i alone (default: 0)")
    parser.add_argument("--weights", choices=("ema", "online"), default="ema", help="default: ema")
    parser.add_argument("--batch-size", type=int, default=64, help="images at a time (default: 64)")
    parser.add_argument("--overwrite", action="store_true", help="replace pictures already in --out")
    trained = "(default: as the run's configuration says)"
    parser.add_argument("--image-size", type=int, help=f"pixels along a side {trained}")
    parser.add_argument("--steps", type=int, help=f"of the solver {trained}")
    parser.add_argument("--guidance", type=float, help=f"classifier-free guidance, 1 = none {trained}")
    parser.add_argument("--guidance-interval", type=float, nargs=2, metavar=("LOW", "HIGH"), help=trained)
    parser.add_argument("--shift", type=float, help=f"time shift, above 1 = more steps near noise {trained}")
    parser.add_argument("--solver", help=trained)


def _sample(args: argparse.Namespace, _: list[str]) -> None:
    from deco_jax.diffusion.samplers import SETTINGS
    from deco_jax.evaluation.generate import generate_to_folder

    settings = {name: getattr(args, name) for name in SETTINGS if getattr(args, name) is not None}
    generate_to_folder(
        args.workdir or args.checkpoint,
        args.out,
        labels=args.labels,
        num=args.num,
        seed=args.seed,
        weights=args.weights,
        batch_size=args.batch_size,
        image_size=args.image_size,
        overwrite=args.overwrite,
        **settings,
    )
