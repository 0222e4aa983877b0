"""Are prepared images read as they were written, and is a folder that is not whole refused, or its bad record counted?

The folders are written here, past `deco prepare`, of which tests/preparation/test_images.py is.
"""

import concurrent.futures
import itertools
import json
import pickle
import resource

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from deco_jax.config import default_config
from deco_jax.data import prepared
from deco_jax.data.pipeline import BadRecords, batches
from deco_jax.data.sources import open_source
from deco_jax.errors import TransientError, UsageError

SIZE, RECORDS, A_FILE, UNREADABLE = 8, 13, 4, 6
FILES = -(-RECORDS // A_FILE)


def image_of(record, size=SIZE):
    """Noise, of which half is at both ends of what a byte holds."""
    rng = np.random.default_rng(record)
    values = rng.integers(0, 256, (size, size, 3))
    return np.where(rng.random(values.shape) < 0.5, values, rng.choice([0, 255], values.shape)).astype(np.uint8)


def record_of(number, size=SIZE):
    """As PNG's filter "Sub": to the left of the first pixel there are zeros."""
    image = image_of(number, size).astype(int)
    left = np.pad(image, ((0, 0), (1, 0), (0, 0)))[:, :-1]
    return int(number % 3).to_bytes(4, "little") + ((image - left) % 256).astype(np.uint8).tobytes()


def write_folder(root, records=RECORDS, a_file=A_FILE):
    """Record UNREADABLE is empty."""
    files = []
    for k, first in enumerate(range(0, records, a_file)):
        path, numbers = root / f"images-{k:05}.array_record", range(first, min(first + a_file, records))
        writer = ArrayRecordWriter(str(path), "group_size:1,zstd:1")
        for number in numbers:
            writer.write(b"" if number == UNREADABLE else record_of(number))
        writer.close()
        bad = {str(n): f"/photos/cat/{n}.png" for n in numbers if n == UNREADABLE}
        files.append({"bytes": path.stat().st_size, "sha256": "0" * 64, "bad": bad})
    contents = {
        "version": 1,
        "identity": "the source",
        "records": records,
        "records_a_file": a_file,
        "image_size": SIZE,
        "crop": "adm",
        "codec": "sub, zstd",
        "orient": True,
        "background": "white",
        "decoding": "as it was",
        "classes": 3,
        "class_names": ["cat", "dog", "eel"],
        "contents": {"source": "folder", "records": records, "classes": {}, "names": []},
        "files": files,
    }
    (root / "images.json").write_text(json.dumps(contents))
    return root


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path)


def config_of(folder, **changes):
    config = default_config().data
    config.update({"source": "prepared", "path": str(folder), "image_size": SIZE, "batch_size": 4, "workers": 0})
    config.update({"max_bad_records": 2, "max_bad_share": 1.0} | changes)
    return config


@pytest.fixture(autouse=True)
def no_patience(monkeypatch):
    """What may pass is tried once."""
    monkeypatch.setenv("DECO_RETRY_SECONDS", "0")


# --- what is there


@pytest.mark.parametrize("size", [1, 2, 17])
def test_pixels_come_back(size):
    """Also of one pixel, and those of a whole batch."""
    images = np.stack([image_of(k, size) for k in range(5)])
    for k, encoded in enumerate(prepared.encode(images)):
        assert encoded.tobytes() == record_of(k, size)[4:]
        record = prepared.decode(record_of(k, size), size)
        assert record["image"].dtype == np.uint8 and record["label"] == k % 3 and record["label"].dtype == np.int32
        np.testing.assert_array_equal(record["image"], images[k])
    assert prepared.encode(images).shape == images.shape


def test_a_folder(folder):
    source = open_source(config_of(folder))
    assert (len(source), source.identity, source.decoding) == (RECORDS, "the source", "as it was")
    assert source.condition.num_classes == 3 and source.class_names == ("cat", "dog", "eel")
    assert source.contents()["records"] == RECORDS
    assert source.summary()[0].startswith("Images: 13 in 3 classes")
    assert source.summary()[1].startswith("Prepared: 4 files, 0.0 GB, in ")
    assert source.describe(5) == f"{folder}/images-00001.array_record record 1"


@pytest.mark.parametrize("copied", [False, True])
def test_many_threads_read_at_once(folder, copied):
    """From one source, of which no file is open yet; and from a worker's copy of one that has read."""
    source = open_source(config_of(folder))
    if copied:
        source.load(0)
        source = pickle.loads(pickle.dumps(source))
    numbers = [n for n in range(RECORDS) if n != UNREADABLE] * 20
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        for number, record in zip(numbers, pool.map(source.load, numbers), strict=True):
            np.testing.assert_array_equal(record["image"], image_of(number))
            assert record["label"] == number % 3


def test_more_files_than_a_process_may_open(tmp_path):
    """ImageNet at 512² takes 940, a process may open 1,024 unless it asks for more, and a reader keeps its file."""
    write_folder(tmp_path, 120, 1)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (100, limits[1]))
    try:
        source = open_source(config_of(tmp_path))
        for number in range(120):
            if number != UNREADABLE:
                source.load(number)
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > 120
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


