"""What the page draws is what `deco sample` draws; its files say how; what may not be asked for is named."""

import dataclasses
import json
import pathlib

import numpy as np
import pytest
from PIL import Image, ImageSequence

from deco_jax.cli import main
from deco_jax.demo.studio import FRAMES, Drawn, open_studio, read_settings, save_drawn
from deco_jax.demo.wishes import Fields, Limits
from deco_jax.errors import UsageError
from deco_jax.generation import folder as sampled

pytest.importorskip("tokenizers")
CLASS = Fields("3", "", 2, 7, 14, 28, False, 4, 2.5, 0.2, 0.9, "euler_sde", 2.0)
TEXT = Fields("a red circle", "a blue circle", 2, 7, 16, 24, False, 5, 3.0, 0.0, 1.0, "adams2", 3.0)


@pytest.fixture(scope="module", params=["class", "text"])
def opened(request, runs):
    """(studio, fields that it fulfils)."""
    return open_studio(runs[request.param]), {"class": CLASS, "text": TEXT}[request.param]


@pytest.fixture(scope="module")
def classes(runs):
    return open_studio(runs["class"], limits=Limits(images=3, side=60))


def finish(studio, fields):
    *steps, drawn = studio.draw(studio.read(fields))
    assert isinstance(drawn, Drawn)
    return steps, drawn


@pytest.mark.slow
def test_images_are_those_of_deco_sample(opened, runs, tmp_path):
    """All settings are others than the run's own; the downloaded file says what sample.json says."""
    studio, fields = opened
    steps, drawn = finish(studio, fields)
    assert steps == list(range(1, fields.steps + 1)) and drawn.film is None
    paths, film = save_drawn(drawn, tmp_path)
    assert film is None and [path.name for path in paths] == ["seed7-0.png", "seed7-1.png"]
    asked = ["--prompt", fields.shown] if studio.is_text else ["--labels", fields.shown]
    asked += ["--negative", fields.negative] if fields.negative else []
    main([
        "sample", "--workdir", runs["text" if studio.is_text else "class"], "--out", str(tmp_path / "out"), "--num=2",
        "--seed=7", *asked, f"--image-size={fields.height}x{fields.width}", f"--steps={fields.steps}",
        f"--guidance={fields.guidance}", "--guidance-interval", str(fields.low), str(fields.high),
        f"--solver={fields.solver}", f"--shift={fields.shift}",
    ])  # fmt: skip
    for number, path in enumerate(paths):
        with Image.open(path) as ours, Image.open(tmp_path / "out" / f"{number:05}.png") as theirs:
            assert ours.size == (fields.width, fields.height)
            assert np.abs(np.asarray(ours, int) - np.asarray(theirs, int)).max() <= 1
        told, expected = read_settings(path), json.loads((tmp_path / "out" / sampled.SETTINGS).read_text())
        assert told.pop("number") == number
        assert expected.pop("source").endswith(told.pop("source"))
        assert told == expected
    with Image.open(paths[0]) as picture:
        assert picture.text["Title"] == fields.shown
    assert "/" not in read_settings(paths[0])["source"].split("/checkpoints/")[0], "folders above are nobody's business"


def test_a_film_begins_with_noise_and_ends_with_the_images(classes, tmp_path):
    """Of many steps no more frames than people want to wait for."""
    _, drawn = finish(classes, dataclasses.replace(CLASS, film=True))
    assert drawn.film.shape == (5, 2, 14, 28, 3)
    np.testing.assert_array_equal(drawn.film[-1], drawn.images)
    assert 60 < drawn.film[0].std() < 110, "standard normal noise, clipped at one deviation"
    _, path = save_drawn(drawn, tmp_path)
    with Image.open(path) as film:
        assert film.size == (28 * 2 + 1, 14) and len(list(ImageSequence.Iterator(film))) == 5
    _, drawn = finish(classes, dataclasses.replace(CLASS, steps=60, film=True))
    assert len(drawn.film) == 21 <= FRAMES + 1


def test_the_page_begins_as_the_run_draws(opened):
    studio, _ = opened
    assert studio.trained.guidance == (4.0 if studio.is_text else 2.0) and studio.trained.shift == 3.0
    assert studio.side == (16 if studio.is_text else 28)


