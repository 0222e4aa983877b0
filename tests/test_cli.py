"""The command line as a user meets it: in processes of its own, with signals."""

import dataclasses
import errno
import inspect
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from PIL import Image

from deco_jax import load_pretrained
from deco_jax.cli import exit_codes, load, main, make_parser
from deco_jax.errors import TransientError, UsageError
from deco_jax.sampling.settings import Sampling

ROOT = pathlib.Path(__file__).parents[1]
TINY = [
    "--config=configs/quickstart.py",
    *(
        f"--config.{setting}"
        for setting in (
            "model.patch_size=7",
            "model.width=16",
            "model.depth=2",
            "model.heads=2",
            "model.decoder_width=8",
            "model.decoder_depth=1",
            "data.batch_size=16",
            "optimizer.decay_steps=0",  # else the learning rate follows train.steps
            "train.log_every=1",
            "train.save_every=1000",
            "train.sample_every=0",
            "sample.steps=2",
        )
    ),
]


def deco(*args, env=None):
    command = [sys.executable, "-m", "deco_jax", *map(str, args)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False, env=env)


def start(*args):
    command = [sys.executable, "-m", "deco_jax", *map(str, args)]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


@pytest.mark.parametrize(
    "line",
    [
        "prepare --config=F --images --out=D",
        "prepare --config=F --teacher --out=D",
        "train --config=F --workdir=D",
        "sample --workdir=D --out=D",
        "sample --checkpoint=P --out=D",
        "spectra --checkpoint=P --out=D",
        "demo P",
        "plan --config=F --topology=T",
        "convert SRC DST",
    ],
)
def test_every_flag_has_the_name_of_a_parameter(line):
    """A command hands all its flags to its function; a renamed parameter would only fail when the command is used."""
    arguments = vars(make_parser().parse_args(line.split()))
    function = load(arguments["function"])
    ours = {"command", "debug", "run", "function"}  # what the command line itself needs
    ours |= {"as_json", "search"} if line.startswith("plan") else set()
    ours |= {"verify"} if "--teacher" in line else set()  # which is refused
    given = arguments.keys() - ours
    given |= {"overrides", "say"} if line.startswith("plan") else set()
    parameters = inspect.signature(function).parameters
    expected = {name for name, p in parameters.items() if p.kind is not inspect.Parameter.VAR_KEYWORD}
    if line.startswith("sample"):
        expected |= {field.name for field in dataclasses.fields(Sampling)}  # every one has a flag
    assert given == expected


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """A run of a million steps that got SIGTERM: (workdir, output, exit code)."""
    workdir = tmp_path_factory.mktemp("run")
    process = start("train", *TINY, f"--workdir={workdir}", "--config.train.steps=1000000")
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("step 5/"):
            process.send_signal(signal.SIGTERM)
            break
    rest, _ = process.communicate(timeout=120)
    return workdir, "".join(lines) + rest, process.returncode


def test_sigterm_saves_and_says_how_to_go_on(interrupted):
    workdir, output, code = interrupted
    assert code == 0, output
    (step,) = [int(p.name) for p in (workdir / "checkpoints").iterdir()]
    assert step >= 5
    assert f"Stopped by SIGTERM; step {step} is saved. The same command resumes from there." in output
    assert "Network: " in output and "transformer/layers/block/attention/qkv/kernel" in output, "no parameter table"


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_a_killed_run_resumes_exactly(interrupted, tmp_path, workers):
    """SIGKILL after a checkpoint, resume, and the same number of steps straight: bitwise equal weights."""
    args = ["train", *TINY, "--config.train.save_every=4", f"--config.data.workers={workers}"]
    process = start(*args, f"--workdir={tmp_path}/a", "--config.train.steps=100000")
    for line in process.stdout:
        if line.startswith("step 1"):
            break
    while not (tmp_path / "a/checkpoints/4/_CHECKPOINT_METADATA").exists():
        assert process.poll() is None, "the run ended by itself"
        time.sleep(0.05)
    time.sleep(0.5)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    saved = max(int(p.name) for p in (tmp_path / "a/checkpoints").iterdir() if p.name.isdigit())
    steps = f"--config.train.steps={saved + 8}"
    outputs = [deco(*args, "--workdir", tmp_path / run, steps) for run in ("a", "b")]
    assert [o.returncode for o in outputs] == [0, 0], outputs
    for weights in ("ema", "online"):
        a, b = (load_pretrained(str(tmp_path / run), weights)[1] for run in ("a", "b"))
        flat = [np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)]) for tree in (a, b)]
        np.testing.assert_array_equal(*flat)
    losses = [{e["step"]: e["loss"] for e in map(json.loads, (tmp_path / r / "metrics.jsonl").open())} for r in "ab"]
    common = losses[0].keys() & losses[1].keys()
    assert len(common) >= 8 and all(losses[0][k] == losses[1][k] for k in common)


