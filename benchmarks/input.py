"""How many images a second do our sources deliver beside PyTorch's DataLoader, and what does a training loop wait for?

python benchmarks/input.py                                made-up photos in a temporary folder; under 10 minutes here
python benchmarks/input.py --data DIR --json FILE         keeps them for the next time; the figures also as JSON
python benchmarks/input.py --data DIR --images FOLDER     of your own photos, the first --count of them
python benchmarks/input.py --names 1300000 --sources      only how a folder of so many images starts

Both sides do the same work: the same records in the same shuffled order, the crop of the ADM code base with Pillow, a
batch as one uint8 array, the same number of worker processes. The first batches are compared bit by bit. PyTorch's side
is what a careful user writes: a dataset with one `__getitem__` per source, DataLoader's defaults (prefetch_factor 2,
batches through shared memory). Ours is `data.pipeline.batches`; each of its processes has data.threads threads. "0
workers" is: in the main process.

Every loader lives in a process of its own. They take turns: in each round each of them delivers for --seconds, after
what it had read ahead was thrown away. Reported is the median over the rounds, with the lowest and highest. "Per core"
is images per second of processor time, of all its processes. A training loop is one that sleeps for a step's time.
What is read was read before: files come from the machine's memory, not from its disk.

Needs the extra `torch`.
"""

import argparse
import contextlib
import dataclasses
import hashlib
import importlib.metadata
import importlib.util
import itertools
import json
import multiprocessing
import os
import pathlib
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import input_torch
import numpy as np
import psutil
from input_data import make_names, make_photos, make_prepared, make_tar, make_tfds

os.environ.setdefault("JAX_PLATFORMS", "cpu")

OURS, TORCH = "deco_jax", "PyTorch"
MODULES = {OURS: ("deco_jax.config", "deco_jax.data.sources"), TORCH: ("torch.utils.data",)}
SEED = 0
COMPARED = 3  # batches
SETTLING = 5  # steps of a training loop before its waits count


@dataclasses.dataclass(frozen=True)
class Case:
    """What one process reads, and how."""

    loader: str
    source: str
    path: str
    size: int  # pixels along a side
    batch: int
    workers: int
    threads: int | None  # None: the configuration's
    order_KxB: np.ndarray = dataclasses.field(repr=False)  # PyTorch's, which goes round it; ours makes its own

    @property
    def ahead(self) -> int:
        """Batches that may have been read ahead, at most."""
        return 6 * max(self.workers, 1)


def shuffled(records: int, batch: int) -> np.ndarray:
    """(K, batch) record numbers of the first batches: three epochs, or 500 batches."""
    import grain

    order = grain.MapDataset.range(records).seed(SEED).shuffle().repeat()
    batches = max(min(3 * records // batch, 500), COMPARED)
    return np.array([int(order[i]) for i in range(batches * batch)]).reshape(batches, batch)


# --- the loaders: (images (B, size, size, 3) uint8, labels (B,)) without end


def our_batches(case: Case) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """What a training run reads; the source is opened before this returns."""
    from deco_jax.config import default_config
    from deco_jax.data import pipeline, sources

    data = default_config().data
    data.update(source=case.source, path=case.path, name="photos", image_size=case.size, batch_size=case.batch)
    data.update(workers=case.workers, orient=False, background="")  # what PyTorch's side does, and upstream's loader
    if case.threads is not None:
        data.threads = case.threads
    source = sources.open_source(data)
    return ((batch["image"], batch["label"]) for batch in pipeline.batches(data, SEED, source, 0))


def their_batches(case: Case) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The same by PyTorch's DataLoader."""
    dataset = input_torch.RecordDataset(case.source, case.path, case.size)
    return input_torch.torch_batches(dataset, case.order_KxB, case.workers)


# --- one loader's process


def serve(pipe: Any, case: Case, began: float) -> None:
    """Opens the loader, says how that went, and answers until the other end closes.

    Args:
      pipe: to the process that asks.
      case: what to open.
      began: when this process was started, by `time.perf_counter`, which all processes of a machine share.
    """
    for module in MODULES[case.loader]:
        importlib.import_module(module)
    imported = time.perf_counter()
    batches = our_batches(case) if case.loader == OURS else their_batches(case)
    opened = time.perf_counter()
    first = next(batches)
    ready = time.perf_counter()
    digest = hashlib.sha256()
    for images_BxSxSx3, labels_B in [first, *itertools.islice(batches, COMPARED - 1)]:
        digest.update(np.ascontiguousarray(images_BxSxSx3).tobytes() + labels_B.astype(np.int64).tobytes())
    pipe.send({"opened": opened - imported, "ready": ready - began, "digest": digest.hexdigest()})
    with contextlib.suppress(EOFError):
        while True:
            question, *arguments = pipe.recv()
            for _ in range(0 if question is memory else case.ahead):
                next(batches)
            pipe.send(question(batches, *arguments))
    batches.close()


def rate(batches: Iterator[tuple[np.ndarray, np.ndarray]], seconds: float) -> tuple[float, float]:
    """Images per second, and per second of processor time."""
    used, began, images = _processor_seconds(), time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        images += len(next(batches)[1])
    return images / (time.perf_counter() - began), images / (_processor_seconds() - used)


def waits(batches: Iterator[tuple[np.ndarray, np.ndarray]], step: float, number: int) -> list[float]:
    """Seconds that each of so many steps waits for its batch, if it takes `step` seconds itself."""
    waited = []
    for _ in range(SETTLING + number):
        began = time.perf_counter()
        next(batches)
        waited.append(time.perf_counter() - began)
        time.sleep(step)
    return waited[SETTLING:]


def memory(batches: Iterator[tuple[np.ndarray, np.ndarray]]) -> dict[str, list[float]]:
    """MB, resident and proportional (what several processes share is divided among them): main process, workers."""
    workers = [p for p in psutil.Process().children(True) if "resource_tracker" not in " ".join(p.cmdline())]
    infos = [p.memory_full_info() for p in [psutil.Process(), *workers]]
    return {"rss": [info.rss / 1e6 for info in infos], "pss": [info.pss / 1e6 for info in infos]}


def _processor_seconds() -> float:
    main = psutil.Process()
    return sum(sum(process.cpu_times()[:2]) for process in [main, *main.children(recursive=True)])


class Loader:
    """A case in its process."""

    def __init__(self, case: Case):
        context = multiprocessing.get_context("spawn")
        self.case, (self.pipe, theirs) = case, context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, case, time.perf_counter()))
        self.process.start()
        theirs.close()
        self.start = self._answer()

    def ask(self, question: Callable, *arguments: Any) -> Any:
        """What `question` returns there, after what was read ahead is used up."""
        self.pipe.send((question, *arguments))
        return self._answer()

    def _answer(self) -> Any:
        try:
            return self.pipe.recv()
        except EOFError:
            sys.exit(f"{self.case} failed.")

    def close(self) -> None:
        """Ends the process."""
        self.pipe.close()
        self.process.join()


