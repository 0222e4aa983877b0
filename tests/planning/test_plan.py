"""`deco plan`: the program it compiles is the run's, its figures add up, and what it cannot do it says."""

import importlib.util
import json
import math
import os
import pathlib
import subprocess
import sys

import jax
import pytest

from deco_jax import cli
from deco_jax.errors import UsageError
from deco_jax.models.flops import forward_flops
from deco_jax.parallel import mesh as meshes
from deco_jax.planning import plan
from deco_jax.planning.report import to_text
from deco_jax.planning.topology import parse_topology
from deco_jax.training.step import make_trainer

ROOT = pathlib.Path(__file__).parents[1]
CONFIG = str(ROOT / "configs" / "quickstart.py")
TINY = [
    f"--config.{setting}"
    for setting in (
        "model.patch_size=7",
        "model.width=16",
        "model.depth=2",
        "model.heads=2",
        "model.decoder_width=8",
        "model.decoder_depth=1",
        "data.batch_size=16",
        "sample.steps=2",
    )
]

pytestmark = pytest.mark.usefixtures("quick_compile")


def tiny_plan(topology, *overrides, **options):
    return plan.plan(CONFIG, [*TINY, *overrides], topology, **options)


@pytest.fixture(scope="module")
def simulated(quick_compile):
    """Reports of the tiny run over 8 simulated devices, by preset; everything that divides is split."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(meshes, "SMALL", 0)
        return {preset: tiny_plan("cpu:8", preset=preset) for preset in ("data", "fsdp")}


def test_memory_is_made_of_its_parts(simulated):
    for report in simulated.values():
        memory = dict(report["memory"])
        used, available = memory.pop("used"), memory.pop("available")
        assert available is None and report["fits"] is None and report["roofline"] is None
        assert sum(memory.values()) == pytest.approx(used)
        assert min(memory[part] for part in ("parameters", "ema", "optimizer", "batch", "temporaries")) > 0
        assert memory["optimizer"] == pytest.approx(2 * memory["parameters"], rel=0.01)
    whole, part = (simulated[preset]["memory"]["parameters"] for preset in ("data", "fsdp"))
    assert whole == 4 * simulated["data"]["parameters"]
    assert part < 0.3 * whole, "fsdp over 8 devices keeps about an eighth of what divides"


def test_communication_is_that_of_the_layout(simulated):
    """Data parallelism sums gradients and gathers no parameters; FSDP gathers parameters too."""
    data, fsdp = (simulated[preset]["collectives"] for preset in ("data", "fsdp"))
    gradients = simulated["data"]["memory"]["parameters"]
    assert data["all-reduce"]["bytes"] == pytest.approx(gradients, rel=0.1)
    assert data.get("all-gather", {"bytes": 0})["bytes"] < 0.1 * gradients
    assert fsdp["all-gather"]["bytes"] > gradients


def test_the_command_prints_a_page_or_json(capsys, simulated):
    """Here for the sampler, which compiles fastest."""
    settings = "--config.sample.guidance=2.0", "--config.sample.steps=4", "--sample", "--per-device-batch=3"
    cli.main(["plan", "--config", CONFIG, "--topology=cpu:8", *TINY, *settings, "--json"])
    report = json.loads(capsys.readouterr().out)
    assert (report["devices"], report["global_batch"], report["per_device_batch"]) == (8, 24, 3)
    assert set(report["memory"]) == {"ema", "batch", "program", "temporaries", "used", "available"}
    network = make_trainer(plan.load_config(CONFIG, TINY)).network
    # The first of four steps starts at t = 0, where guidance does not act: 1 + 3 × 2 passes for 3 images a device.
    assert report["flops"]["model"] == 3 * 7 * forward_flops(network, 28, 28)
    page = to_text(report)
    assert "Sampler" in page and "cpu:8" in page and "Batch 3 a device, 24 in all" in page and "no limit" in page
    assert "Train step" in to_text(simulated["fsdp"]) and "all-gather" in to_text(simulated["fsdp"])


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_executed_arithmetic_agrees_with_xla(remat):
    """XLA counts the program before it optimises it; matrix products are nearly all of it at this width."""
    overrides = [
        "--config.model.width=192",
        "--config.model.heads=2",
        "--config.model.depth=3",
        "--config.model.patch_size=2",
        "--config.model.decoder_width=4",
        "--config.data.batch_size=2",
        "--config.model.scan=False",
        f"--config.model.remat={remat}",
    ]
    config = plan.load_config(CONFIG, [*TINY, *overrides])
    place = parse_topology("cpu:1")
    mesh = meshes.make_mesh(config.mesh, jax.devices()[:1])
    program = plan.Program(config, make_trainer(config), mesh, place, sampler=False)
    xla = program.lower().cost_analysis()["flops"]
    model, executed = program.flops()
    assert executed == pytest.approx(xla, rel=0.1)
    assert (executed > model) == (remat != "none")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--topology=v5litepod-16"], "--topology=v5litepod-16 is not known. .*v5e:4x4.*h100:8.*cpu:8"),
        (["--topology=v5e:5x5"], "v5e has 1x1, 2x2, 2x4, 4x4"),
        (["--topology=v5p:4x4"], "v5p has 2x2x1, and AxBxC"),
        (["--topology=v4:3x3x3"], "v4 has 2x2x1, and AxBxC"),
        (["--topology=h100:0"], "is not known"),
        (["--topology=h100:2x2"], "is not known"),
        (["--topology=cpu"], "is not known"),
        (["--topology=cpu:8", "--slices=0"], "--slices=0 must be 1 or more"),
        (["--topology=cpu:8", "--per-device-batch=0"], "--per-device-batch=0 must be 1 or more"),
        (["--topology=cpu:8", "--fit"], "--fit needs hardware with a limit"),
        (["--topology=cpu:8", "--preset=nosuch"], "mesh.preset='nosuch' does not exist"),
        (["--topology=cpu:8", "--config.data.batch_size=12"], "data.batch_size=12 is not divisible by 8 devices"),
        (["--topology=cpu:99"], "this process has 8 simulated devices"),
        (["--topology=h100:8", "--sample"], "--sample cannot be estimated for h100:8"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_compiled(capsys, monkeypatch, arguments, message):
    monkeypatch.setattr(plan.Program, "lower", lambda self: pytest.fail("compiled"))
    with pytest.raises(SystemExit, match="2"):
        cli.main(["plan", "--config", CONFIG, *TINY, *arguments])
    output = capsys.readouterr()
    lines = [line for line in output.err.splitlines() if line.startswith("deco: error: ")]
    assert output.out == "" and len(lines) == 1
    with pytest.raises(UsageError, match=message):
        raise UsageError(lines[0])


def test_without_libtpu_the_extra_is_named(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "libtpu" else find(name))
    with pytest.raises(UsageError, match=r"v5e:4x4 needs libtpu.*pip install 'deco-jax\[tpu\]'"):
        tiny_plan("v5e:4x4")


def test_gpus_are_estimated_and_marked_as_such(monkeypatch):
    monkeypatch.setattr(meshes, "SMALL", 0)
    monkeypatch.setattr(plan.Program, "lower", lambda self: pytest.fail("compiled"))
    one, two = (tiny_plan("h100:8", preset="fsdp", per_device_batch=batch) for batch in (4, 8))
    assert one["method"] == "estimate, not compiled" and "estimate, not compiled" in to_text(one)
    assert one["fits"] and one["roofline"]["bound"] in ("compute", "memory", "network")
    assert two["memory"]["activations"] == 2 * one["memory"]["activations"]
    assert one["memory"]["gradients"] == one["memory"]["parameters"] < 4 * one["parameters"]
    assert one["collectives"]["all-gather"]["wire_bytes"] == pytest.approx(2 * 7 / 8 * 4 * one["parameters"])


def test_a_teacher_takes_memory_arithmetic_and_no_part_of_the_sampler():
    """ViT-B/14 by hand: 86,579,712 parameters without the mask token, linear layers' kernels in bfloat16."""
    aligned = ["model.patch_size=16", "data.image_size=32", "loss.alignment_weight=0.5", "model.dtype=bfloat16"]
    aligned = [f"--config.{setting}" for setting in (*aligned, "loss.alignment_layer=2")]
    without, with_teacher = (
        tiny_plan("h100:8", *aligned, *more) for more in (["--config.loss.alignment_weight=0"], [])
    )
    size = with_teacher["memory"]["teacher"]
    block = 2304 + 768 + 3072 + 768 + 4 * 768 + 2 * 768  # biases, norms, factors
    assert size == 2 * 86_579_712 + 2 * ((1 + 37**2 + 1) * 768 + 12 * block + 3 * 768)
    assert "teacher" not in without["memory"] and f"{size / 2**20:.2f} MiB" in to_text(with_teacher)
    tokens, d = 5, 768
    forward = 12 * (tokens * 12 * d * d + 2 * tokens**2 * d) + 4 * 3 * 14**2 * d
    assert with_teacher["flops"]["model"] - without["flops"]["model"] == 2 * 2 * forward  # 2 images a device


