"""Do errors of the storage that pass change nothing, and do those that stay end the run without being counted?"""

import copy
import dataclasses
import errno
import itertools
import json
import multiprocessing
import os
import pathlib
import shutil
import time

import numpy as np
import pytest
from PIL import Image

from deco_jax.config import default_config
from deco_jax.data import reading
from deco_jax.data.features import Contents, StoredFeatures, open_features
from deco_jax.data.folder import Folder
from deco_jax.data.pipeline import batches
from deco_jax.data.sources import open_source
from deco_jax.data.stored import array_file
from deco_jax.errors import TransientError, UsageError

RECORDS = 120
FAULTS = [  # what network folders and mounted buckets raise
    OSError(errno.ESTALE, "Stale file handle"),
    OSError(errno.EIO, "Input/output error"),
    TimeoutError("timed out"),
    ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"),
    OSError(errno.ENOTCONN, "Transport endpoint is not connected"),
]


class FailingFile:
    """Opened, but not to be read."""

    def __init__(self, error):
        self.error = error

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def seek(self, _):
        raise self.error


@dataclasses.dataclass
class Unreliable:
    """A folder on a storage that fails at one of `every` files, at opening or reading; also in a worker's copy."""

    folder: Folder
    every: int
    calls: int = 0

    def __post_init__(self):
        self.identity, self.decoding, self.condition = self.folder.identity, "", self.folder.condition

    def __len__(self):
        return len(self.folder)

    def open(self, path, mode):
        self.calls += 1
        if self.calls % self.every:
            return open(path, mode)
        error = copy.copy(FAULTS[self.calls // self.every % len(FAULTS)])
        if self.calls // self.every % 2:
            raise error
        return FailingFile(error)

    def load(self, index, offset=None):
        if multiprocessing.parent_process():  # in a worker; in this process tests set it, for as long as they last
            reading.open = self.open
        return self.folder.load(index, offset)

    def describe(self, index):
        return self.folder.describe(index)


@pytest.fixture
def unreliable(monkeypatch):
    """Makes a source unreliable, until the end of the test."""

    def make(source, every):
        made = Unreliable(source, every)
        monkeypatch.setattr(reading, "open", made.open, raising=False)
        return made

    return make


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Images of noise, two of which are broken; no test changes them."""
    root = tmp_path_factory.mktemp("images")
    for i in range(RECORDS):
        path = root / f"class{i % 3}" / f"{i:03}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (8, 8, 3), np.uint8)).save(path)
    for path in (root / "class0/006.png", root / "class2/065.png"):
        path.write_bytes(path.read_bytes()[:60])
    return root


def data_config(root, **fields):
    """The `data` part of a configuration."""
    config = default_config().data
    config.update({"source": "folder", "path": str(root), "image_size": 8, "batch_size": 24, "workers": 0} | fields)
    return config


def take(count, config, source, **more):
    return list(itertools.islice(batches(config, 0, source, 0, **more), count))


@pytest.mark.parametrize("workers", [0, 2])
def test_errors_that_pass_change_no_batch(images, workers, unreliable, caplog):
    """One ESTALE among a million reads once took another image into the batch, and counted as a broken file."""
    config = data_config(images, workers=workers)
    source = open_source(config)
    expected = take(10, data_config(images), source)  # two epochs
    failing = unreliable(source, every=17)
    for k, (batch, whole) in enumerate(zip(take(10, config, failing), expected, strict=True)):
        for key in whole:
            np.testing.assert_array_equal(batch[key], whole[key], f"{key} of batch {k}")
    assert sum((batch["bad"] >= 0).sum() for batch in expected) == 4, "broken files are still found"
    if not workers:
        assert failing.calls > 240 and "tried again in" in caplog.text


@pytest.mark.parametrize("workers", [0, 2])
def test_errors_that_stay_end_the_run_and_count_nothing(images, workers, unreliable, monkeypatch):
    """The type must survive the way from a worker: exit code 75 asks a scheduler for the same command again."""
    monkeypatch.setenv("DECO_RETRY_SECONDS", "0.3")
    config = data_config(images, workers=workers, max_bad_records=0, max_bad_share=0.0)
    with pytest.raises(TransientError, match=r"reading .*\.png still fails \(.*Error: "):
        take(1, config, unreliable(open_source(config), every=1))


def test_a_run_that_ends_reads_no_further_batch(images, unreliable, monkeypatch):
    """Threads would go on, and each would try for five minutes before it gives up."""
    monkeypatch.setenv("DECO_RETRY_SECONDS", "0.5")
    config = data_config(images, threads=3)
    source, reads = unreliable(open_source(config), every=1), []
    load = source.load
    monkeypatch.setattr(source, "load", lambda index, offset: reads.append(index) or load(index, offset))
    with pytest.raises(TransientError):
        take(1, config, source)
    time.sleep(1)
    assert len(reads) <= 3, f"records {reads} were tried, and three threads should have tried one each"


def test_a_file_that_is_not_there_is_a_bad_record(images, tmp_path, monkeypatch):
    """It is the record's own fault, and not tried again; but a whole folder that went away is a mount's."""
    shutil.copytree(images, tmp_path / "copy")
    source = open_source(data_config(tmp_path / "copy"))
    pathlib.Path(source.describe(3)).unlink()
    with pytest.raises(FileNotFoundError):
        source.load(3)
    monkeypatch.setenv("DECO_RETRY_SECONDS", "0.2")
    shutil.rmtree(tmp_path / "copy")
    with pytest.raises(TransientError, match="its folder is gone"):
        source.load(4)


def test_a_folder_that_may_not_be_read_is_bad_input(images, monkeypatch):
    def deny(path):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(os, "scandir", deny)
    with pytest.raises(UsageError, match=r"cannot be read: .*Permission denied"):
        open_source(data_config(images))


# --- stored features


def write_features(folder, source):
    """Of record i, N = 4 tokens of F = 8 channels, all i."""
    contents = Contents(source.identity, RECORDS, 50, 4, 8, 8, 4, "digest")
    for k in range(contents.files):
        rows = np.arange(50 * k, 50 * k + contents.shape(k)[0])
        array = np.broadcast_to(rows[:, None, None], contents.shape(k)).astype(np.float16)
        with array_file("features", folder, k).open("wb") as file:
            np.save(file, array)
    (folder / "features.json").write_text(json.dumps(contents.__dict__ | {"bad": [5]}))
    return StoredFeatures(folder)


def test_features_survive_errors_that_pass(images, tmp_path, unreliable, monkeypatch):
    """They come from the same disks, three times as many bytes as the images."""
    source = open_source(data_config(images))
    features = write_features(tmp_path, source)
    failing = unreliable(source, every=5)
    for record in range(0, RECORDS, 3):
        np.testing.assert_array_equal(features[record], np.full((4, 8), record))
    assert failing.calls > 45
    StoredFeatures(tmp_path)
    monkeypatch.setenv("DECO_RETRY_SECONDS", "0.2")
    failing.every = 1
    for read in (lambda: features[3], lambda: StoredFeatures(tmp_path)):
        with pytest.raises(TransientError, match="still fails"):
            read()


def test_features_of_images_that_were_decoded_otherwise(images, tmp_path):
    """They would be aligned to another picture."""
    config = default_config()
    config.data, config.teacher.stored = data_config(images), str(tmp_path)
    config.model.patch_size, config.loss.alignment_features = 4, 8
    write_features(tmp_path, open_source(config.data))
    said = json.loads((tmp_path / "features.json").read_text())
    said["decoding"] = ""
    (tmp_path / "features.json").write_text(json.dumps(said))
    expected = (
        r"not turned, transparency dropped \(data.orient=False.* there, turned by EXIF, transparency on white here"
    )
    with pytest.raises(UsageError, match=expected):
        open_features(config, open_source(config.data))
    config.data.update(orient=False, background="")
    open_features(config, open_source(config.data))


def test_features_of_earlier_versions_do_not_say_how_images_were_decoded(images, tmp_path, caplog):
    """The command that used them goes on, with a warning where it may matter."""
    config = default_config()
    config.data, config.teacher.stored = data_config(images), str(tmp_path)
    config.model.patch_size, config.loss.alignment_features = 4, 8
    write_features(tmp_path, open_source(config.data))
    said = json.loads((tmp_path / "features.json").read_text())
    del said["decoding"]
    (tmp_path / "features.json").write_text(json.dumps(said))
    for warned, decoding in ((True, {}), (False, {"orient": False, "background": ""})):
        caplog.clear()
        config.data.update(decoding)
        open_features(config, open_source(config.data))
        assert ("does not say how its images were decoded" in caplog.text) == warned


def test_links_that_lead_to_no_file_are_reported(tmp_path, caplog):
    """As when the disk that a farm of links points to is not mounted."""
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat/a.png").write_bytes(b"image")
    (tmp_path / "cat/b.png").symlink_to(tmp_path / "cat/a.png")
    (tmp_path / "cat/c.png").symlink_to(tmp_path / "gone/c.png")
    assert reading.list_files(tmp_path) == ["cat/a.png", "cat/b.png"]
    assert "left out are 1 links that lead to no file, such as cat/c.png" in caplog.text
