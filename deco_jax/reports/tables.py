"""What stands on the page in words and numbers? The runs' cards and configurations, metrics, sweeps and times."""

import datetime
from collections.abc import Sequence
from typing import Any

from deco_jax.config import FIELDS
from deco_jax.reports.runs import Result, Run, goodput_seconds, is_number, sweep_points, swept_fields

# Of the settings that images were made with, those that change them.
SAMPLER = ("weights", "dtype", "solver", "steps", "guidance", "guidance_interval", "shift", "last", "negative", "seed")


def times(run: Run) -> dict[str, Any]:
    """Where a run's time went, and in how many starts."""
    seconds = goodput_seconds(run)
    total = sum(seconds.values())
    starts = max((line["attempt"] for line in run.goodput if is_number(line.get("attempt"))), default=1)
    return {
        "run": run.name,
        "starts": starts,
        "seconds": seconds,
        "total": total,
        "share": seconds.get("step", 0) / (total or 1),
    }


def about(run: Run, color: str) -> dict[str, Any]:
    """A run's card: what people ask first."""
    config, metrics, facts = run.config, run.metrics, {}
    steps = config.get("train.steps")
    ended = bool(run.goodput) and bool(run.goodput[-1].get("ended"))
    facts["Steps"] = f"{run.step:,}" + (f" of {steps:,}" if isinstance(steps, int) else "")
    facts["Steps"] += ", finished" if ended else ", not finished"
    if isinstance(parameters := run.meta.get("parameters"), int):
        facts["Parameters"] = f"{parameters / 1e6:,.2f} M"
    if "model.width" in config:
        facts["Network"] = "{}, width {}, depth {}, patches of {}".format(
            *(config.get(f"model.{name}", "?") for name in ("kind", "width", "depth", "patch_size"))
        )
    if "data.source" in config:
        name = config["data.source"] if config["data.source"] != "tfds" else config.get("data.name", "tfds")
        path = f" {config['data.path']}" if config.get("data.path") else ""
        side, batch = config.get("data.image_size", "?"), config.get("data.batch_size", "?")
        facts["Data"] = f"{name}{path}, {side} × {side} pixels, batches of {batch}"
    logged = [t for t in metrics.get("time", ()) if 0 < t < 1e11]  # seconds; NaN is not among them
    if logged:
        first, last = (datetime.datetime.fromtimestamp(t, datetime.UTC) for t in (logged[0], logged[-1]))
        same_day = first.date() == last.date()
        facts["Trained"] = f"{first:%Y-%m-%d %H:%M} to {last:{'%H:%M' if same_day else '%Y-%m-%d %H:%M'}} UTC"
    results = [*run.evaluated, *run.spectra]
    device = run.meta.get("device") or next((r.content["device"] for r in results if r.content.get("device")), None)
    if device:
        facts["Device"] = device
    if run.meta.get("version"):
        facts["deco_jax"] = run.meta["version"]
    return {"name": run.name, "path": run.path, "color": color, "facts": facts}


def configuration(runs: Sequence[Run]) -> dict[str, Any]:
    """Rows (field, default, meaning, values of the runs), and which of them a reader wants to see first."""
    known = [run for run in runs if run.config]
    rows = []
    for name in dict.fromkeys([*FIELDS, *(name for run in known for name in run.config)]):
        values = [run.config.get(name) for run in known]
        field = FIELDS.get(name)
        default = field.default if field else None
        rows.append({
            "name": name,
            "default": default,
            "meaning": field.meaning if field else "unknown to this version",
            "values": values,
            "changed": [show_value(value) != show_value(default) for value in values],
            "differs": len(set(map(show_value, values))) > 1,
        })  # fmt: skip
    rows = rows if known else []
    changed, differing = [r for r in rows if any(r["changed"])], [r for r in rows if r["differs"]]
    return {"runs": [run.name for run in known], "all": rows, "changed": changed, "differing": differing}


def metrics_table(found: Sequence[tuple[Run, Result]]) -> dict[str, Any]:
    """Rows of `deco evaluate`, a column for each metric that one of them has."""
    contents = [result.content for _, result in found]
    names = dict.fromkeys(name for content in contents for name in _dict(content["metrics"]))
    rows = []
    for run, result in found:
        content = result.content
        reference = _dict(content["reference"])
        rows.append({
            "run": run.name,
            "where": result.where,
            "metrics": _dict(content["metrics"]),
            "images": content.get("images"),
            "settings": _settings(_dict(content.get("settings"))),
            "reference": reference.get("path") or reference.get("source") or "",
            "line": content.get("line") or "",
            "warnings": content["warnings"] if isinstance(content.get("warnings"), list) else [],
        })  # fmt: skip
    return {"names": list(names), "rows": rows}


def sweep_table(run: Run, sweep: Result) -> dict[str, Any]:
    """A row for each point: the settings in which they differ, and all metrics."""
    points = sweep_points(sweep)
    return {
        "run": run.name,
        "where": sweep.where,
        "fields": swept_fields(sweep),
        "names": list(dict.fromkeys(name for _, metrics in points for name in metrics)),
        "points": points,
        "best": sweep.content.get("best"),
        "by": sweep.content.get("by", ""),
    }


def about_spectra(result: Result) -> list[str]:
    """How each network's spectrum was measured, a line each."""
    lines = []
    for name, network in result.content["networks"].items():
        if isinstance(network, dict):
            told = [f"{key.replace('_', ' ')} {network[key]}" for key in ("images", "steps", "seed") if key in network]
            lines.append(f"{name}: {', '.join(told)}")
    return lines


def _settings(settings: dict[str, Any]) -> str:
    """The few that change an image."""
    told = {**settings, **_dict(settings.get("sampling"))}
    return ", ".join(f"{name} {show_value(told[name])}" for name in SAMPLER if told.get(name) is not None)


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def show_value(value: Any) -> str:
    """A setting as people write it; equal ones look equal, whether read from JSON or not."""
    if value is None:
        return "–"
    if isinstance(value, list | tuple):
        return ":".join(map(show_value, value))
    if isinstance(value, float):
        return f"{value:g}"
    return '""' if value == "" else f"{value}"
