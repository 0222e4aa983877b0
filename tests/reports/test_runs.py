"""Is what a workdir holds read as it is, also if it is unfinished, damaged, old, or in a bucket?"""

import json
import tarfile

import numpy as np
import pytest

from deco_jax.errors import UsageError
from deco_jax.reports.report import write_report
from deco_jax.reports.runs import names_of, read_run
from deco_jax.storage import to_path
from tests.helpers import RECORDED
from tests.reports.workdirs import add_results, evaluated, make_workdir, write_lines, write_result


def test_everything_is_found(tmp_path):
    run = read_run(add_results(make_workdir(tmp_path / "run", optimizer__lr=0.5)), "run")
    assert run.step == 100 and run.config["optimizer.lr"] == 0.5
    np.testing.assert_array_equal(run.metrics["step"], np.arange(5, 101, 5))
    np.testing.assert_allclose(run.metrics["loss"], 3 - np.arange(5, 101, 5) / 100)
    assert [step for step, _ in run.grids] == [20, 60, 100]
    assert [result.where for result in run.evaluated] == ["evaluation/metrics.json"], "points of a sweep belong to it"
    assert [result.where for result in run.sweeps] == ["sweep/sweep.json"]
    assert [result.where for result in run.spectra] == ["spectra/spectra.json"]
    assert not run.notes


def test_steps_that_a_resumed_run_did_again_count_once_as_logged_last(tmp_path):
    workdir = make_workdir(tmp_path / "run")
    lines = [(5, 1.0), (10, 2.0), (15, 3.0), (10, 20.0), (15, 30.0), (20, 40.0)]
    write_lines(workdir / "metrics.jsonl", [{"step": step, "loss": loss} for step, loss in lines])
    metrics = read_run(workdir, "run").metrics
    assert metrics["step"].tolist() == [5, 10, 15, 20] and metrics["loss"].tolist() == [1.0, 20.0, 30.0, 40.0]


def test_what_is_cut_off_or_not_finite_is_a_gap(tmp_path):
    workdir = make_workdir(tmp_path / "run", grids=())
    (workdir / "metrics.jsonl").write_text(
        '{"step": 1, "loss": null}\n{"step": 2, "loss": NaN, "new": 5}\n\x00\x00garbage\n[]\n{"step": 4, "loss": 1.5}\n'
        '{"step": 5, "loss": "x"}\n{"step": 6, "lo'
    )
    run = read_run(workdir, "run")
    assert run.metrics["step"].tolist() == [1, 2, 4, 5]
    np.testing.assert_array_equal(run.metrics["loss"], [np.nan, np.nan, 1.5, np.nan])
    np.testing.assert_array_equal(run.metrics["new"], [np.nan, 5, np.nan, np.nan])
    assert run.notes == [
        "2 of 7 lines of metrics.jsonl cannot be read and are left out.",
        "There are no sample grids.",
    ], "the last line is just being written, which is no damage"


@pytest.mark.parametrize("kept", [["config.json"], ["metrics.jsonl"], ["goodput.jsonl"]])
def test_a_run_that_has_just_begun_is_one(tmp_path, kept):
    workdir = make_workdir(tmp_path / "run", grids=())
    for file in workdir.iterdir():
        if file.is_file() and file.name not in kept:
            file.unlink()
    run = read_run(workdir, "run")
    assert run.notes and run.meta == {}
    write_report([str(workdir)])


@pytest.mark.parametrize("folder", ["plain", "aligned", "clipped"])
def test_runs_of_the_version_before_the_redesign_are_shown(tmp_path, folder):
    with tarfile.open(RECORDED / "written.tar.xz") as archive:
        archive.extractall(tmp_path, [m for m in archive if m.name.startswith(f"{folder}/")], filter="data")
    run = read_run(tmp_path / folder, folder)
    assert run.config["data.orient"] is False, "its configuration is not that of today's defaults"
    assert run.meta["parameters"] > 0 and len(run.metrics["step"])
    assert write_report([str(tmp_path / folder)]) == tmp_path / folder / "report.html"


def test_a_configuration_of_another_version_is_shown_as_it_is(tmp_path):
    workdir = make_workdir(tmp_path / "run")
    write_result(workdir / "config.json", {"train": {"steps": 7}, "model": {"warp": 9}})
    run = read_run(workdir, "run")
    assert run.config == {"train.steps": 7, "model.warp": 9}
    assert any("model.warp" in note for note in run.notes)


