"""From an image of any size to a square of the size we train on (docs/model.md, 6)."""

import numpy as np
from PIL import Image


def center_crop(image: Image.Image, size: int) -> np.ndarray:
    """The crop of the ADM code base, which FID reference batches were made with; (size, size, 3) uint8.

    Halves with a box filter while the short side is at least twice `size`, resizes bicubically until the
    short side is `size`, and cuts out the centre. No flip, no other augmentation.
    """
    if image.mode != "RGB":  # converting would copy it
        image = image.convert("RGB")
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    if width > height:  # Pillow resizes rows, then columns, of which the crop needs these alone
        image = image.resize((width, image.height), Image.Resampling.BICUBIC)
        left = (width - size) // 2
        image = image.crop((left, 0, left + size, image.height))
        return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC))
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    top = (height - size) // 2
    return np.asarray(image.crop((0, top, size, top + size)))
