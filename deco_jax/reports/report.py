"""How did runs go? `deco report` writes one page about them, to be looked at without a network."""

import datetime
import json
from collections.abc import Sequence
from typing import Any

from deco_jax.errors import UsageError
from deco_jax.reports.runs import Result, Run, names_of, read_run
from deco_jax.reports.tables import about, about_spectra, configuration, metrics_table, show_value, sweep_table, times
from deco_jax.storage import AnyPath, reading, retried, to_path, write_bytes
from deco_jax.version import __version__

MARK = b'<meta name="generator" content="deco report">'  # of files that may be replaced; page.html begins with it
NAME = "report.html"


def write_report(workdirs: list[str], out: str | None = None) -> AnyPath:
    """Writes one self-contained HTML file about the runs, prints where it is, and returns its path.

    Args:
      workdirs: of `deco train`, on a disk or in a bucket; a run may still be training.
      out: the file; None = report.html in the first workdir. A former report there is replaced, nothing else.

    Raises:
      TransientError: the storage fails.
      UsageError: a workdir is none; there is another file at `out`, or it cannot be written; a library is missing.
    """
    _require_libraries()
    folders = [to_path(workdir) for workdir in workdirs]
    target = folders[0] / NAME if out is None else to_path(out)
    _check_replaceable(target)
    runs = [read_run(folder, name) for folder, name in zip(folders, names_of(folders), strict=True)]
    page = _render(runs).encode()
    write_bytes(target, page)
    print(f"Report: {target} ({len(page) / 1e6:.1f} MB)")
    return target


def _require_libraries() -> None:
    try:
        import jinja2  # noqa: F401
        import plotly  # noqa: F401
    except ImportError as error:
        raise UsageError(f"A report needs {error.name}: pip install -e '.[eval]' in the repository.") from error


def _check_replaceable(target: AnyPath) -> None:
    """Raises UsageError unless there is nothing at `target`, or a page that this command made."""

    def begins() -> bytes:
        with target.open("rb") as file:
            return file.read(1000)

    with reading(target):
        if target.is_dir():
            raise UsageError(f"--out={target} is a folder; name a file, {target / NAME}.")
        if retried(f"reading {target}", target.exists) and MARK not in retried(f"reading {target}", begins):
            raise UsageError(f"--out={target} is there and no report of this command; remove it or name another file.")


def _render(runs: Sequence[Run]) -> str:
    import jinja2
    from plotly.offline import get_plotlyjs

    from deco_jax.reports import figures
    from deco_jax.reports.figures import Figure
    from deco_jax.reports.samples import read_grids

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("deco_jax", "reports"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"value": show_value, "metric": _metric, "number": _number, "duration": _duration}
    drawn: list[dict[str, Any]] = []  # what the page draws, in one list

    def place(found: Sequence[Figure | None]) -> list[dict[str, str]]:
        """Takes figures into the page, and returns what the template needs for their places."""
        places = []
        for figure in filter(None, found):
            content = json.loads(figure.figure.to_json())
            places.append({"id": f"figure-{len(drawn)}", "title": figure.title})
            drawn.append({"id": places[-1]["id"], "losses": figure.losses} | content)
        return places

    grids = [{"run": run, "grids": found} for run in runs if (found := read_grids(run))]
    values = {
        "runs": [about(run, figures.color(k)) for k, run in enumerate(runs)],
        "notes": [(run.name, note) for run in runs for note in run.notes],
        "configuration": configuration(runs),
        "losses": place(figures.loss_figures(runs)),
        "grids": grids,
        "steps": sorted({grid.step for one in grids for grid in one["grids"]}),
        "evaluation": place(figures.evaluation_figures(runs)),
        "evaluated": metrics_table(_each(runs, "evaluated")),
        "sweeps": [
            sweep_table(run, sweep) | {"figures": place([figures.sweep_figure(sweep)])}
            for run, sweep in _each(runs, "sweeps")
        ],
        "spectra": [
            {"run": run.name, "where": one.where, "about": about_spectra(one)}
            | {"figures": place(figures.spectra_figures(one))}
            for run, one in _each(runs, "spectra")
        ],
        "speed": place(figures.speed_figures(runs)),
        "goodput": place([figures.goodput_figure(runs)]),
        "times": [times(run) for run in runs if run.goodput],
        "phases": figures.PHASES,
    }
    return environment.get_template("page.html").render(
        **values,
        figures=drawn,
        plotly=get_plotlyjs().replace("</", "<\\/") if drawn else "",
        version=__version__,
        date=f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC",
    )


def _each(runs: Sequence[Run], kind: str) -> list[tuple[Run, Result]]:
    return [(run, result) for run in runs for result in getattr(run, kind)]


def _metric(name: str) -> str:
    """A metric's name, with an arrow to where it is better."""
    if name.startswith(("fid", "sfid", "kid", "fd_")):
        return f"{name} ↓"
    return f"{name} ↑" if name.startswith(("inception_score", "precision", "recall")) else name


def _number(value: Any) -> str:
    return f"{value:,.4g}" if isinstance(value, float) else "" if value is None else f"{value}"


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"
