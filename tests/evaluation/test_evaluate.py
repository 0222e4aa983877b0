"""Are the numbers those of a direct computation, whatever kills and processes are in between, and is bad input refused?

All with EfficientNet-Lite0, whose weights are installed, on pictures of 16².
"""

import functools
import json
import pathlib
import signal
import socket
import time

import jax
import numpy as np
import pytest
import scipy.linalg
from PIL import Image

from deco_jax import cli, storage
from deco_jax.encoders.features import load_features
from deco_jax.errors import UsageError
from deco_jax.evaluation import extract, measure
from deco_jax.evaluation.evaluate import evaluate
from deco_jax.evaluation.stats import compute_stats
from tests.helpers import GOLDEN, programs

LIGHTNING, SIDE = str(GOLDEN / "lightning_c2i.ckpt"), 16
DRAW = {"image_size": str(SIDE), "steps": 2, "dtype": "float32", "batch_size": 8}


def blobs(seed, number):
    """Pictures of a bright spot on noise, whose place and colour differ."""
    rng = np.random.default_rng(seed)
    places, y, x = rng.uniform(3, SIDE - 3, (number, 2)), *np.mgrid[:SIDE, :SIDE]
    near = np.exp(-((y - places[:, :1, None]) ** 2 + (x - places[:, 1:, None]) ** 2) / 20)
    colours = rng.integers(60, 256, (number, 1, 1, 3))
    return np.clip(near[..., None] * colours + rng.integers(0, 30, (number, SIDE, SIDE, 3)), 0, 255).astype(np.uint8)


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    """And a network that is compiled once for all tests."""
    monkeypatch.setattr(extract, "SHARD_IMAGES", 8)
    monkeypatch.setattr(extract, "load_features", cached_features)


cached_features = functools.cache(load_features)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """real.npz and drawn.npz, and the reference of the real ones; no test changes them."""
    root = tmp_path_factory.mktemp("made")
    np.savez(root / "real.npz", blobs(0, 30))
    np.savez_compressed(root / "drawn.npz", blobs(1, 21))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(extract, "SHARD_IMAGES", 8)
        compute_stats(None, f"{root}/real.npz", f"{root}/ref", "efficientnet", batch_size=8)
    return root


def metrics_of(folder):
    return json.loads((folder / "metrics.json").read_text())["metrics"]


def run(made, out, source=None, **changes):
    arguments = {"reference": f"{made}/ref", "features": "efficientnet", "batch_size": 8} | changes
    evaluate(str(source or made / "drawn.npz"), str(out), **arguments)


