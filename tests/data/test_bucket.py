"""Are images and features in a bucket those of the same files on a disk, also while the bucket fails and dawdles?"""

import itertools
import pathlib

import numpy as np
import pytest

from deco_jax import storage
from deco_jax.data.features import StoredFeatures
from deco_jax.data.pipeline import batches
from deco_jax.data.records import compare
from deco_jax.data.sources import open_source
from deco_jax.errors import UsageError
from tests.data.test_reading import RECORDS, data_config, images, write_features  # noqa: F401
from tests.data.test_sources import no_tensorflow, prepared  # noqa: F401


@pytest.fixture
def upload(bucket):
    """Copies a folder to a name in the bucket, and returns its address."""

    def copy(folder, name):
        storage.upload(folder, storage.to_path(f"{bucket.url}/{name}"))
        return f"{bucket.url}/{name}"

    return copy


@pytest.mark.parametrize("workers", [0, 2])
def test_a_folder_of_images(bucket, upload, images, monkeypatch, workers):  # noqa: F811
    """With one request in ten failing; in workers, too, which open the bucket for themselves."""
    monkeypatch.setenv("PYTHONPATH", bucket.env["PYTHONPATH"])
    here, there = data_config(images), data_config(upload(images, "images"), workers=workers)
    local, remote = open_source(here), open_source(there)
    assert (remote.identity, remote.summary()[:-1]) == (local.identity, local.summary()[:-1])
    assert compare(remote.contents(), local.contents()) == ""
    before = bucket.counts()
    bucket.faults(share=0.1, delay=0.005)
    both = zip(batches(here, 0, local, 0), batches(there, 0, remote, 0), strict=True)
    for k, (batch, other) in enumerate(itertools.islice(both, 5)):  # an epoch
        for key in batch:
            np.testing.assert_array_equal(batch[key], other[key], f"{key} of batch {k}")
    remote.root = "gs://private/images"
    with pytest.raises(UsageError, match="gs://private/images/class./....png cannot be read: .*gcloud auth"):
        next(batches(there, 0, remote, 0))
    failed = {fault: count - before[fault] for fault, count in bucket.counts().items()}
    assert min(failed.values()) > 0, f"each kind of fault should have happened: {failed}"


def test_a_tfds_set(bucket, upload, prepared, no_tensorflow, monkeypatch):  # noqa: F811
    """array_record itself reads buckets; only its name for the emulator is another."""
    monkeypatch.setenv("CLOUD_STORAGE_EMULATOR_ENDPOINT", bucket.address)
    config = data_config(prepared, source="tfds", name="tiny_set", image_size=32)
    local = open_source(config)
    config.path = upload(pathlib.Path(prepared), "tfds")
    remote = open_source(config)
    assert remote.identity == local.identity
    for i in range(12):
        for key, value in local.load(i).items():
            np.testing.assert_array_equal(remote.load(i)[key], value)


def test_stored_features(bucket, upload, images, tmp_path):  # noqa: F811
    """Of a file of a gigabyte just the bytes of the record are asked for."""
    write_features(tmp_path, open_source(data_config(images)))
    bucket.faults(share=0.1)
    features = StoredFeatures(storage.to_path(upload(tmp_path, "features")))
    for record in (0, 49, 50, RECORDS - 1):
        np.testing.assert_array_equal(features[record], np.full((4, 8), record))


@pytest.mark.parametrize(
    "path, problem",
    [
        ("gs://no-such-bucket/images", "is no folder; it must hold one folder per class"),
        ("gs://bucket/nowhere", "is no folder; it must hold one folder per class"),
        ("gs://private/images", "cannot be read: .*gcloud auth application-default login"),
        ("ftp://host/images", "is no address that can be read; allowed: gs://"),
    ],
)
def test_a_bucket_that_leads_nowhere(bucket, path, problem):
    with pytest.raises(UsageError, match=f"{path}.*{problem}"):
        open_source(data_config(path))