def test_what_the_forward_pass_keeps_follows_remat(tiny_config):
    """Against a count by hand: with "full", a block keeps only its input, (N, D) numbers an image and layer."""
    tiny_config.model.remat = "full"
    mesh = meshes.make_mesh(tiny_config.mesh, jax.devices()[:1])

    def kept(depth, remat):
        tiny_config.model.update(depth=depth, remat=remat)
        return plan._saved_bytes(make_trainer(tiny_config), mesh)

    tokens, width = (28 // 7) ** 2, 16
    assert kept(5, "full") - kept(3, "full") == 2 * tokens * width * 4
    assert kept(3, "full") < kept(3, "dots") < kept(3, "none")


def test_a_run_that_does_not_fit_ends_with_1(capsys):
    with pytest.raises(SystemExit, match="1"):
        cli.main(["plan", "--config", CONFIG, "--topology", "h100:8", *TINY, "--per-device-batch", "1000000"])
    assert "DOES NOT FIT" in capsys.readouterr().out


def test_the_compilers_refusal_is_an_answer():
    """As libtpu 0.0.42.1 words it; an older wording; and an error of another kind, which stays an error."""
    message = (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (39.55G) exceeds "
        "available HBM (15.75G)."
    )
    assert plan._memory_of_error(message) == (39.55 * 2**30, 15.75 * 2**30)
    older = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.5G of 15.75G hbm. Exceeded by 4.8G."
    assert plan._memory_of_error(older) == (20.5 * 2**30, 15.75 * 2**30)
    with pytest.raises(RuntimeError, match="INTERNAL: crash"):
        plan._memory_of_error("INTERNAL: crash")


@pytest.mark.parametrize("start", [1, 4, 64])
@pytest.mark.parametrize("limit", [0, 3, 37, 53, 200])
def test_the_largest_batch_is_found_and_verified(start, limit):
    """Memory is not quite linear in the batch; the answer is tried, and so is the batch that is too large."""
    tried = {}

    def measure(batch):
        used = 100 + 10 * batch + math.sqrt(batch)
        available = 100 + 10 * limit + math.sqrt(limit)
        tried[batch] = used <= available
        return used, available, tried[batch]

    best, step = plan.largest_fit(measure, start, unit=1)
    assert best <= limit < best + step
    assert tried.get(best, best == 0) and not tried[best + step]
    assert step <= max(limit / 8, 1)
    assert len(tried) <= 6, "each try may take minutes"


needs_libtpu = [
    pytest.mark.tpu_compiler,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None, reason="libtpu is not here: pip install -e '.[tpu]'"
    ),
]
SMALL = ["--config.model.width=128", "--config.model.heads=2", "--config.model.depth=2"]  # large enough to be split


