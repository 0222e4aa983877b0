"""The text quickstart's measure: captions say what questions leave, and the judge of images is not easily pleased."""

import importlib
import json
import pathlib

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image, ImageColor, ImageDraw

from deco_jax.config import default_config
from deco_jax.data.webdataset import WebDataset
from deco_jax.errors import UsageError

ROOT = pathlib.Path(__file__).parents[1]
CSS = {"green": "lime"}  # the others are called as in CSS


@pytest.fixture
def modules(monkeypatch):
    """benchmarks/shapes_data.py and benchmarks/shapes.py."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("shapes_data"), importlib.import_module("shapes")


# --- captions


def test_questions_leave_what_their_answers_say(modules):
    data, _ = modules
    every = {(color, shape) for color in data.COLORS for shape in data.SHAPES}
    red = {("red", shape) for shape in data.SHAPES}
    for question, answer, left in [
        ("is there a red shape?", "yes", red),
        ("is there a red shape?", "no", every - red),
        ("is there not a red shape in the image?", "no", red),
        ("is no red shape present?", "yes", every - red),
        ("what color is the shape?", "red", red),
        ("what is the red shape?", "circle", {("red", "circle")}),
        ("what color is the circle?", "red", {("red", "circle")}),
        ("does the image not contain a circle?", "yes", {pair for pair in every if pair[1] != "circle"}),
    ]:
        assert data.possible([(question, answer)]) == left, question
    assert data.possible([("is a circle present?", "yes"), ("is there a red shape?", "yes")]) == {("red", "circle")}
    assert data.possible([]) == every
    with pytest.raises(ValueError, match="how many shapes"):
        data.possible([("how many shapes are there?", "2")])


def test_captions_are_true_of_the_real_images(modules):
    """Colours are compared with CSS's, of which the images were made; nothing else tells us what they show."""
    data, shapes = modules
    folder = _real_data(data)
    for split, certain, unclear in (("train", 3578, 422), ("test", 888, 112)):
        images, left_out = data.read_captioned(folder / split)
        assert (len(images), left_out) == (certain, unclear)
        for image in images[::9]:
            pixels = shapes.Decoder.from_config(_config(64))(image.content).reshape(-1, 3)
            named = ImageColor.getrgb(CSS.get(image.pair[0], image.pair[0]))
            assert (pixels == named).all(axis=1).sum() > 8, f"{split} image {image.number} is not {image.pair[0]}"


def test_training_sees_no_held_out_pair_and_no_held_out_wording(modules, tmp_path, monkeypatch):
    """From a made-up package: what the shards hold, as training reads them; the same bytes when made again."""
    data, _ = modules
    folder = tmp_path / "package"
    (folder / "train" / "images").mkdir(parents=True)
    pairs = [*data.PAIRS, ("red", "circle")]
    questions = [["what color is the shape?", pair[0], k] for k, pair in enumerate(pairs)]
    questions += [["what shape is present?", pair[1], k] for k, pair in enumerate(pairs[:-1])]
    (folder / "train" / "questions.json").write_text(json.dumps(questions))
    for k, pair in enumerate(pairs):
        Image.fromarray(_draw(*pair, k)).save(folder / "train" / "images" / f"{k}.png")
    monkeypatch.setattr(data, "installed_folder", lambda: folder)
    data.main(str(tmp_path / "out"))
    data.main(str(tmp_path / "again"))
    for tar in sorted((tmp_path / "out").glob("*.tar")):
        assert tar.read_bytes() == (tmp_path / "again" / tar.name).read_bytes()
    counts = json.loads((tmp_path / "out" / data.DONE).read_text())
    kept = len(data.PAIRS) - len(data.UNSEEN_PAIRS)
    assert counts == {
        "samples": kept * data.REPEATS,
        "images": kept,
        "questions_leave_several_pairs": 1,
        "of_unseen_pairs": len(data.UNSEEN_PAIRS),
    }
    source = WebDataset(_config(64, str(tmp_path / "out")))
    assert len(source) == counts["samples"]
    said = {wording.format(color=c, shape=s): (c, s) for wording in data.WORDINGS for c, s in data.PAIRS}
    for k in range(len(source)):
        record = source.load(k)
        color, shape = said[record["caption"]]  # a held-out wording would be no key
        number = int(source.describe(k).rpartition(" ")[2].partition("_")[0])
        assert pairs[number] == (color, shape) not in data.UNSEEN_PAIRS
        np.testing.assert_array_equal(record["image"], _draw(color, shape, number))
    assert not set(data.WORDINGS) & set(data.UNSEEN_WORDINGS)
    unseen = np.array(data.UNSEEN_PAIRS)
    assert set(data.COLORS) == {c for c, s in data.PAIRS if (c, s) not in data.UNSEEN_PAIRS}
    assert all((unseen[:, 0] == color).sum() <= 1 for color in data.COLORS), "two shapes of each colour are seen"


