"""Many images from a network, their grid, and the classifier that judges the digits."""

import itertools
import json
import pathlib
import re
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image, ImageSequence

from benchmarks.digits import DigitClassifier
from deco_jax.checkpoints import store
from deco_jax.cli import main
from deco_jax.config import default_config
from deco_jax.data.digits import Digits
from deco_jax.diffusion.flow import to_uint8
from deco_jax.generation import folder as module
from deco_jax.generation.batches import generate
from deco_jax.generation.folder import _grid_by_label, _missing
from deco_jax.pretrained.load import Pretrained, load_pretrained
from deco_jax.sampling.pictures import make_grid, save_png
from deco_jax.sampling.sample import image_noise, sample
from deco_jax.sampling.settings import Sampling
from deco_jax.storage import to_path
from tests.helpers import Golden

LIGHTNING = str(pathlib.Path(__file__).parents[1] / "golden" / "lightning_c2i.ckpt")
SAMPLE = ["sample", "--checkpoint", LIGHTNING, "--image-size=8", "--steps=1", "--dtype=float32"]


def pictures(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "grid.png"}


def test_a_grid_lays_images_out_row_by_row():
    images = np.arange(5, dtype=np.uint8)[:, None, None, None] * np.ones((5, 2, 3, 3), np.uint8)
    grid = make_grid(images, columns=3)
    assert grid.shape == (5, 11, 3)
    assert [grid[0, 0, 0], grid[0, 4, 0], grid[0, 8, 0], grid[3, 0, 0], grid[3, 4, 0]] == [0, 1, 2, 3, 4]
    assert (grid[2] == 255).all() and (grid[:, 3] == 255).all() and (grid[3:, 8:] == 255).all()


def test_a_picture_appears_whole(tmp_path):
    save_png(np.zeros((4, 4, 3), np.uint8), tmp_path / "new" / "a.png")
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["a.png"]


def test_a_grid_has_a_row_for_each_label():
    """Seven images of three labels, which take turns: labels 0, 1, 2, 0, 1, 2, 0."""
    images = np.arange(7, dtype=np.uint8)[:, None, None, None] * np.ones((7, 1, 1, 3), np.uint8)
    grid = _grid_by_label(images, 3)[::2, ::2, 0]
    np.testing.assert_array_equal(grid, [[0, 3, 6], [1, 4, 255], [2, 5, 255]])
    assert _grid_by_label(images, 7).shape == (1, 13, 3) and _grid_by_label(images, 1).shape == (1, 13, 3)


def test_images_come_in_order_whatever_the_batch():
    """Eight devices: eleven images in batches of 8, the last one filled up, and in one of 16."""
    g = Golden("deco_c2i")
    labels, settings = [*range(10), "null"], Sampling(steps=2, guidance=2.0)
    model, params = g.model(), g.params()
    small, large = (np.stack(list(generate(model, params, labels, 5, 8, size, settings))) for size in (3, 99))
    assert small.shape == (11, 8, 8, 3) and small.dtype == np.uint8
    assert np.abs(small.astype(int) - large).max() <= 1, "an image depends on its batch"
    noise = image_noise(jax.random.key(5), np.array([7]), (8, 8, 3))
    (alone,) = np.asarray(to_uint8(sample(model, params, [7], noise=noise, settings=settings)))
    assert np.abs(alone.astype(int) - small[7]).max() <= 1, "image 7 shows label 7, from the noise of number 7"
    assert np.abs(alone.astype(int) - small[6]).max() > 1


def test_the_judge_knows_digits_and_is_not_fooled_by_noise():
    """A judge that always agreed would make the quickstart's figure worthless."""
    data = default_config().data
    data.update(source="digits", image_size=28)
    digits = Digits(data)
    train, held_out = np.arange(0, 5000, 3), np.arange(1, 5000, 10)
    judge = DigitClassifier(digits.images_KxHxW[train], digits.labels_K[train])
    assert (judge(digits.images_KxHxW[held_out]) == digits.labels_K[held_out]).mean() > 0.93
    noise = np.random.default_rng(0).integers(0, 256, (200, 28, 28), np.uint8)
    labels = np.arange(200) % 10
    assert (judge(noise) == labels).mean() < 0.3


def test_the_numbers_that_are_missing():
    assert list(_missing(6, np.array([0, 1, 3]))) == [2, 4, 5]
    assert list(_missing(3, np.array([0, 1, 2]))) == []
    first = itertools.islice(_missing(10**9, np.array([1], np.int64)), 3)
    assert list(first) == [0, 2, 3], "a billion are counted, not listed"


