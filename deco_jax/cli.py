"""What does `deco COMMAND` understand, and what does it run? One line for bad input; `--debug` shows the traceback.

A command is the path of a function and its flags, each of which has the name of one of the function's parameters.
Nothing but the standard library is loaded before the flags are understood.
"""

import argparse
import contextlib
import importlib
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from deco_jax.errors import BrokenRun, TransientError, UsageError

SOURCE = "workdir, checkpoint, .ckpt, .pt, .pth, .safetensors or Hugging Face folder"
IMAGES = "deco_jax.preparation.images:prepare_images"
HEARTBEAT_TIMEOUT = 100  # seconds of silence after which a process counts as dead, in commands without a configuration


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `deco` and `python -m deco_jax`."""
    parser = make_parser()
    args, overrides = parser.parse_known_args(argv)
    arguments = vars(args)
    run, debug = arguments.pop("run"), arguments.pop("debug")
    del arguments["command"]
    if overrides and run in (_call, _call_as_process):
        parser.error(f"unrecognized arguments: {' '.join(overrides)}")
    with exit_codes(debug):
        run(overrides, **arguments)


@contextlib.contextmanager
def exit_codes(debug: bool = False) -> Iterator[None]:
    """Within it, an error ends the program: with 2 and one line for bad input, with 75 for what may pass by itself."""
    go_on = "The same command goes on from what is saved."
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenRun as error:
        if debug or error.code == 1:
            traceback.print_exception(error.__cause__)
        print(f"deco: error: {error}. {go_on}", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(error.code)  # an ordinary exit would wait for the other processes
    except UsageError as error:
        if debug:
            raise
        print(f"deco: error: {error}", file=sys.stderr)
        sys.exit(2)
    except Exception as error:
        if not load("deco_jax.storage:is_transient")(error):
            raise
        if debug:
            traceback.print_exception(error)
        reason = f"{error}" if isinstance(error, TransientError) else f"{type(error).__name__}: {error}"
        print(f"deco: error: {reason.strip().splitlines()[0].rstrip('.')}. {go_on}", file=sys.stderr)
        sys.exit(75)


def make_parser() -> argparse.ArgumentParser:
    """All commands and their flags."""
    parser = argparse.ArgumentParser(prog="deco", description="DeCo: frequency-decoupled pixel diffusion in JAX.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in COMMANDS:
        add(commands)
    return parser


def _call(_: list[str], function: str, **arguments: Any) -> None:
    """Runs a function with the flags' values."""
    load("deco_jax.parallel.hardware:skip_absent_accelerators")()
    load(function)(**arguments)


def _call_with_config(overrides: list[str], function: str, config: str, **arguments: Any) -> None:
    """Runs a function with the configuration of `--config` and its overrides, maybe as one process of several."""
    settings = load("deco_jax.config:load_config")(config, overrides)
    load("deco_jax.parallel.hardware:skip_absent_accelerators")()
    load("deco_jax.parallel.processes:initialize")(settings.train.heartbeat_timeout)
    load(function)(config=settings, **arguments)


def _call_as_process(_: list[str], function: str, **arguments: Any) -> None:
    """Runs a function with the flags' values, maybe as one process of several."""
    load("deco_jax.parallel.hardware:skip_absent_accelerators")()
    load("deco_jax.parallel.processes:initialize")(HEARTBEAT_TIMEOUT)
    load(function)(**arguments)


def _prepare(overrides: list[str], function: str, verify: bool, **arguments: Any) -> None:
    """Runs one of the preparations."""
    if verify and function != IMAGES:
        raise UsageError("--verify is for --images; damaged features are found when a run opens them.")
    more = {"verify": verify} if function == IMAGES else {}
    _call_with_config(overrides, function, **arguments, **more)


def _plan(overrides: list[str], function: str, as_json: bool, search: bool, **arguments: Any) -> None:
    """Prints what a plan finds; exits with 1 if the run does not fit."""
    import jax

    to_text = "deco_jax.planning.report:to_text"
    if search:
        function, to_text = "deco_jax.planning.search:search", "deco_jax.planning.search:to_text"
        for option in ("preset", "sampler", "fit"):
            if arguments.pop(option):
                name = {"sampler": "sample"}.get(option, option)
                raise UsageError(f"--search looks for a layout of the training step; --{name} does not go with it.")
    jax.config.update("jax_platforms", "cpu")  # what compiles is this machine's CPU, whatever else it has
    report = load(function)(overrides=overrides, say=lambda line: print(line, file=sys.stderr), **arguments)
    print(json.dumps(report, indent=2) if as_json else load(to_text)(report))
    if report["fits"] is False:
        sys.exit(1)


