"""`deco plan --search`: the layouts that it tries, which it takes for the best, and its words."""

import shlex

import jax
import pytest

from deco_jax import cli
from deco_jax.config import load_config
from deco_jax.parallel import mesh as meshes
from deco_jax.planning import search
from tests.planning.test_plan import ROOT

NEEDED = {"available": 100 * search.GIB}
XL = str(ROOT / "configs" / "imagenet256_deco_xl.py")


@pytest.fixture
def planned(monkeypatch):
    """Makes analyses of what they are asked."""
    asked = []

    def analyse(program):
        config = program.config
        asked.append((dict(program.layout.mesh.shape), program.layout.whole, config.model.remat))
        memory = {"none": 9.0, "dots": 3.0, "full": 2.5}[config.model.remat] * program.layout.mesh.shape["tensor"]
        memory *= search.GIB * 28 / config.optimizer.accumulation
        fits = memory < NEEDED["available"]
        seconds = {
            "compute": program.flops()[1] / program.topology.accelerator.flops,
            "memory": 0.08 / program.layout.mesh.shape["fsdp"],
            "network": 0.0,
        }
        return {
            "memory": {"used": memory, "available": NEEDED["available"]},
            "fits": fits,
            "roofline": {"seconds": seconds, "images_per_second_a_chip": 9.0} if fits else None,
        }

    monkeypatch.setattr(search, "analyse", analyse)
    monkeypatch.setattr(search, "make_devices", lambda place: jax.devices("cpu")[:8])
    return asked


def test_what_fits_comes_first_and_what_cannot_win_is_not_compiled(planned):
    report = search.search(XL, [], "h100:8", per_device_batch=16)
    first = report["candidates"][0]
    assert report["fits"] and first["fits"] and not report["candidates"][-1]["fits"]
    assert (first["preset"], first["fsdp"], first["remat"]) == ("fsdp", 8, "none")
    assert {(c["preset"], c["fsdp"], c["tensor"]) for c in report["candidates"]} == {
        ("data", 1, 1),
        ("fsdp", 8, 1),
        ("zero1", 8, 1),
        ("fsdp_tensor", 4, 2),
    }
    assert any(whole for _, whole, _ in planned) and len(planned) == len(report["candidates"])
    # With data alone memory is the bound, so full remat may win; with fsdp it is arithmetic, of which that has more.
    tried = {preset: [c for c in report["candidates"] if c["preset"] == preset] for preset in ("data", "fsdp")}
    assert {c["remat"] for c in tried["data"]} == {"none", "dots", "full"}
    assert {c["remat"] for c in tried["fsdp"]} == {"none"}
    text = search.to_text(report)
    assert report["command"] in text and "--config.data.batch_size=128" in report["command"]


def test_parts_are_tried_where_no_remat_fits(planned, monkeypatch):
    monkeypatch.setitem(NEEDED, "available", 40 * search.GIB)
    report = search.search(XL, [], "h100:8", per_device_batch=16)
    tried = {(c["remat"], c["accumulation"]) for c in report["candidates"] if c["preset"] == "data"}
    assert tried == {
        ("none", 1),
        ("none", 2),
        ("none", 4),
        ("none", 8),
        ("dots", 1),
        ("dots", 2),
        ("dots", 4),
        ("full", 1),
        ("full", 2),
    }


def test_where_nothing_fits_it_says_what_comes_closest(planned, monkeypatch):
    monkeypatch.setitem(NEEDED, "available", 1.0)
    report = search.search(XL, [], "h100:8", per_device_batch=16)
    assert not report["fits"] and "None fits; the smallest" in search.to_text(report)


def test_the_command_it_prints_is_one_that_a_run_takes(planned):
    asked = ["--config.model.remat=full", "--config.optimizer.lr=0.1", "--config.data.path=/a b"]
    command = shlex.split(search.search(XL, asked, "h100:8", per_device_batch=16)["command"])
    assert command[:4] == ["deco", "train", "--config", XL]
    assert len({field.partition("=")[0] for field in command[4:]}) == len(command[4:]), "each field once"
    config = load_config(XL, command[4:])
    assert (config.optimizer.lr, config.data.path) == (0.1, "/a b")
    assert config.data.batch_size == 128 and config.mesh.preset in ("data", "fsdp", "zero1", "fsdp_tensor")


def test_the_command_for_several_slices_is_one_that_they_take(planned):
    report = search.search(XL, [], "h100:4", slices=2, per_device_batch=16)
    config = load_config(XL, shlex.split(report["command"])[4:])
    assert config.mesh.slices == 2 and meshes.make_layout(config.mesh, jax.devices("cpu")[:8]).mesh.size == 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--topology", "cpu:8"], "simulates devices"),
        (["--topology", "h100:8", "--fit"], "--fit does not go with it"),
        (["--topology", "h100:8", "--sample"], "--sample does not go with it"),
        (["--topology", "h100:8", "--preset", "fsdp"], "--preset does not go with it"),
        (["--topology", "h100:8", "--per-device-batch", "0"], "must be 1 or more"),
    ],
)
def test_bad_input(planned, arguments, message, capsys):
    with pytest.raises(SystemExit) as error:
        cli.main(["plan", "--config", XL, "--search", *arguments])
    assert error.value.code == 2 and message in capsys.readouterr().err