# --- what is measured, and told


def measure_sources(root: pathlib.Path, photos: list[pathlib.Path], args: argparse.Namespace) -> list[dict[str, Any]]:
    """Of each source of the photos and each loader, what was measured; says a line of each."""
    make = {
        "folder": lambda: root / "photos",
        "tars": lambda: make_tar(root, photos),
        "tfds": lambda: make_tfds(root, photos),
        "prepared": lambda: make_prepared(root, args.size),
    }
    order, results = shuffled(len(photos), args.batch), []
    for source in args.sources:
        path = str(make[source]())
        cases = [
            Case(loader, source, path, args.size, args.batch, workers, args.threads, order)
            for workers in sorted({0, args.workers})
            for loader in (OURS, TORCH)
        ]
        for result in compare(cases, args):
            results.append(result)
            line = f"{source}, {result['loader']}, {result['workers']} workers: {_spread(result['rate'])} images/s"
            print(line, flush=True)
    return results


def compare(cases: list[Case], args: argparse.Namespace) -> list[dict[str, Any]]:
    """Of each case, all with the same records, what was measured."""
    with contextlib.ExitStack() as closing:
        loaders = []
        for case in cases:
            loaders.append(Loader(case))
            closing.callback(loaders[-1].close)
        if len({loader.start["digest"] for loader in loaders}) != 1:
            sys.exit(f"{cases[0].source}: the batches differ: {[loader.start['digest'] for loader in loaders]}")
        rates = [[loader.ask(rate, args.seconds) for loader in loaders] for _ in range(args.rounds)]
        ahead = [loader for loader in loaders if loader.case.workers]
        waiting = {step: {loader: loader.ask(waits, step, args.number) for loader in ahead} for step in args.steps}
        results = []
        for loader, measured in zip(loaders, zip(*rates, strict=True), strict=True):
            case = loader.case
            results.append(
                {"loader": case.loader, "source": case.source, "workers": case.workers}
                | {"rate": [wall for wall, _ in measured], "rate_per_core": [core for _, core in measured]}
                | {"waits": {str(step): waited[loader] for step, waited in waiting.items() if loader in waited}}
                | {"memory": loader.ask(memory), "opened": loader.start["opened"], "ready": loader.start["ready"]}
            )
    return results


def measure_names(path: pathlib.Path, case: Case) -> list[dict[str, Any]]:
    """How a folder of many names starts: with us for the first time, and again; with PyTorch."""
    for index in path.glob(".deco_jax_index*"):
        index.unlink()
    results = []
    for loader, start in ((OURS, "first"), (OURS, "second"), (TORCH, "every")):
        running = Loader(dataclasses.replace(case, loader=loader))
        running.ask(rate, 1)
        results.append({"loader": loader, "start": start, "memory": running.ask(memory), **running.start})
        running.close()
    return results