# --- what cannot be read


def alter(path, content, place):
    """Writes the content with one bit changed, in a byte that holds something: files are filled up with zeros."""
    content, holding = bytearray(content), np.flatnonzero(np.frombuffer(content, np.uint8))
    content[holding[int(place * len(holding))]] ^= 16
    path.write_bytes(content)


def damage(folder, record):
    """Alters the middle of a record in a file of four."""
    path = folder / f"images-{record // A_FILE:05}.array_record"
    alter(path, path.read_bytes(), (record % A_FILE + 0.5) / A_FILE)


def test_no_altered_byte_gives_another_image(folder):
    """Wherever in the file it is, also in what says where the records are: a record is the right one, or none."""
    path, found = folder / "images-00000.array_record", set()
    content = path.read_bytes()
    for place in np.linspace(0, 1, 60, endpoint=False):
        alter(path, content, place)
        source, good = open_source(config_of(folder)), []
        for number in range(A_FILE):
            try:
                np.testing.assert_array_equal(source.load(number)["image"], image_of(number))
                good.append(number)
            except ValueError as error:
                assert "its bytes were altered. This makes it anew: deco prepare --images" in str(error)
        found.add(len(good))
    assert {0, 3} <= found, "none of the places was in a record, or none in a header"


def test_bad_records_are_named_and_others_stand_in(folder, caplog):
    """One was unreadable from the start; of another a byte was altered."""
    damage(folder, 9)
    config = config_of(folder)
    source = open_source(config)
    with pytest.raises(ValueError, match="unreadable when the images were prepared"):
        source.load(UNREADABLE)
    records, order = BadRecords(source, config), []
    for batch in itertools.islice(batches(config, 0, source, 0), 26):  # eight epochs
        records.check(batch["bad"])
        order += zip(batch["bad"].tolist(), batch["image"], strict=True)
    assert records.seen == {UNREADABLE, 9}
    for bad, image in order:
        if bad >= 0:
            np.testing.assert_array_equal(image, image_of(bad + 1))
    assert f"{folder}/images-00001.array_record record 2, /photos/cat/6.png (ValueError: its image was" in caplog.text
    assert (
        f"{folder}/images-00002.array_record record 1 (ValueError: its bytes were altered. This makes it" in caplog.text
    )


def test_too_many_bad_records_end_the_run(folder):
    for number in (0, 4, 9):
        damage(folder, number)
    config = config_of(folder, max_bad_records=1)
    source = open_source(config)
    records = BadRecords(source, config)
    with pytest.raises(UsageError, match=r"data.max_bad_records=1"):
        for batch in itertools.islice(batches(config, 0, source, 0), 8):
            records.check(batch["bad"])


@pytest.mark.parametrize("record", [b"abc", bytes(4), bytes(3 * SIZE**2 + 3), bytes(3 * SIZE**2 + 5)])
def test_a_record_of_another_length_is_no_image(record):
    with pytest.raises(ValueError, match=f"{len(record)} bytes, where {3 * SIZE**2 + 4} are expected"):
        prepared.decode(record, SIZE)


@pytest.mark.parametrize("kept", [0, 100, -70_000, -50])
def test_a_file_that_is_cut_off_during_the_run_gives_no_image(folder, kept):
    source, path = open_source(config_of(folder)), folder / "images-00000.array_record"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises((ValueError, RuntimeError), match="its bytes were altered|should be at least 64KB big"):
        source.load(1)


def test_a_folder_that_goes_away_is_no_bad_record(folder):
    """As one that is mounted does for a while: nothing is counted, and later all is read."""
    source = open_source(config_of(folder))
    folder.rename(folder.with_name("away"))
    with pytest.raises(TransientError, match=r"images-00003.array_record record 0 still fails .*its folder is gone"):
        source.load(12)
    folder.with_name("away").rename(folder)
    np.testing.assert_array_equal(source.load(12)["image"], image_of(12))


def test_a_file_that_goes_away_ends_the_run_and_counts_nothing(folder):
    """A hundred records of one file would be unreadable for good; and once it is back, all is read."""
    source, file = open_source(config_of(folder)), folder / "images-00001.array_record"
    file.rename(folder / "aside")
    with pytest.raises(UsageError, match=f"{file} is not there any more. This makes it anew: deco prepare --images"):
        source.load(5)
    (folder / "aside").rename(file)
    np.testing.assert_array_equal(source.load(5)["image"], image_of(5))


def test_a_label_that_is_no_class_is_an_unreadable_record(folder):
    """It would be a NaN in the loss, as a table's row that is not there."""
    change_manifest(folder, classes=1, class_names=["cat"])
    source, found = open_source(config_of(folder)), []
    for number in range(len(source)):
        try:
            found.append(int(source.load(number)["label"]))
        except ValueError as error:
            assert "label is" in str(error) or "unreadable" in str(error)
    assert set(found) == {0} and len(found) < len(source)