def assert_close(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name in theirs:
        assert ours[name] == pytest.approx(theirs[name], rel=1e-5, abs=1e-8), name


def directly(images):
    """Features of all images in one go, float64, and no code of `evaluation` or `metrics`."""
    network = load_features("efficientnet")
    return np.asarray(jax.jit(network.apply)(network.params, images)["pool"], np.float64)


def balls(of, points):
    """For each point, whether it is within the ball of some vector of `of`, as far as that one's third neighbour."""
    own = np.sort(np.linalg.norm(of[:, None] - of[None], axis=-1), axis=1)[:, 3]  # the first is itself
    return (np.linalg.norm(points[:, None] - of[None], axis=-1) <= own).any(axis=1)


def test_the_numbers_are_those_of_a_direct_computation(made, tmp_path, capsys):
    """Against scipy and numpy in float64 on the features of all images at once, without shards."""
    run(made, tmp_path / "e", batch_size=5)
    real, drawn = directly(blobs(0, 30)), directly(blobs(1, 21))
    a, b = np.cov(real.T), np.cov(drawn.T)
    distance = ((real.mean(0) - drawn.mean(0)) ** 2).sum() + np.trace(a + b) - 2 * np.trace(scipy.linalg.sqrtm(a @ b))
    found = json.loads((tmp_path / "e/metrics.json").read_text())
    assert found["metrics"]["fd_efficientnet"] == pytest.approx(distance.real, rel=1e-4)
    assert found["metrics"]["precision_efficientnet"] == pytest.approx(balls(real, drawn).mean())
    assert found["metrics"]["recall_efficientnet"] == pytest.approx(balls(drawn, real).mean())
    assert 0 < balls(real, drawn).mean() < 1, "with other pictures the shares would say more"
    assert "fid" not in found["metrics"], "only Inception's distance has this name"
    assert (found["images"], found["image_size"], found["settings"]) == (21, [SIDE, SIDE], None)
    printed = capsys.readouterr().out
    row = (tmp_path / "e/metrics.md").read_text()
    assert row in printed and found["line"] in printed and "21 images are fewer than the 320 features" in printed
    assert f"{found['metrics']['fd_efficientnet']:.4f}" in row.splitlines()[2]
    for part in ("21 images of 16×16", found["images_hash"], "drawn by others", found["reference"]["hash"], "deco_jax"):
        assert part in found["line"]
    names = {p.name for p in (tmp_path / "e").iterdir()}
    assert names == {".lease", "evaluation.json", "metrics.json", "metrics.md"}, "features are removed at the end"


def test_a_folder_and_an_array_of_the_same_images_give_the_same(made, tmp_path):
    (tmp_path / "pictures").mkdir()
    for i, image in enumerate(blobs(1, 21)):
        Image.fromarray(image).save(tmp_path / f"pictures/{i:02}.png")
    run(made, tmp_path / "array")
    run(made, tmp_path / "folder", tmp_path / "pictures")
    assert_close(metrics_of(tmp_path / "folder"), metrics_of(tmp_path / "array"))
    hashes = {json.loads((tmp_path / k / "metrics.json").read_text())["images_hash"] for k in ("array", "folder")}
    assert len(hashes) == 1
    run(made, tmp_path / "first", num=10)
    assert json.loads((tmp_path / "first/metrics.json").read_text())["images"] == 10


def test_images_in_the_reference_stand_for_vectors(made, tmp_path):
    """As in the ADM suite's files, which have pictures for precision and recall, and no features."""
    with np.load(made / "ref/reference.npz") as file:
        moments = {name: file[name] for name in ("efficientnet/mu", "efficientnet/sigma")}
    np.savez(tmp_path / "adm.npz", blobs(0, 30), **moments)
    own = tmp_path / "adm/reference"  # of the user, in the folder for the results
    own.mkdir(parents=True)
    (tmp_path / "adm.npz").rename(own / "adm.npz")
    for _ in range(2):
        run(made, tmp_path / "adm", reference=f"{own}/adm.npz")
    run(made, tmp_path / "ours")
    assert_close(metrics_of(tmp_path / "adm"), metrics_of(tmp_path / "ours"))
    names = {p.name for p in (tmp_path / "adm").iterdir()}
    assert names == {".lease", "evaluation.json", "metrics.json", "metrics.md", "reference"} and list(own.iterdir())


def test_a_network_is_drawn_from_and_measured(made, tmp_path, capsys):
    run(made, tmp_path / "e", LIGHTNING, num=12, seed=3, guidance=2.0, **DRAW)
    found = json.loads((tmp_path / "e/metrics.json").read_text())
    assert found["settings"]["seed"] == 3 and found["settings"]["guidance"] == 2.0
    for part in ("guidance 2 on (0, 1]", "seed 3", "euler 2 steps", found["settings"]["weights_digest"], "ema weights"):
        assert part in found["line"]
    run(made, tmp_path / "again", tmp_path / "e/samples/samples.npz")
    assert_close(metrics_of(tmp_path / "again"), found["metrics"])
    assert json.loads((tmp_path / "again/metrics.json").read_text())["line"] == found["line"], "the settings come along"

    capsys.readouterr()
    before = (tmp_path / "e/metrics.json").stat().st_mtime_ns
    run(made, tmp_path / "e", LIGHTNING, num=12, seed=3, guidance=2.0, **DRAW)
    assert "is done:" in capsys.readouterr().out and (tmp_path / "e/metrics.json").stat().st_mtime_ns == before
    with pytest.raises(UsageError, match=r"something else \(seed: 3 there, 4 here; guidance: 2.0 there, 1.0 here\)"):
        run(made, tmp_path / "e", LIGHTNING, num=12, seed=4, guidance=1.0, **DRAW)


def test_what_does_not_fit_is_refused_before_anything_is_drawn(made, tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "generate_samples", lambda *_, **__: pytest.fail("drawn"))
    (tmp_path / "other").mkdir()
    (tmp_path / "other/metrics.json").write_text("{}")
    out = tmp_path / "e"
    for message, source, changes in (
        (r"of images of 16×16 pixels, those of .* have 32×24; they must be eq", LIGHTNING, {"image_size": "32x24"}),
        (r"have 256×256; they must", LIGHTNING, {"image_size": None}),
        (r"gone.npz does not exist", LIGHTNING, {"reference": f"{tmp_path}/gone.npz"}),
        (r"--features=fid: 'fid' is not known; allowed: inception, dinov2, e", LIGHTNING, {"features": "fid"}),
        (r"--features=efficientnet,efficientnet names .* twice", LIGHTNING, {"features": "efficientnet,efficientnet"}),
        (r"--feature-weights=x must be NAME=FILE", LIGHTNING, {"feature_weights": ["x"]}),
        (r"solver='magic'", LIGHTNING, {"solver": "magic"}),
        (r"--num=1 must be at least 2", LIGHTNING, {"num": 1}),
        (r"--batch-size=0 must be", LIGHTNING, {"batch_size": 0}),
        (r"does not exist; expected a workdir", tmp_path / "nothing", {}),
    ):
        with pytest.raises(UsageError, match=message):
            run(made, out, source, **{"num": 12, **DRAW, **changes})
        assert not out.exists(), message
    for message, changes in (
        (r"--guidance, --last is for networks", {"guidance": 2.0, "last": 0.1}),
        (r"--num=22 is more than the 21 images", {"num": 22}),
        (r"--labels is for networks", {"labels": "0-4"}),
    ):
        with pytest.raises(UsageError, match=message):
            run(made, out, **changes)
    with pytest.raises(UsageError, match=r"holds metrics.json, and no evaluation.json that says of what"):
        run(made, tmp_path / "other")


def start(run_program, made, out, seconds=0.0, **environment):
    command = [pathlib.Path(__file__).parent / "small_shards.py", "evaluate", made / "drawn.npz", "--out", out]
    command += ["--reference", made / "ref", "--features", "efficientnet", "--batch-size", "4"]
    return run_program(*command, **{"DECO_TEST_SECONDS": str(seconds)} | environment)


def end_of(process):
    output, _ = process.communicate(timeout=120)
    return process.returncode, output


def wait_for(path):
    for _ in range(900):
        if path.exists():
            return
        time.sleep(0.1)
    raise AssertionError(f"{path} did not come")


def test_a_killed_evaluation_goes_on(made, tmp_path):
    """kill −9 after the first of three shards: the second start keeps it, and the numbers are those of one go."""
    run(made, tmp_path / "whole", batch_size=4)
    network = load_features("efficientnet")
    folder = tmp_path / f"cut/features/efficientnet-{network.digest}"
    with programs() as run_program:
        process = start(run_program, made, tmp_path / "cut", seconds=0.8)
        wait_for(folder / "00000.npz")
        process.send_signal(signal.SIGKILL)
        assert end_of(process)[0] == -signal.SIGKILL
    assert not (tmp_path / "cut/metrics.json").exists()
    before = (folder / "00000.npz").stat().st_mtime_ns
    seen, remove = [], measure.remove
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            measure, "remove", lambda f: (seen.extend(p.stat().st_mtime_ns for p in f.rglob("00000.npz")), remove(f))
        )
        run(made, tmp_path / "cut", batch_size=4)
    assert seen == [before], "a shard that was there was made again"
    assert_close(metrics_of(tmp_path / "cut"), metrics_of(tmp_path / "whole"))


