"""How is an evaluation reported? metrics.json, a row of Markdown, and a line that says all that others must compare."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from deco_jax.evaluation.images import size_text

METRICS_JSON, METRICS_MD = "metrics.json", "metrics.md"
NAMES = {  # of metrics, as papers write them
    "fid": "FID",
    "sfid": "sFID",
    "inception_score": "IS",
    "precision": "precision",
    "recall": "recall",
    "kid": "KID",
}
BEST_BY = ("fid", "fd_dinov2", "fd_efficientnet")  # the first one that there is; less is better


def metric_name(metric: str) -> str:
    """ "precision_dinov2" → "precision (dinov2)"; distances that are no FID are called FD."""
    start, _, network = metric.rpartition("_")
    if metric in NAMES or not start:
        return NAMES.get(metric, metric)
    return f"{'FD' if start == 'fd' else NAMES.get(start, start)} ({network})"


def metric_text(metric: str, value: float) -> str:
    """With as many digits as are worth comparing."""
    return f"{value:.5f}" if metric.startswith("kid") else f"{value:.4f}"


def to_markdown(rows: Sequence[tuple[Mapping[str, str], Mapping[str, float]]]) -> str:
    """A table with a row for each (what it is of, metrics); where a row lacks a column, it is empty."""
    left = list(dict.fromkeys(name for what, _ in rows for name in what))
    right = list(dict.fromkeys(name for _, metrics in rows for name in metrics))
    lines = [[*left, *map(metric_name, right)], [*(":--" for _ in left), *("--:" for _ in right)]]
    for what, metrics in rows:
        values = [metric_text(name, metrics[name]) if name in metrics else "" for name in right]
        lines.append([*(what.get(name, "").replace("|", "\\|") for name in left), *values])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def row_of(result: Mapping[str, Any]) -> str:
    """metrics.md of what metrics.json holds: a header and one row."""
    settings, what = result["settings"] or {}, {"images": f"{result['images']:,} of {size_text(result['image_size'])}"}
    what = {"of": settings.get("source", result["source"])} | what
    if "solver" in settings:
        what |= {"sampler": f"{settings['solver']} {settings['steps']}", "guidance": guidance_text(settings)}
    return to_markdown([(what, result["metrics"])])


def guidance_text(settings: Mapping[str, Any]) -> str:
    """ "3.2 on (0.1, 1]", of generation.json."""
    guidance, (low, high) = settings["guidance"], settings["guidance_interval"]
    return f"{guidance:g} on ({low:g}, {high:g}]" if guidance != 1 else "none"


def line_of(result: Mapping[str, Any]) -> str:
    """Metrics and everything that they depend on, in one line, for others to compare theirs with."""
    metrics = ", ".join(f"{metric_name(name)} {metric_text(name, value)}" for name, value in result["metrics"].items())
    parts = [metrics, f"{result['images']:,} images of {size_text(result['image_size'])}, hash {result['images_hash']}"]
    settings = result["settings"]
    if settings is None:
        parts.append(f"images {result['source']}, drawn by others")
    else:
        weights = f"{settings.get('weights', '')} weights {settings.get('weights_digest', 'without a hash')}"
        parts.append(f"{settings.get('source')}, {weights}, {settings.get('dtype')}")
        if "solver" in settings:
            sampler = f"{settings['solver']} {settings['steps']} steps, guidance {guidance_text(settings)}"
            if settings.get("negative") is not None:
                sampler += f" away from {settings['negative']}"
            parts.append(f"{sampler}, shift {settings['shift']:g}, last {settings['last']:g}")
        parts.append(f"seed {settings.get('seed')}, labels {_short(settings.get('labels'))}")
    parts.append(" and ".join(f"{name} {digest}" for name, digest in result["features"].items()))
    reference = result["reference"]
    parts.append(f"reference {reference['path'].rpartition('/')[2]} {reference['hash']}")
    return " | ".join([*parts, f"deco_jax {result['deco_jax']}, jax {result['jax']}, {result['device']}"])


def _short(labels: Any) -> str:
    text = labels if isinstance(labels, str) else json.dumps(labels)
    return text if len(text) <= 60 else f"{text[:57]}…"
