"""`deco plan`: the program it compiles is the run's, its figures are the run's, and what it cannot do it says."""

import dataclasses
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
from deco_jax.config import build_model, load_config
from deco_jax.errors import UsageError
from deco_jax.models.flops import forward_flops
from deco_jax.parallel import mesh as meshes
from deco_jax.planning import cost, plan
from deco_jax.planning.hlo import TextError
from deco_jax.planning.report import to_text
from deco_jax.planning.topology import parse_topology

ROOT = pathlib.Path(__file__).parents[2]
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


def tiny_plan(topology, *overrides, **options):
    return plan.plan(CONFIG, [*TINY, *overrides], topology, **options)


@pytest.fixture(scope="module")
def simulated():
    """Reports of the tiny run over 8 simulated devices, by preset; everything that divides is split."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(meshes, "SMALL", 0)
        return {preset: tiny_plan("cpu:8", preset=preset) for preset in ("data", "fsdp")}


def number_of_parameters():
    """Of the tiny run's network, without anything of planning: from its own initialisation."""
    model = build_model(load_config(CONFIG, TINY).model)
    image = jax.ShapeDtypeStruct((1, 28, 28, 3), "float32")
    shapes = jax.eval_shape(
        model.init, jax.random.key(0), image, jax.ShapeDtypeStruct((1,), "float32"), model.condition.example(1)
    )
    return sum(math.prod(x.shape) for x in jax.tree.leaves(shapes))


def test_memory_is_that_of_the_runs_arguments(simulated):
    """fp32 parameters, EMA and two moments; images and labels; and no byte more or less than the program is given."""
    parameters = number_of_parameters()
    for preset, report in simulated.items():
        memory = report["memory"]
        assert report["parameters"] == parameters
        assert memory["batch"] == 2 * (28 * 28 * 3 + 4) + 4 * 3, "two images and labels, three messages"
        assert memory["padding"] == 3 * 4, (
            "beside these parts the compiler counts three numbers: steps done and skipped"
        )
        assert memory["available"] is None and report["fits"] is None and report["roofline"] is None
        if preset == "data":
            assert memory["parameters"] == memory["ema"] == 4 * parameters
            assert 2 * 4 * parameters <= memory["optimizer"] <= 2 * 4 * parameters + 16, "and its counters"
        else:
            assert 4 * parameters / 8 <= memory["parameters"] < 0.3 * 4 * parameters, "most divides by 8"


def test_temporaries_hold_the_gradients(simulated):
    """They were once 212 KiB beside arrays of 36 MiB: XLA's peak on a CPU does not count them."""
    for report in simulated.values():
        assert report["memory"]["temporaries"] >= report["memory"]["parameters"], "fp32, as large as the parameters"


def test_communication_is_that_of_the_layout(simulated):
    """Data parallelism sums gradients and gathers no parameters; FSDP gathers parameters too."""
    data, fsdp = (simulated[preset]["collectives"] for preset in ("data", "fsdp"))
    gradients = 4 * number_of_parameters()
    assert data["all-reduce"]["bytes"] == pytest.approx(gradients, rel=0.01)  # and the losses; some gradients are equal
    assert data.get("all-gather", {"bytes": 0})["bytes"] < 1000, "the processes' messages to each other, nothing else"
    assert fsdp["all-gather"]["bytes"] > 0.9 * gradients


def test_less_traffic_than_the_gradients_is_an_error_of_the_reader(monkeypatch, simulated):
    """A collective in a form that is not read must not pass for a run that needs no network."""
    read = cost.read

    def forgetful(text):
        found = read(text)
        return dataclasses.replace(found, collectives=[c for c in found.collectives if c.kind != "all-reduce"])

    monkeypatch.setattr(cost, "read", forgetful)
    with pytest.raises(TextError, match="the gradients alone have"):
        tiny_plan("cpu:2", preset="data", per_device_batch=1)


