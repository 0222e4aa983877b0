"""The command line, `deco COMMAND`. One clear line for bad input; `--debug` shows the traceback."""

import argparse
import os
import sys
import traceback
from collections.abc import Sequence

from deco_jax.errors import BrokenRun, UsageError


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `deco` and `python -m deco_jax`."""
    parser = argparse.ArgumentParser(prog="deco", description="DeCo: frequency-decoupled pixel diffusion in JAX.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_prepare(commands)
    _add_train(commands)
    _add_sample(commands)
    _add_spectra(commands)
    _add_plan(commands)
    _add_convert(commands)
    args, rest = parser.parse_known_args(argv)
    if rest and args.command not in ("prepare", "train", "plan"):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        args.run(args, rest)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenRun as error:
        if args.debug or error.code == 1:
            traceback.print_exception(error.__cause__)
        print(f"deco: error: {error}. The same command goes on from what is saved.", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(error.code)  # an ordinary exit would wait for the other processes
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


def _add_prepare(commands) -> None:
    parser = _add_command(commands, "prepare", _prepare, "Compute and store what never changes about the images.")
    parser.add_argument("--config", required=True, metavar="FILE", help="configs/NAME.py, or FILE:ARGUMENT")
    parser.add_argument("--teacher", action="store_true", required=True, help="its features are what is prepared")
    parser.add_argument("--out", required=True, metavar="DIR", help="of the features; gone on with if it holds some")
    parser.add_argument("--batch-size", type=int, default=64, help="images at a time, on each process (default: 64)")
    parser.epilog = "Any setting of the file: --config.PART.FIELD=VALUE, for instance --config.data.path=DIR"


def _prepare(args: argparse.Namespace, overrides: list[str]) -> None:
    from deco_jax.config import load_config
    from deco_jax.parallel.processes import initialize
    from deco_jax.preparation.teacher import prepare_teacher

    config = load_config(args.config, overrides)
    initialize(config.train.heartbeat_timeout)
    prepare_teacher(config, args.out, args.batch_size)


def _add_train(commands) -> None:
    parser = _add_command(commands, "train", _train, "Train a network, or go on training it.")
    parser.add_argument("--config", required=True, metavar="FILE", help="configs/NAME.py, or FILE:ARGUMENT")
    parser.add_argument(
        "--workdir", required=True, metavar="DIR", help="checkpoints, samples and logs; resumed if there"
    )
    parser.epilog = "Any setting of the file: --config.PART.FIELD=VALUE, for instance --config.optimizer.lr=2e-4"


def _train(args: argparse.Namespace, overrides: list[str]) -> None:
    from deco_jax.config import load_config
    from deco_jax.parallel.processes import initialize
    from deco_jax.training.loop import train

    config = load_config(args.config, overrides)
    initialize(config.train.heartbeat_timeout)
    train(config, args.workdir)


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
    from deco_jax.evaluation.generate import generate_to_folder
    from deco_jax.sampling.solvers import SETTINGS

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


def _add_spectra(commands) -> None:
    text = "Over which frequencies does the energy of a transformer's output lie, and of its network's velocity?"
    parser = _add_command(commands, "spectra", _spectra, text)
    parser.add_argument(
        "--checkpoint", required=True, metavar="PATH", help="workdir, checkpoint, .ckpt, .pt, .safetensors or folder"
    )
    parser.add_argument(
        "--against", nargs="+", action="extend", default=[], metavar="PATH", help="networks to put beside it"
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="gets spectra.json, spectra.csv and spectra.png")
    parser.add_argument("--num", type=int, default=64, help="images a network (default: 64)")
    parser.add_argument("--seed", type=int, default=0, help="of the noise, the same for every network (default: 0)")
    trained = "(default: as the run's configuration says; else"
    parser.add_argument("--steps", type=int, help=f"of the Euler solver {trained} 50)")
    parser.add_argument("--shift", type=float, help=f"time shift, above 1 = more steps near noise {trained} 1)")
    parser.add_argument("--image-size", type=int, help=f"pixels along a side {trained} 256)")
    parser.add_argument("--batch-size", type=int, default=16, help="images at a time (default: 16)")
    parser.add_argument("--weights", choices=("ema", "online"), default="ema", help="default: ema")
    parser.add_argument("--overwrite", action="store_true", help="replace spectra already in --out")


def _spectra(args: argparse.Namespace, _: list[str]) -> None:
    from deco_jax.evaluation.spectra import spectra_to_folder

    spectra_to_folder(
        [args.checkpoint, *args.against],
        args.out,
        num=args.num,
        seed=args.seed,
        steps=args.steps,
        shift=args.shift,
        image_size=args.image_size,
        batch_size=args.batch_size,
        weights=args.weights,
        overwrite=args.overwrite,
    )


def _add_convert(commands) -> None:
    parser = _add_command(commands, "convert", _convert, "Carry weights between this project and PyTorch.")
    parser.add_argument("source", metavar="SRC", help="workdir, checkpoint, .ckpt, .pt, .pth, .safetensors or folder")
    parser.add_argument("target", metavar="DST", help="NAME.safetensors, NAME.ckpt, or a folder")
    parser.add_argument("--format", help="checkpoint, safetensors, ckpt or huggingface (default: by DST's ending)")
    parser.add_argument("--weights", default="ema", help="ema or online, for formats with one set (default: ema)")
    parser.add_argument("--train-state", action="store_true", help="also optimiser, step and projector, to train on")
    parser.add_argument("--without-projector", action="store_true", help="with --train-state: to train without REPA")
    parser.add_argument("--image-size", type=int, help="it was trained on, if SRC does not say (default: 256)")
    parser.add_argument("--prediction", help="velocity or image, if SRC does not say")
    parser.add_argument("--force", action="store_true", help="replace DST, if it is a file or made by this command")


def _convert(args: argparse.Namespace, _: list[str]) -> None:
    from deco_jax.porting.convert import convert

    convert(
        args.source,
        args.target,
        kind=args.format,
        weights=args.weights,
        train_state=args.train_state,
        projector=not args.without_projector,
        image_size=args.image_size,
        prediction=args.prediction,
        force=args.force,
    )


def _add_plan(commands) -> None:
    text = "Would a run fit on hardware that is not here, and how fast could it be? Ends with 1 if it does not fit."
    parser = _add_command(commands, "plan", _plan, text)
    parser.add_argument("--config", required=True, metavar="FILE", help="configs/NAME.py, or FILE:ARGUMENT")
    parser.add_argument(
        "--topology", required=True, metavar="NAME", help="v4:2x2x4, v5e:4x4, v5p:2x2x4, v6e:4x4, h100:8, cpu:8, …"
    )
    parser.add_argument("--slices", type=int, default=1, help="so many of them behind a slower network (default: 1)")
    parser.add_argument("--preset", metavar="NAME", help="layout of the mesh, as --config.mesh.preset")
    parser.add_argument("--per-device-batch", type=int, metavar="B", help="(default: the configuration's global batch)")
    parser.add_argument("--sample", action="store_true", help="plan the sampler instead of the training step")
    parser.add_argument("--fit", action="store_true", help="find the largest batch that fits; compiles several times")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.epilog = "Any setting of the file: --config.PART.FIELD=VALUE, for instance --config.model.remat=full"


def _plan(args: argparse.Namespace, overrides: list[str]) -> None:
    import json

    import jax

    from deco_jax.planning.plan import plan
    from deco_jax.planning.report import to_text

    jax.config.update("jax_platforms", "cpu")  # what compiles is this machine's CPU, whatever else it has
    report = plan(
        args.config,
        overrides,
        args.topology,
        preset=args.preset,
        slices=args.slices,
        per_device_batch=args.per_device_batch,
        sampler=args.sample,
        fit=args.fit,
        say=lambda line: print(line, file=sys.stderr),
    )
    print(json.dumps(report, indent=2) if args.json else to_text(report))
    if report["fits"] is False:
        sys.exit(1)
