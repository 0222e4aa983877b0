"""Are exactly the images read that a user means, and is everything else refused with words that help?"""

import dataclasses
import json
import tracemalloc

import numpy as np
import pytest
from PIL import Image

from deco_jax.config import default_config
from deco_jax.data.sources import open_source
from deco_jax.errors import UsageError
from deco_jax.evaluation.images import SourceImages, holds_images, open_images
from deco_jax.sampling.settings import Sampling


def pixels(number, height=5, width=7):
    return np.random.default_rng(number).integers(0, 256, (number, height, width, 3), np.uint8)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_any_rows_of_an_array_are_read_in_any_order(tmp_path, save):
    """A second start begins in the middle, and processes take turns."""
    x = pixels(23)
    save(tmp_path / "x.npz", x, np.arange(23))
    images = open_images(f"{tmp_path}/x.npz")
    assert (len(images), images.image_size, images.settings) == (23, (5, 7), None)
    for start, stop in ((20, 23), (0, 4), (4, 9), (3, 5), (22, 23)):
        np.testing.assert_array_equal(images.read(start, stop), x[start:stop])


def test_an_array_is_not_held_in_memory(tmp_path):
    x = np.zeros((4000, 32, 32, 3), np.uint8)
    np.savez_compressed(tmp_path / "x.npz", x)
    tracemalloc.start()
    images = open_images(f"{tmp_path}/x.npz")
    for start in range(0, 4000, 100):
        images.read(start, start + 100)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < x.nbytes / 4, f"{most:,} bytes were in use for an array of {x.nbytes:,}"


def test_the_same_array_is_known_again_and_another_is_told(tmp_path):
    x = pixels(4)
    np.savez(tmp_path / "a.npz", x)
    np.savez_compressed(tmp_path / "b.npz", x)
    np.savez(tmp_path / "c.npz", x ^ 1)
    a, b, c = (open_images(f"{tmp_path}/{name}.npz").identity for name in "abc")
    assert a == b != c


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((2, 4, 4, 3), np.float32), r"arr_0 is float32; expected uint8 \(N, height, width, 3\); of values in"),
        (np.zeros((2, 3, 4, 4), np.uint8), r"\(2, 3, 4, 4\), channels first; .*transpose\(0, 2, 3, 1\)"),
        (np.zeros((2, 4, 4), np.uint8), r"has the shape \(2, 4, 4\); expected"),
        (np.zeros((2, 4, 4, 4), np.uint8), r"has the shape \(2, 4, 4, 4\); expected"),
        (np.zeros((0, 4, 4, 3), np.uint8), "and so no images"),
        (np.zeros((2, 4, 4, 3), np.int64), "is int64; expected uint8"),
        (np.asfortranarray(pixels(2)), "column by column"),
        (np.array([[1], None], object), "holds Python objects, which are not read"),
    ],
)
def test_arrays_that_are_no_images(tmp_path, array, message):
    np.savez(tmp_path / "x.npz", array)
    with pytest.raises(UsageError, match=message):
        open_images(f"{tmp_path}/x.npz")


