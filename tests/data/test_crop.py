"""Does a random crop cut out what Pillow alone cuts out, everywhere along an image, and the same one in every start?"""

import hashlib
import io
import itertools
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from deco_jax.config.fields import FIELDS
from deco_jax.data.decode import Decoder
from deco_jax.data.features import open_features
from deco_jax.data.pipeline import batches, crop_offset, fingerprint
from deco_jax.data.sources import open_source
from deco_jax.data.transforms import square_crop
from deco_jax.errors import UsageError
from deco_jax.preparation.images import prepare_images
from deco_jax.preparation.teacher import prepare_teacher
from tests.data.captioned import Lengths
from tests.data.test_reading import data_config

SIZE, RECORDS, BATCH, SEED = 8, 14, 6, 5
BROKEN = 4  # a record that cannot be read; the next one stands in
LAST = 1 - 2.0**-53  # the greatest offset there is


# --- the square


def resized(image, size):
    """What ADM's code makes of an image before it cuts out the square."""
    while min(*image.size) >= 2 * size:
        image = image.resize(tuple(x // 2 for x in image.size), resample=Image.Resampling.BOX)
    scale = size / min(*image.size)
    return np.array(image.resize(tuple(round(x * scale) for x in image.size), resample=Image.Resampling.BICUBIC))


def test_a_square_of_the_resized_image():
    """To the bit, at both ends and between them, lying and standing."""
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (300, 300, 3), np.uint8))
    for width, height in rng.integers(1, 300, (100, 2)).tolist():
        image = noise.crop((0, 0, width, height))
        whole_HxWx3 = resized(image, 31)
        room = max(whole_HxWx3.shape) - 31
        for place in {0, room // 3, room}:
            top, left = (place, 0) if height > width else (0, place)
            offset = (place + 0.5) / (room + 1)
            case = f"{width}×{height}, {place} of {room}"
            np.testing.assert_array_equal(
                square_crop(image, 31, offset), whole_HxWx3[top : top + 31, left : left + 31], case
            )


@pytest.mark.parametrize("offset, first", [(0.0, 0), (0.24, 0), (0.26, 1), (0.74, 2), (0.76, 3), (LAST, 3)])
def test_both_ends_have_their_share(offset, first):
    """Of room for four places each gets a quarter; the last one would be left out by the usual slip."""
    image_8x11x3 = np.random.default_rng(0).integers(0, 256, (8, 11, 3), np.uint8)
    for pixels in (image_8x11x3, image_8x11x3.transpose(1, 0, 2)):
        expected = np.take(pixels, np.arange(first, first + 8), int(np.argmax(pixels.shape)))
        np.testing.assert_array_equal(square_crop(Image.fromarray(pixels), 8, offset), expected)


def test_a_photograph_is_turned_before_it_is_cut():
    """Its long side is that of the upright picture."""
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 20, 3), np.uint8))
    stream = io.BytesIO()
    image.save(stream, "png", exif=exif)
    upright_20x8x3 = np.rot90(np.asarray(image), -1)
    decoder = Decoder(size=8, orient=True, background="white")
    np.testing.assert_array_equal(decoder(stream.getvalue(), 0.0), upright_20x8x3[:8])
    np.testing.assert_array_equal(decoder(stream.getvalue(), LAST), upright_20x8x3[12:])


# --- the draw


def philox(seed, place):
    """The first 64 bits of Philox4x64-10 (Salmon et al. 2011), counted from 1 as NumPy does."""
    mask, x, key = 2**64 - 1, [1, 0, 0, 0], [seed, place]
    for _ in range(10):
        a, b = 0xD2E7470EE14C6C93 * x[0], 0xCA5A826395121157 * x[2]
        x = [(b >> 64) ^ x[1] ^ key[0], b & mask, (a >> 64) ^ x[3] ^ key[1], a & mask]
        key = [(key[0] + 0x9E3779B97F4A7C15) & mask, (key[1] + 0xBB67AE8584CAA73B) & mask]
    return x[0]