def test_shards_that_are_complete_stay(modules, tmp_path, monkeypatch, capsys):
    data, _ = modules
    (tmp_path / data.DONE).write_text("{}")
    monkeypatch.setattr(data, "installed_folder", None)
    data.main(str(tmp_path))
    assert "is complete" in capsys.readouterr().out


def test_a_missing_package_is_named(modules, monkeypatch):
    data, _ = modules
    monkeypatch.setattr(data, "PACKAGE", "no_such_package")
    with pytest.raises(UsageError, match="pip install --no-deps easy-vqa"):
        data.installed_folder()


# --- the reader of images


@pytest.fixture
def reader(modules):
    data, shapes = modules
    drawn = [(_small(_draw(*pair, seed)), pair) for seed in range(12) for pair in data.PAIRS]
    images, pairs = zip(*drawn, strict=True)
    return shapes.ShapeReader(np.stack(images), list(pairs))


def test_the_reader_tells_shapes_that_it_has_not_seen(modules, reader):
    data, shapes = modules
    images = np.stack([_small(_draw(*pair, seed)) for seed in range(50, 54) for pair in data.PAIRS])
    noisy = np.clip(images + np.random.default_rng(0).normal(0, 8, images.shape), 0, 255).astype(np.uint8)
    for what, shown in (("clean", images), ("noisy", noisy)):
        right = shapes._right(reader, shown, [*data.PAIRS] * 4)
        assert right[:, 0].mean() == 1, what
        assert right[:, 1].mean() > 0.97, what


def test_the_reader_denies_what_is_not_asked_for(modules, reader):
    """A judge that always agreed would make the figure worthless."""
    data, shapes = modules
    images = np.stack([_small(_draw(*pair, 60)) for pair in data.PAIRS])
    others = [(data.COLORS[data.COLORS.index(c) - 1], data.SHAPES[data.SHAPES.index(s) - 1]) for c, s in data.PAIRS]
    assert not shapes._right(reader, images, others).any()


@pytest.mark.parametrize("kind", ["nothing", "noise", "two shapes", "a cross", "between two colours"])
def test_the_reader_sees_nothing_in(kind, reader):
    circle, cross = _draw("red", "circle", 61), np.full((64, 64, 3), 240)
    cross[16:48, 28:36] = cross[28:36, 16:48] = (255, 0, 0)
    image = {
        "nothing": np.full((64, 64, 3), 240, np.uint8),
        "noise": np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8),
        "two shapes": np.minimum(_draw("red", "circle", 61, (18, 18)), _draw("red", "circle", 61, (46, 46))),
        "a cross": cross,
        "between two colours": np.where((circle == (255, 0, 0)).all(-1)[..., None], (255, 127, 0), circle),
    }[kind].astype(np.uint8)
    colors, shapes = reader(_small(image)[None])
    assert kind == "a cross" or colors == -1
    assert kind == "between two colours" or shapes == -1


def test_the_reader_is_right_about_real_images(modules):
    """So what it says of drawn ones is about them."""
    data, shapes = modules
    folder = _real_data(data)
    known, test = (data.read_captioned(folder / split)[0] for split in ("train", "test"))
    decoder = shapes.Decoder.from_config(_config(32))
    reader = shapes.ShapeReader(shapes._real(known[:600], decoder), [image.pair for image in known[:600]])
    right = shapes._right(reader, shapes._real(test[:200], decoder), [image.pair for image in test[:200]])
    assert right[:, 0].mean() == 1 and right[:, 1].mean() > 0.98


