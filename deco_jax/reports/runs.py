"""What does a workdir tell about its run? Whatever is there, on a disk or in a bucket; what is not is left out.

A run may just be writing: lines that are cut off are skipped, and said if they are not the last.
"""

import dataclasses
import itertools
import json
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from deco_jax.checkpoints import store
from deco_jax.config import CONFIG_VERSION, flatten, restore_config
from deco_jax.errors import UsageError
from deco_jax.storage import AnyPath, is_remote, reading, resolved, retried

OF_A_RUN = {"metrics.jsonl", "goodput.jsonl", store.FOLDER}  # a workdir has one of these, or a config.json of ours
# Folders that a run fills itself; results of other commands are looked for in all others below the workdir.
NOT_RESULTS = {store.FOLDER, "compilation_cache", "tensorboard", "samples", "profile", "features"}
DEPTH = 4  # folders below a workdir in which results are looked for


@dataclasses.dataclass(frozen=True)
class Result:
    """What another command found out about a run."""

    where: str  # its file, from the workdir on
    content: dict[str, Any]


@dataclasses.dataclass
class Run:
    """What is known of one run."""

    name: str  # on the page; no other run there has it
    path: str
    config: dict[str, Any]  # {"model.width": …}; {} if unknown
    meta: dict[str, Any]  # of its newest checkpoint; {} if there is none
    metrics: dict[str, np.ndarray]  # columns of metrics.jsonl, float64 (N,), NaN where nothing finite was logged
    goodput: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]  # of evaluation.jsonl
    grids: list[tuple[int, AnyPath]]  # (step, picture), by step
    evaluated: list[Result]  # metrics.json of `deco evaluate`
    sweeps: list[Result]
    spectra: list[Result]
    notes: list[str]  # what the reader should know

    @property
    def step(self) -> int:
        """The last step that is known of."""
        steps = [int(line["step"]) for line in [*self.goodput, *self.evaluations]]
        steps += [step for step, _ in self.grids] + self.metrics["step"][-1:].astype(int).tolist()
        return max(steps, default=0)


def read_run(workdir: AnyPath, name: str) -> Run:
    """Everything of a run that a page can show.

    Raises:
      TransientError: the storage fails.
      UsageError: `workdir` is none, or may not be read.
    """
    with reading(workdir):
        files = _list(workdir)
        notes: list[str] = []
        saved = _read_json(files["config.json"], notes) if "config.json" in files else None
        if not OF_A_RUN & files.keys() and "train.steps" not in flatten(saved or {}):
            what = "is no workdir of `deco train`" if files else "is empty or does not exist"
            raise UsageError(f"{workdir} {what}; expected a folder with config.json, metrics.jsonl or checkpoints.")
        meta = store.newest_meta(workdir)
        lines = {}
        for kind in ("metrics", "goodput", "evaluation"):
            file = files.get(f"{kind}.jsonl")
            lines[kind] = [] if file is None else _read_lines(file, notes)
        results = [Result(where, content) for where, content in _find_results(workdir, files, notes)]
        run = Run(
            name=name,
            path=os.fspath(workdir),
            config=_configuration(saved, meta, notes),
            meta=meta,
            metrics=_columns(lines["metrics"]),
            goodput=[line for line in lines["goodput"] if isinstance(line.get("seconds"), dict)],
            evaluations=_last_of_each_step(lines["evaluation"]),
            grids=_grids(files),
            evaluated=_without_points([r for r in results if {"metrics", "reference"} <= r.content.keys()], results),
            sweeps=[r for r in results if isinstance(r.content.get("points"), list)],
            spectra=[r for r in results if isinstance(r.content.get("networks"), dict)],
            notes=notes,
        )
    if not len(run.metrics["step"]):
        notes.append("Nothing has been logged yet: there are no curves.")
    if not run.grids:
        notes.append("There are no sample grids.")
    return run


def names_of(workdirs: Sequence[AnyPath]) -> list[str]:
    """What to call runs: the last folders of their paths, as many as make them differ.

    Raises:
      UsageError: one is named twice.
    """
    parts = [[p for p in os.fspath(workdir).split("/") if p] for workdir in map(resolved, workdirs)]
    for k, one in enumerate(parts):
        if one in parts[:k]:
            raise UsageError(f"{workdirs[k]} is named twice; name each workdir once.")
    tries = (["/".join(one[-length:]) for one in parts] for length in itertools.count(1))
    return next(names for names in tries if len(set(names)) == len(names))


def goodput_seconds(run: Run) -> dict[str, float]:
    """Seconds by phase over all starts, as the last line of goodput.jsonl has them."""
    found = run.goodput[-1]["seconds"] if run.goodput else {}
    return {phase: float(s) for phase, s in found.items() if is_number(s) and s >= 0}


