"""Do the stamps of a package become records of ours, each with its own English caption, and none without a word?"""

import pathlib
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from deco_jax.config import default_config
from deco_jax.data.sources import open_source

SCRIPT = pathlib.Path(__file__).parents[2] / "launch" / "tuxpaint_stamps.py"
TEXT = "{}\nde.utf8=Übersetzt.\nfr.utf8=Traduit.\n"


def pixels(number):
    """Lying or standing, of three hundred colours, with a transparent corner."""
    shape = (20, 32, 4) if number % 2 else (48, 16, 4)
    image = np.random.default_rng(number).integers(0, 256, shape, np.uint8)
    image[..., 3] = 255
    image[:5, :5, 3] = 0
    return image


@pytest.fixture
def package(tmp_path):
    """As dpkg-deb unpacks the package: in the middle of sounds, settings and drawings lie the stamps."""
    root = tmp_path / "package/usr/share/tuxpaint/stamps"

    def write(name, number, caption):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels(number)).save(path)
        path.with_suffix(".dat").write_text("noflip\n")
        path.with_name(f"{path.stem}_desc_fr.ogg").write_bytes(b"sound")
        if caption is not None:
            path.with_suffix(".txt").write_text(TEXT.format(caption), "utf-8")

    for number in range(103):
        write(f"animals/birds/{number:03}.png", number, f"Bird “{number}”, é.")
    write("food/x.y.png", 200, "  An apple. ")
    write("food/mirror.png", 201, None)
    write("food/silent.png", 202, " ")
    write("symbols/money/penny.png", 203, "A penny.")
    write("town/cartoon/house.png", 204, "A house.")
    (root / "food/broken.png").write_bytes(b"no image")
    (root / "food/broken.txt").write_text(TEXT.format("Broken."))
    (root / "food/drawn.svg").write_text("<svg/>")
    (root / "food/drawn.txt").write_text(TEXT.format("Drawn."))
    return tmp_path / "package"


def run(*arguments):
    return subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True, timeout=60)


def test_stamps_become_records(package, tmp_path):
    """Each in the middle of a white square with a margin, to the bit; the order is that of the names."""
    ended, left_out = run(package, tmp_path / "shards"), "2 without a caption, 1 unreadable, 1 symbols, 1 cartoon"
    assert (ended.returncode, ended.stderr) == (0, "")
    assert f"104 stamps with captions. Left out: {left_out}." in ended.stdout
    assert sorted(path.name for path in (tmp_path / "shards").iterdir()) == ["stamps-00000.tar", "stamps-00001.tar"]
    config = default_config().data
    for size, numbers in ((34, (1, 3, 101)), (52, (0, 2, 102))):  # as large as the squares: the crop changes nothing
        config.update(source="webdataset", path=str(tmp_path / "shards"), image_size=size)
        source = open_source(config)
        assert len(source) == 104
        for number in numbers:
            stamp, record = pixels(number), source.load(number)
            expected = np.full((size, size, 3), 255, np.uint8)
            top, left = (size - stamp.shape[0]) // 2, (size - stamp.shape[1]) // 2
            stamp[:5, :5] = 255
            expected[top:, left:][: stamp.shape[0], : stamp.shape[1]] = stamp[..., :3]
            assert record["caption"] == f"Bird “{number}”, é."
            np.testing.assert_array_equal(record["image"], expected)
    assert source.load(103)["caption"] == "An apple."
    assert source.summary()[1].startswith("Index: "), "nothing in the shards is ignored"


def test_shards_are_the_same_whenever_they_are_made(package, tmp_path):
    for name in ("one", "two"):
        assert run(package, tmp_path / name).returncode == 0
    one, two = ([path.read_bytes() for path in sorted((tmp_path / name).iterdir())] for name in ("one", "two"))
    assert one == two


@pytest.mark.parametrize(
    "folder, out, message",
    [
        ("nowhere", "shards", "nowhere holds no stamps; unpack the package there: dpkg-deb -x PACKAGE.deb FOLDER"),
        ("package", "package", "package is not empty; choose another folder."),
    ],
)
def test_bad_input_is_one_line(package, tmp_path, folder, out, message):
    ended = run(tmp_path / folder, tmp_path / out)
    assert ended.returncode == 2 and message in ended.stderr and "Traceback" not in ended.stderr
