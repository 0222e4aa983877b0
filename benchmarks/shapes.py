"""Does a network draw the shape that its prompt asks for, in the colour that it asks for?

    python benchmarks/shapes.py WORKDIR

Draws one guided image for each of 312 prompts whose wording training has not seen, 52 of them of pairs of colour and
shape that it has not seen either, and asks a program that was fitted to the real images. Writes WORKDIR/shapes.png and
WORKDIR/shapes.json. What has been measured for a checkpoint is not measured again.
"""

import json
import pathlib
import sys
import textwrap

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage  # scipy comes with jax
from scipy.spatial.distance import cdist
from shapes_data import (
    COLORS,
    PAIRS,
    SHAPES,
    UNSEEN_PAIRS,
    UNSEEN_WORDINGS,
    Captioned,
    Pair,
    installed_folder,
    read_captioned,
)

from deco_jax.checkpoints import store
from deco_jax.data.decode import Decoder
from deco_jax.encoders.text import load_run_encoder
from deco_jax.errors import UsageError
from deco_jax.generation.batches import generate
from deco_jax.pretrained.load import load_pretrained
from deco_jax.sampling.pictures import save_png
from deco_jax.sampling.settings import Sampling
from deco_jax.storage import write_json

BATCH = 52
EXPECTED = {"colors": 0.9, "shapes": 0.8}  # of all prompts; docs/numbers.md has what was measured
LEAST_CONTRAST = 60  # of a shape with its background, in RGB; real ones have 180 or more
NONE = -1  # no colour, or no shape, that could be told
# Of the picture: every image's pixels are so large, so far apart; wordings of its upper part and, of each unseen pair,
# of the two rows of its lower part.
SCALE, GAP = 3, 8
SHOWN = UNSEEN_WORDINGS[1]
BELOW = (UNSEEN_WORDINGS[8:12], UNSEEN_WORDINGS[4:8])


