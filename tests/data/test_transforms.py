"""Does an image become the same training square as in the published code, whatever its size and colour mode?"""

import pathlib

import numpy as np
import pytest
from PIL import Image

from deco_jax.data.transforms import square_crop

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "center_crop.npz"


@pytest.mark.parametrize("k", range(4))
def test_equals_the_recorded_crops(k):
    """FID reference batches were made with ADM's crop: another filter or rounding shifts every figure we report."""
    with np.load(GOLDEN) as golden:
        image_HxWx3, expected_32x32x3 = golden[f"{k}:image"], golden[f"{k}:cropped32"]
    cropped = square_crop(Image.fromarray(image_HxWx3), 32)
    assert cropped.dtype == np.uint8
    np.testing.assert_array_equal(
        cropped, expected_32x32x3, "not a bit of the crop may change; expect a change only of Pillow's resampling"
    )


def upstreams_crop(image, size):
    """As ADM's guided_diffusion/image_datasets.py writes it, and DeCo's loader after it."""
    while min(*image.size) >= 2 * size:
        image = image.resize(tuple(x // 2 for x in image.size), resample=Image.Resampling.BOX)
    scale = size / min(*image.size)
    image = image.resize(tuple(round(x * scale) for x in image.size), resample=Image.Resampling.BICUBIC)
    array = np.array(image)
    top, left = (array.shape[0] - size) // 2, (array.shape[1] - size) // 2
    return array[top : top + size, left : left + size]


def test_equals_upstreams_crop_at_all_sizes():
    """To the bit: what is saved in time must not cost a rounding."""
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (400, 400, 3), np.uint8))
    for width, height in rng.integers(1, 400, (300, 2)).tolist():
        image = noise.crop((0, 0, width, height))
        for size in (16, 31, 100):
            expected = upstreams_crop(image, size)
            np.testing.assert_array_equal(square_crop(image, size), expected, f"{width}×{height} to {size}")
    np.testing.assert_array_equal(image, noise.crop((0, 0, width, height)), "the image itself must stay as it is")


def test_leaves_an_image_of_the_right_size_alone():
    """The crop neither flips nor resamples what already fits (the paper trains without augmentation)."""
    image_16x16x3 = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    np.testing.assert_array_equal(square_crop(Image.fromarray(image_16x16x3), 16), image_16x16x3)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("extra", [6, 7])
def test_cuts_out_the_centre(axis, extra):
    """The long side loses as much before as behind; of an odd excess, the smaller half before, as in ADM's code."""
    shape = [16, 16, 3]
    shape[axis] += extra
    image_HxWx3 = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    expected = np.take(image_HxWx3, np.arange(16) + extra // 2, axis)
    np.testing.assert_array_equal(square_crop(Image.fromarray(image_HxWx3), 16), expected)


def test_no_size_leaves_a_border():
    """Rounding a side to one pixel too few would be filled with black by Pillow without a word."""
    failed = [
        (width, height, size)
        for width in range(1, 72)
        for height in (1, 31, 53)
        for size in (16, 31)
        if not np.array_equal(
            square_crop(Image.new("RGB", (width, height), "white"), size), np.full((size, size, 3), 255)
        )
    ]
    assert not failed, f"(width, height, size) whose white image does not stay white: {failed}"


@pytest.mark.parametrize(
    "mode, fill, rgb",
    [
        ("L", 77, (77, 77, 77)),
        ("1", 1, (255, 255, 255)),
        ("RGBA", (10, 20, 30, 0), (10, 20, 30)),
        ("LA", (77, 9), (77, 77, 77)),
        ("CMYK", (0, 255, 255, 0), (255, 0, 0)),  # ImageNet holds a few of these
    ],
)
def test_every_mode_becomes_rgb(mode, fill, rgb):
    """A grey or transparent image among colour ones would otherwise end the run with a shape error."""
    cropped = square_crop(Image.new(mode, (40, 50), fill), 16)
    np.testing.assert_array_equal(cropped, np.broadcast_to(np.uint8(rgb), (16, 16, 3)))


@pytest.mark.parametrize("size", [(1, 2049), (2049, 1), (2, 4097)])
def test_a_line_of_pixels_is_no_image(size):
    """332 bytes of PNG may be 1×65,000 pixels, which at 256 would be enlarged to 17 GB."""
    with pytest.raises(ValueError, match="pixels are too thin for a square of 256"):
        square_crop(Image.new("RGB", size), 256)
    assert square_crop(Image.new("RGB", (2048, 1)), 256).shape == (256, 256, 3)