def test_pictures_are_added_to_those_of_the_same_settings(tmp_path, capsys, monkeypatch):
    """And to no others; with --overwrite all are drawn anew, and none of the old ones stay between the new."""
    straight, out = tmp_path / "straight", tmp_path / "out"
    main([*SAMPLE, "--num=12", "--out", str(straight)])
    main([*SAMPLE, "--num=9", "--out", str(out)])
    (out / "00004.png").unlink()
    drawn, write = [], module._write
    monkeypatch.setattr(module, "_write", lambda image, path: drawn.append(path.name) or write(image, path))
    main([*SAMPLE, "--num=12", "--batch-size=1", "--out", str(out)])
    assert sorted(drawn) == ["00004.png", "00009.png", "00010.png", "00011.png"]
    assert "12 images of 8×8 pixels, at most 2.30kB, of which 8 are there already." in capsys.readouterr().out
    assert pictures(out).keys() == pictures(straight).keys()
    for name in ("grid.png", "00004.png"):
        a, b = (np.asarray(Image.open(folder / name)).astype(int) for folder in (out, straight))
        assert np.abs(a - b).max() <= 1, name
    before = pictures(out)
    with pytest.raises(SystemExit):
        main([*SAMPLE, "--num=12", "--out", str(out), "--seed=1", "--guidance=2"])
    told = (
        "holds pictures that were drawn in another way (seed: 0 there, 1 here; guidance: 1.0 there, 2.0 here); choose"
    )
    assert told in capsys.readouterr().err and pictures(out) == before
    main([*SAMPLE, "--num=2", "--out", str(out), "--seed=1", "--overwrite"])
    assert pictures(out).keys() == {"00000.png", "00001.png", "sample.json"}
    assert json.loads((out / "sample.json").read_text())["seed"] == 1
    (out / "sample.json").unlink()
    with pytest.raises(SystemExit):
        main([*SAMPLE, "--num=2", "--out", str(out), "--seed=1"])
    assert "already holds pictures; choose another folder or pass --overwrite" in capsys.readouterr().err


def test_pictures_of_earlier_versions_are_added_to(tmp_path, capsys):
    """Their sample.json has a side, and nothing about a negative label."""
    main([*SAMPLE, "--num=2", "--out", str(tmp_path)])
    file = tmp_path / "sample.json"
    how = json.loads(file.read_text())
    assert how["image_size"] == [8, 8] and how.pop("negative") is None
    file.write_text(json.dumps(how | {"image_size": 8}))
    main([*SAMPLE, "--num=3", "--out", str(tmp_path)])
    assert "of which 2 are there already" in capsys.readouterr().out
    file.write_text(json.dumps(how | {"image_size": 16}))
    with pytest.raises(SystemExit):
        main([*SAMPLE, "--num=3", "--out", str(tmp_path)])
    assert "in another way (image_size: [16, 16] there, [8, 8] here)" in capsys.readouterr().err
    del how["fingerprint"]
    file.write_text(json.dumps(how))
    main([*SAMPLE, "--num=3", "--out", str(tmp_path)])
    assert "of which 3 are there already" in capsys.readouterr().out
    file.write_text(json.dumps(how | {"fingerprint": "0" * 32}))  # of the file that was replaced
    with pytest.raises(SystemExit):
        main([*SAMPLE, "--num=3", "--out", str(tmp_path)])
    assert f"in another way (fingerprint: {'0' * 32} there" in capsys.readouterr().err


@pytest.mark.slow
def test_wide_pictures_led_away_from_a_class_and_their_ways(tmp_path, capsys):
    """trajectory.gif: the noise, two states on the way, the grid itself; the pictures are those without it."""
    wide = [*SAMPLE, "--image-size=8x16", "--steps=5", "--guidance=3", "--negative=2", "--labels=0,1", "--num=5"]
    for name, more in {"plain": [], "film": ["--trajectory=2", "--batch-size=1"]}.items():
        main([*wide, *more, "--out", str(tmp_path / name)])
    assert "5 images of 8×16 pixels" in capsys.readouterr().out
    assert json.loads((tmp_path / "film" / "sample.json").read_text())["negative"] == 2
    grid = np.asarray(Image.open(tmp_path / "film" / "grid.png")).astype(int)
    assert grid.shape == (17, 50, 3), "two rows of three, one pixel apart"
    assert np.abs(grid - np.asarray(Image.open(tmp_path / "plain" / "grid.png"))).max() <= 1
    film = Image.open(tmp_path / "film" / "trajectory.gif")
    frames = [np.asarray(frame.convert("RGB")).astype(int) for frame in ImageSequence.Iterator(film)]
    far = [np.abs(frame - grid).mean() for frame in frames]
    assert len(frames) == 4 and far[-1] < 8 and far == sorted(far, reverse=True), f"{far}: noise first, images last"
    model, params = load_pretrained(LIGHTNING, dtype="float32")
    noise = image_noise(jax.random.key(0), np.arange(5), (8, 16, 3))
    settings = Sampling(5, guidance=3.0)
    away = sample(model, params, [0, 1, 0, 1, 0], noise=noise, negative=[2] * 5, settings=settings)
    ours = np.asarray(Image.open(tmp_path / "plain" / "00003.png")).astype(int)
    assert np.abs(ours - np.asarray(to_uint8(away))[3]).max() <= 1