def test_classes_have_names(classes):
    """As in the data; WordNet's numbers are for nobody to read."""
    named = dataclasses.replace(classes, class_names=("n01440764 tench, Tinca tinca", "1", "cat"))
    assert named.classes()[:4] == [("0 tench, Tinca tinca", "0"), ("1", "1"), ("2 cat", "2"), ("3", "3")]
    assert named.read(dataclasses.replace(CLASS, shown="Tinca  TINCA")).request == 0
    assert named.read(dataclasses.replace(CLASS, negative="cat")).negative == 2
    with pytest.raises(UsageError, match=r"class: no class is called 'tensh'; the nearest are tench \(0\)"):
        named.read(dataclasses.replace(CLASS, shown="tensh"))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"shown": " "}, "The class is empty; write a number or a name"),
        ({"shown": None}, "a prompt is text; None is none"),
        ({"shown": "10"}, "labels 10 do not exist; the network has the classes 0 to 9"),
        ({"shown": "1-3"}, "class=1-3 says 3 labels; write one"),
        ({"negative": "11"}, "labels 11 do not exist"),
        ({"images": 4}, "images=4 must be a whole number from 1 to 3"),
        ({"images": 1.5}, "images=1.5 must be a whole number"),
        ({"seed": -1}, "seed=-1 must be a whole number from 0 to 4294967295"),
        ({"seed": None}, "seed= must be a number"),
        ({"seed": 1e300}, "seed=1e\\+300 must be a whole number from"),
        ({"height": 20}, "height and width=20x28 must be a positive multiple of the network's patch size, 7"),
        ({"width": 63}, "width=63 must be a whole number from 1 to 60"),
        ({"steps": 251}, "steps=251 must be a whole number from 1 to 250"),
        ({"steps": float("nan")}, "steps=nan must be a number"),
        ({"steps": True}, "steps=True must be a number"),
        ({"guidance": -1}, "guidance=-1 must be a finite number"),
        ({"guidance": "much"}, "guidance=much must be a number"),
        ({"low": 0.95}, r"guidance_interval=\(0.95, 0.9\) must be"),
        ({"shift": 0}, "shift=0 must be positive"),
        ({"solver": "magic"}, "solver='magic' is not known; allowed: euler,"),
    ],
)
def test_what_may_not_be_asked_for_is_named(classes, change, message):
    with pytest.raises(UsageError, match=message):
        classes.read(dataclasses.replace(CLASS, **change))


def test_prompts_are_checked(runs):
    studio = open_studio(runs["text"])
    for shown, message in (
        ("", "The prompt is empty; write what the images shall show"),
        ("a" * 10_001, "has 10,001 characters; at most 10,000 are read"),
        ("a\0b", "control character"),
    ):
        with pytest.raises(UsageError, match=message):
            studio.read(dataclasses.replace(TEXT, shown=shown))
    long = studio.read(dataclasses.replace(TEXT, shown="a red " * 10))
    assert "more than 12 tokens" in studio.warnings(long)[0] and not studio.warnings(studio.read(TEXT))


def test_what_cannot_be_opened(runs, tmp_path):
    for arguments, message in (
        ({"text_encoder": "minilm"}, "--text-encoder=minilm is for networks that are told text"),
        ({"limits": Limits(side=6)}, "--max-side=6 must be at least the network's patch size, 7"),
        ({"weights": "best"}, "weights='best' is not known"),
    ):
        with pytest.raises(UsageError, match=message):
            open_studio(runs["class"], **arguments)
    with pytest.raises(UsageError, match="--max-images=0 must be at least 1"):
        Limits(images=0)
    Image.new("RGB", (2, 2)).save(tmp_path / "other.png")
    with pytest.raises(UsageError, match="does not say how it was drawn"):
        read_settings(pathlib.Path(tmp_path / "other.png"))


def test_an_image_that_is_not_finite_is_no_image(classes):
    broken = dataclasses.replace(classes, params={**classes.params, "decoder": _nan(classes.params["decoder"])})
    with pytest.raises(UsageError, match="An image is not finite; try less guidance, or start the page with"):
        finish(broken, CLASS)


def _nan(tree):
    return {name: _nan(value) if isinstance(value, dict) else value * np.nan for name, value in tree.items()}