def test_the_draw_is_that_of_runs_which_are_under_way():
    """A run that was begun with another version of NumPy must go on with the same crops."""
    for seed, place in ((0, 0), (0, 1), (2**31 - 1, 10**13), (5, 2**63 - 1)):
        assert crop_offset(seed, place) == (philox(seed, place) >> 11) / 2**53


def test_draws_are_uniform_and_independent():
    """Also those of places side by side, of the next epoch, and of neighbouring seeds, the usual choice."""
    count, bins = 20_000, 10
    draws = np.array([[crop_offset(seed, place) for place in range(count)] for seed in (0, 1)])
    assert draws.min() >= 0 and draws.max() < 1
    for drawn in draws:
        shares = np.bincount((drawn * bins).astype(int), minlength=bins) / count
        assert np.abs(shares - 1 / bins).max() < 5 * (0.1 * 0.9 / count) ** 0.5
    pairs = [(draws[0], draws[1]), *((draws[0][:-lag], draws[0][lag:]) for lag in (1, 2, RECORDS, 256))]
    for one, other in pairs:
        assert abs(np.corrcoef(one, other)[0, 1]) < 5 / count**0.5


# --- the batches


def pixels(number):
    """Lying or standing, and noise: each crop tells from which image and from where it is."""
    long = 9 + number % 5
    shape = (SIZE, long, 3) if number % 2 else (long, SIZE, 3)
    return np.random.default_rng(number).integers(0, 256, shape, np.uint8)


def files():
    """[(stem, bytes of a PNG)] of the records in order, of which one is cut off."""
    for number in range(RECORDS):
        stream = io.BytesIO()
        Image.fromarray(pixels(number)).save(stream, "png")
        yield f"{number:02}", stream.getvalue()[: 40 if number == BROKEN else None]


def tar_of(path, members):
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def write_folder(root):
    (root / "all").mkdir()
    for stem, content in files():
        (root / f"all/{stem}.png").write_bytes(content)


def write_tars(root):
    tar_of(root / "all.tar", [(f"{stem}.png", content) for stem, content in files()])


def write_captions(root):
    for stem, content in files():
        (root / f"{stem}.png").write_bytes(content)
    lines = [json.dumps({"file_name": f"{stem}.png", "text": stem}) for stem, _ in files()]
    (root / "metadata.jsonl").write_text("\n".join(lines))


def write_webdataset(root):
    tar_of(root / "0.tar", [(f"{s}.{end}", c) for s, png in files() for end, c in (("png", png), ("txt", s.encode()))])


def write_parquet(root):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    stems, contents = zip(*files(), strict=True)
    pq.write_table(pa.table({"image": contents, "caption": stems}), root / "x.parquet", row_group_size=4)


WRITERS = {
    "folder": write_folder,
    "tars": write_tars,
    "captions": write_captions,
    "webdataset": write_webdataset,
    "parquet": write_parquet,
}


def config_of(root, source, **fields):
    usual = {"image_size": SIZE, "batch_size": BATCH, "crop": "random", "max_bad_share": 1.0}
    return data_config(root, **usual | {"source": source} | fields)


def take(config, start=0, count=6, rows=None):
    source = open_source(config)
    tokenizer = Lengths() if config.source in ("captions", "webdataset", "parquet") else None
    return list(itertools.islice(batches(config, SEED, source, start, rows=rows, tokenizer=tokenizer), count))


def same(ours, theirs):
    for batch, other in zip(ours, theirs, strict=True):
        assert batch.keys() == other.keys()
        for key in batch:
            np.testing.assert_array_equal(batch[key], other[key], key)


def record_of(centre):
    """Which record's centre this is."""
    (found,) = [k for k in range(RECORDS) if np.array_equal(square_crop(Image.fromarray(pixels(k)), SIZE), centre)]
    return found


