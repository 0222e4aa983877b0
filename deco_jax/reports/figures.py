"""How do the numbers of runs look? Plotly figures: curves over steps, where time went, sweeps, spectra.

A figure has no colours of text or paper, which the page sets for light and dark. Every trace of a run has the run's
place as `meta`, by which the page hides it.
"""

import dataclasses
import html
from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from deco_jax.reports.runs import Result, Run, goodput_seconds, is_number, sweep_points, swept_fields
from deco_jax.reports.tables import show_value

# Okabe and Ito's, which colour-blind readers tell apart, without yellow and black: all are seen on white and on black.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#8C6BB1", "#7F7F7F")
POINTS = 1500  # of a curve on the page
SMOOTHED = 25  # the smoothed curve averages over this part of a curve, weighted by a Hann window

# Columns of metrics.jsonl: title, unit.
LOSSES = (
    ("loss", "Loss, all terms", ""),
    ("loss_flow", "Flow matching", ""),
    ("loss_frequency", "Frequency loss", ""),
    ("loss_alignment", "Alignment with the teacher", ""),
    ("gradient_norm", "Gradient norm", ""),
)
SPEED = (
    ("images_per_second", "Throughput", "images/s"),
    ("step_seconds", "Time of a step", "s"),
    ("data_wait_seconds", "Waiting for data, per step", "s"),
    ("mfu", "Model FLOP utilisation", ""),
)
# Where time goes, as goodput.jsonl calls it: what it is, and its colour.
PHASES = {
    "step": ("training steps", "#009E73"),
    "data wait": ("waiting for data", "#E69F00"),
    "compile": ("compiling", "#56B4E9"),
    "init": ("starting", "#8C6BB1"),
    "eval": ("samples and evaluation", "#CC79A7"),
    "checkpoint": ("checkpoints", "#0072B2"),
    "lost to restarts": ("lost to restarts", "#D55E00"),
}
SPECTRA = {"transformer": "Transformer's output", "velocity": "Velocity"}  # parts in spectra.json


@dataclasses.dataclass(frozen=True)
class Figure:
    """A figure, and what the page has to know of it."""

    title: str
    figure: go.Figure
    losses: bool = False  # the switch to logarithmic axes acts on it


def color(k: int) -> str:
    """Of the k-th run."""
    return COLORS[k % len(COLORS)]


def loss_figures(runs: Sequence[Run]) -> list[Figure]:
    """Losses by term, gradient norm and learning rate over steps."""
    found = [_curves(runs, *about, losses=True) for about in LOSSES]
    found.append(_curves(runs, "learning_rate", "Learning rate", smooth=False))
    return [figure for figure in found if figure is not None]


def speed_figures(runs: Sequence[Run]) -> list[Figure]:
    """Throughput and its like over steps."""
    return [figure for about in SPEED if (figure := _curves(runs, *about)) is not None]


def evaluation_figures(runs: Sequence[Run]) -> list[Figure]:
    """Each metric of the evaluations while training, over steps."""
    names = dict.fromkeys(name for run in runs for line in run.evaluations for name in line["metrics"])
    figures = []
    for name in names:
        figure = _figure()
        for k, run in enumerate(runs):
            by_step = {line["step"]: line["metrics"].get(name) for line in run.evaluations}
            points = [(step, value) for step, value in sorted(by_step.items()) if is_number(value)]
            if points:
                steps, values = zip(*points, strict=True)
                figure.add_trace(_line(k, run, steps, values, mode="lines+markers"))
        if figure.data:
            figures.append(Figure(name, figure))
    return figures


def goodput_figure(runs: Sequence[Run]) -> Figure | None:
    """Which share of each run's time went where; a bar for each run. The page's table of times is its legend."""
    figure, known = _figure(), [run for run in runs if goodput_seconds(run)]
    phases = dict.fromkeys([*PHASES, *(phase for run in known for phase in goodput_seconds(run))])
    names = [html.escape(run.name) for run in known]
    for phase in phases:
        seconds = [goodput_seconds(run).get(phase, 0.0) for run in known]
        if not any(seconds):
            continue
        totals = [sum(goodput_seconds(run).values()) for run in known]
        shares = [100 * s / total if total else 0.0 for s, total in zip(seconds, totals, strict=True)]
        title, paint = PHASES.get(phase, (phase, "#7F7F7F"))
        bar = go.Bar(y=names, x=shares, name=html.escape(title), orientation="h", marker={"color": paint})
        bar.update(customdata=seconds, hovertemplate="%{fullData.name}: %{customdata:.1f} s, %{x:.1f} %<extra></extra>")
        figure.add_trace(bar)
    figure.update_layout(barmode="stack", height=75 + 36 * len(known), hovermode="closest")
    figure.update_xaxes(title="% of the time", range=[0, 100])
    figure.update_yaxes(autorange="reversed", type="category", showticklabels=False)
    for name in names if len(known) > 1 else []:  # within the bars: names may be long and pages narrow
        figure.add_annotation(x=0.5, y=name, text=name, showarrow=False, xanchor="left", font={"color": "#fff"})
    return Figure("Where the time went", figure) if figure.data else None