def _stats(overrides: list[str], function: str, config: str | None, **arguments: Any) -> None:
    """Runs the statistics of images, or of the data of a configuration."""
    if overrides and config is None:
        raise UsageError(f"unrecognized arguments: {' '.join(overrides)}")
    settings = None if config is None else load("deco_jax.config:load_config")(config, overrides)
    _call_as_process([], function, config=settings, **arguments)


def load(path: str) -> Callable[..., Any]:
    """The function at "module:name"; its libraries load only now."""
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


def _add_command(commands: Any, name: str, run: Callable, function: str, text: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.set_defaults(run=run, function=function)
    return parser


def _add_config(parser: argparse.ArgumentParser, example: str, dest: str = "config") -> None:
    """The configuration file, whose settings may be overridden, as in the example."""
    text = "configs/NAME.py, or FILE:ARGUMENT"
    parser.add_argument("--config", dest=dest, required=True, metavar="FILE", help=text)
    parser.epilog = f"Any setting of the file: --config.PART.FIELD=VALUE, for instance {example}"


def _add_drawing(parser: argparse.ArgumentParser, batch_size: int, *, out: str, files: str, seed: str) -> None:
    """What commands have in common that draw images with a trained network."""
    parser.add_argument("--out", required=True, metavar="DIR", help=f"gets {out}")
    parser.add_argument("--seed", type=int, default=0, help=f"{seed} (default: 0)")
    parser.add_argument("--weights", choices=("ema", "online"), default="ema", help="default: ema")
    text = "of matrix products (default: as it was trained)"
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help=text)
    parser.add_argument("--batch-size", type=int, default=batch_size, help=f"images at a time (default: {batch_size})")
    parser.add_argument("--overwrite", action="store_true", help=f"replace {files} already in --out")


def _add_labels(labels: Any) -> None:
    text = 'as in "0,5-9,golden retriever,null"; image i shows label i modulo their number (default: all)'
    labels.add_argument("--labels", help=text)


def _add_prompts(parser: argparse.ArgumentParser) -> None:
    """Of networks that are told text."""
    what = parser.add_mutually_exclusive_group()
    text = "of a network that is told text: what the images show (repeat for several)"
    what.add_argument("--prompt", action="append", default=[], metavar="TEXT", help=text)
    text = 'a .txt with a prompt in each line, a .jsonl with {"prompt": …} in each, or a folder of .txt'
    what.add_argument("--prompts", metavar="FILE", help=text)
    text = "of the prompts: a folder, a name on Hugging Face, or minilm (default: as the run's configuration says)"
    parser.add_argument("--text-encoder", metavar="NAME", help=text)


def _add_negative(parser: argparse.ArgumentParser) -> None:
    text = "guidance leads away from it (default: from no class, or the empty prompt)"
    parser.add_argument("--negative", metavar="LABEL|TEXT", help=text)


def _add_part(parser: argparse.ArgumentParser) -> None:
    text = "of several that run independently and share --out, from 0/N on (default: as a SLURM array says, else all)"
    parser.add_argument("--part", metavar="I/N", help=text)


def _add_sampler(parser: argparse.ArgumentParser) -> None:
    """The settings of a sampler, by default those of the network's run."""
    trained = "(default: as the run's configuration says)"
    text = f"pixels, one number for squares or HEIGHTxWIDTH {trained}"
    parser.add_argument("--image-size", metavar="SIZE", help=text)
    text = f"euler, euler_sde, heun, heun_exact, adams1, … adams4 {trained}"
    parser.add_argument("--solver", metavar="NAME", help=text)
    parser.add_argument("--steps", type=int, help=f"of the solver {trained}")
    parser.add_argument("--guidance", type=float, help=f"classifier-free guidance, 1 = none {trained}")
    parser.add_argument("--guidance-interval", type=float, nargs=2, metavar=("LOW", "HIGH"), help=trained)
    parser.add_argument("--shift", type=float, help=f"time shift, above 1 = more steps near noise {trained}")
    parser.add_argument("--last", type=float, help=f"length of the last step before the shift, 0 = 1/steps {trained}")


