"""Does every kind of image file become the picture that people see, and none of them a wrong one without a word?"""

import gc
import io
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image, UnidentifiedImageError

from deco_jax.config import default_config
from deco_jax.data.decode import Decoder, TooSmall, decode
from deco_jax.data.transforms import square_crop
from deco_jax.errors import UsageError


def encode(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def decoded(image, kind="PNG", orient=True, background="white", **options):
    """(H, W, 3): what we read of what Pillow writes."""
    rgb = decode(encode(image, kind, **options), orient, background)
    assert rgb.mode == "RGB"
    return np.asarray(rgb)


BROKEN_EXIF = b"Exif\x00\x00II*\x00\xff\xff\xff\xff broken"
NOISE = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)


@pytest.mark.parametrize("kind, options", [("PNG", {}), ("JPEG", {"quality": 90}), ("WEBP", {}), ("BMP", {})])
def test_plain_images_are_what_pillow_reads(kind, options):
    """Nearly all images are such: not a bit of them may depend on what is done for the others."""
    content = encode(Image.fromarray(NOISE), kind, **options)
    expected = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
    for orient, background in ((True, "white"), (False, ""), (True, "#102030")):
        np.testing.assert_array_equal(decode(content, orient, background), expected)


def test_jpeg_decoded_at_a_smaller_scale_is_another_picture():
    """libjpeg can leave out the finest frequencies, in half the time. But its halves are not those of the box filter
    that the ADM crop begins with, so images of the same files would differ from upstream's, and we decode the whole."""
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 256, (12, 16, 3), np.uint8))
    content = encode(small.resize((640, 480), Image.Resampling.BICUBIC), "JPEG", quality=95)
    scaled = Image.open(io.BytesIO(content))
    scaled.draft("RGB", (320, 240))
    assert scaled.size == (320, 240)
    crop = Decoder(size=240, orient=True, background="white")(content)
    assert not np.array_equal(square_crop(scaled, 240), crop)
    whole = Image.open(io.BytesIO(content))
    np.testing.assert_array_equal(square_crop(whole.resize((320, 240), Image.Resampling.BOX), 240), crop)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_an_image_is_free_as_soon_as_its_crop_is_there():
    """Megabytes each: a cycle of references would keep thousands until Python's collector comes by."""
    image = Image.new("RGB", (37, 41))  # no other test has one of this size
    contents = [encode(image, kind) for kind in ("JPEG", "PNG", "WEBP", "BMP", "GIF")]
    contents.append(encode(image, "JPEG", exif=BROKEN_EXIF))
    del image
    decoder = Decoder(size=16, orient=True, background="white")
    gc.collect()
    gc.disable()
    try:
        for content in contents:
            decoder(content)
        left = [x for x in gc.get_objects() if isinstance(x, Image.Image) and x.size == (37, 41)]
    finally:
        gc.enable()
    assert not left


def test_16_bits_of_grey():
    """Pillow clips them at 255, which makes nearly all of an image white."""
    grey = np.arange(0, 65536, 16, dtype=np.uint16).reshape(64, 64)
    expected = np.repeat((grey >> 8).astype(np.uint8)[..., None], 3, -1)
    for kind in ("PNG", "TIFF"):
        np.testing.assert_array_equal(decoded(Image.fromarray(grey), kind), expected, kind)
    np.testing.assert_array_equal(decoded(Image.fromarray(grey.astype(">u2")), "TIFF"), expected)
    np.testing.assert_array_equal(decoded(Image.fromarray(grey.astype(np.int32)), "TIFF"), expected)


def test_grey_in_floating_point():
    """From 0 to 1; where the range is another, nobody knows what is white, and the record counts as unreadable."""
    grey = np.linspace(0, 1, 256, dtype=np.float32).reshape(16, 16)
    np.testing.assert_array_equal(decoded(Image.fromarray(grey), "TIFF")[..., 0].ravel(), np.arange(256))
    for wrong in (grey * 255, grey - 0.1, grey * np.nan):
        with pytest.raises(ValueError, match="grey values from .* where 0 to 1.0 are known"):
            decoded(Image.fromarray(wrong), "TIFF")
    with pytest.raises(ValueError, match="where 0 to 65535 are known"):
        decoded(Image.fromarray(np.full((4, 4), 70000, np.int32)), "TIFF")


ORIENTATIONS = [  # of EXIF: which sides of the picture are the first row and column of what is stored
    (1, "top", "left"),
    (2, "top", "right"),
    (3, "bottom", "right"),
    (4, "bottom", "left"),
    (5, "left", "top"),
    (6, "right", "top"),
    (7, "right", "bottom"),
    (8, "left", "bottom"),
]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "AVIF", "TIFF"])
@pytest.mark.parametrize("orientation, first_row, first_column", ORIENTATIONS)
def test_photographs_stand_upright(kind, orientation, first_row, first_column):
    """Cameras store what the sensor saw and how they were held; viewers turn it, so labels are of the turned one."""
    upright = np.full((40, 60, 3), 40, np.uint8)
    upright[:20, :20], upright[:20, 40:] = 250, 150  # two corners tell all eight apart
    stored = upright if first_row in ("top", "bottom") else upright.swapaxes(0, 1)
    stored = stored[::-1] if first_row in ("bottom", "right") else stored
    stored = stored[:, ::-1] if first_column in ("bottom", "right") else stored
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(stored))
    turned = decoded(stored, kind, exif=exif)
    assert turned.shape == upright.shape
    assert np.abs(turned.astype(int) - upright).mean() < 8, "turned or mirrored the wrong way"
    if kind != "TIFF":  # Pillow itself always turns those
        assert decoded(stored, kind, orient=False, exif=exif).shape == np.asarray(stored).shape


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_a_broken_exif_block_is_no_broken_image():
    """ImageNet holds a few of these."""
    content = encode(Image.fromarray(NOISE), "JPEG", exif=BROKEN_EXIF)
    np.testing.assert_array_equal(decode(content, True, "white"), decode(content, False, "white"))


