"""The images that benchmarks/input.py reads: photos, made up or one's own, as each of our sources wants them.

What an earlier start made in the same folder is used again.
"""

import concurrent.futures
import io
import itertools
import json
import multiprocessing
import os
import pathlib
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator

import numpy as np
from PIL import Image, ImageDraw

PHOTO_SIZES = [(500, 375)] * 5 + [(375, 500)] * 2 + [(640, 480)] * 2 + [(500, 333)]  # about ImageNet's mix
CLASSES = 10
NAMES_A_CLASS = 1300


def photo(number: int) -> bytes:
    """A made-up photo as JPEG of quality 95; the same for the same number.

    Discs of all sizes in front of each other have the edges of things; noise that falls with frequency has the
    textures between them. Its strength is set so that 111 photos' bytes are met, as JPEG (97,500 each) and, cropped to
    256², as stored by `deco prepare --images` (123,000).
    """
    rng = np.random.default_rng(number)
    width, height = PHOTO_SIZES[rng.integers(len(PHOTO_SIZES))]
    image = Image.new("RGB", (width, height), tuple(rng.integers(40, 216, 3).tolist()))
    draw, colour = ImageDraw.Draw(image), rng.integers(30, 226, 3)
    for radius in np.sort(np.minimum(8 / rng.random(60), 200))[::-1]:
        x, y, wide = rng.random() * width, rng.random() * height, radius * rng.uniform(0.5, 1.5)
        shade = np.clip(colour + rng.normal(0, 40) + rng.normal(0, 18, 3), 0, 255).astype(int)
        draw.ellipse((x - wide, y - radius, x + wide, y + radius), fill=tuple(shade.tolist()))
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    frequency[0, 0] = 1

    def texture_HxWx1() -> np.ndarray:
        spectrum = np.fft.rfft2(rng.normal(size=(height, width))) / frequency**1.4
        noise = np.fft.irfft2(spectrum, (height, width))
        return (noise / noise.std())[..., None]

    tint, grain = rng.normal(0, 0.25, 3), rng.normal(0, 2, (height, width, 1))
    pixels = np.asarray(image) + 28 * (texture_HxWx1() + tint * texture_HxWx1()) + grain
    file = io.BytesIO()
    Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(file, "JPEG", quality=95)
    return file.getvalue()


def make_photos(root: pathlib.Path, count: int, images: str | None) -> list[pathlib.Path]:
    """Fills `root`/photos/<class> with made-up photos, or with the first of the folder `images`; returns their paths.

    A folder that an earlier start filled is used again.
    """
    wanted, told = {"count": count, "images": images}, root / "made.json"
    if told.exists() and json.loads(told.read_text()) != wanted:
        sys.exit(f"--data={root} holds other photos ({told.read_text()}); name another folder, or remove it.")
    if not told.exists():
        shutil.rmtree(root / "photos", ignore_errors=True)
        if images:
            found = sorted(p for p in pathlib.Path(images).rglob("*") if p.suffix.lower() in (".jpeg", ".jpg", ".png"))
            if not found:
                sys.exit(f"--images={images} holds no .jpeg, .jpg or .png.")
            contents = ((p.read_bytes(), p.suffix) for p in found[:count])
        else:
            contents = zip(_in_parallel(photo, range(count)), itertools.repeat(".JPEG"), strict=False)
        for number, (content, suffix) in enumerate(contents):
            path = root / "photos" / f"class_{number % CLASSES}" / f"{number:06d}{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        told.write_text(json.dumps(wanted))
    return sorted((root / "photos").glob("*/*"))


def _in_parallel(function: Callable[[int], bytes], numbers: range) -> Iterator[bytes]:
    with concurrent.futures.ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(function, numbers, chunksize=8)


def make_tar(root: pathlib.Path, photos: list[pathlib.Path]) -> pathlib.Path:
    """A tar of one tar per class, as ImageNet's training images come."""
    path = root / "photos.tar"
    if not path.exists():
        partial = path.with_suffix(".partial")
        with tarfile.open(partial, "w") as outer:
            for folder, files in itertools.groupby(photos, lambda photo: photo.parent):
                inner = io.BytesIO()
                with tarfile.open(fileobj=inner, mode="w") as tar:
                    for file in files:
                        tar.add(file, file.name)
                member = tarfile.TarInfo(f"{folder.name}.tar")
                member.size = inner.tell()
                inner.seek(0)
                outer.addfile(member, inner)
        partial.rename(path)
    return path


def make_tfds(root: pathlib.Path, photos: list[pathlib.Path]) -> pathlib.Path:
    """The photos as the TensorFlow Datasets set "photos", in ArrayRecord files."""
    path = root / "tfds"
    if (path / "photos" / "1.0.0").exists():
        return path
    import tensorflow_datasets as tfds

    tfds.disable_progress_bar()
    with tfds.core.registered.skip_registration():

        class Photos(tfds.core.GeneratorBasedBuilder):
            VERSION = tfds.core.Version("1.0.0")
            url_infos: dict = {}  # nothing to download  # noqa: RUF012

            def _info(self):
                features = {"image": tfds.features.Image(), "label": tfds.features.ClassLabel(num_classes=CLASSES)}
                return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

            def _split_generators(self, dl_manager):
                return {"train": self._generate_examples()}

            def _generate_examples(self):
                for number, file in enumerate(photos):
                    yield number, {"image": str(file), "label": int(file.parent.name.partition("_")[2])}

    Photos(data_dir=path).download_and_prepare(file_format="array_record")
    return path


def make_prepared(root: pathlib.Path, size: int) -> pathlib.Path:
    """The photos of `make_photos`, cropped and stored by our own command."""
    path, config = root / f"prepared-{size}", root / "config.py"
    config.write_text(
        "from deco_jax.config import default_config\n\n\ndef get_config():\n    c = default_config()\n"
        f"    c.data.update(source='folder', path={str(root / 'photos')!r}, image_size={size}, orient=False)\n"
        "    c.data.background = ''\n    return c\n"
    )
    command = [sys.executable, "-m", "deco_jax", "prepare", "--images", "--config", str(config), "--out", str(path)]
    if subprocess.run(command, stdout=subprocess.DEVNULL).returncode:
        sys.exit("Preparing the photos failed.")
    return path


def make_names(root: pathlib.Path, count: int) -> pathlib.Path:
    """`count` names of images in classes of 1,300; those of a class are all one small file."""
    path, partial = root / f"names-{count}", root / f"names-{count}.partial"
    if not path.exists():
        shutil.rmtree(partial, ignore_errors=True)
        content = io.BytesIO()
        Image.new("RGB", (32, 32), (200, 100, 50)).save(content, "JPEG")
        for number in range(count):
            folder = partial / f"n{number // NAMES_A_CLASS:08d}"
            if number % NAMES_A_CLASS == 0:
                folder.mkdir(parents=True)
                (folder / f"{folder.name}_0.JPEG").write_bytes(content.getvalue())
            else:
                os.link(folder / f"{folder.name}_0.JPEG", folder / f"{folder.name}_{number}.JPEG")
        for folder in partial.iterdir():
            os.utime(folder, (1.7e9, 1.7e9))  # 2023: an index does not trust folders that changed a moment ago
        partial.rename(path)
    return path