def _add_prepare(commands: Any) -> None:
    text = "Compute and store what never changes: images' crops, a teacher's features of them, states of captions."
    parser = _add_command(commands, "prepare", _prepare, "", text)
    _add_config(parser, "--config.data.path=DIR")
    what = parser.add_mutually_exclusive_group(required=True)
    for name, function, text in (
        ("--images", IMAGES, "crop all images; to train from them: --config.data.source=prepared"),
        ("--teacher", "deco_jax.preparation.teacher:prepare_teacher", "prepare its features"),
        ("--text", "deco_jax.preparation.text:prepare_text", "prepare the text encoder's states of all captions"),
    ):
        what.add_argument(name, dest="function", action="store_const", const=function, help=text)
    parser.add_argument("--out", required=True, metavar="DIR", help="gets them; continued if it holds some")
    text = "at a time: images or captions of each process; for --images, of each worker (default: 64)"
    parser.add_argument("--batch-size", type=int, default=64, help=text)
    text = "of --images: compare files that are there with their checksums, and make damaged ones anew"
    parser.add_argument("--verify", action="store_true", help=text)
    _add_part(parser)


def _add_train(commands: Any) -> None:
    text = "Train a network, or go on training it."
    parser = _add_command(commands, "train", _call_with_config, "deco_jax.training.loop:train", text)
    _add_config(parser, "--config.optimizer.lr=2e-4")
    text = "checkpoints, samples and logs; resumed if there"
    parser.add_argument("--workdir", required=True, metavar="DIR", help=text)


def _add_sample(commands: Any) -> None:
    text = "Draw images from a trained network."
    parser = _add_command(commands, "sample", _call, "deco_jax.generation.folder:generate_to_folder", text)
    source = parser.add_mutually_exclusive_group(required=True)
    text = "of `deco train`; its newest checkpoint is used"
    source.add_argument("--workdir", dest="source", metavar="DIR", help=text)
    text = "WORKDIR/checkpoints/STEP, .ckpt, .pt, .safetensors or folder"
    source.add_argument("--checkpoint", dest="source", metavar="PATH", help=text)
    seed = "image i depends on the seed and i alone"
    out = "grid.png and one PNG per image; continued if it holds some of the same"
    _add_drawing(parser, 64, out=out, files="pictures", seed=seed)
    parser.add_argument("--num", type=int, help="images (default: 64, or four of each prompt)")
    _add_labels(parser)
    _add_prompts(parser)
    _add_negative(parser)
    text = "also trajectory.gif: the first 64 images after every K-th step (default: none)"
    parser.add_argument("--trajectory", type=int, default=0, metavar="K", help=text)
    _add_sampler(parser)


def _add_generate(commands: Any) -> None:
    text = "Draw very many images, on all devices and hosts; ends with samples.npz, as evaluation suites read it."
    function = "deco_jax.generation.shards:generate_samples"
    parser = _add_command(commands, "generate", _call_as_process, function, text)
    parser.add_argument("source", metavar="SOURCE", help=SOURCE)
    out = "samples.npz, and shards until then; continued if it holds some"
    parser.add_argument("--out", required=True, metavar="DIR", help=f"gets {out}")
    number = parser.add_mutually_exclusive_group()
    number.add_argument("--num", type=int, metavar="N", help="images (default: 50000, or one of each prompt)")
    number.add_argument("--per-class", type=int, metavar="K", help="images of each label")
    number.add_argument("--per-prompt", type=int, metavar="K", help="images of each prompt, one after the other")
    labels = parser.add_mutually_exclusive_group()
    _add_labels(labels)
    text = "a text file with the label of one image on each line"
    labels.add_argument("--label-file", metavar="FILE", help=text)
    _add_prompts(parser)
    _add_negative(parser)
    parser.add_argument("--png", action="store_true", help="also one PNG per image, in --out/png")
    text = "of pictures: npz (none), png, or as a benchmark's scorer reads them: geneval, dpg (default: by --prompts)"
    parser.add_argument("--layout", metavar="NAME", help=text)
    _add_generation(parser)
    _add_part(parser)