def transparent_images():
    rgba = Image.fromarray(np.dstack([NOISE, np.tile(np.uint8([0, 255, 128]), (20, 10))]))
    palette, grey = Image.fromarray(NOISE).convert("P"), Image.fromarray(NOISE[..., 0])
    return {
        "RGBA": (rgba, "PNG", {}),
        "WebP": (rgba, "WEBP", {"lossless": True, "exact": True}),
        "LA": (rgba.convert("LA"), "PNG", {}),
        "palette with a transparent colour": (palette, "PNG", {"transparency": palette.getpixel((3, 4))}),
        "palette with a transparency of each colour": (palette, "PNG", {"transparency": bytes([0, 128] * 128)}),
        "GIF": (palette, "GIF", {"transparency": palette.getpixel((3, 4))}),
        "RGB with a transparent colour": (Image.fromarray(NOISE), "PNG", {"transparency": tuple(NOISE[3, 4].tolist())}),
        "grey with a transparent value": (grey, "PNG", {"transparency": grey.getpixel((3, 4))}),
    }


@pytest.mark.parametrize("name", transparent_images())
@pytest.mark.filterwarnings("error")
def test_transparent_pixels_show_the_background(name):
    """What lies under a transparent pixel is whatever a program left there, often black, and nobody sees it."""
    image, kind, options = transparent_images()[name]
    content = encode(image, kind, **options)
    rgba = np.asarray(Image.open(io.BytesIO(content)).convert("RGBA")).astype(float)
    opacity = rgba[..., 3:] / 255
    assert opacity.min() < 1
    for background, colour in (("white", (255, 255, 255)), ("#20ff00", (32, 255, 0))):
        expected = rgba[..., :3] * opacity + np.array(colour) * (1 - opacity)
        assert np.abs(np.asarray(decode(content, True, background)) - expected).max() <= 1
    np.testing.assert_array_equal(decode(content, True, ""), rgba[..., :3], 'background="" drops transparency')


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF", "AVIF"])
def test_animations_show_their_first_frame(kind):
    first, second = Image.new("RGB", (16, 16), (200, 30, 30)), Image.new("RGB", (16, 16), (0, 0, 255))
    rgb = decoded(first, kind, save_all=True, append_images=[second])
    assert np.abs(rgb.astype(int) - (200, 30, 30)).max() <= 4


def test_colours_for_printing():
    rgb = decoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG")
    assert np.abs(rgb.astype(int) - (255, 0, 0)).max() <= 3


def test_a_huge_image_is_a_bad_record(monkeypatch):
    """One of 200 million pixels would take the memory of a worker; Pillow refuses it, and warns of half as many."""
    content = encode(Image.new("1", (200, 100)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 9_000)
    with pytest.raises(Image.DecompressionBombError):
        decode(content, True, "white")


def test_nothing_is_said_to_every_worker(tmp_path):
    """Pillow warns of large images, of odd palettes and of bad EXIF, file by file and worker by worker."""
    (tmp_path / "large.png").write_bytes(encode(Image.new("1", (200, 100))))
    (tmp_path / "odd.jpg").write_bytes(encode(Image.fromarray(NOISE), "JPEG", exif=BROKEN_EXIF))
    program = (
        "import sys; from PIL import Image; from deco_jax.data.decode import decode; Image.MAX_IMAGE_PIXELS = 15_000\n"
        "for path in sys.argv[1:]: decode(open(path, 'rb').read(), True, 'white')"
    )
    command = [sys.executable, "-c", program, *map(str, tmp_path.iterdir())]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("colour", ["whiet", "#12345", "#ffffff80"])
def test_a_background_that_is_no_colour(colour):
    config = default_config().data
    config.background = colour
    with pytest.raises(UsageError, match=f"data.background='{colour}' is no colour; write a name"):
        Decoder.from_config(config)


def test_postscript_is_not_run(monkeypatch):
    """Pillow would hand a .jpg that begins so to Ghostscript, if that is installed."""
    started = []
    monkeypatch.setattr(subprocess, "check_call", lambda *args, **options: started.append(args))
    content = encode(Image.fromarray(NOISE), "EPS")
    with Image.open(io.BytesIO(content)) as image:
        assert image.format == "EPS"
    with pytest.raises(UnidentifiedImageError):
        decode(content, True, "white")
    assert not started


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "PPM", "JPEG2000"])
def test_other_formats_are_known_by_their_content(kind):
    assert decoded(Image.fromarray(NOISE), kind).shape == NOISE.shape


def test_small_images_are_known_by_their_head():
    content = encode(Image.fromarray(NOISE))
    with pytest.raises(TooSmall, match="30×20 pixels; data.min_side=21 asks for more"):
        decode(content[:60], True, "white", min_side=21)
    assert decode(content, True, "white", min_side=20).size == (30, 20)
