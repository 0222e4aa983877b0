"""Which picture do the bytes of a file show? Eight bits of red, green and blue, upright, on a background.

What Pillow's own conversion makes of them is kept for whatever has no more than that: such images, nearly all, are
bit by bit what upstream's loader reads.
"""

import dataclasses
import functools
import io
import warnings

import numpy as np
from ml_collections import ConfigDict
from PIL import ExifTags, Image, ImageColor

from deco_jax.data.transforms import square_crop
from deco_jax.errors import UsageError

# Many files have small faults in what they say beside the image; each worker would tell of each.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

TURNS = {  # EXIF's orientation: what makes the image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode(content: bytes, orient: bool, background: str, min_side: int = 0) -> Image.Image:
    """The image in a file, as RGB; of several frames the first.

    Grey of 16 bits loses its lower eight, as Pillow does it to colours of 16 bits; grey in floating point is taken as
    0 to 1.

    Args:
      content: of the file, of any format that Pillow reads by itself, whatever its name ends with.
      orient: turn it as its EXIF orientation says.
      background: colour behind transparent pixels, as `ImageColor` reads it; "" = transparency is dropped.
      min_side: pixels along the short side that it must have.

    Raises:
      TooSmall: it has fewer; nothing but the file's head was read.
      Exception: whatever Pillow raises at a broken file, or one of more than 179 million pixels; ValueError: of grey
        values in a range that is not known.
    """
    with Image.open(io.BytesIO(content), formats=_known_formats()) as image:
        if min(image.size) < min_side:
            raise TooSmall(f"{image.width}×{image.height} pixels; data.min_side={min_side} asks for more")
        image.load()
        turn = TURNS.get(_orientation(image)) if orient else None
        image = _to_rgb(image, background)
    return image if turn is None else image.transpose(turn)


@functools.cache
def _known_formats() -> tuple[str, ...]:
    """All that Pillow reads, but for PostScript, which it hands to another program."""
    Image.init()
    return tuple(name for name in Image.OPEN if name != "EPS")


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # a broken EXIF block is no broken image
        return 1


def _to_rgb(image: Image.Image, background: str) -> Image.Image:
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        values, white = np.asarray(image), 1.0 if image.mode == "F" else 65535
        if not (values.min() >= 0 and values.max() <= white):  # NaN fits nowhere
            raise ValueError(f"grey values from {values.min()} to {values.max()}, where 0 to {white} are known")
        image = Image.fromarray((values * 255 + 0.5 if image.mode == "F" else values >> 8).astype(np.uint8))
    if not image.has_transparency_data:
        return image if image.mode == "RGB" else image.convert("RGB")  # which would copy it
    image = image.convert("RGBA")
    if background:
        image = Image.alpha_composite(Image.new("RGBA", image.size, background), image)
    return image.convert("RGB")


class TooSmall(ValueError):
    """An image has fewer pixels along its short side than data.min_side asks for; nothing is wrong with it."""


@dataclasses.dataclass(frozen=True)
class Decoder:
    """From the bytes of a file to the square that is trained on."""

    size: int  # pixels along a side
    orient: bool
    background: str
    min_side: int = 0  # pixels along the short side that an image must have

    @classmethod
    def from_config(cls, config: ConfigDict) -> "Decoder":
        """As `config`, the `data` part of a configuration, says.

        Raises:
          UsageError: data.background is no colour.
        """
        try:
            known = not config.background or len(ImageColor.getrgb(config.background)) == 3
        except ValueError:
            known = False
        if not known:
            raise UsageError(
                f'data.background={config.background!r} is no colour; write a name ("white"), "#rrggbb", or "" to '
                "drop transparency."
            )
        return cls(config.image_size, config.orient, config.background, config.min_side)

    def __call__(self, content: bytes, offset: float | None = None) -> np.ndarray:
        """(size, size, 3) uint8; raises as `decode` does, and TooSmall.

        Args:
          content: of the file.
          offset: of the square, see `square_crop`.
        """
        return square_crop(  # keeps no image
            decode(content, self.orient, self.background, self.min_side), self.size, offset
        )

    def __str__(self) -> str:
        """In words, what is done that upstream's loader does not do; "" if nothing."""
        turned = ["turned by EXIF"] if self.orient else []
        return ", ".join([*turned, f"transparency on {self.background}"] if self.background else turned)


def check_every_size(min_side: int, name: str) -> None:
    """Raises UsageError if `min_side`, which is data.min_side, is not 0; `name`: what has every image, of any size."""
    if min_side:
        raise UsageError(
            f"data.min_side={min_side} skips images by their size, and {name} has all of them; set data.min_side=0, or "
            "leave small images out of the source."
        )


def check_centred(crop: str, name: str) -> None:
    """Raises UsageError if `crop`, which is data.crop, is not the centre; `name`: what holds one crop of each image."""
    if crop != "centre":
        raise UsageError(
            f"data.crop={crop!r} cuts another square out of each image in every epoch, and {name} is of one of each; "
            "set data.crop='centre', or do without it."
        )
