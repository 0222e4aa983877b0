"""Which captions belong to the images of easy-VQA? What its questions and answers leave possible, as WebDataset shards.

    python benchmarks/shapes_data.py FOLDER

The PyPI package `easy-vqa` ships 5,000 images of one coloured shape each, and questions such as "is there a red shape?"
with their answers. An image is captioned if these leave one colour and one shape; its caption is said in several
wordings. Some pairs of colour and shape, and some wordings, are kept from training.
"""

import dataclasses
import importlib.util
import io
import itertools
import json
import pathlib
import re
import sys
import tarfile
from collections.abc import Iterable

import numpy as np

from deco_jax.errors import UsageError
from deco_jax.storage import write_json

PACKAGE = "easy_vqa"
COLORS = ("red", "green", "blue", "yellow", "teal", "black", "gray", "brown")
SHAPES = ("circle", "rectangle", "triangle")
PAIRS = tuple(itertools.product(COLORS, SHAPES))
UNSEEN_PAIRS = (("red", "triangle"), ("blue", "rectangle"), ("yellow", "circle"), ("brown", "triangle"))
WORDINGS = (
    "a {color} {shape}",
    "there is a {color} {shape} in the image",
    "the image contains a {color} {shape}",
    "a picture of a {color} {shape}",
    "one {color} {shape} on a light background",
    "the color of the {shape} is {color}",
    "a {shape} that is {color}",
    "the shape is a {color} {shape}",
    "an image of a {shape}, and it is {color}",
    "here you can see a {color} {shape}",
)
UNSEEN_WORDINGS = (
    "{color} {shape}",
    "a drawing of a {color} {shape}",
    "a photo of a {color} {shape}",
    "a {shape} in {color}",
    "a {shape} painted {color}",
    "a single {shape}, colored {color}",
    "the {shape} in this picture is {color}",
    "this {shape} has the color {color}",
    "please show me one {color} {shape}",
    "I would like a {color} {shape}",
    "look at this {color} {shape}",
    "a {color} {shape} on a plain background",
    "a quick sketch of one {color} {shape}",
)
REPEATS = 3  # wordings of each image's caption
SHARDS = 4
DONE = "shapes.json"  # beside the shards: they are complete

Pair = tuple[str, str]  # colour and shape


@dataclasses.dataclass(frozen=True)
class Captioned:
    """An image whose questions tell what it shows."""

    number: int
    content: bytes  # of its PNG file
    pair: Pair


def installed_folder() -> pathlib.Path:
    """The data that the package ships; it is not imported, since it would want TensorFlow.

    Raises:
      UsageError: it is not installed.
    """
    package = importlib.util.find_spec(PACKAGE)
    if package is None:
        raise UsageError("the shapes need a package of PyPI: pip install --no-deps easy-vqa")
    return pathlib.Path(package.origin).parent / "data"


def possible(questions: Iterable[tuple[str, str]]) -> set[Pair]:
    """What an image may show, after questions and their answers: "is there not a red shape?", "no" → three pairs.

    Raises:
      ValueError: a question is none of those that are known.
    """
    left = set(PAIRS)
    for question, answer in questions:
        words = re.findall("[a-z]+", question)
        named = [word for word in words if word in COLORS + SHAPES]
        if answer in ("yes", "no") and len(named) == 1:
            shown = (answer == "yes") != ("not" in words or "no" in words)
            left = {pair for pair in left if (named[0] in pair) == shown}
        elif answer in COLORS + SHAPES and len(named) <= 1:
            left = {pair for pair in left if answer in pair and set(named) <= set(pair)}
        else:
            raise ValueError(f"{question!r} with the answer {answer!r} is not understood")
    return left


def read_captioned(folder: pathlib.Path) -> tuple[list[Captioned], int]:
    """The images of `folder`, train or test, whose pair is certain; and the number of the others."""
    questions: dict[int, list[tuple[str, str]]] = {}
    for question, answer, number in json.loads((folder / "questions.json").read_text()):
        questions.setdefault(number, []).append((question, answer))
    found, images = [], sorted((folder / "images").glob("*.png"), key=lambda path: int(path.stem))
    for path in images:
        pairs = possible(questions.get(int(path.stem), []))
        if len(pairs) == 1:
            found.append(Captioned(int(path.stem), path.read_bytes(), pairs.pop()))
    return found, len(images) - len(found)


def captions(pair: Pair, number: int) -> list[str]:
    """`REPEATS` captions of different wordings for an image, drawn by its number."""
    color, shape = pair
    chosen = np.random.default_rng(number).choice(len(WORDINGS), REPEATS, replace=False)
    return [WORDINGS[k].format(color=color, shape=shape) for k in chosen]


def write_shards(images: list[Captioned], out: pathlib.Path) -> int:
    """Writes shards of image and caption, the same bytes whenever it is done; returns the number of samples."""
    samples = [(image, k, text) for image in images for k, text in enumerate(captions(image.pair, image.number))]
    for shard in range(SHARDS):
        with tarfile.open(out / f"shapes-{shard:05}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for image, k, text in samples[shard::SHARDS]:
                for suffix, content in (("png", image.content), ("txt", text.encode())):
                    member = tarfile.TarInfo(f"{image.number:04}_{k}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return len(samples)


def main(out: str) -> None:
    """Writes the shards to train on into a folder, unless they are there, and says how many images are left out."""
    folder = pathlib.Path(out)
    if (folder / DONE).exists():
        print(f"{folder} is complete: {(folder / DONE).read_text().strip()}")
        return
    folder.mkdir(parents=True, exist_ok=True)
    images, unclear = read_captioned(installed_folder() / "train")
    kept = [image for image in images if image.pair not in UNSEEN_PAIRS]
    counts = {
        "samples": write_shards(kept, folder),
        "images": len(kept),
        "questions_leave_several_pairs": unclear,
        "of_unseen_pairs": len(images) - len(kept),
    }
    write_json(folder / DONE, counts)
    print(
        f"{folder}: {counts['samples']:,} captions of {len(kept):,} images. Left out are {unclear:,} images whose "
        f"questions do not tell what they show, and {counts['of_unseen_pairs']:,} of pairs that training shall not see."
    )


if __name__ == "__main__":
    try:
        main(sys.argv[1])
    except UsageError as error:
        sys.exit(str(error))