def test_the_command_prints_a_page_or_json(capsys, simulated):
    """Here for the sampler, which compiles fastest."""
    settings = "--config.sample.guidance=2.0", "--config.sample.steps=4", "--sample", "--per-device-batch=3"
    cli.main(["plan", "--config", CONFIG, "--topology=cpu:8", *TINY, *settings, "--json"])
    report = json.loads(capsys.readouterr().out)
    assert (report["devices"], report["global_batch"], report["per_device_batch"]) == (8, 24, 3)
    assert set(report["memory"]) == {"ema", "batch", "padding", "program", "temporaries", "used", "available"}
    network = build_model(load_config(CONFIG, TINY).model)
    # The first of four steps starts at t = 0, where guidance does not act: 1 + 3 × 2 passes for 3 images per device.
    assert report["flops"]["model"] == 3 * 7 * forward_flops(network, 28, 28)
    page = to_text(report)
    assert "Sampler" in page and "cpu:8" in page and "Batch 3 per device, 24 in all" in page and "no limit" in page
    page = to_text(simulated["data"])
    assert "Train step" in page and " more (" in page and ") × 1 " in page, "arrays named, their bytes together, times"


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
    config = load_config(CONFIG, [*TINY, *overrides])
    layout = meshes.make_layout(config.mesh, jax.devices()[:1])
    program = plan.Program(config, layout, parse_topology("cpu:1"), sampler=False)
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
        (["--topology=h100:16"], "h100 comes in nodes of up to 8; --slices=2 plans for two"),
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


@pytest.mark.parametrize(
    "topology, module, message",
    [
        ("v5e:4x4", "libtpu", r"v5e:4x4 needs libtpu.*pip install -e '.\[tpu\]' in the repo"),
        ("h100:8", "jax_cuda13_plugin", r"h100:8 needs jax-cuda13-plugin.*pip install -e '.\[plan-gpu\]' in the repo"),
    ],
)
def test_without_the_compiler_the_extra_is_named(monkeypatch, topology, module, message):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == module else find(name))
    with pytest.raises(UsageError, match=message):
        tiny_plan(topology)


def test_a_teacher_takes_memory_arithmetic_and_no_part_of_the_sampler():
    """ViT-B/14 by hand: 86,579,712 parameters without the mask token, linear layers' kernels in bfloat16."""
    aligned = ["model.patch_size=16", "data.image_size=32", "loss.alignment_weight=0.5", "model.dtype=bfloat16"]
    aligned = [f"--config.{setting}" for setting in (*aligned, "loss.alignment_layer=2")]

    def program(*more, sampler=False):
        config = load_config(CONFIG, [*TINY, *aligned, *more])
        return plan.Program(
            config, meshes.make_layout(config.mesh, jax.devices()[:8]), parse_topology("cpu:8"), sampler
        )

    without, with_teacher = program("--config.loss.alignment_weight=0"), program()
    size = plan.local_bytes(with_teacher.arguments["teacher"])
    block = 2304 + 768 + 3072 + 768 + 4 * 768 + 2 * 768  # biases, norms, factors
    assert size == 2 * 86_579_712 + 2 * ((1 + 37**2 + 1) * 768 + 12 * block + 3 * 768)
    assert "teacher" not in without.arguments and "teacher" not in program(sampler=True).arguments
    stored = program("--config.teacher.stored=somewhere").arguments
    assert "teacher" not in stored and stored["batch"][0]["features"].shape == (16, 4, 768)
    tokens, d = 5, 768
    forward = 12 * (tokens * 12 * d * d + 2 * tokens**2 * d) + 4 * 3 * 14**2 * d
    assert with_teacher.flops()[0] - without.flops()[0] == 2 * 2 * forward  # 2 images per device