def deco_plan(*arguments):
    """In a process of its own, as libtpu is never unloaded: (exit code, the JSON it printed)."""
    command = [sys.executable, "-m", "deco_jax", "plan", "--config", CONFIG, *TINY, *arguments, "--json"]
    env = {name: value for name, value in os.environ.items() if not name.startswith(("TPU_", "JAX_PLATFORMS"))}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False, env=env)
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout)


class TestForTpus:
    pytestmark = needs_libtpu

    def test_a_split_run_communicates_its_parameters(self):
        code, split = deco_plan("--topology=v5e:2x2", "--preset=fsdp", "--per-device-batch=4", *SMALL)
        assert code == 0 and split["fits"]
        assert split["method"].startswith("libtpu ") and split["devices"] == 4
        code, copied = deco_plan("--topology=v5e:2x2", "--preset=data", "--per-device-batch=4", *SMALL)
        assert code == 0 and set(copied["collectives"]) == {"all-reduce", "all-gather"}
        assert copied["collectives"]["all-gather"]["bytes"] < 10_000, "the processes' notes to each other, nothing else"
        assert copied["memory"]["parameters"] == 4 * copied["parameters"]
        assert split["memory"]["parameters"] < 0.6 * copied["memory"]["parameters"]
        gathered = sum(
            split["collectives"].get(kind, {"bytes": 0})["bytes"] for kind in ("all-gather", "collective-permute")
        )
        assert gathered > copied["parameters"], "two bytes a parameter, for most of them, both ways"
        assert copied["memory"]["available"] == 15.75 * 2**30
        assert copied["unknown_loops"] == split["unknown_loops"] == 0
        seconds = split["roofline"]["seconds"]
        assert seconds[split["roofline"]["bound"]] == max(seconds.values()) > 0

    def test_a_batch_that_is_too_large_is_an_answer(self):
        code, report = deco_plan("--topology=v5e:2x2", "--per-device-batch=200000")
        assert code == 1 and report["fits"] is False
        assert report["memory"]["used"] > report["memory"]["available"] == 15.75 * 2**30
        assert "DOES NOT FIT" in to_text(report)
