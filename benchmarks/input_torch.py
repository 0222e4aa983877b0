"""PyTorch's side of benchmarks/input.py: what a careful user writes to read the same images with a DataLoader.

A dataset per source, by number, and DataLoader's defaults; nothing of deco_jax. Its workers are forked, as on Linux by
default up to Python 3.13: that starts fastest and shares most memory.
"""

import functools
import io
import itertools
import os
import pathlib
import tarfile
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from PIL import Image

Reader = Callable[[int], tuple[np.ndarray, int]]


class RecordDataset:
    """What DataLoader asks for records by number."""

    def __init__(self, source: str, path: str, size: int):
        self.read = READERS[source](path, size)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        import torch

        image_SxSx3, label = self.read(index)
        return torch.from_numpy(image_SxSx3), label


def torch_batches(
    dataset: RecordDataset, order_KxB: np.ndarray, workers: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Images (B, size, size, 3) uint8 and labels (B,), without end; the K batches of record numbers over and over."""
    import torch
    from torch.utils.data import DataLoader

    torch.set_num_threads(1)  # as its workers have; more of them wait for each other where 64 small images are stacked
    order, context = itertools.cycle(order_KxB.tolist()), "fork" if workers else None
    for images, labels in DataLoader(
        dataset, batch_sampler=order, num_workers=workers, multiprocessing_context=context
    ):
        yield images.numpy(), labels.numpy()


def read_folder(path: str, size: int) -> Reader:
    """As torchvision's ImageFolder does it: every name is listed at the start."""
    classes = sorted(entry.name for entry in os.scandir(path) if entry.is_dir())
    found = []
    for label, name in enumerate(classes):
        for folder, _, files in sorted(os.walk(os.path.join(path, name))):
            for file in sorted(files):
                if file.lower().endswith((".jpeg", ".jpg", ".png")):
                    found.append((os.path.join(folder, file), label))

    def read(index: int) -> tuple[np.ndarray, int]:
        file, label = found[index]
        with Image.open(file) as image:
            return upstream_crop(image.convert("RGB"), size), label

    return read


def read_tars(path: str, size: int) -> Reader:
    """Reads an image from its place in the tar."""
    found = []
    with tarfile.open(path) as outer:
        for label, member in enumerate(sorted(outer, key=lambda member: member.name)):
            with tarfile.open(fileobj=outer.extractfile(member)) as inner:
                images = sorted(inner, key=lambda image: image.name)
                found += [(member.offset_data + image.offset_data, image.size, label) for image in images]
    tar = os.open(path, os.O_RDONLY)

    def read(index: int) -> tuple[np.ndarray, int]:
        start, count, label = found[index]
        with Image.open(io.BytesIO(os.pread(tar, count, start))) as image:
            return upstream_crop(image.convert("RGB"), size), label

    return read


def read_tfds(path: str, size: int) -> Reader:
    """TFDS' own source, which its documentation recommends for DataLoader; Pillow decodes."""
    import tensorflow_datasets as tfds

    decoders = {"image": tfds.decode.SkipDecoding()}
    records = tfds.builder("photos", data_dir=path).as_data_source(split="train", decoders=decoders)

    def read(index: int) -> tuple[np.ndarray, int]:
        record = records[index]
        with Image.open(io.BytesIO(record["image"])) as image:
            return upstream_crop(image.convert("RGB"), size), int(record["label"])

    return read


def read_prepared(path: str, size: int) -> Reader:
    """ArrayRecord's own source; a record is a label, and pixels as differences to the left."""
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    files = [str(file) for file in sorted(pathlib.Path(path).glob("*.array_record"))]
    records = functools.cache(lambda: ArrayRecordDataSource(files))  # in each worker: one from before a fork crashes it

    def read(index: int) -> tuple[np.ndarray, int]:
        record = np.frombuffer(records()[index], np.uint8)
        differences = record[4:].reshape(size, size, 3)
        return np.add.accumulate(differences, axis=1, dtype=np.uint8), int(record[:4].view("<i4")[0])

    return read


READERS = {"folder": read_folder, "tars": read_tars, "tfds": read_tfds, "prepared": read_prepared}


def upstream_crop(image: Image.Image, size: int) -> np.ndarray:
    """As the ADM code base writes it; (size, size, 3) uint8."""
    while min(*image.size) >= 2 * size:
        image = image.resize(tuple(x // 2 for x in image.size), resample=Image.Resampling.BOX)
    scale = size / min(*image.size)
    image = image.resize(tuple(round(x * scale) for x in image.size), resample=Image.Resampling.BICUBIC)
    pixels = np.array(image)
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return pixels[top : top + size, left : left + size]