class ShapeReader:
    """Which colour and which shape is in an image? The nearest real colour, and kernel ridge regression on the outline.

    It is strict: an image without a shape, or with several, shows neither; a colour half-way to another is none, and
    neither is an outline that is like none of the real ones.
    """

    gamma, ridge = 0.1, 0.01
    farthest_color = 50  # from the nearest real one, of RGB; no two of those are less than 107 apart
    least_likeness = 1 / 3  # half of what the regression aims at for the right one; every real image has more
    least_share = 0.9  # of what stands out from the background, in its largest piece

    def __init__(self, images_KxHxWx3: np.ndarray, pairs: list[Pair]):
        found = [find_shape(image) for image in images_KxHxWx3]
        colors, shapes = (np.array(column) for column in zip(*pairs, strict=True))
        seen = np.array([color for color, *_ in found])
        self.palette = np.stack([np.median(seen[colors == color], axis=0) for color in COLORS])
        self.outlines = np.stack([outline for _, outline, _ in found])
        targets = (shapes[:, None] == np.array(SHAPES)) - 1 / len(SHAPES)
        kernel = self._kernel(self.outlines) + self.ridge * np.eye(len(targets))
        self.weights = np.linalg.solve(kernel, targets)

    def __call__(self, images_KxHxWx3: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """uint8 → (K,) places in COLORS and (K,) places in SHAPES, `NONE` where there is none."""
        found = [find_shape(image) for image in images_KxHxWx3]
        alone = np.array([share >= self.least_share for *_, share in found])
        far = cdist(np.array([color for color, *_ in found]), self.palette)
        colors = np.where(alone & (far.min(axis=1) <= self.farthest_color), far.argmin(axis=1), NONE)
        likeness = self._kernel(np.stack([outline for _, outline, _ in found])) @ self.weights
        clear = alone & (likeness.max(axis=1) >= self.least_likeness)
        return colors, np.where(clear, likeness.argmax(axis=1), NONE)

    def _kernel(self, outlines: np.ndarray) -> np.ndarray:
        return np.exp(-self.gamma * cdist(outlines, self.outlines, "sqeuclidean"))


def find_shape(image_HxWx3: np.ndarray, side: int = 12) -> tuple[np.ndarray, np.ndarray, float]:
    """What stands out from an image's background most.

    Returns:
      its colour (3,); its outline, scaled to fill a square, (side · side,) from 0 to 1; and its share of all that
      stands out, 0 if nothing does.
    """
    pixels = image_HxWx3.astype(np.float64)
    background = np.median(pixels.reshape(-1, 3), axis=0)  # a shape covers less than a third
    away = np.linalg.norm(pixels - background, axis=-1)
    contrast = np.sort(away, axis=None)[-4:].mean()
    if contrast < LEAST_CONTRAST:
        return background, np.zeros(side * side), 0.0
    cover = np.clip(away / contrast, 0, 1)
    pieces, _ = ndimage.label(cover > 0.5)
    sizes = np.bincount(pieces.ravel())[1:]
    piece = pieces == 1 + sizes.argmax()
    color = np.median(pixels[piece & (cover >= np.quantile(cover[piece], 0.5))], axis=0)
    rows, columns = ndimage.find_objects(ndimage.binary_dilation(piece).astype(int))[0]
    cut = np.where(ndimage.binary_dilation(piece), cover, 0)[rows, columns]
    places = [_across(cut.sum(axis=1 - axis), side) for axis in (0, 1)]
    outline = ndimage.map_coordinates(cut, np.meshgrid(*places, indexing="ij"), order=1, mode="constant")
    return color, outline.ravel(), sizes.max() / sizes.sum()


def _across(profile: np.ndarray, side: int) -> np.ndarray:
    """`side` places from edge to edge of a shape whose cover sums up to `profile` along an axis."""
    middle = (profile * np.arange(len(profile))).sum() / profile.sum()
    width = np.sqrt(12 * max((profile * (np.arange(len(profile)) - middle) ** 2).sum() / profile.sum(), 0.1))
    return middle + width * ((np.arange(side) + 0.5) / side - 0.5) * 1.2


def _real(captioned: list[Captioned], decoder: Decoder) -> np.ndarray:
    """(K, size, size, 3) uint8, as training sees them."""
    return np.stack([decoder(image.content) for image in captioned])


def measure(workdir: str) -> dict[str, float | dict[str, float]]:
    """Shares of the images that show what was asked for, and of the real test images that are read rightly.

    Args:
      workdir: of a network trained on the captions of shapes_data.py; gets shapes.png.

    Returns:
      {"colors", "shapes", "both"} of all prompts, of "seen_pairs", of "unseen_pairs", and of "real_images".
    """
    config = store.read_config(*store.find_checkpoint(workdir))
    model, params = load_pretrained(workdir)
    encoder, decoder = load_run_encoder(config), Decoder.from_config(config.data)
    asked = [(wording, pair) for wording in UNSEEN_WORDINGS for pair in PAIRS]
    prompts = [wording.format(color=pair[0], shape=pair[1]) for wording, pair in asked]
    settings = Sampling.from_config(config.sample)
    images = np.stack(
        list(generate(model, params, prompts, 0, config.data.image_size, BATCH, settings, encoder=encoder))
    )
    save_png(picture(images, asked), pathlib.Path(workdir) / "shapes.png")

    folder = installed_folder()
    known, test = (read_captioned(folder / split)[0] for split in ("train", "test"))
    reader = ShapeReader(_real(known, decoder), [image.pair for image in known])
    pairs = [pair for _, pair in asked]
    unseen = np.array([pair in UNSEEN_PAIRS for pair in pairs])
    right = _right(reader, images, pairs)
    return {
        **_shares(right),
        "seen_pairs": _shares(right[~unseen]),
        "unseen_pairs": _shares(right[unseen]),
        "real_images": _shares(_right(reader, _real(test, decoder), [image.pair for image in test])),
    }


def _right(reader: ShapeReader, images: np.ndarray, pairs: list[Pair]) -> np.ndarray:
    """(K, 2) booleans: has image k the colour of pair k, has it its shape?"""
    wanted = np.array([(COLORS.index(color), SHAPES.index(shape)) for color, shape in pairs])
    return np.stack(reader(images), axis=1) == wanted


def _shares(right_Kx2: np.ndarray) -> dict[str, float]:
    colors, shapes = right_Kx2.mean(axis=0)
    return {"colors": float(colors), "shapes": float(shapes), "both": float(right_Kx2.all(axis=1).mean())}


def picture(images_KxHxWx3: np.ndarray, asked: list[tuple[str, Pair]]) -> np.ndarray:
    """Rows = shapes, columns = colours, of one wording; below, pairs that training has not seen, with their prompts."""
    font, size = ImageFont.load_default(13), SCALE * images_KxHxWx3.shape[1]
    cell, left, top = size + GAP, 70, 40
    below = top + len(SHAPES) * cell + 40
    canvas = Image.new("RGB", (left + len(COLORS) * cell, below + 2 * cell), "white")
    draw = ImageDraw.Draw(canvas)

    def put(wording: str, pair: Pair, x: int, y: int) -> None:
        image = Image.fromarray(images_KxHxWx3[asked.index((wording, pair))])
        canvas.paste(image.resize((size, size), Image.Resampling.NEAREST), (x, y))
        if pair in UNSEEN_PAIRS:
            draw.rectangle((x - 2, y - 2, x + size + 1, y + size + 1), outline=(220, 0, 160), width=2)

    draw.text((left, 2), f"Prompts: “{SHOWN.format(color='…', shape='…')}”", "black", font)
    for column, color in enumerate(COLORS):
        draw.text((left + column * cell, top - 19), color, "black", font)
    for row, shape in enumerate(SHAPES):
        draw.text((4, top + row * cell + size // 2 - 8), shape, "black", font)
        for column, color in enumerate(COLORS):
            put(SHOWN, (color, shape), left + column * cell, top + row * cell)
    draw.text((left, below - 24), "Framed: colours and shapes that training has never seen together.", "black", font)
    for row, wordings in enumerate(BELOW):
        for column, (wording, (color, shape)) in enumerate(zip(wordings, UNSEEN_PAIRS, strict=True)):
            x, y = left + 2 * column * cell, below + row * cell
            put(wording, (color, shape), x, y)
            told = textwrap.fill(wording.format(color=color, shape=shape), 13)
            draw.multiline_text((x + cell + 4, y + 4), told, "black", font)
    return np.asarray(canvas)


def main(workdir: str) -> None:
    """Measures, or repeats what was measured before for the same checkpoint, and says where everything is."""
    file = pathlib.Path(workdir) / "shapes.json"
    folder, step = store.find_checkpoint(workdir)
    steps = store.read_config(folder, step).train.steps
    if step < steps:
        sys.exit(f"Training stopped at step {step} of {steps}; run the same command again to go on.")
    known = json.loads(file.read_text()) if file.exists() else {}
    if known.get("step") != step or not (pathlib.Path(workdir) / "shapes.png").exists():
        known = {"step": step, **measure(workdir)}
        write_json(file, known)
    print("Prompts in wordings that training has not seen, one image each; what a program sees in the images:")
    for name, part in [("all", known), *((name, known[name]) for name in ("seen_pairs", "unseen_pairs"))]:
        print(f"  {name.replace('_', ' '):12} {_told(part)}")
    print(f"The program itself, on real images that it has not seen: {_told(known['real_images'])}")
    if any(known[name] < least for name, least in EXPECTED.items()):
        told = " and ".join(f"{least:.0%} of the {name}" for name, least in EXPECTED.items())
        print(f"Expected are {told}: something is wrong with this installation or machine.")
    print(f"Images:      {workdir}/shapes.png")
    print(f"Logs:        {workdir}/metrics.jsonl, and {workdir}/tensorboard for TensorBoard")
    print(
        f"Checkpoints: {workdir}/checkpoints; draw more: .venv/bin/deco sample --workdir {workdir} "
        "--prompt 'a green circle' --out FOLDER"
    )


def _told(shares: dict[str, float]) -> str:
    return ", ".join(f"{name} {shares[name]:.1%}" for name in ("colors", "shapes", "both"))


if __name__ == "__main__":
    try:
        main(sys.argv[1])
    except UsageError as error:
        sys.exit(str(error))