def tables(results: list[dict[str, Any]], names: list[dict[str, Any]], count: int, steps: list[float]) -> Iterator[str]:
    """For docs/numbers.md; MB are resident / proportional, of the main process and of the largest worker."""
    if results:
        yield "| source | loader | workers | images/s | per core | main, MB | a worker, MB | first batch after |"
        yield "|---|---|---|---|---|---|---|---|"
        for r in results:
            yield (
                f"| {r['source']} | {r['loader']} | {r['workers']} | {_spread(r['rate'])} | "
                f"{_spread(r['rate_per_core'])} | {_memory(r)} | {r['ready']:.1f} s |"
            )
        yield ""
    if waiting := [r for r in results if r["waits"]]:
        yield f"| waits of a loop for its batch | {' | '.join(f'step of {step:g} s' for step in steps)} |"
        yield f"|---{'|---' * len(steps)}|"
        for r in waiting:
            shown = [f"{statistics.median(w) * 1e3:.0f} ms, at most {max(w) * 1e3:.0f}" for w in r["waits"].values()]
            yield f"| {r['source']}, {r['loader']}, {r['workers']} workers | {' | '.join(shown)} |"
        yield ""
    if names:
        yield f"| {count:,} names, start | opened in | first batch after | main, MB | a worker, MB |"
        yield "|---|---|---|---|---|"
        for r in names:
            line = f"| {r['loader']}, {r['start']} | {r['opened']:.1f} s | {r['ready']:.1f} s | {_memory(r)} |"
            yield line


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):,.0f} ({min(values):,.0f}–{max(values):,.0f})"


def _memory(result: dict[str, Any]) -> str:
    (rss, *workers_rss), (pss, *workers_pss) = result["memory"]["rss"], result["memory"]["pss"]
    workers = f"{max(workers_rss):.0f} / {max(workers_pss):.0f}" if workers_rss else "–"
    return f"{rss:.0f} / {pss:.0f} | {workers}"


def main() -> None:
    args = parse()
    if importlib.util.find_spec("torch") is None:
        sys.exit("torch is not installed; it comes with the extra `torch`.")
    about = {"processor": _processor(), "cores": os.cpu_count(), "python": platform.python_version()}
    about |= {package: importlib.metadata.version(package) for package in ("pillow", "torch", "grain", "array_record")}
    with contextlib.ExitStack() as closing:
        root = pathlib.Path(args.data or closing.enter_context(tempfile.TemporaryDirectory())).resolve()
        root.mkdir(parents=True, exist_ok=True)
        # Where indices have copies; those of an earlier start would make the first start of many names a second one.
        os.environ["TMPDIR"] = closing.enter_context(tempfile.TemporaryDirectory())
        results, names = [], []
        if args.sources:
            photos = make_photos(root, args.count, args.images)
            about["photos"] = f"{len(photos):,} of {statistics.mean(p.stat().st_size for p in photos):,.0f} bytes"
            results = measure_sources(root, photos, args)
        if args.names:
            path, order = make_names(root, args.names), shuffled(args.names, args.batch)
            case = Case(OURS, "folder", str(path), args.size, args.batch, args.workers, args.threads, order)
            names = measure_names(path, case)
    print(", ".join(f"{name}: {value}" for name, value in about.items()))
    print(f"batches of {args.batch}, {args.size}², median of {args.rounds} rounds (lowest–highest)\n")
    print("\n".join(tables(results, names, args.names, args.steps)))
    if args.json:
        report = {"about": about, "settings": vars(args), "results": results, "names": names}
        pathlib.Path(args.json).write_text(json.dumps(report, indent=1))


def _processor() -> str:
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder that keeps the data for the next time (default: a temporary one)")
    parser.add_argument("--images", help="folder of photos to use instead of made-up ones")
    parser.add_argument("--count", type=int, default=1000, help="photos")
    parser.add_argument("--sources", nargs="*", choices=input_torch.READERS, default=list(input_torch.READERS))
    parser.add_argument("--size", type=int, default=256, help="pixels along a side, after the crop")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes, beside a run with none")
    parser.add_argument("--threads", type=int, help="of each of our processes, data.threads (default: its own)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3, help="that a loader delivers in a round")
    parser.add_argument("--steps", type=float, nargs="*", default=[0.05, 0.1, 0.2], help="seconds of a training step")
    parser.add_argument("--number", type=int, default=20, help="steps whose waits are measured")
    parser.add_argument("--names", type=int, default=100_000, help="images of the folder whose start is measured")
    parser.add_argument("--json", help="file for all figures")
    return parser.parse_args()


if __name__ == "__main__":
    main()
