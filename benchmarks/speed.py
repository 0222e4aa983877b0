"""What do the benchmarks of speed share? Sizes of networks, rounds in which contenders take turns, tables, JSON.

Contenders live in one process and take turns: in each round each of them makes one step that is not timed and then a
few that are, ended by a wait for the device. Reported is the median over the rounds, with the lowest and the highest.
"""

import argparse
import concurrent.futures
import dataclasses
import datetime
import gc
import importlib.metadata
import json
import os
import pathlib
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from typing import Any

# PyTorch needs memory beside us. JAX takes this share of a GPU's and no more: 38 GB of an H100's, of which XL's step
# with 64 images takes 33. Growing as needed instead it would end with far more, as it doubles what it has.
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.48")
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

try:
    import jax
    import numpy as np
    from flax import linen as nn
    from ml_collections import ConfigDict

    from deco_jax.config import check_config, default_config, load_config
    from deco_jax.encoders.dinov2.model import DINOv2
    from deco_jax.encoders.teacher import default_teacher, teacher_of
    from deco_jax.parallel.hardware import peak_flops, skip_absent_accelerators
except ImportError as error:
    raise SystemExit(
        f"{error.name or error} is missing. Of deco_jax's requirements the benchmarks of speed need jax, flax, optax, "
        "absl-py, etils, numpy, pillow, psutil, ml_collections and array_record, and torch for the other side; run "
        "them in the repository's root as PYTHONPATH=. python3 benchmarks/…"
    ) from error

ROOT = pathlib.Path(__file__).parents[1]
SIZES = ("tiny", "small", "l", "xl", "xl512")
OURS, EAGER, COMPILED = "deco_jax", "PyTorch eager", "PyTorch compiled"


# --- what is measured


def add_arguments(parser: argparse.ArgumentParser, rounds: int = 5) -> None:
    """The options that these benchmarks have in common."""
    parser.add_argument("--size", choices=SIZES, help="of the network (default: xl on a GPU, small on a CPU)")
    parser.add_argument("--batch", type=int, help="images (default: 64 on a GPU, 32 on a CPU)")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="of products (default: the size's)")
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--json", help="file for all figures")
    parser.add_argument("--no-torch", action="store_true", help="only ours")
    parser.add_argument(
        "--torch-compile",
        choices=("whole", "blocks", "both", "none"),
        help="the network as one, or its repeated blocks (default: blocks on a GPU, whole on a CPU)",
    )


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The options, with defaults for this machine's device."""
    args = parser.parse_args()
    skip_absent_accelerators()
    gpu = jax.default_backend() == "gpu"
    args.size = args.size or ("xl" if gpu else "small")
    args.batch = args.batch or (64 if gpu else 32)
    args.torch_compile = args.torch_compile or ("blocks" if gpu else "whole")
    return args


def configuration(size: str, batch: int, dtype: str | None = None, changes: Sequence[str] = ()) -> ConfigDict:
    """A run's configuration: of configs/, or small ones for a CPU; `changes` are <part>.<field>=<value>."""
    if size in ("tiny", "small"):
        c = default_config()
        if size == "small":  # 21.7 M parameters
            c.model.update(num_classes=10, patch_size=4, width=384, depth=8, heads=6, decoder_width=32, decoder_depth=3)
        else:
            c.model.update(num_classes=10, width=48, depth=3, heads=3, decoder_width=8, decoder_depth=2)
            c.loss.update(alignment_weight=0.5, alignment_layer=2, alignment_features=32)
        c.model.update(dtype="float32", remat="none", scan=False)
        c.data.image_size = 32
        c.sample.update(guidance=3.0, guidance_interval=(0.1, 1.0))
    else:
        side, name = (512, "xl") if size == "xl512" else (256, size)
        c = load_config(str(ROOT / f"configs/imagenet{side}_deco_{name}.py"))
    c.data.batch_size = batch
    c.optimizer.accumulation = 1
    if dtype:
        c.model.dtype = dtype
    for change in changes:
        field, _, value = change.partition("=")
        part, _, name = field.partition(".")
        old = c[part][name]
        c[part][name] = value == "True" if isinstance(old, bool) else type(old)(value)
    check_config(c)
    return c


def random_teacher(config: ConfigDict) -> Any:
    """The teacher's network as a run has it in its step; the tiny size's is tiny as well."""
    if config.loss.alignment_features == 32:
        return teacher_of(DINOv2(width=32, depth=2, heads=2, table_side=4), config)
    return default_teacher(config)


