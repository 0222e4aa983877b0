"""Which settings of the sampler are best? `deco evaluate --sweep`: an evaluation for each combination of values.

OUT/guidance=2.0,guidance_interval=0.1:1.0/    an evaluation, without the images it drew
OUT/sweep.json, sweep.md, sweep.png            all points that are done, by this command or before, the best marked
OUT/.reference                                 features of the images in an ADM reference, until all points are done
"""

import dataclasses
import io
import itertools
import json
from collections.abc import Sequence
from typing import Any

from deco_jax import storage
from deco_jax.errors import UsageError
from deco_jax.evaluation.extract import remove
from deco_jax.evaluation.measure import Judge, Request, look_into, measure, read_result
from deco_jax.evaluation.results import BEST_BY, metric_name, to_markdown
from deco_jax.jobs import open_job
from deco_jax.parallel import processes
from deco_jax.pretrained.load import open_pretrained
from deco_jax.sampling.settings import Sampling
from deco_jax.storage import AnyPath
from deco_jax.version import __version__

FILES = ("sweep.json", "sweep.md", "sweep.png")
FIELDS = {field.name: field.type for field in dataclasses.fields(Sampling)}


def parse_sweep(texts: Sequence[str]) -> dict[str, list[Any]]:
    """ "guidance=1,2" and "guidance_interval=0:1,0.1:1" → the values of each field of `Sampling`.

    Raises:
      UsageError: a field is not known or given twice, or a value is none of its.
    """
    found: dict[str, list[Any]] = {}
    for text in texts:
        name, _, values = text.partition("=")
        name = name.strip().replace("-", "_")
        if name not in FIELDS:
            raise UsageError(f"--sweep={text}: {name!r} is no setting of the sampler; allowed: {', '.join(FIELDS)}.")
        if name in found:
            raise UsageError(f"--sweep={text}: {name} is given twice; write all its values in one: {name}=A,B.")
        found[name] = [_parse(text, name, value.strip()) for value in values.split(",")]
        for value in found[name]:
            Sampling(**{name: value} | ({"steps": 2} if name == "last" else {}))  # raises if out of range
            if found[name].count(value) > 1:
                raise UsageError(f"--sweep={text} has {_text(value)} twice.")
    return found


def _parse(text: str, name: str, value: str) -> Any:
    kind, default = FIELDS[name], getattr(Sampling(), name)
    try:
        if isinstance(default, tuple):
            low, high = map(float, value.split(":"))
            return low, high
        return type(default)(value) if value else int(value)
    except ValueError:
        what = "LOW:HIGH, as in 0.1:1" if isinstance(default, tuple) else f"{kind.__name__}, as in {default}"
        raise UsageError(f"--sweep={text}: {value!r} is no value of {name}; write {what}.") from None


def _text(value: Any) -> str:
    return ":".join(map(str, value)) if isinstance(value, tuple) else str(value)


def point_name(point: dict[str, Any]) -> str:
    """ "guidance=2.0,guidance_interval=0.1:1.0", the folder of a point."""
    return ",".join(f"{name}={_text(value)}" for name, value in point.items())


def measure_sweep(request: Request, judge: Judge, out: str, fields: dict[str, list[Any]]) -> bool:
    """Evaluates every combination of the fields' values, and what `out` has of the same fields before.

    Those that are done are not done again.

    Args:
      request: what the points have in common; a network.
      judge: see `measure`.
      out: the folder.
      fields: see `parse_sweep`.

    Returns:
      Whether all points are done; otherwise it was told to stop.

    Raises:
      UsageError: `request` is about images that are there, sets a field as well, or a combination is out of range;
        `out` has a sweep of other fields; or as `measure`. Then nothing is drawn.
    """
    with open_job("--out", out) as job:

        def look() -> tuple[list[dict[str, Any]], list[Request], int]:
            require_matplotlib()
            if not request.is_network:
                raise UsageError(f"--sweep needs a network; {request.source} holds images, already drawn.")
            for name in fields:
                if request.sampling.get(name) is not None:
                    raise UsageError(f"--{name.replace('_', '-')} is also in --sweep; give it once.")
            points = [dict(zip(fields, values, strict=True)) for values in itertools.product(*fields.values())]
            before = _points_before(job.folder, list(fields))
            points = before + [point for point in points if point not in before]
            source = str(open_pretrained(request.source))  # the same checkpoint for all of them
            same = dataclasses.replace(request, source=source)
            requests = [dataclasses.replace(same, sampling={**request.sampling, **point}) for point in points]
            for one in requests:
                look_into(one, judge)
            return points, requests, len(before)

        points, requests, known = processes.agree(look)
        processes.assert_equal("the points", json.dumps([point_name(point) for point in points]))
        job.claim()
        cache, done = job.folder / ".reference", points[:known]
        for k, (point, one) in enumerate(zip(points, requests, strict=True)):
            job.check()
            job.say(f"\nPoint {k + 1} of {len(points)}: {point_name(point)}")
            if job.stop or not measure(one, judge, f"{job.folder / point_name(point)}", cache, keep=False):
                job.say(f"\n{len(done)} of {len(points)} points are done. The same command goes on.")
                return False
            if k < known:
                continue
            done.append(point)
            processes.agree(lambda: _write(job.folder, done, len(points)) if job.first else None)
        if job.first:
            remove(cache)
            table = job.folder / "sweep.md"
            job.say(f"\n{storage.retried(f'reading {table}', table.read_text)}")
            job.say(f"{', '.join(FILES)} are in {job.folder}.")
        return True