@pytest.mark.slow
def test_the_second_start_of_a_run_compiles_no_step_again(tmp_path):
    env = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    env["JAX_LOG_COMPILES"] = "1"
    stored = []
    for steps in (2, 4):
        done = deco("train", *TINY, f"--workdir={tmp_path}", f"--config.train.steps={steps}", env=env)
        assert done.returncode == 0, done.stderr
        stored.append(sorted(p.name for p in (tmp_path / "compilation_cache").glob("jit_step-*-cache")))
        assert ("compilation cache hit for 'jit_step'" in done.stderr) == (steps == 4), done.stderr
    assert stored[0] == stored[1] and len(stored[0]) == 1


@pytest.mark.parametrize(
    "when, number",
    [("Network: ", signal.SIGINT), pytest.param("step 3/", signal.SIGTERM, marks=pytest.mark.slow)],
)
def test_signals_to_the_whole_process_group(interrupted, tmp_path, when, number):
    """What a terminal (Ctrl-C) and a scheduler do: data workers get the signal too, perhaps while they start."""
    process = start("train", *TINY, f"--workdir={tmp_path}", "--config.train.steps=1000000", "--config.data.workers=2")
    output = ""
    for line in process.stdout:
        output += line
        if line.startswith(when):
            os.killpg(process.pid, number)
            break
    rest, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output + rest
    assert "Traceback" not in rest and f"Stopped by {number.name}; " in rest
    saved = list((tmp_path / "checkpoints").iterdir())
    assert saved or "nothing was trained" in rest


def test_a_workdir_serves_one_run_at_a_time(tmp_path):
    process = start("train", *TINY, f"--workdir={tmp_path}", "--config.train.steps=1000000")
    for line in process.stdout:
        if line.startswith("Network: "):
            break
    second = deco("train", *TINY, f"--workdir={tmp_path}", "--config.train.steps=1000000")
    process.kill()
    process.communicate()
    assert second.returncode == 2 and "is in use by another run: process " in second.stderr


@pytest.mark.slow
def test_sample_draws_the_same_image_whatever_the_batch(interrupted, tmp_path):
    workdir = interrupted[0]
    base = ["sample", "--workdir", workdir, "--labels", "3,1-2", "--steps", 2, "--guidance", 2, "--seed", 7]
    first = deco(*base, "--num", 6, "--out", tmp_path / "a")
    assert first.returncode == 0, first.stderr
    assert "6 images and grid.png" in first.stdout
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    second = deco(*base, "--num", 5, "--batch-size", 2, "--out", tmp_path / "b", env=env)
    assert second.returncode == 0, second.stderr
    for i in range(5):
        a, b = (np.asarray(Image.open(tmp_path / f / f"{i:05d}.png")).astype(int) for f in "ab")
        assert a.shape == (28, 28, 3)
        assert np.abs(a - b).max() <= 1, f"image {i} depends on the batch or the devices"
    assert Image.open(tmp_path / "a" / "grid.png").size == (2 * 29 - 1, 3 * 29 - 1)  # a row for each label

    again = deco(*base, "--num", 6, "--shift", 2, "--out", tmp_path / "a")
    told = "already holds pictures that were drawn in another way (shift: 1.0 there, 2.0 here); choose another folder"
    assert again.returncode == 2 and told in again.stderr