# --- what is told


def test_shares_are_told_apart(modules):
    _, shapes = modules
    right = np.array([[True, True], [True, False], [True, False], [False, True]])
    assert shapes._shares(right) == {"colors": 0.75, "shapes": 0.5, "both": 0.25}


def test_the_picture_shows_every_pair_where_it_belongs(modules):
    """Each image is one grey; framed are pairs that training has not seen."""
    data, shapes = modules
    asked = [(wording, pair) for wording in data.UNSEEN_WORDINGS for pair in data.PAIRS]
    greys = np.arange(len(asked)) % 251
    picture = shapes.picture(
        np.broadcast_to(greys[:, None, None, None], (len(asked), 32, 32, 3)).astype(np.uint8), asked
    )
    size = 32 * shapes.SCALE
    cell = size + shapes.GAP
    for (wording, (color, shape)), grey in zip(asked, greys, strict=True):
        if wording == shapes.SHOWN:
            x, y = 70 + data.COLORS.index(color) * cell, 40 + data.SHAPES.index(shape) * cell
            assert (picture[y : y + size, x : x + size] == grey).all()
            framed = tuple(picture[y - 1, x]) == (220, 0, 160)
            assert framed == ((color, shape) in data.UNSEEN_PAIRS), (color, shape)
    assert all(len(row) == len(data.UNSEEN_PAIRS) for row in shapes.BELOW)


def test_a_finished_run_is_measured_once_and_a_weak_one_is_told(modules, tmp_path, monkeypatch, capsys):
    _, shapes = modules
    part, measured = {"colors": 0.95, "shapes": 0.7, "both": 0.66}, []

    def measure(workdir):
        measured.append(workdir)
        (tmp_path / "shapes.png").touch()
        return {**part, "seen_pairs": part, "unseen_pairs": part, "real_images": part}

    config = default_config()
    config.train.steps = 7
    monkeypatch.setattr(shapes.store, "read_config", lambda folder, step: config)
    monkeypatch.setattr(shapes, "measure", measure)
    monkeypatch.setattr(shapes.store, "find_checkpoint", lambda workdir: (tmp_path, 6))
    with pytest.raises(SystemExit, match="stopped at step 6 of 7"):
        shapes.main(str(tmp_path))
    monkeypatch.setattr(shapes.store, "find_checkpoint", lambda workdir: (tmp_path, 7))
    for _ in range(2):
        shapes.main(str(tmp_path))
        said = capsys.readouterr().out
        assert "unseen pairs colors 95.0%, shapes 70.0%, both 66.0%" in said
        assert "Expected are 90% of the colors and 80% of the shapes" in said
    assert len(measured) == 1


# --- helpers


def _config(size: int, path: str = "") -> ConfigDict:
    config = default_config().data
    config.image_size, config.path, config.source = size, path, "webdataset"
    return config


def _real_data(data) -> pathlib.Path:
    try:
        return data.installed_folder()
    except UsageError as error:
        pytest.skip(str(error))


def _draw(color: str, shape: str, seed: int, centre: tuple[int, int] | None = None) -> np.ndarray:
    """(64, 64, 3) uint8: a shape as easy-VQA's are, of a random size at a random place, or at `centre`."""
    rng = np.random.default_rng(seed)
    background = tuple(int(x) for x in rng.integers(230, 255, 3))
    image = Image.new("RGB", (64, 64), background)
    width, height = (int(x) for x in rng.integers(14, 32, 2))
    x, y = centre or (int(v) for v in rng.integers(17, 47, 2))
    if shape != "rectangle":
        height = width
    box = (x - width // 2, y - height // 2, x + width // 2, y + height // 2)
    draw, fill = ImageDraw.Draw(image), CSS.get(color, color)
    if shape == "triangle":
        draw.polygon([(x, box[1]), (box[0], box[3]), (box[2], box[3])], fill)
    else:
        {"circle": draw.ellipse, "rectangle": draw.rectangle}[shape](box, fill)
    return np.asarray(image)


def _small(image_64x64x3: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(image_64x64x3).resize((32, 32), Image.Resampling.BOX))