def test_a_reader_that_failed_for_a_while_is_opened_again(folder, monkeypatch):
    """What is tried again opens the file anew: a handle of a network folder may be stale for good."""
    monkeypatch.setenv("DECO_RETRY_SECONDS", "30")
    opened, real = [], prepared.ArrayRecordReader

    def open_reader(path, *arguments, **options):
        opened.append(path)
        if len(opened) > 1:
            return real(path, *arguments, **options)

        class Stale:
            def read(self, _):
                raise RuntimeError("INTERNAL: Stale file handle")

        return Stale()

    monkeypatch.setattr(prepared, "ArrayRecordReader", open_reader)
    np.testing.assert_array_equal(open_source(config_of(folder)).load(3)["image"], image_of(3))
    assert opened == [f"{folder}/images-00000.array_record"] * 2


# --- folders that are refused


def change_manifest(folder, **fields):
    values = json.loads((folder / "images.json").read_text()) | fields
    kept = {name: value for name, value in values.items() if value is not None}
    (folder / "images.json").write_text(json.dumps(kept))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"image_size": 16}, r"was prepared with data.image_size=8, and the run has 16; they must be equal"),
        ({"orient": False}, r"was prepared with data.orient=True, and the run has False"),
        ({"background": ""}, r"was prepared with data.background='white', and the run has ''"),
    ],
)
def test_a_run_that_needs_other_images(folder, change, message):
    with pytest.raises(UsageError, match=rf"data.path='{folder}' {message}"):
        open_source(config_of(folder, **change))


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"crop": "random"}, r"was prepared with crop='random'; this deco_jax reads 'adm'"),
        ({"codec": "qoi"}, r"was prepared with codec='qoi'; this deco_jax reads 'sub, zstd'"),
        ({"version": 2}, r"images.json is of version 2, and this deco_jax reads version 1"),
        ({"identity": None}, r"images.json is damaged \(identity is 'None'\)"),
        ({"records": "13"}, r"images.json is damaged \(records is '13'\)"),
        ({"records": True}, r"images.json is damaged \(records is 'True'\)"),
        ({"records_a_file": 0}, r"images.json is damaged \(records_a_file is '0'\)"),
        ({"records": 17}, r"images.json is damaged \(4 files, not 5\)"),
        ({"files": [{"bytes": 5}] * 4}, r"images.json is damaged \(sha256 is 'None'\)"),
        ({"files": "none"}, r"images.json is damaged \('n' has no fields\)"),
        ({"files": [{"bytes": 5, "sha256": "0", "bad": {"one": "cat/1.png"}}] * 4}, r"damaged \(bad is "),
        ({"classes": 2}, r"images.json is damaged \(3 class names, not 2\)"),
        ({"contents": {}}, r"images.json is damaged \(None records of the source, not 13\)"),
        ({"files": None}, r"is incomplete: 4 of 4 files are missing. This makes them: deco prepare --images"),
    ],
)
def test_a_manifest_of_something_else_or_damaged(folder, fields, message):
    change_manifest(folder, **fields)
    with pytest.raises(UsageError, match=message):
        open_source(config_of(folder))


@pytest.mark.parametrize("content", ["", "{", "[1]", "\0" * 100])
def test_a_manifest_that_is_no_json(folder, content):
    (folder / "images.json").write_text(content)
    with pytest.raises(UsageError, match=r"images.json is damaged"):
        open_source(config_of(folder))


def test_files_that_are_not_whole(folder):
    path = folder / "images-00002.array_record"
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    size = f"{len(content) - 1:,} bytes of {len(content):,}"
    with pytest.raises(
        UsageError, match=rf"damaged files: images-00002.array_record \({size}\)\. This makes them anew: deco"
    ):
        open_source(config_of(folder))
    path.unlink()
    with pytest.raises(
        UsageError, match=rf"1 of {FILES} files are missing. .*deco prepare --images --config FILE --out"
    ):
        open_source(config_of(folder))


@pytest.mark.parametrize(
    "path, message",
    [
        ("nowhere", "is no folder; `deco prepare --images --out DIR` makes one"),
        ("", "holds no images.json; `deco prepare --images --out DIR` makes such a folder"),
    ],
)
def test_no_folder_of_prepared_images(tmp_path, path, message):
    with pytest.raises(UsageError, match=message):
        open_source(config_of(tmp_path / path))
    with pytest.raises(UsageError, match="data.path='' is no folder"):
        open_source(config_of(""))


def test_a_run_that_would_skip_small_images_is_told_that_it_does_not(folder, caplog):
    """Runs of older versions, which took no notice, must go on."""
    assert len(open_source(config_of(folder, min_side=9))) == len(open_source(config_of(folder)))
    assert f"data.min_side=9 does nothing: data.path='{folder}' has the crops of all images" in caplog.text
