"""From an image of any size to a square of the size we train on (docs/model.md, 6)."""

import numpy as np
from PIL import Image

MOST_PIXELS = 2**27  # of an image that was enlarged so far that its short side has `size`: 400 MB


def square_crop(image: Image.Image, size: int, offset: float | None = None) -> np.ndarray:
    """The crop of the ADM code base, which FID reference batches were made with; (size, size, 3) uint8.

    Halves with a box filter while the short side is at least twice `size`, resizes bicubically until the
    short side is `size`, and cuts out the centre, or the square at `offset` along the long side: 0 is the left or
    upper end, just below 1 the other one, and each place in whole pixels has an equal share. No flip.

    Raises:
      ValueError: it is so thin that it would be enlarged to more than 134 million pixels.
    """
    if max(image.size) * size**2 > MOST_PIXELS * min(image.size):
        raise ValueError(f"{image.width}×{image.height} pixels are too thin for a square of {size}")
    if image.mode != "RGB":  # converting would copy it
        image = image.convert("RGB")
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    if width > height:  # Pillow resizes rows, then columns, of which the crop needs these alone
        image = image.resize((width, image.height), Image.Resampling.BICUBIC)
        left = _place(width - size, offset)
        image = image.crop((left, 0, left + size, image.height))
        return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC))
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    top = _place(height - size, offset)
    return np.asarray(image.crop((0, top, size, top + size)))


def _place(room: int, offset: float | None) -> int:
    """The first pixel of the square, of 0 … room."""
    return room // 2 if offset is None else int(offset * (room + 1))