def _points_before(folder: AnyPath, fields: list[str]) -> list[dict[str, Any]]:
    """Those of a sweep.json that is there."""
    path = folder / "sweep.json"
    with storage.reading(path):
        text = storage.retried(f"reading {path}", lambda: path.read_text() if path.exists() else '{"points": []}')
    try:
        settings = [dict(point["settings"]) for point in json.loads(text)["points"]]
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path} is damaged ({error!r}); remove it and run the same command again.") from error
    for point in settings:
        if list(point) != fields:
            raise UsageError(
                f"{folder} holds a sweep of {', '.join(point)}, not of {', '.join(fields)}; choose another folder."
            )
    return [{name: tuple(v) if isinstance(v, list) else v for name, v in point.items()} for point in settings]


def _write(folder: AnyPath, points: list[dict[str, Any]], total: int) -> None:
    """sweep.json, .md and .png of the points that are done."""
    results = [read_result(folder / point_name(point)) for point in points]
    metrics = [result["metrics"] for result in results]
    by = next(name for name in BEST_BY if name in metrics[0])
    best = min(range(len(points)), key=lambda k: metrics[k][by])
    content = {
        "points": [
            {
                "settings": {name: list(v) if isinstance(v, tuple) else v for name, v in point.items()},
                "metrics": result["metrics"],
                "warnings": result["warnings"],
                "line": result["line"],
                "folder": point_name(point),
            }
            for point, result in zip(points, results, strict=True)
        ],
        "best": best,
        "by": by,
        "total": total,
        "images": results[0]["images"],
        "deco_jax": __version__,
    }
    rows = [({name: _text(v) for name, v in point.items()}, m) for point, m in zip(points, metrics, strict=True)]
    rows[best] = ({name: f"**{value}**" for name, value in rows[best][0].items()}, rows[best][1])
    note = f"\nBest by {metric_name(by)}: **{point_name(points[best])}**. {results[0]['images']:,} images per point.\n"
    storage.write_bytes(folder / "sweep.md", (to_markdown(rows) + note).encode())
    storage.write_bytes(folder / "sweep.png", _to_png(points, metrics, best, by))
    storage.write_json(folder / "sweep.json", content)


def require_matplotlib() -> None:
    """Raises UsageError if the plot cannot be drawn here."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise UsageError("--sweep draws a plot with matplotlib: pip install -e '.[eval]' in the repository.") from error


def _to_png(points: list[dict[str, Any]], metrics: list[dict[str, float]], best: int, by: str) -> bytes:
    """A panel for each metric, over the first field; a line for each combination of the others; the best is a star."""
    from matplotlib.figure import Figure

    along, *others = points[0]
    names = list(metrics[0])
    labels = list(dict.fromkeys(_text(point[along]) for point in points))
    numeric = all(isinstance(point[along], int | float) for point in points)
    places = [point[along] if numeric else labels.index(_text(point[along])) for point in points]
    lines: dict[str, list[int]] = {}
    for k, point in enumerate(points):
        lines.setdefault(", ".join(f"{name} {_text(point[name])}" for name in others), []).append(k)
    columns = min(len(names), 3)
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(4.2 * columns, 3.4 * rows + 0.25 * len(lines)), dpi=150, layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for axes, name in zip(panels, names, strict=False):
        for label, members in lines.items():
            members = sorted(members, key=lambda k: places[k])
            axes.plot([places[k] for k in members], [metrics[k][name] for k in members], "o-", ms=4, label=label)
        axes.plot(places[best], metrics[best][name], "*", ms=14, color="black", label=f"best by {metric_name(by)}")
        axes.set(title=metric_name(name), xlabel=along)
        if not numeric:
            axes.set_xticks(range(len(labels)), labels)
        axes.grid(alpha=0.3, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in list(panels):
        axes.set_visible(False)
    handles, told = figure.axes[0].get_legend_handles_labels()
    shown = [(handle, text) for handle, text in zip(handles, told, strict=True) if text]
    figure.legend(*zip(*shown, strict=True), loc="outside lower center", frameon=False, ncols=min(len(shown), 3))
    png = io.BytesIO()
    figure.savefig(png, format="png")
    return png.getvalue()
