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
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return np.asarray(image.crop((left, top, left + size, top + size)))