def test_classes_have_the_names_of_the_data(tmp_path, monkeypatch):
    """Of a checkpoint of ours; ImageNet's where they are WordNet ids, or where nobody says of a thousand classes."""
    config = default_config()
    config.model.num_classes = 3
    found = Pretrained("run", config, checkpoint=(tmp_path, 1))
    for names, expected in {
        ("cat", "dog"): ("cat", "dog"),
        ("n01440764", "own"): ("n01440764 tench, Tinca tinca", "own"),
        (): (),
    }.items():
        monkeypatch.setattr(store, "read_meta", lambda *_, names=names: {"class_names": list(names)})
        assert found.class_names == expected
    config.model.num_classes = 1000
    assert found.class_names[207] == "n02099601 golden retriever" and len(found.class_names) == 1000
    monkeypatch.setattr(store, "read_meta", lambda *_: {})
    assert found.class_names == Pretrained("file.ckpt", config).class_names, "a meta of before names were kept"


def test_ctrl_c_keeps_what_is_drawn_of_a_billion_images(tmp_path):
    """The first pictures come at once, though nobody could wait for the last."""
    command = [sys.executable, "-m", "deco_jax", *SAMPLE, "--num=1000000000", "--out", str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert "float32" in process.stdout.readline() and "at most 192GB" in process.stdout.readline()
    while not any(tmp_path.glob("*.png")):
        assert process.poll() is None, process.stderr.read()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    count = len(list(tmp_path.glob("*.png")))
    assert process.returncode == 130 and "Traceback" not in err
    told = re.search(rf"Stopped; ([\d,]+) of 1,000,000,000 images are in {tmp_path}. The same command goes on.", out)
    assert count - int(told[1].replace(",", "")) in (0, 1), "the signal may come between writing and counting"


def test_pictures_in_a_bucket(bucket, tmp_path, monkeypatch):
    """With one request in ten failing; and nothing is written beside the address, as ./gs:/bucket."""
    monkeypatch.chdir(tmp_path)
    main([*SAMPLE, "--num=3", f"--out={bucket.url}/drawn"])
    bucket.faults(share=0.1)
    main([*SAMPLE, "--num=5", f"--out={bucket.url}/drawn"])
    bucket.faults()
    main([*SAMPLE, "--num=5", "--out=here"])
    there, here = to_path(f"{bucket.url}/drawn"), tmp_path / "here"
    assert [p.name for p in tmp_path.iterdir()] == ["here"]
    assert sorted(p.name for p in there.iterdir()) == sorted(p.name for p in here.iterdir())
    for name in ("00003.png", "00004.png", "grid.png"):
        (tmp_path / "copy.png").write_bytes((there / name).read_bytes())
        a, b = (np.asarray(Image.open(file)).astype(int) for file in (tmp_path / "copy.png", here / name))
        assert np.abs(a - b).max() <= 1, name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--image-size=8x10"],
            "--image-size=8x10 must be a positive multiple of the network's patch",
        ),
        (["--image-size=8by8"], "--image-size=8by8 is no image size; write a side as 256, or height and width"),
        (["--labels=cat"], "--labels=cat is not understood"),
        (["--negative=0,1"], "--negative=0,1 says 2 labels; write one"),
        (["--trajectory=-1"], "--trajectory=-1 must be at least 0"),
        (["--guidance=-1"], "guidance=-1.0 must be a finite number, 0 or more; 1 is none"),
        (["--num=3000000000"], "--num=3000000000 must be at least 1, and at most 2147483647"),
        (["--out=/proc/none"], "/proc/none/sample.json cannot be written"),
        (["--out=ftp://host/out"], "ftp://host/out is no address that can be read"),
    ],
)
def test_mistakes_are_one_line_before_anything_is_compiled(tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.setattr(module, "generate", lambda *_: pytest.fail("was sampled"))
    with pytest.raises(SystemExit) as caught:
        main([*SAMPLE, "--num=1", f"--out={tmp_path}/out", *arguments])
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert caught.value.code == 2 and message in line


@pytest.mark.parametrize("name", ["nothere", "readonly"])
def test_buckets_that_take_nothing_are_one_line(bucket, capsys, monkeypatch, name):
    monkeypatch.setattr(module, "generate", lambda *_: pytest.fail("was sampled"))
    with pytest.raises(SystemExit) as caught:
        main([*SAMPLE, "--num=1", f"--out=gs://{name}/out"])
    assert caught.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("deco: error")]
    assert f"gs://{name}/out/sample.json cannot be written: " in line