def _add_generation(parser: argparse.ArgumentParser) -> None:
    """What commands have in common that generate very many images."""
    text = "image i depends on the seed and i alone (default: 0)"
    parser.add_argument("--seed", type=int, default=0, help=text)
    parser.add_argument("--weights", choices=("ema", "online"), default="ema", help="default: ema")
    text = "of matrix products (default: as it was trained)"
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help=text)
    text = "images at a time on each process (default: 64)"
    parser.add_argument("--batch-size", type=int, default=64, help=text)
    _add_sampler(parser)


def _add_evaluate(commands: Any) -> None:
    text = "Measure generated images against a reference: FID, sFID, Inception Score, precision, recall and others."
    function = "deco_jax.evaluation.evaluate:evaluate"
    parser = _add_command(commands, "evaluate", _call_as_process, function, text)
    text = f"{SOURCE}, whose images are generated; or images: NAME.npz with arr_0, or a folder of pictures"
    parser.add_argument("source", metavar="SOURCE", help=text)
    parser.add_argument("--out", required=True, metavar="DIR", help="gets metrics.json and metrics.md; continued")
    text = "of `deco stats`, or of the ADM suite (NAME.npz)"
    parser.add_argument("--reference", required=True, metavar="FILE", help=text)
    _add_features(parser)
    more = {"action": "append", "default": [], "metavar": "FIELD=A,B,…"}
    text = "evaluates for every value, and every combination if repeated: guidance=1,2,3.2 guidance_interval=0:1,0.1:1"
    parser.add_argument("--sweep", **more, help=text)
    parser.add_argument(
        "--num",
        type=int,
        metavar="N",
        help="images to generate (default: 50000, or one of each prompt), or to look at (all)",
    )
    _add_labels(parser)
    _add_prompts(parser)
    _add_generation(parser)


def _add_features(parser: argparse.ArgumentParser) -> None:
    text = "networks whose features are compared, of inception, dinov2, efficientnet (default: inception)"
    parser.add_argument("--features", default="inception", metavar="A,B,…", help=text)
    text = "file of a network's weights, if not in the cache (repeat for several)"
    more = {"action": "append", "default": [], "metavar": "NAME=FILE"}
    parser.add_argument("--feature-weights", **more, help=text)


def _add_stats(commands: Any) -> None:
    text = "Compute the statistics of a data set that `deco evaluate` compares with."
    parser = _add_command(commands, "stats", _stats, "deco_jax.evaluation.stats:compute_stats", text)
    images = parser.add_mutually_exclusive_group(required=True)
    text = "a folder of pictures, or NAME.npz with arr_0"
    images.add_argument("--images", metavar="PATH", help=text)
    text = "whose data are taken, as training sees them"
    images.add_argument("--config", metavar="FILE", help=text)
    parser.add_argument("--out", required=True, metavar="DIR", help="gets reference.npz; continued")
    parser.add_argument("--batch-size", type=int, default=64, help="images at a time on each process (default: 64)")
    text = "the first images only (default: all)"
    parser.add_argument("--num", type=int, metavar="N", help=text)
    _add_features(parser)


def _add_report(commands: Any) -> None:
    text = "Write one HTML page about runs, to be looked at without a network: losses, samples, speed, metrics."
    parser = _add_command(commands, "report", _call, "deco_jax.reports.report:write_report", text)
    parser.add_argument("workdirs", nargs="+", metavar="WORKDIR", help="of `deco train`; several are put side by side")
    parser.add_argument("--out", metavar="FILE.html", help="(default: report.html in the first WORKDIR)")


def _add_demo(commands: Any) -> None:
    text = "Serve a page on which people draw images with a trained network in their browser."
    parser = _add_command(commands, "demo", _call, "deco_jax.demo.page:serve", text)
    parser.add_argument("source", metavar="SOURCE", help=SOURCE)
    parser.add_argument("--weights", choices=("ema", "online"), default="ema", help="default: ema")
    text = "of matrix products (default: as it was trained)"
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help=text)
    text = "of a network that is told text (default: the one of its run)"
    parser.add_argument("--text-encoder", metavar="NAME", help=text)
    text = "address to serve; 0.0.0.0 lets others in (default: 127.0.0.1, this machine alone)"
    parser.add_argument("--host", default="127.0.0.1", help=text)
    parser.add_argument("--port", type=int, default=7860, help="0 = any that is free (default: 7860)")
    parser.add_argument("--max-images", type=int, default=4, help="of one drawing (default: 4)")
    parser.add_argument("--max-side", type=int, default=1024, help="pixels of height and width (default: 1024)")
    parser.add_argument("--queue", type=int, default=16, help="drawings that may wait for their turn (default: 16)")


