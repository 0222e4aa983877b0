"""References: ours and the ADM suite's, read and written; what is none says so in one line."""

import dataclasses
import json
import types
import zipfile

import numpy as np
import pytest

from deco_jax.errors import UsageError
from deco_jax.metrics.references import read_reference, write_reference
from deco_jax.metrics.scores import Scores, warnings_for

SIZES = {"pool": 6, "spatial": 5, "logits": 4}


def network(name="inception", digest="abc", **sizes):
    return types.SimpleNamespace(name=name, digest=digest, sizes=SIZES | sizes)


def scores(number=30, name="inception"):
    rng = np.random.default_rng(0)
    features = {part: rng.normal(size=(number, size)) for part, size in SIZES.items()}
    return Scores.from_model_output(name, np.arange(number), **features)


@pytest.fixture
def adm():
    """The arrays of the ADM suite's files."""
    rng = np.random.default_rng(0)
    pool, spatial = rng.normal(size=(40, 6)), rng.normal(size=(40, 5))
    return {
        "arr_0": np.zeros((3, 8, 12, 3), np.uint8),
        "mu": pool.mean(axis=0),
        "sigma": np.cov(pool, rowvar=False),
        "mu_s": spatial.mean(axis=0),
        "sigma_s": np.cov(spatial, rowvar=False),
    }


def save(path, arrays):
    np.savez(path, **arrays)
    return str(path)


def test_what_is_written_is_read(tmp_path):
    references = [scores(name=name).as_reference("abc", (8, 12), "digits") for name in ("inception", "dinov2")]
    path = tmp_path / "reference.npz"
    write_reference(path, references)
    for name, wrote in zip(("inception", "dinov2"), references, strict=True):
        for where in (path, tmp_path):  # the folder of `deco stats` as well
            read = read_reference(str(where), network(name))
            assert (read.hash, read.count, read.image_size, read.source) == (wrote.hash, 30, (8, 12), "digits")
            np.testing.assert_array_equal(read.vectors, wrote.vectors)
    assert {"mu", "sigma", "mu_s", "sigma_s"} <= set(np.load(path).files)  # the ADM suite finds what it looks for


def test_the_adm_suites_files_are_read(adm, tmp_path):
    read = read_reference(save(tmp_path / "VIRTUAL.npz", adm), network())
    np.testing.assert_array_equal(read.pool[1], adm["sigma"])
    np.testing.assert_array_equal(read.spatial[0], adm["mu_s"])
    assert read.image_size == (8, 12) and read.has_images and read.vectors is None and read.digest is None
    told = "\n".join(warnings_for(scores(), read))
    assert "no precision, recall or KID" in told and "does not say which weights" in told


@pytest.mark.parametrize(
    "change, message",
    [
        ({"mu": None, "sigma": None}, "no statistics of inception; it holds the arrays arr_0"),
        ({"sigma": None}, "lacks the array sigma"),
        ({"mu": np.zeros(7)}, r"mu has the shape \(7,\); the network's features need \(6\)"),
        ({"sigma": np.zeros((6, 5))}, r"sigma has the shape \(6, 5\)"),
        ({"mu": np.zeros(6, int)}, "mu must hold finite floating-point numbers; it is int64"),
        ({"mu": np.full(6, np.nan)}, "mu must hold finite"),
        ({"sigma": np.arange(36.0).reshape(6, 6)}, "sigma is no covariance"),
        ({"sigma": -np.eye(6)}, "sigma is no covariance"),
        ({"mu": np.array([None] * 6)}, "is no reference, or is damaged"),
        (
            {"meta": np.array(json.dumps({"networks": {"inception": "xyz"}}))},
            "with the weights xyz; those here are abc",
        ),
        ({"meta": np.array("[1]")}, "is of another program: its array meta"),
        ({"meta": np.array(json.dumps({"networks": ["inception"]}))}, "is of another program: its array meta"),
    ],
)
def test_what_does_not_fit_is_named(adm, tmp_path, change, message):
    arrays = {name: value for name, value in (adm | change).items() if value is not None}
    with pytest.raises(UsageError, match=message):
        read_reference(save(tmp_path / "bad.npz", arrays), network())


def test_the_hash_changes_with_whatever_a_metric_is_computed_of(adm, tmp_path):
    other = adm | {"arr_0": adm["arr_0"] + 1}
    without = {name: value for name, value in adm.items() if name != "arr_0"}
    files = [save(tmp_path / f"{k}.npz", arrays) for k, arrays in enumerate((adm, other, without))]
    hashes = {read_reference(file, network()).hash for file in files}
    ours = scores().as_reference("abc", (8, 12), "")
    hashes |= {ours.hash, dataclasses.replace(ours, vectors=ours.vectors[:9]).hash}
    assert len(hashes) == 5


def test_files_of_something_else(adm, tmp_path):
    path = save(tmp_path / "a.npz", adm)
    with pytest.raises(UsageError, match="no statistics of dinov2; it holds statistics of inception"):
        read_reference(path, network("dinov2"))
    with pytest.raises(UsageError, match="does not exist; `deco stats` makes"):
        read_reference(str(tmp_path / "none.npz"), network())
    (tmp_path / "cut.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:2_000])
    (tmp_path / "text.npz").write_text("hello")
    np.save(tmp_path / "array.npy", adm["mu"])
    for name in ("cut.npz", "text.npz", "array.npy"):
        with pytest.raises(UsageError, match="is no reference: it is no .npz, or a truncated one"):
            read_reference(str(tmp_path / name), network())
    np.savez_compressed(tmp_path / "packed.npz", **adm)
    content = bytearray((tmp_path / "packed.npz").read_bytes())
    with zipfile.ZipFile(tmp_path / "packed.npz") as file:
        start = file.getinfo("sigma.npy").header_offset + 60
    content[start : start + 100] = bytes(255 - byte for byte in content[start : start + 100])
    (tmp_path / "packed.npz").write_bytes(content)
    with pytest.raises(UsageError, match="is no reference, or is damaged"):
        read_reference(str(tmp_path / "packed.npz"), network())