def test_files_that_are_no_arrays(tmp_path):
    np.savez(tmp_path / "named.npz", images=pixels(2), labels=np.arange(2))
    (tmp_path / "junk.npz").write_bytes(b"not a zip file")
    np.savez(tmp_path / "whole.npz", pixels(2))
    content = (tmp_path / "whole.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(content[: len(content) // 2])
    (tmp_path / "empty").mkdir()
    for name, message in (
        ("named.npz", "holds images, labels; images are expected as arr_0"),
        ("junk.npz", "is no .npz that can be read"),
        ("cut.npz", "is no .npz that can be read"),
        ("gone.npz", "does not exist"),
        ("gone", "is neither NAME.npz nor a folder of pictures"),
        ("empty", "holds no pictures"),
    ):
        with pytest.raises(UsageError, match=f"{name} {message}"):
            open_images(f"{tmp_path}/{name}")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_damage_within_an_array_is_named(tmp_path, save):
    """A flipped bit in a stored array is one that only the checksum shows, when its end is reached."""
    x = pixels(50)
    save(tmp_path / "x.npz", x)
    whole = (tmp_path / "x.npz").read_bytes()
    content = bytearray(whole)
    content[len(content) // 2] ^= 255
    (tmp_path / "x.npz").write_bytes(content)
    images = open_images(f"{tmp_path}/x.npz")
    with pytest.raises(UsageError, match="x.npz is damaged between images"):
        for start in range(0, 50, 10):
            images.read(start, start + 10)
    (tmp_path / "x.npz").write_bytes(whole[:60] + bytes(byte ^ 255 for byte in whole[60:90]) + whole[90:])
    with pytest.raises(UsageError, match="x.npz"):  # in the header of the array
        open_images(f"{tmp_path}/x.npz")


def test_a_folder_of_pictures_in_the_order_of_names(tmp_path):
    x = pixels(6)
    (tmp_path / "b").mkdir()
    (tmp_path / ".hidden").mkdir()
    for name, image in (("a2.png", x[1]), ("a1.bmp", x[0]), ("b/1.png", x[2]), (".hidden/1.png", x[3])):
        Image.fromarray(image).save(tmp_path / name)
    grey = Image.fromarray(x[4][..., 0])
    grey.save(tmp_path / "c.png")
    clear = Image.fromarray(np.dstack([x[5], np.zeros((5, 7), np.uint8)]), "RGBA")
    clear.save(tmp_path / "d.webp", lossless=True)
    (tmp_path / "readme.txt").write_text("no picture")
    Image.fromarray(x[0]).save(tmp_path / "way.gif")
    images = open_images(f"{tmp_path}")
    assert (images.names, images.image_size) == (["a1.bmp", "a2.png", "b/1.png", "c.png", "d.webp"], (5, 7))
    read = images.read(0, 5)
    np.testing.assert_array_equal(read[:3], x[:3])
    np.testing.assert_array_equal(read[3], np.repeat(x[4][..., :1], 3, axis=-1))
    assert (read[4] == 255).all(), "a transparent picture is white, as in training"


def test_what_deco_has_drawn_is_taken_with_its_settings(tmp_path):
    """The grid of `deco sample` is no sample; samples.npz of `deco generate` stands for its PNGs."""
    x, drawn, made = pixels(2), tmp_path / "drawn", tmp_path / "made"
    (made / "png").mkdir(parents=True)
    drawn.mkdir()
    for name in ("00000.png", "00001.png"):
        Image.fromarray(x[0]).save(drawn / name)
        Image.fromarray(x[0]).save(made / "png" / name)
    Image.fromarray(pixels(1, 11, 15)[0]).save(drawn / "grid.png")
    said = {"source": "runs/x", "labels": "0-9", **dataclasses.asdict(Sampling())}
    said = json.loads(json.dumps(said))
    (drawn / "sample.json").write_text(json.dumps(said | {"seed": 3}))
    (made / "generation.json").write_text(json.dumps(said | {"seed": 4}))
    images = open_images(f"{drawn}")
    assert (images.names, images.settings) == (["00000.png", "00001.png"], said | {"seed": 3})
    with pytest.raises(UsageError, match=r"lacks samples.npz. Run the same `deco generate` again"):
        open_images(f"{made}")
    np.savez(made / "samples.npz", x, np.arange(2))
    for path in (made, made / "samples.npz"):
        images = open_images(f"{path}")
        assert (len(images), images.settings) == (2, said | {"seed": 4})
    (drawn / "sample.json").write_text('{"solver": "ddim"}')  # of somebody else
    assert open_images(f"{drawn}").settings is None


def test_pictures_of_several_sizes_and_broken_ones_are_named(tmp_path):
    for name, size in (("1.png", (8, 6)), ("2.png", (8, 6)), ("3.png", (6, 8))):
        Image.new("RGB", size).save(tmp_path / name)
    images = open_images(f"{tmp_path}")
    images.read(0, 2)
    with pytest.raises(UsageError, match="several sizes: 1.png has 6×8 pixels, and 3.png 8×6"):
        images.read(0, 3)
    (tmp_path / "2.png").write_bytes(b"no picture")
    with pytest.raises(UsageError, match=r"2.png cannot be read \(it is no picture\); mend or remove it"):
        images.read(0, 2)


def test_networks_and_images_are_told_apart(tmp_path):
    """A workdir holds pictures, too: the samples of its training."""
    for name in ("run/checkpoints/100", "run/samples", "pictures", "hub"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "run/samples/step_100.png").touch()
    (tmp_path / "pictures/1.png").touch()
    (tmp_path / "hub/model.safetensors").touch()
    (tmp_path / "net.ckpt").touch()
    kinds = {name: holds_images(f"{tmp_path}/{name}") for name in ("run", "hub", "net.ckpt", "pictures", "x.npz")}
    assert kinds == {"run": False, "hub": False, "net.ckpt": False, "pictures": True, "x.npz": True}


def test_a_data_set_is_read_as_in_training(tmp_path):
    """Every record once and in order, with the crop of training; unreadable ones are marked, up to the limit."""
    c = default_config()
    for i in range(6):
        path = tmp_path / f"class{i % 2}" / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(pixels(i + 1, 20, 30)[0]).save(path)
    (tmp_path / "class0/2.png").write_bytes(b"broken")
    c.data.update(source="folder", path=str(tmp_path), image_size=16, max_bad_records=1, max_bad_share=1.0)
    images, source = SourceImages(c.data), open_source(c.data)
    read = images.read(0, 6)
    assert (len(images), images.image_size, images.bad) == (6, (16, 16), {1})
    assert not read[1].any()
    for number in (0, 2, 3, 4, 5):
        np.testing.assert_array_equal(read[number], source.load(number)["image"])
    (tmp_path / "class1/5.png").write_bytes(b"broken")
    with pytest.raises(UsageError, match=r"2 records cannot be read, .*data.max_bad_records=1"):
        images.read(0, 6)