def random_params(boxed: Any, seed: int) -> Any:
    """Parameters of these shapes, numpy fp32: normal by the number of inputs, no zero hides a part of the network."""
    leaves, tree = jax.tree_util.tree_flatten_with_path(nn.meta.unbox(boxed))

    def make(number: int) -> np.ndarray:
        path, leaf = leaves[number]
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        x = np.random.default_rng((seed, number)).standard_normal(leaf.shape, np.float32)
        if name.endswith("scale"):
            return 1 + 0.1 * x
        stacked = any(part in name for part in ("layers/", "blocks/"))
        inputs = leaf.shape[stacked] if name.endswith("kernel") else 400
        return x / np.float32(inputs) ** 0.5

    with concurrent.futures.ThreadPoolExecutor() as pool:
        return tree.unflatten(pool.map(make, range(len(leaves))))


# --- turns


@dataclasses.dataclass
class Contender:
    """One of those who take turns."""

    name: str
    run: Callable[[int], None]  # so many steps, until the device is done
    compile_seconds: float | None = None
    peak: Callable[[], float | None] = lambda: None  # bytes, asked after a turn
    before: Callable[[], None] = lambda: None  # of a turn
    after: Callable[[], None] = lambda: None  # of a turn
    details: dict[str, Any] = dataclasses.field(default_factory=dict)  # for the JSON

    seconds: list[float] = dataclasses.field(default_factory=list)  # per step, one of each round
    memory: float | None = None  # bytes at the peak
    problem: str = ""  # why there are no figures


def take_turns(contenders: Sequence[Contender], rounds: int, steps: int, warm: int = 1) -> None:
    """`rounds` times, each contender makes `warm` steps that do not count and `steps` that do."""
    for _ in range(rounds):
        for contender in contenders:
            if not contender.problem:
                attempt(contender, lambda c=contender: _turn(c, steps, warm))


def attempt(contender: Contender, what: Callable[[], Any]) -> Any:
    """What `what` returns; if the device's memory is too small the contender has no figures, and that is said."""
    try:
        return what()
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        if "out of memory" not in text.lower() and "RESOURCE_EXHAUSTED" not in text:
            raise
        contender.problem = "out of memory"
        print(f"{contender.name}: {text.splitlines()[0][:200]}", flush=True)
    gc.collect()  # the error is gone, and with it what its traceback held
    contender.after()
    return None


def _turn(contender: Contender, steps: int, warm: int) -> None:
    contender.before()
    if warm:
        contender.run(warm)
    began = time.perf_counter()
    contender.run(steps)
    contender.seconds.append((time.perf_counter() - began) / steps)
    contender.memory = max(filter(None, (contender.memory, contender.peak())), default=None)
    contender.after()


def median(values: Sequence[float]) -> float | None:
    """Of measured values, None if there are none."""
    return statistics.median(values) if values else None


def spread(values: Sequence[float], scale: float = 1.0, digits: int = 1) -> str:
    """Median (lowest–highest)."""
    if not values:
        return "–"
    low, middle, high = (scale * f(values) for f in (min, statistics.median, max))
    return f"{middle:,.{digits}f} ({low:,.{digits}f}–{high:,.{digits}f})"


def ratio(ours: Contender, others: Sequence[Contender]) -> float | None:
    """How many times faster than the fastest of the others; > 1 is faster."""
    theirs = [other.seconds for other in others if other.seconds]
    return min(map(statistics.median, theirs)) / statistics.median(ours.seconds) if theirs and ours.seconds else None


# --- reports


def about() -> dict[str, str]:
    """The machine, versions, the date."""
    device = jax.devices()[0]
    facts = {"date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")}
    facts["device"] = device.device_kind if device.platform != "cpu" else f"{_processor()}, {os.cpu_count()} cores"
    facts["python"] = platform.python_version()
    for package in ("jax", "jaxlib", "flax", "torch"):
        try:
            facts[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            facts[package] = "not installed"
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT)
    facts["commit"] = git.stdout.strip() or "unknown"
    return facts | {"load": f"{os.getloadavg()[0]:.1f}"}  # of the machine's last minute: 1 or 2 here is this benchmark


def _processor() -> str:
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def utilisation(flops_per_second: float) -> float | None:
    """MFU on this machine's device; None on one whose peak is not known."""
    peak = peak_flops(jax.devices()[0])
    return flops_per_second / peak if peak else None


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows))


def report(args: argparse.Namespace, title: str, lines: Sequence[str], results: Any) -> None:
    """Prints what was found, with the machine it was found on; and writes the JSON if one was asked for."""
    facts = about()
    print(f"\n{title}\n{', '.join(f'{name} {value}' for name, value in facts.items())}\n", flush=True)
    print("\n".join(lines), flush=True)
    if args.json:
        text = json.dumps({"about": facts, "settings": vars(args), "results": results}, indent=1, default=_plain)
        pathlib.Path(args.json).write_text(text)


def figures(contender: Contender) -> dict[str, Any]:
    """A contender's figures for the JSON."""
    names = ("name", "seconds", "compile_seconds", "memory", "problem")
    return {name: getattr(contender, name) for name in names} | contender.details


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else str(value)
