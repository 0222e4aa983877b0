"""Do the curves show what was logged?"""

import numpy as np
import pytest
import scipy.ndimage

from deco_jax.reports import figures
from deco_jax.reports.runs import Result, read_run
from tests.reports.workdirs import add_results, make_workdir, write_lines


def test_smoothing_is_the_mean_under_a_hann_window():
    values = np.random.default_rng(0).normal(size=500)
    window = np.hanning(23)[1:-1]  # 500 // 25 // 2 = 10 neighbours on either side
    seen = scipy.ndimage.convolve1d(np.ones(500), window, mode="constant")
    expected = scipy.ndimage.convolve1d(values, window, mode="constant") / seen
    np.testing.assert_allclose(figures._smooth(values), expected, rtol=1e-12, atol=1e-12)


def test_smoothing_takes_nothing_from_gaps_and_leaves_them():
    values = np.full(100, 3.0)
    values[[5, 50, 51]] = np.nan
    np.testing.assert_allclose(figures._smooth(values), values)


@pytest.mark.parametrize("count", [1, 10, 1500, 1501, 100_000])
def test_thinning_keeps_ends_peaks_and_gaps(count):
    values = np.random.default_rng(0).normal(size=count)
    peak, gap = count // 3, count // 2
    values[peak] = 50.0
    if count > 10:
        values[gap : gap + 2 * count // figures.POINTS + 1] = np.nan
    chosen = figures._extremes(values)
    assert len(chosen) <= 1.01 * figures.POINTS + 2 and (np.diff(chosen) > 0).all()
    assert chosen[0] == 0 and chosen[-1] == count - 1 and peak in chosen
    assert np.isnan(values[chosen]).any() == np.isnan(values).any(), "a gap must not be drawn over"


def test_every_run_has_its_colour_in_every_figure(tmp_path):
    runs = [read_run(make_workdir(tmp_path / name), name) for name in ("a", "b")]
    for figure in figures.loss_figures(runs) + figures.speed_figures(runs):
        assert {(trace.meta, trace.line.color) for trace in figure.figure.data} == {
            (k, figures.color(k)) for k in range(2)
        }, figure.title
    assert [figure.title for figure in figures.loss_figures(runs)] == [
        "Loss, all terms", "Flow matching", "Frequency loss", "Gradient norm", "Learning rate",
    ]  # fmt: skip


def test_a_run_that_resumed_draws_its_times_and_metrics_by_step(tmp_path):
    workdir = add_results(make_workdir(tmp_path / "run"))
    again = [{"step": s, "metrics": {"fd_efficientnet": v}} for s, v in ((50, 9.0), (100, 8.0), (50, 7.0))]
    write_lines(workdir / "evaluation.jsonl", again)
    run = read_run(workdir, "run")
    (line,) = figures.evaluation_figures([run])[0].figure.data
    assert list(line.x) == [50, 100] and list(line.y) == [7.0, 8.0]
    bars = {bar.name: bar.x[0] for bar in figures.goodput_figure([run]).figure.data}
    assert bars == {"training steps": 60.0, "compiling": 20.0, "starting": 10.0, "lost to restarts": 10.0}


def test_a_sweep_is_a_line_for_each_value_of_the_shorter_field_and_a_star():
    points = [
        {"settings": {"interval": [low, 1.0], "guidance": g, "steps": 50}, "metrics": {"fid": g + low}}
        for low in (0.0, 0.1)
        for g in (3.0, 1.0, 2.0)
    ]
    figure = figures.sweep_figure(Result("sweep.json", {"points": points, "best": 1, "by": "fid"})).figure
    first, second, star = figure.data
    assert (first.name, first.x, first.y) == ("interval 0:1", (1.0, 2.0, 3.0), (1.0, 2.0, 3.0))
    assert second.name == "interval 0.1:1" and second.y == (1.1, 2.1, 3.1)
    assert star.marker.symbol == "star" and (star.x, star.y) == ((1.0,), (1.0,))
    assert figure.layout.xaxis.title.text == "guidance"
    by_word = [{"settings": {"solver": s}, "metrics": {"fid": 2.0}} for s in ("heun", "euler")]
    figure = figures.sweep_figure(Result("sweep.json", {"points": by_word, "best": 0, "by": "fid"})).figure
    assert figure.layout.xaxis.type == "category" and figure.data[0].x == ("heun", "euler")