def test_results_with_missing_or_strange_parts_are_shown_as_far_as_they_go(tmp_path):
    workdir = make_workdir(tmp_path / "run")
    write_result(workdir / "a/metrics.json", {"metrics": None, "reference": None})
    write_result(workdir / "b/metrics.json", {"metrics": {"fid": None, "kid": "?"}, "reference": "x", "warnings": 3})
    write_result(workdir / "c/metrics.json", {"other": 1})
    write_result(workdir / "d/sweep.json", {"points": [None, {}, {"settings": {"guidance": 1}, "metrics": {"fid": 3}}]})
    write_result(workdir / "e/sweep.json", {"points": [{"settings": 1, "metrics": {"fid": 3}}], "best": 9, "by": "fid"})
    write_result(workdir / "f/spectra.json", {"networks": {"a": None, "b": {"velocity": {"normalised_log": [None]}}}})
    (workdir / "g").mkdir()
    (workdir / "g/metrics.json").write_text('{"metr')
    write_lines(workdir / "evaluation.jsonl", [{"step": 1}, {"step": 2, "metrics": {"fid": None}}])
    write_lines(workdir / "goodput.jsonl", [{"step": 1, "seconds": None}, {"step": 2, "seconds": {"step": "?"}}])
    write_lines(workdir / "metrics.jsonl", [{"step": 1, "time": 1e30, "loss": 1e300}, {"step": 2, "time": None}])
    (workdir / "samples/step_00000100.png").write_bytes(b"\x89PNG half")
    page = write_report([str(workdir)]).read_text()
    assert "g/metrics.json" in page and "is no picture yet" in page


def test_what_is_no_workdir_is_refused(tmp_path):
    make_workdir(tmp_path / "run")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/config.json").write_text(json.dumps({"model_type": "bert"}))
    for name in ("other", "absent", "run/metrics.jsonl", "run/samples"):
        with pytest.raises(UsageError, match=f"{name}.*expected a folder with config.json"):
            write_report([str(tmp_path / "run"), str(tmp_path / name)], str(tmp_path / "out.html"))
    with pytest.raises(UsageError, match="named twice"):
        write_report([str(tmp_path / "run"), str(tmp_path / "run/")], str(tmp_path / "out.html"))
    assert not (tmp_path / "out.html").exists()


def test_names_are_as_short_as_they_can_be():
    assert names_of([to_path("/a/x/run"), to_path("/a/y/run")]) == ["x/run", "y/run"]
    assert names_of([to_path("/a/x"), to_path("gs://bucket/run")]) == ["x", "run"]
    assert names_of([to_path("/a/run"), to_path("/b/a/run")]) == ["a/run", "b/a/run"]


def test_a_run_in_a_bucket_is_shown_and_the_page_may_lie_there(bucket, tmp_path):
    local = add_results(make_workdir(tmp_path / "local"))
    workdir = to_path(f"{bucket.url}/{tmp_path.name}/run")
    for file in filter(lambda path: path.is_file(), local.rglob("*")):
        (workdir / file.relative_to(local).as_posix()).write_bytes(file.read_bytes())
    target = write_report([str(workdir)])
    assert str(target) == f"{workdir}/report.html"
    write_report([str(workdir)])  # replaces its own page
    page, ours = target.read_text(), write_report([str(local)]).read_text()
    assert page.count("<img ") == ours.count("<img ") == 3 and page.count('id="figure-') == ours.count('id="figure-')
    (workdir / "notes.html").write_text("mine")
    with pytest.raises(UsageError, match="no report of this command"):
        write_report([str(workdir)], f"{workdir}/notes.html")
    with pytest.raises(UsageError, match="expected a folder with"):
        write_report([f"{bucket.url}/{tmp_path.name}/absent"])


def test_a_metrics_file_below_is_no_point_of_another_folders_sweep(tmp_path):
    workdir = add_results(make_workdir(tmp_path / "run"))
    write_result(workdir / "sweep/again/metrics.json", evaluated(fid=1.0))
    found = {result.where for result in read_run(workdir, "run").evaluated}
    assert found == {"evaluation/metrics.json", "sweep/again/metrics.json"}