def sweep_figure(sweep: Result) -> Figure | None:
    """The metric by which the best is chosen, over the field that takes most values; a line for each of the others'."""
    points, by = sweep_points(sweep), str(sweep.content.get("by", ""))
    drawn = [k for k, (_, metrics) in enumerate(points) if is_number(metrics.get(by))]
    if not drawn:
        return None
    fields = swept_fields(sweep)
    fields.sort(key=lambda field: -len({str(points[k][0].get(field)) for k in drawn}))
    along, others = (fields[0], fields[1:]) if fields else ("", [])
    numeric = all(is_number(points[k][0].get(along)) for k in drawn)
    lines: dict[str, list[tuple[Any, float, int]]] = {}
    for k in drawn:
        settings, metrics = points[k]
        name = ", ".join(f"{field} {show_value(settings.get(field))}" for field in others)
        at = settings.get(along)
        lines.setdefault(name, []).append((at if numeric else show_value(at), metrics[by], k))
    figure = _figure()
    for k, (name, line) in enumerate(lines.items()):
        xs, ys, _ = zip(*(sorted(line) if numeric else line), strict=True)
        figure.add_trace(go.Scatter(x=xs, y=ys, name=html.escape(name), mode="lines+markers", line={"color": color(k)}))
    best = sweep.content.get("best")
    for line in lines.values():
        for x, y, k in line:
            if k == best:
                star = {"symbol": "star", "size": 17, "color": "#E69F00", "line": {"width": 1, "color": "#5a4200"}}
                figure.add_trace(go.Scatter(x=[x], y=[y], name=f"best, {y:.4g}", mode="markers", marker=star))
    figure.update_xaxes(title=html.escape(along), type=None if numeric else "category")
    figure.update_layout(showlegend=True, height=360, hovermode="closest")
    return Figure(f"{by} over {along}" if along else by, figure)


def spectra_figures(spectra: Result) -> list[Figure]:
    """Normalised log energy over the 64 coefficients in zig-zag order; one figure for tokens, one for velocities."""
    figures = []
    for part, title in SPECTRA.items():
        figure = _figure()
        for k, (name, network) in enumerate(spectra.content["networks"].items()):
            curve = network.get(part, {}) if isinstance(network, dict) else {}
            values = curve.get("normalised_log", []) if isinstance(curve, dict) else []
            if values and all(map(is_number, values)):
                label = f"{values[-1]:.3f} at the last bin: {html.escape(name)}"
                figure.add_trace(go.Scatter(y=values, name=label, mode="lines", line={"color": color(k), "width": 2}))
        if figure.data:
            figure.update_layout(showlegend=True, height=380)
            figure.update_xaxes(title="DCT coefficient in zig-zag order", range=[0, 63])
            figure.update_yaxes(range=[0, 1.05])
            figures.append(Figure(f"{title}, log(1 + energy), divided by its largest", figure))
    return figures


def _curves(
    runs: Sequence[Run], column: str, title: str, unit: str = "", losses: bool = False, smooth: bool = True
) -> Figure | None:
    figure = _figure()
    for k, run in enumerate(runs):
        steps, values = run.metrics["step"], run.metrics.get(column, np.array([]))
        seen = np.isfinite(values)
        if not seen.any():
            continue
        smoothed = smooth and seen.sum() >= 10
        raw = _extremes(values)
        if smoothed:
            trace = _line(k, run, steps[raw], values[raw], width=1)
            figure.add_trace(trace.update(opacity=0.3, hoverinfo="skip"))
            values, raw = _smooth(values), _evenly(len(values))
        lone = "lines+markers" if seen.sum() < 10 else "lines"
        figure.add_trace(_line(k, run, steps[raw], values[raw], mode=lone))
    return Figure(f"{title}, {unit}" if unit else title, figure, losses) if figure.data else None


def _figure() -> go.Figure:
    figure = go.Figure(layout={"template": None, "height": 270, "showlegend": False, "hovermode": "x"})
    figure.update_xaxes(title="step")
    figure.update_yaxes(exponentformat="power")
    return figure


def _line(k: int, run: Run, x: Any, y: Any, mode: str = "lines", width: float = 2) -> go.Scatter:
    line = {"color": color(k), "width": width}
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float32)
    return go.Scatter(x=x, y=y, mode=mode, line=line, name=html.escape(run.name), meta=k)


def _smooth(values_N: np.ndarray) -> np.ndarray:
    """Each value's mean with its neighbours, weighted by a Hann window; NaN stays, and counts for nothing."""
    half = max(1, len(values_N) // SMOOTHED // 2)
    window = np.hanning(2 * half + 3)[1:-1]
    seen = np.isfinite(values_N)
    total = np.convolve(np.where(seen, values_N, 0.0), window)[half:-half]
    weight = np.convolve(seen.astype(float), window)[half:-half]
    return np.where(seen, total / np.where(seen, weight, 1.0), np.nan)


def _evenly(count: int) -> np.ndarray:
    """Which of `count` points are drawn: at most POINTS."""
    return np.unique(np.linspace(0, count - 1, min(count, POINTS)).round().astype(int))


def _extremes(values_N: np.ndarray) -> np.ndarray:
    """Which points are drawn so that no peak is lost: of each stretch the least and the greatest."""
    if len(values_N) <= POINTS:
        return np.arange(len(values_N))
    chosen = {0, len(values_N) - 1}
    for stretch in np.array_split(np.arange(len(values_N)), POINTS // 2):
        seen = stretch[np.isfinite(values_N[stretch])]
        if len(seen):
            chosen |= {int(seen[values_N[seen].argmin()]), int(seen[values_N[seen].argmax()])}
        if len(seen) < len(stretch):  # the gap is drawn
            chosen.add(int(stretch[~np.isfinite(values_N[stretch])][0]))
    return np.array(sorted(chosen))
