"""How do images get onto disk, one by one, as grids, and as films of how they came about?"""

import math
from collections.abc import Mapping

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from deco_jax.storage import AnyPath, write_beside


def make_grid(images_BxHxWx3: np.ndarray, columns: int) -> np.ndarray:
    """Lays uint8 images out row by row, one white pixel apart; missing ones at the end are white."""
    b, h, w, c = images_BxHxWx3.shape
    rows = math.ceil(b / columns)
    grid = np.full((rows * (h + 1) - 1, columns * (w + 1) - 1, c), 255, np.uint8)
    for i, image in enumerate(images_BxHxWx3):
        top, left = i // columns * (h + 1), i % columns * (w + 1)
        grid[top : top + h, left : left + w] = image
    return grid


def save_png(image_HxWx3: np.ndarray, path: AnyPath, texts: Mapping[str, str] | None = None) -> None:
    """Writes a uint8 image as PNG, with `texts` as its metadata; a reader never sees half a file."""
    info = PngInfo()
    for name, text in (texts or {}).items():
        info.add_text(name, text)
    with write_beside(path) as draft:
        Image.fromarray(image_HxWx3).save(draft, format="PNG", pnginfo=info)


def save_gif(frames_SxHxWx3: np.ndarray, path: AnyPath, seconds: float = 0.1, last: float = 1.5) -> None:
    """Writes uint8 frames as a GIF that repeats; each stays for `seconds`, the last for longer. Never half a file."""
    first, *others = (Image.fromarray(frame).quantize() for frame in frames_SxHxWx3)
    durations = [round(1000 * seconds)] * len(others) + [round(1000 * last)]
    with write_beside(path) as draft:
        first.save(draft, format="GIF", save_all=True, append_images=others, duration=durations, loop=0)