def test_a_run_that_does_not_fit_is_tried_with_fsdp(monkeypatch, capsys, simulated):
    """On devices whose memory is just enough for it; and on smaller ones, where splitting the state cannot help."""
    used = {preset: report["memory"]["used"] for preset, report in simulated.items()}
    assert used["fsdp"] < used["data"]
    tried = []

    def limited(program):
        tried.append(program.config.mesh.preset)
        report = simulated[tried[-1]]
        memory = report["memory"] | {"available": limit}
        return report | {"memory": memory, "fits": memory["used"] <= limit}

    def page():
        with pytest.raises(SystemExit, match="1"):
            cli.main(["plan", "--config", CONFIG, "--topology", "cpu:8", *TINY])
        return capsys.readouterr().out

    monkeypatch.setattr(plan, "analyse", limited)
    limit = used["fsdp"]
    text = page()
    assert "DOES NOT FIT" in text and "`--preset fsdp` would, with" in text and tried == ["data", "fsdp"]
    limit = 1000.0
    assert "nor would `--preset fsdp`" in page() and tried == ["data", "fsdp", "data"]


def test_the_compilers_refusal_is_an_answer():
    """As libtpu 0.0.42.1 words it; an older wording; and an error of another kind, which stays an error."""
    message = (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (39.55G) exceeds "
        "available HBM (15.75G)."
    )
    assert plan.memory_of_refusal(message) == (39.55 * 2**30, 15.75 * 2**30)
    older = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.5G of 15.75G hbm. Exceeded by 4.8G."
    assert plan.memory_of_refusal(older) == (20.5 * 2**30, 15.75 * 2**30)
    with pytest.raises(RuntimeError, match="INTERNAL: crash"):
        plan.memory_of_refusal("INTERNAL: crash")


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
needs_plugin = pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None,
    reason="jax's CUDA plugin is not here: pip install -e '.[plan-gpu]'",
)
SMALL = ["--config.model.width=128", "--config.model.heads=2", "--config.model.depth=2"]  # large enough to be split


def deco_plan(*arguments):
    """In a process of its own, as libtpu is never unloaded: (exit code, the JSON it printed)."""
    command = [sys.executable, "-m", "deco_jax", "plan", "--config", CONFIG, *TINY, *arguments, "--json"]
    env = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("TPU_", "JAX_PLATFORMS", "JAX_DISABLE_MOST"))
    }
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False, env=env)
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout)


class TestForTpus:
    pytestmark = needs_libtpu

    @pytest.mark.slow
    def test_a_split_run_communicates_its_parameters(self):
        code, split = deco_plan("--topology=v5e:2x2", "--preset=fsdp", "--per-device-batch=4", *SMALL)
        assert code == 0 and split["fits"]
        assert split["method"].startswith("libtpu ") and split["devices"] == 4
        code, copied = deco_plan("--topology=v5e:2x2", "--preset=data", "--per-device-batch=4", *SMALL)
        assert code == 0 and set(copied["collectives"]) == {"all-reduce", "all-gather"}
        assert copied["collectives"]["all-gather"]["bytes"] < 10_000, "the processes' messages to each other"
        assert copied["collectives"]["all-reduce"]["bytes"] >= 4 * copied["parameters"], "gradients, fp32"
        assert copied["memory"]["parameters"] == 4 * copied["parameters"]
        assert split["memory"]["parameters"] < 0.6 * copied["memory"]["parameters"]
        gathered = sum(
            split["collectives"].get(kind, {"bytes": 0})["bytes"] for kind in ("all-gather", "collective-permute")
        )
        assert gathered > copied["parameters"], "two bytes per parameter, for most of them, both ways"
        assert copied["memory"]["available"] == 15.75 * 2**30
        seconds = split["roofline"]["seconds"]
        assert seconds[split["roofline"]["bound"]] == max(seconds.values()) > 0

    @pytest.mark.slow
    def test_slices_exchange_their_gradients(self):
        """Two slices of four chips: libtpu writes what they send to each other as `send`."""
        code, report = deco_plan("--topology=v5e:2x2", "--slices=2", "--per-device-batch=1", *SMALL)
        assert code == 0 and report["devices"] == 8 and report["mesh"]["data"] == 8
        assert report["collectives"]["send"]["bytes"] >= 4 * report["parameters"] / 4, "each chip a quarter, fp32"

    def test_a_batch_that_is_too_large_is_an_answer(self):
        code, report = deco_plan("--topology=v5e:2x2", "--per-device-batch=200000")
        assert code == 1 and report["fits"] is False
        assert report["memory"]["used"] > report["memory"]["available"] == 15.75 * 2**30
        assert report["fsdp"]["fits"] is False, "the batch is what does not fit"
        assert "DOES NOT FIT" in to_text(report) and "nor would `--preset fsdp`" in to_text(report)