def sweep_points(sweep: Result) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """(settings, metrics) of each point; what is missing is empty."""

    def part(point: Any, key: str) -> dict[str, Any]:
        found = point.get(key) if isinstance(point, dict) else None
        return found if isinstance(found, dict) else {}

    return [(part(point, "settings"), part(point, "metrics")) for point in sweep.content["points"]]


def swept_fields(sweep: Result) -> list[str]:
    """The settings in which points differ."""
    settings = [settings for settings, _ in sweep_points(sweep)]
    names = dict.fromkeys(name for one in settings for name in one)
    return [name for name in names if len({str(one.get(name)) for one in settings}) > 1]


def is_number(value: Any) -> bool:
    """A finite number, as JSON has it."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e38


def _list(folder: AnyPath) -> dict[str, AnyPath]:
    def find() -> dict[str, AnyPath]:
        return {path.name: path for path in sorted(folder.iterdir())} if folder.is_dir() else {}

    return retried(f"reading {folder}", find)


def _read(file: AnyPath) -> str:
    return retried(f"reading {file}", file.read_bytes).decode("utf-8", errors="replace")


def _read_json(file: AnyPath, notes: list[str]) -> dict[str, Any] | None:
    try:
        content = json.loads(_read(file))
    except ValueError:
        content = None
    if not isinstance(content, dict):
        notes.append(f"{file.name} cannot be read and is left out: {file}.")
        return None
    return content


def _read_lines(file: AnyPath, notes: list[str]) -> list[dict[str, Any]]:
    """The lines with a step."""
    texts = [text for text in _read(file).split("\n") if text.strip()]
    lines, unreadable = [], []
    for k, text in enumerate(texts):
        try:
            line = json.loads(text)
            lines.append(line | {"step": int(line["step"])})
        except (ValueError, TypeError, KeyError, OverflowError):
            unreadable.append(k)
    damaged = sum(k < len(texts) - 1 for k in unreadable)
    if damaged:
        notes.append(f"{damaged} of {len(texts)} lines of {file.name} cannot be read and are left out.")
    return lines


def _columns(lines: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    """One array per name. What is no finite number is NaN: a run that
    diverges logs null. Where one that resumed did steps again, what it logged last counts."""
    by_step = {line["step"]: line for line in lines}
    ordered = [by_step[step] for step in sorted(by_step)]
    names = {"step": None, **{name: None for line in ordered for name in line}}
    return {name: np.array([line[name] if is_number(line.get(name)) else np.nan for line in ordered]) for name in names}


def _last_of_each_step(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Evaluations in the order of their steps; a resumed run may have repeated one."""
    found = {line["step"]: line for line in lines if isinstance(line.get("metrics"), dict)}
    return [found[step] for step in sorted(found)]


def _configuration(saved: dict[str, Any] | None, meta: dict[str, Any], notes: list[str]) -> dict[str, Any]:
    """As this version understands it; as it was written if it does not."""
    values = saved or meta.get("config")
    if not isinstance(values, dict):
        notes.append("Its configuration is not known: there is no config.json and no checkpoint.")
        return {}
    version = meta.get("config_version", 1) if meta else CONFIG_VERSION
    try:
        return flatten(restore_config({"config": values, "config_version": version}))
    except UsageError as error:
        notes.append(f"The configuration is shown as it was written: {error}")
        return flatten(values)


def _grids(files: dict[str, AnyPath]) -> list[tuple[int, AnyPath]]:
    found = _list(files["samples"]) if "samples" in files else {}
    steps = {name: re.fullmatch(r"step_(\d+)\.png", name) for name in found}
    return sorted((int(match[1]), found[name]) for name, match in steps.items() if match)


def _find_results(
    folder: AnyPath, files: dict[str, AnyPath], notes: list[str], inside: str = "", depth: int = DEPTH
) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, path in files.items():
        if name in ("metrics.json", "sweep.json", "spectra.json"):
            if (content := _read_json(path, notes)) is not None:
                yield inside + name, content
        elif depth and name not in NOT_RESULTS and not name.startswith(".") and _may_be_folder(path):
            yield from _find_results(path, _list(path), notes, f"{inside}{name}/", depth - 1)


def _may_be_folder(path: AnyPath) -> bool:
    """Without asking a bucket about every file."""
    if is_remote(path):
        return not re.search(r"\.(jsonl?|png|npz|csv|md|html|txt|gif)$", path.name)
    return path.is_dir() and not path.is_symlink()


def _without_points(evaluated: list[Result], results: list[Result]) -> list[Result]:
    """Those that are no points of a sweep, which are shown with it."""
    listed = set()
    for r in results:
        points = r.content.get("points")
        for point in points if isinstance(points, list) else []:
            if isinstance(point, dict):
                listed.add(f"{r.where.removesuffix('sweep.json')}{point.get('folder')}/metrics.json")
    return [r for r in evaluated if r.where not in listed]