@pytest.mark.slow
def test_two_processes_give_the_numbers_of_one(made, tmp_path):
    run(made, tmp_path / "one", batch_size=4)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        settings = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free.getsockname()[1]}", "JAX_NUM_PROCESSES": "2"}
    with programs() as run_program:
        both = [start(run_program, made, tmp_path / "two", **settings, JAX_PROCESS_ID=str(k)) for k in range(2)]
        ends = [end_of(process) for process in both]
    assert [code for code, _ in ends] == [0, 0], ends
    assert "FD (efficientnet)" in ends[0][1] and "FD (efficientnet)" not in ends[1][1], "process 0 reports"
    assert_close(metrics_of(tmp_path / "two"), metrics_of(tmp_path / "one"))


@pytest.mark.slow
def test_a_stopped_evaluation_says_what_is_missing_and_goes_on(made, tmp_path):
    with programs() as run_program:
        process = start(run_program, made, tmp_path / "e", seconds=0.8)
        wait_for(next_shard := tmp_path / f"e/features/efficientnet-{load_features('efficientnet').digest}/00000.npz")
        process.send_signal(signal.SIGTERM)
        code, output = end_of(process)
    assert (code, "2 shards are missing in" in output, next_shard.exists()) == (0, True, True), output
    run(made, tmp_path / "e", batch_size=4)
    run(made, tmp_path / "whole", batch_size=4)
    assert_close(metrics_of(tmp_path / "e"), metrics_of(tmp_path / "whole"))


def test_all_in_a_bucket(made, tmp_path, bucket, monkeypatch):
    """Images, reference and results; nothing is left there but results and claims."""
    monkeypatch.setenv("HOME", str(tmp_path))  # copies of this host
    root = storage.to_path(f"{bucket.url}/evaluation")
    for name in ("drawn.npz", "real.npz"):
        storage.write_bytes(root / name, (made / name).read_bytes())
    compute_stats(None, f"{root}/real.npz", f"{root}/ref", "efficientnet", batch_size=8)
    run(made, f"{root}/e", f"{root}/drawn.npz", reference=f"{root}/ref")
    run(made, tmp_path / "here")
    assert_close(metrics_of(root / "e"), metrics_of(tmp_path / "here"))
    names = {p.name for p in (root / "e").iterdir()} - {".lease"}
    assert names == {"evaluation.json", "metrics.json", "metrics.md"}


def test_the_command_line(made, tmp_path, capsys):
    arguments = ["evaluate", f"{made}/drawn.npz", f"--out={tmp_path}/e", f"--reference={made}/ref"]
    cli.main([*arguments, "--features=efficientnet", "--num=9"])
    assert "metrics.json and metrics.md are in" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        cli.main([*arguments, "--features=efficientnet", "--num=10"])
    assert ended.value.code == 2
    assert "evaluates something else (num: 9 there, 10 here)" in capsys.readouterr().err