@pytest.mark.parametrize(
    "args, message",
    [
        (["train", *TINY, "--workdir=W", "--config.optimizer.lrr=1"], "nearest: --config.optimizer.lr."),
        (["train", "--config=configs/none.py", "--workdir=W"], "configs/none.py is no file. Here are: configs/"),
        (["train", *TINY, "--workdir=ftp://host/run"], "ftp://host/run is no address that can be read; allowed: gs://"),
        (["train", *TINY, "--workdir=README.md"], "--workdir=README.md is no folder"),
        (["train", *TINY, "--workdir=W", "--config.seed=-1"], "seed=-1 must be from 0"),
        (["train", *TINY, "--workdir=W", "--config.sample.guidance=nan"], "guidance=nan must be a finite number"),
        (["train", *TINY, "--workdir=W", "--config.optimizer.lr=nan"], "optimizer.lr=nan must be 0 or more"),
        (["train", *TINY, "--workdir=W", "--config.train.steps=-5"], "train.steps=-5 must be 1 or more"),
        (
            ["train", *TINY, "--workdir=W", "--config.model.attention=cudnn"],
            "model.attention='cudnn' needs a GPU",
        ),
        (
            ["train", *TINY, "--workdir=W", "--config.loss.alignment_weight=0.5", "--config.loss.alignment_layer=1"],
            "data.image_size=28 is not divisible by 16, as the teacher needs; nearest: 16 and 32",
        ),
        (["train", *TINY, "--workdir=W", "--config.data.source=folder"], "data.path='' is no folder"),
        (["sample", "--workdir=W", "--out=O"], "does not exist; expected a workdir of `deco train`"),
    ],
)
def test_mistakes_are_one_line(args, message, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(ROOT)
    args = [a.replace("=W", f"={tmp_path}/w").replace("=O", f"={tmp_path}/o") for a in args]
    line = error_of(args, capfd)
    assert line.startswith("deco: error: ") and message in line
    assert not (tmp_path / "w").exists()


def error_of(args, capfd):
    """The one line that a command which exits with 2 writes to stderr, in this process."""
    with pytest.raises(SystemExit) as end:
        main(args)
    (line,) = capfd.readouterr().err.strip().splitlines()
    assert end.value.code == 2
    return line


def test_a_mistake_is_one_line_of_a_process_too(tmp_path):
    """Nothing that a library or the interpreter's end has to say stands beside it."""
    result = deco("train", *TINY, f"--workdir={tmp_path / 'w'}", "--config.data.source=folder")
    (line,) = result.stderr.strip().splitlines()
    assert result.returncode == 2 and line.startswith("deco: error: data.path='' is no folder")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--guidance", "nan"], "guidance=nan must be a finite number"),
        (["--labels", "10"], 'labels 10 do not exist; the network has the classes 0 to 9 and, by that name, "null"'),
        (["--labels", "5-3"], "--labels=5-3 is not understood"),
        (["--image-size", "27"], "--image-size=27 must be a positive multiple of the network's patch size, 7"),
        (["--image-size", "0"], "--image-size=0 is no image size"),
        (["--seed", str(2**40)], "--seed=1099511627776 must be from 0"),
        (["--steps", "-3"], "steps=-3 must be at least 1"),
        (["--num", "0"], "--num=0"),
        (["--last", "1"], "last=1.0 must be from 0 to below 1; 0 is 1/steps"),
    ],
)
def test_bad_sampling_arguments_are_one_line(interrupted, tmp_path, arguments, message, capfd):
    line = error_of(["sample", "--workdir", str(interrupted[0]), "--out", str(tmp_path / "out"), *arguments], capfd)
    assert line.startswith("deco: error: ") and message in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "error, code, message",
    [
        (UsageError("seed=-1 must be 0 or more."), 2, "deco: error: seed=-1 must be 0 or more.\n"),
        (TransientError("reading /x still fails"), 75, "deco: error: reading /x still fails. The same command goes on"),
        (
            OSError(errno.ESTALE, "Stale file handle"),
            75,
            "deco: error: OSError: [Errno 116] Stale file handle. The same",
        ),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_exit_codes(error, code, message, capsys):
    """A scheduler starts again what ends with 75, and nothing that ends with 2."""
    with pytest.raises(SystemExit) as end, exit_codes():
        raise error
    assert end.value.code == code and capsys.readouterr().err.startswith(message)


def test_a_bug_shows_its_traceback():
    with pytest.raises(ZeroDivisionError), exit_codes():
        _ = 1 / 0


def test_accelerators_that_are_not_there_are_not_asked(tmp_path):
    """Their libraries, which `deco plan` needs, would print lines that begin with ERROR or end in a traceback."""
    env = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
    result = deco("sample", "--workdir", tmp_path, "--out", tmp_path / "out", env=env)
    assert len(result.stderr.splitlines()) == 1 and "holds no finished checkpoint" in result.stderr
    code = "from deco_jax.parallel.hardware import skip_absent_accelerators as skip; skip(); import jax; jax.devices()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True)
    assert done.stderr == ""


def test_debug_shows_the_traceback(tmp_path):
    result = deco("sample", "--workdir", tmp_path / "none", "--out", tmp_path, "--debug")
    assert "Traceback" in result.stderr and "UsageError" in result.stderr