@pytest.mark.parametrize("source", WRITERS)
def test_each_place_in_the_epochs_has_its_own_crop(source, tmp_path):
    """Of the same records in the same order as the centres, over two and a half epochs; what stands in for a broken
    record is cut where that one would have been; and neither resuming nor hosts nor workers change a bit."""
    WRITERS[source](tmp_path)
    config = config_of(tmp_path, source)
    taken, centres = take(config), take(config_of(tmp_path, source, crop="centre"))
    offsets = {}
    for k, (batch, centre) in enumerate(zip(taken, centres, strict=True)):
        np.testing.assert_array_equal(batch["bad"], centre["bad"])
        for row in range(BATCH):
            record, place = record_of(centre["image"][row]), k * BATCH + row
            assert (record == BROKEN + 1) >= (batch["bad"][row] == BROKEN)
            whole = pixels(record)
            first = int(philox(SEED, place) / 2**64 * (max(whole.shape[:2]) - SIZE + 1))
            expected = np.take(whole, np.arange(first, first + SIZE), int(np.argmax(whole.shape[:2])))
            np.testing.assert_array_equal(batch["image"][row], expected, f"record {record} at place {place}")
            offsets.setdefault(record, set()).add(first)
    assert any(len(firsts) > 1 for firsts in offsets.values()), "the crop of a record must change with the epoch"
    assert any(BROKEN in batch["bad"] for batch in taken), "no record stood in for another, so this compared nothing"
    same(take(config, start=2, count=4), taken[2:])
    halves = [take(config, rows=rows) for rows in np.split(np.arange(BATCH), 2)]
    same([{key: np.concatenate([a[key], b[key]]) for key in a} for a, b in zip(*halves, strict=True)], taken)
    config.workers = 2
    same(take(config), taken)


def test_a_run_keeps_its_crop(tmp_path):
    """It is part of what a run is: the fingerprint of its batches changes, that of older runs does not."""
    write_folder(tmp_path)
    config = config_of(tmp_path, "folder")
    source = open_source(config)
    prints = {crop: fingerprint(config_of(tmp_path, "folder", crop=crop), 0, source) for crop in ("random", "centre")}
    older = repr((source.identity, RECORDS, 0, BATCH, SIZE)).encode()
    assert prints["centre"] == hashlib.sha256(older).hexdigest()[:16] != prints["random"]
    assert FIELDS["data.crop"].resume == "fixed" and FIELDS["data.crop"].default == "centre"


# --- what holds one crop of each image


def test_what_holds_one_crop_of_each_image_is_refused(tmp_path, tiny_config):
    """Stored features, or prepared images, would be of other pixels than the ones that are trained on."""
    (tmp_path / "images").mkdir()
    WRITERS["folder"](tmp_path / "images")
    tiny_config.data = config_of(tmp_path / "images", "folder", image_size=32)
    tiny_config.teacher.stored = str(tmp_path / "features")
    source, said = open_source(tiny_config.data), "data.crop='random' cuts another square out of each image in every"
    with pytest.raises(UsageError, match=rf"{said} epoch, and teacher\.stored=.*features is of one of each"):
        open_features(tiny_config, source)
    with pytest.raises(UsageError, match=rf"{said} epoch, and --out=.*out is of one of each"):
        prepare_images(tiny_config, str(tmp_path / "out"), 4)
    with pytest.raises(UsageError, match=rf"{said} epoch, and --out=.*out is of one of each"):
        prepare_teacher(tiny_config, str(tmp_path / "out"), 4)
    tiny_config.data.crop = "centre"
    prepare_images(tiny_config, str(tmp_path / "prepared"), 4)
    tiny_config.data.update(crop="random", source="prepared", path=str(tmp_path / "prepared"))
    with pytest.raises(UsageError, match=rf"{said} epoch, and data\.path=.*prepared' is of one of each"):
        open_source(tiny_config.data)
