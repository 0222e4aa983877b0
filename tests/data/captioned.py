"""Captioned images for tests of their sources, and what Pillow, the ADM crop and Python's own reading make of them."""

import io
import itertools
import os
import pickle

import ml_dtypes
import numpy as np
from PIL import Image

from deco_jax.data.pipeline import batches
from deco_jax.data.transforms import square_crop

SIZE, BATCH = 8, 6
LONG_AGO = 1_600_000_000


class Lengths:
    """A stub of a tokenizer: of each caption its first characters' numbers."""

    def encode(self, text):
        return np.array([ord(c) for c in f"{text:<24.24}"], np.int32)


class States:
    """A stub of stored states, of which record 3 has none."""

    def __getitem__(self, record):
        if record == 3:
            raise ValueError("it has no stored states")
        return np.full((5, 2), record, ml_dtypes.bfloat16)


def pixels(number):
    shape = (9 + number % 5, 8 + number % 7, 3)
    return np.random.default_rng(number).integers(0, 256, shape, np.uint8)


def encoded(number, how="png"):
    """The bytes of the file of image `number`."""
    stream = io.BytesIO()
    Image.fromarray(pixels(number)).save(stream, how)
    return stream.getvalue()


def caption(number):
    return f"picture {number}, é 猫 {'very ' * (number % 4)}nice"


def crop(content):
    with Image.open(io.BytesIO(content)) as image:
        return square_crop(image.convert("RGB"), SIZE)


def same_records(source, expected):
    """`expected`: [(bytes of the image, caption)]; also of a worker's copy."""
    assert len(source) == len(expected)
    copy = pickle.loads(pickle.dumps(source))
    for number, (content, text) in enumerate(expected):
        for each in (source, copy):
            record = each.load(number)
            assert record.keys() == {"image", "caption"} and record["caption"] == text
            np.testing.assert_array_equal(record["image"], crop(content))


def some_batches(config, source, start=0, count=3, rows=None, seed=5):
    found = batches(config, seed, source, start, rows=rows, tokenizer=Lengths())
    return list(itertools.islice(found, count))


def same_batches(ours, theirs):
    for batch, other in zip(ours, theirs, strict=True):
        assert batch.keys() == other.keys() == {"image", "tokens", "bad"}
        for key in batch:
            np.testing.assert_array_equal(batch[key], other[key], key)


def order_is_exact(config, source):
    """Resuming, hosts and workers change no batch, and an epoch has each record once."""
    whole = some_batches(config, source, count=4)
    same_batches(some_batches(config, source, start=2, count=2), whole[2:])
    halves = [some_batches(config, source, count=4, rows=rows) for rows in np.split(np.arange(config.batch_size), 2)]
    joined = [{key: np.concatenate([a[key], b[key]]) for key in a} for a, b in zip(*halves, strict=True)]
    same_batches(joined, whole)
    config.workers = 2
    same_batches(some_batches(config, source, count=4), whole)
    config.workers = 0
    epoch = some_batches(config, source, count=-(-len(source) // config.batch_size))
    tokens = np.concatenate([batch["tokens"] for batch in epoch])[: len(source)]
    expected = [Lengths().encode(source.load(k)["caption"]) for k in range(len(source))]
    assert sorted(map(tuple, tokens.tolist())) == sorted(tuple(e.tolist()) for e in expected)


def age(root, when=LONG_AGO):
    """Makes all of a folder old: an index of what changed just now is not kept."""
    for path in [root, *root.rglob("*")]:
        os.utime(path, (when, when))
