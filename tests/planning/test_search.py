"""`deco plan --search`: the layouts that it tries, the line that it draws through short networks, and its words."""

import shlex

import pytest

from deco_jax import cli
from deco_jax.config import load_config
from deco_jax.planning import search
from tests.planning.test_plan import ROOT

XL = str(ROOT / "configs" / "imagenet256_deco_xl.py")


@pytest.fixture
def planned(monkeypatch):
    """Makes analyses of what they are asked, with memory that only full remat brings below the limit."""
    asked = []

    def analyse(program):
        config, layers = program.config, program.config.model.depth
        asked.append((dict(program.layout.mesh.shape), program.layout.whole, config.model.remat, layers))
        memory = {"none": 9.0, "dots": 2.0, "full": 1.0}[config.model.remat] * layers * search.GIB
        sent = {"all-gather": {"wire_bytes": 1e9 * layers}, "send": {"wire_bytes": 1e15}}
        return {
            "memory": {"used": memory / config.optimizer.accumulation + 5e8, "available": 1.0},
            "roofline": {},
            "hbm_bytes": 1e10 + 2e9 * layers,
            "collectives": sent,
        }

    monkeypatch.setattr(search, "analyse", analyse)
    monkeypatch.setattr(search, "make_devices", lambda place: __import__("jax").devices("cpu")[:8])
    return asked


def test_what_fits_comes_first_and_figures_are_those_of_all_blocks(planned):
    report = search.search(XL, [], "h100:8", per_device_batch=16)
    first = report["candidates"][0]
    assert report["fits"] and first["fits"] and not report["candidates"][-1]["fits"]
    assert first["hbm_bytes"] == pytest.approx(1e10 + 2e9 * 28) and first["sent_bytes"] == pytest.approx(28e9)
    assert {(c["preset"], c["fsdp"], c["tensor"]) for c in report["candidates"]} == {
        ("data", 1, 1),
        ("fsdp", 8, 1),
        ("zero1", 8, 1),
        ("fsdp_tensor", 4, 2),
    }
    assert {layers for *_, layers in planned} == set(search.DEPTHS)
    assert any(whole for _, whole, *_ in planned)
    # What does not fit is tried in more parts; what fits is not.
    tried = {(c["remat"], c["accumulation"]) for c in report["candidates"] if c["preset"] == "fsdp"}
    assert tried == {("none", 1), ("none", 2), ("none", 4), ("dots", 1), ("full", 1)}
    text = search.to_text(report)
    assert report["command"] in text and "--config.data.batch_size=128" in report["command"]


def test_the_command_it_prints_is_one_that_a_run_takes(planned):
    asked = ["--config.model.remat=full", "--config.optimizer.lr=0.1", "--config.data.path=/a b"]
    command = shlex.split(search.search(XL, asked, "h100:8", per_device_batch=16)["command"])
    assert command[:4] == ["deco", "train", "--config", XL]
    assert len({field.partition("=")[0] for field in command[4:]}) == len(command[4:]), "each field once"
    config = load_config(XL, command[4:])
    assert (config.optimizer.lr, config.data.path) == (0.1, "/a b")
    assert config.data.batch_size == 128 and config.mesh.preset in ("data", "fsdp", "zero1", "fsdp_tensor")


def test_extrapolation_is_a_straight_line():
    assert search.extrapolate([{"a": 5.0}, {"a": 9.0}], 28) == {"a": 57.0}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--topology", "cpu:8"], "simulates devices"),
        (["--topology", "h100:8", "--fit"], "--fit does not go with it"),
        (["--topology", "h100:8", "--sample"], "--sample does not go with it"),
        (["--topology", "h100:8", "--preset", "fsdp"], "--preset does not go with it"),
        (["--topology", "h100:8", "--config.model.depth=3"], "model.depth=3"),
        (["--topology", "h100:8", "--per-device-batch", "0"], "must be 1 or more"),
    ],
)
def test_bad_input(planned, arguments, message, capsys):
    with pytest.raises(SystemExit) as error:
        cli.main(["plan", "--config", XL, "--search", *arguments])
    assert error.value.code == 2 and message in capsys.readouterr().err