class TestForGpus:
    pytestmark = needs_plugin

    @pytest.mark.slow
    def test_a_published_network_with_its_teacher_is_compiled(self):
        """Two blocks of DeCo-XL, whose alignment layer once met an estimate of a single block."""
        config = str(ROOT / "configs" / "imagenet256_deco_xl.py")
        depth = ["--config.model.depth=2", "--config.loss.alignment_layer=1", "--config.model.decoder_depth=1"]
        env = os.environ | {"JAX_PLATFORMS": "cpu"}
        command = [sys.executable, "-m", "deco_jax", "plan", "--config", config, *depth, "--topology=h100:8", "--json"]
        done = subprocess.run(
            [*command, "--per-device-batch=1"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
            env=env,
        )
        assert done.returncode == 0, done.stderr
        report = json.loads(done.stdout)
        assert report["method"].startswith("jax-cuda13-plugin ") and report["devices"] == 8
        trained = report["memory"]["parameters"] / 4  # the network's and the projector's
        assert report["parameters"] < trained < 1.1 * report["parameters"]
        reduced = report["collectives"]["all-reduce"]["bytes"]
        assert 3.99 * trained <= reduced < 4.1 * trained, "fp32, but for biases"
        assert report["memory"]["available"] == pytest.approx(0.9 * 84.9e9)
        assert report["memory"]["padding"] < 64

    @pytest.mark.parametrize("gpu", ["a100", "h200", "b200"])
    def test_every_gpu_is_known_to_the_compiler(self, gpu):
        code, report = deco_plan(f"--topology={gpu}:2", "--sample", "--config.sample.steps=1")
        assert code == 0 and report["fits"] and report["devices"] == 2
        assert report["collectives"] == {}, "every GPU draws its own images"


def test_what_a_network_of_text_holds_beside_itself():
    """The published Qwen3-0.6B, in bfloat16; or the states that it would give, as `text.stored` has them."""
    text = ["model.kind=deco_text", "model.dtype=bfloat16", "model.text_depth=1", "model.text_features=1024"]

    def held(stored):
        settings = [*text, "model.text_tokens=8", f"text.stored={stored}"]
        config, place = load_config(CONFIG, [*TINY, *(f"--config.{s}" for s in settings)]), parse_topology("cpu:1")
        layout = meshes.make_layout(config.mesh, jax.devices()[:1])
        arguments = plan.Program(config, layout, place, False).arguments
        return {name: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree)) for name, tree in arguments.items()}

    live, stored = held(""), held("anywhere")
    qwen3 = 151_936 * 1024 + 28 * (1024 * 128 * (16 + 8 + 8 + 16) + 3 * 1024 * 3072)  # table, attention, MLPs
    assert live["text"] == pytest.approx(2 * qwen3, rel=1e-3)
    assert stored["text"] == 4 * 8 * 1024, "the empty prompt's states, fp32"
    more = stored["batch"] - live["batch"]
    assert more == 16 * 8 * (2 * 1024 - 4), "bfloat16 states of 16 prompts in place of int32 tokens"
