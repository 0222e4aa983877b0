"""Is every combination measured once, the best found, and a wrong field refused before anything is drawn?"""

import functools
import json

import numpy as np
import pytest
from PIL import Image

from deco_jax.encoders.features import load_features
from deco_jax.errors import UsageError
from deco_jax.evaluation import extract, measure, sweep
from deco_jax.evaluation.evaluate import evaluate
from deco_jax.evaluation.results import to_markdown
from deco_jax.evaluation.stats import compute_stats
from deco_jax.evaluation.sweep import parse_sweep, point_name
from tests.helpers import GOLDEN

LIGHTNING = str(GOLDEN / "lightning_c2i.ckpt")
TWO = ["guidance=1,3", "guidance_interval=0:1,0.3:1"]


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    root = tmp_path_factory.mktemp("reference")
    np.savez(root / "real.npz", np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3), np.uint8))
    compute_stats(None, f"{root}/real.npz", f"{root}", "efficientnet", batch_size=8)
    return f"{root}"


@pytest.fixture(autouse=True)
def compiled_once(monkeypatch):
    monkeypatch.setattr(extract, "load_features", cached_features)


cached_features = functools.cache(load_features)


def run(reference, out, texts=TWO, source=LIGHTNING, **changes):
    arguments = {"image_size": "8", "steps": 4, "dtype": "float32", "batch_size": 8, "num": 8} | changes
    evaluate(str(source), str(out), reference, "efficientnet", sweep=texts, **arguments)


def test_values_are_read_by_their_fields():
    found = parse_sweep(["guidance=1.0,2,3.2", "guidance-interval=0:1,0.1:1", "solver=euler,heun", "steps=2,50"])
    assert found == {
        "guidance": [1.0, 2.0, 3.2],
        "guidance_interval": [(0.0, 1.0), (0.1, 1.0)],
        "solver": ["euler", "heun"],
        "steps": [2, 50],
    }
    point = {name: values[-1] for name, values in found.items()}
    assert point_name(point) == "guidance=3.2,guidance_interval=0.1:1.0,solver=heun,steps=50"


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["temperature=1"], "'temperature' is no setting of the sampler; allowed: steps, solver, guidance"),
        (["guidance=1,x"], "'x' is no value of guidance; write float, as in 1.0"),
        (["guidance="], "'' is no value of guidance"),
        (["steps=2.5"], "'2.5' is no value of steps; write int"),
        (["guidance_interval=0.1"], "write LOW:HIGH, as in 0.1:1"),
        (["guidance_interval=0.5:0.1"], "must be .low, high. with"),
        (["solver=magic"], "solver='magic' is not known"),
        (["solver="], "'' is no value of solver"),
        (["guidance=1,2,1.0"], "has 1.0 twice"),
        (["guidance=1", "guidance=2"], "guidance is given twice"),
    ],
)
def test_values_that_are_none(texts, message):
    with pytest.raises(UsageError, match=message):
        parse_sweep(texts)


@pytest.mark.slow
def test_every_combination_is_measured_once_and_the_best_is_marked(reference, tmp_path, monkeypatch, capsys):
    drawn, generate = [], measure.generate_samples

    def count(source, out, **arguments):
        drawn.append((arguments["guidance"], arguments["guidance_interval"]))
        if len(drawn) == 3:
            return None  # as if told to stop
        return generate(source, out, **arguments)

    monkeypatch.setattr(measure, "generate_samples", count)
    run(reference, tmp_path)
    assert "2 of 4 points are done. The same command goes on." in capsys.readouterr().out
    assert len(json.loads((tmp_path / "sweep.json").read_text())["points"]) == 2
    run(reference, tmp_path)
    everywhere, later = (0.0, 1.0), (0.3, 1.0)
    order = [(1.0, everywhere), (1.0, later), (3.0, everywhere), (3.0, later)]
    assert drawn == [*order[:3], *order[2:]], "points that are done are not done again"

    found = json.loads((tmp_path / "sweep.json").read_text())
    distances = [point["metrics"]["fd_efficientnet"] for point in found["points"]]
    assert [tuple(point["settings"].values()) for point in found["points"]] == [(g, list(i)) for g, i in order]
    assert (found["by"], found["best"]) == ("fd_efficientnet", int(np.argmin(distances)))
    assert distances[0] == pytest.approx(distances[1], rel=1e-6), "without guidance the interval changes nothing"
    assert len({round(distance, 4) for distance in distances}) == 3
    table = (tmp_path / "sweep.md").read_text()
    assert table.count("**") == 6 and f"**{found['points'][found['best']]['folder']}**" in table
    for point in found["points"]:
        own = json.loads((tmp_path / point["folder"] / "metrics.json").read_text())
        assert (own["metrics"], own["line"]) == (point["metrics"], point["line"])
        assert own["settings"]["guidance"] == point["settings"]["guidance"]
        assert not (tmp_path / point["folder"] / "samples").exists(), "many points would fill a disk"
    with Image.open(tmp_path / "sweep.png") as picture:
        assert picture.width > 1000 and len(picture.convert("RGB").getcolors(2**20)) > 20
    run(reference, tmp_path)
    assert len(drawn) == 5
    run(reference, tmp_path, ["guidance=2", "guidance_interval=0.3:1"])
    more = json.loads((tmp_path / "sweep.json").read_text())
    assert len(drawn) == 6 and more["points"][:4] == found["points"], "a later command adds to the sweep"
    assert more["points"][4]["settings"] == {"guidance": 2.0, "guidance_interval": [0.3, 1.0]} and more["total"] == 5
    with pytest.raises(UsageError, match="holds a sweep of guidance, guidance_interval, not of steps"):
        run(reference, tmp_path, ["steps=2,3"], steps=None)


def test_what_does_not_fit_is_refused_before_anything_is_drawn(reference, tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "generate_samples", lambda *_, **__: pytest.fail("drawn"))
    np.savez(tmp_path / "x.npz", np.zeros((4, 8, 8, 3), np.uint8))
    out = tmp_path / "out"
    for message, changes in (
        ("--guidance is also in --sweep", {"guidance": 2.0}),
        ("--sweep needs a network; .*x.npz holds images", {"source": tmp_path / "x.npz"}),
        ("have 16×16; they must be equal", {"image_size": "16"}),
        ("last=0.5 needs at least 2 steps", {"texts": ["last=0,0.5"], "steps": 1}),
    ):
        with pytest.raises(UsageError, match=message):
            run(reference, out, **changes)
        assert not out.exists(), message


def test_a_table_of_rows_with_different_columns():
    table = to_markdown([({"guidance": "1"}, {"fid": 2.34567, "kid": 0.001}), ({"solver": "a|b"}, {"fid": 1.0})])
    assert table.splitlines() == [
        "| guidance | solver | FID | KID |",
        "| :-- | :-- | --: | --: |",
        "| 1 |  | 2.3457 | 0.00100 |",
        "|  | a\\|b | 1.0000 |  |",
    ]


def test_one_field_and_words_are_drawn(tmp_path):
    """Without lines to tell apart, and along a field that has no numbers."""
    points = [{"solver": name} for name in ("euler", "heun")]
    content = sweep._to_png(points, [{"fid": 2.0, "recall": 0.1}, {"fid": 1.0, "recall": 0.2}], 1, "fid")
    (tmp_path / "x.png").write_bytes(content)
    with Image.open(tmp_path / "x.png") as picture:
        assert picture.width > picture.height