def _add_spectra(commands: Any) -> None:
    text = "Over which frequencies does the energy of a transformer's output lie, and of its network's velocity?"
    parser = _add_command(commands, "spectra", _call, "deco_jax.evaluation.spectra:spectra_to_folder", text)
    parser.add_argument("--checkpoint", required=True, metavar="PATH", help=SOURCE)
    more = {"nargs": "+", "action": "extend", "default": []}
    parser.add_argument("--against", **more, metavar="PATH", help="networks to put beside it")
    files, seed = "spectra.json, spectra.csv and spectra.png", "of the noise, the same for every network"
    _add_drawing(parser, 16, out=files, files="spectra", seed=seed)
    parser.add_argument("--num", type=int, default=64, help="images per network (default: 64)")
    trained = "(default: as the run's configuration says; else"
    parser.add_argument("--steps", type=int, help=f"of the Euler solver {trained} 50)")
    parser.add_argument("--shift", type=float, help=f"time shift, above 1 = more steps near noise {trained} 1)")
    parser.add_argument("--image-size", metavar="SIZE", help=f"pixels, or HEIGHTxWIDTH {trained} 256)")


def _add_plan(commands: Any) -> None:
    text = "Would a run fit on hardware that is not here, and how fast could it be? Ends with 1 if it does not fit."
    parser = _add_command(commands, "plan", _plan, "deco_jax.planning.plan:plan", text)
    _add_config(parser, "--config.model.remat=full", dest="path")
    text = "v4:2x2x4, v5e:4x4, v5p:2x2x4, v6e:4x4, h100:8, cpu:8, …"
    parser.add_argument("--topology", required=True, metavar="NAME", help=text)
    parser.add_argument("--slices", type=int, default=1, help="so many of them behind a slower network (default: 1)")
    parser.add_argument("--preset", metavar="NAME", help="layout of the mesh, as --config.mesh.preset")
    parser.add_argument("--per-device-batch", type=int, metavar="B", help="(default: the configuration's global batch)")
    text = "plan the sampler instead of the training step"
    parser.add_argument("--sample", dest="sampler", action="store_true", help=text)
    parser.add_argument("--fit", action="store_true", help="find the largest batch that fits; compiles several times")
    text = "compile the step in the layouts there are, and print the best; ten minutes and more"
    parser.add_argument("--search", action="store_true", help=text)
    parser.add_argument("--json", dest="as_json", action="store_true", help="print one JSON object")


def _add_convert(commands: Any) -> None:
    text = "Carry weights between this project and PyTorch."
    parser = _add_command(commands, "convert", _call, "deco_jax.porting.convert:convert", text)
    parser.add_argument("source", metavar="SRC", help="workdir, checkpoint, .ckpt, .pt, .pth, .safetensors or folder")
    parser.add_argument("target", metavar="DST", help="NAME.safetensors, NAME.ckpt, NAME.pt, or a folder")
    text = "checkpoint, safetensors, ckpt, pt or huggingface (default: by DST's ending)"
    parser.add_argument("--format", dest="kind", metavar="FORMAT", help=text)
    parser.add_argument("--weights", default="ema", help="ema or online, for formats with one set (default: ema)")
    parser.add_argument("--train-state", action="store_true", help="also optimiser, step and projector, to train on")
    text = "with --train-state, or to a .ckpt: to train without REPA"
    parser.add_argument("--without-projector", dest="projector", action="store_false", help=text)
    parser.add_argument("--image-size", type=int, help="it was trained on, if SRC does not say (default: 256)")
    parser.add_argument("--prediction", help="velocity or image, if SRC does not say")
    parser.add_argument("--force", action="store_true", help="replace DST, if it is a file or made by this command")


COMMANDS = (
    _add_prepare,
    _add_train,
    _add_sample,
    _add_generate,
    _add_evaluate,
    _add_stats,
    _add_report,
    _add_demo,
    _add_spectra,
    _add_plan,
    _add_convert,
)
