"""Are a data set's statistics those of the images that training sees, and can they be compared with?"""

import json

import jax
import numpy as np
import pytest
from PIL import Image

from deco_jax import cli
from deco_jax.data.sources import open_source
from deco_jax.encoders.features import load_features
from deco_jax.errors import UsageError
from deco_jax.evaluation import extract
from deco_jax.evaluation.evaluate import evaluate
from deco_jax.evaluation.extract import Extraction
from deco_jax.evaluation.stats import compute_stats


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(extract, "SHARD_IMAGES", 8)


@pytest.fixture
def config(tiny_config, tmp_path):
    """Twelve pictures of no particular size, one of them broken."""
    for i in range(12):
        path = tmp_path / f"data/class{i % 2}/{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (20 + i, 40, 3), np.uint8)).save(path)
    (tmp_path / "data/class1/05.png").write_bytes(b"broken")
    tiny_config.data.update(
        source="folder", path=str(tmp_path / "data"), image_size=16, max_bad_records=1, max_bad_share=1.0
    )
    return tiny_config


def test_statistics_are_of_what_training_sees(config, tmp_path, capsys):
    """Against numpy's mean and covariance of the features of the source's own records."""
    compute_stats(config, None, f"{tmp_path}/ref", "efficientnet", batch_size=5)
    source, network = open_source(config.data), load_features("efficientnet")
    good = [number for number in range(12) if not source.describe(number).endswith("05.png")]
    images = np.stack([source.load(number)["image"] for number in good])
    features = np.asarray(jax.jit(network.apply)(network.params, images)["pool"], np.float64)
    with np.load(tmp_path / "ref/reference.npz", allow_pickle=False) as file:
        scale = np.abs(np.cov(features.T)).max()
        np.testing.assert_allclose(file["efficientnet/mu"], features.mean(0), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(file["efficientnet/sigma"], np.cov(features.T), rtol=1e-3, atol=1e-5 * scale)
        np.testing.assert_allclose(file["efficientnet/pool"], features, rtol=1e-3, atol=1e-4)
        meta = json.loads(str(file["meta"]))
    assert (meta["images"], meta["image_size"], meta["networks"]) == (11, [16, 16], {"efficientnet": network.digest})
    assert "12 images of" in meta["source"] and "1 unreadable ones left out, hash " in meta["source"]
    assert {p.name for p in (tmp_path / "ref").iterdir()} == {".lease", "reference.npz", "stats.json"}

    capsys.readouterr()
    compute_stats(config, None, f"{tmp_path}/ref", "efficientnet", batch_size=5)
    assert "reference.npz is done." in capsys.readouterr().out
    np.savez(tmp_path / "same.npz", images)
    evaluate(f"{tmp_path}/same.npz", f"{tmp_path}/e", f"{tmp_path}/ref", "efficientnet", batch_size=5)
    found = json.loads((tmp_path / "e/metrics.json").read_text())["metrics"]
    assert found["fd_efficientnet"] < 1e-3 * np.trace(np.cov(features.T)), "the same images are no distance apart"
    assert found["precision_efficientnet"] == found["recall_efficientnet"] == 1


def test_more_unreadable_records_than_allowed_end_it(config, tmp_path):
    (tmp_path / "data/class0/10.png").write_bytes(b"broken")
    with pytest.raises(UsageError, match=r"2 records cannot be read, .*data.max_bad_records=1"):
        compute_stats(config, None, f"{tmp_path}/ref", "efficientnet", batch_size=12)
    assert not (tmp_path / "ref/reference.npz").exists()


def test_unreadable_records_of_earlier_starts_count(config, tmp_path, monkeypatch):
    """The second start reads none, as the first has left its shard."""
    first, write = [], extract._write_shard

    def write_one(job, extraction, shard, computed):
        if first:
            job.stop.by = "SIGTERM"
        first.append(shard)
        yield from write(job, extraction, shard, computed)

    with monkeypatch.context() as patch:
        patch.setattr(extract, "_write_shard", write_one)
        compute_stats(config, None, f"{tmp_path}/ref", "efficientnet", batch_size=4)
    assert len(list((tmp_path / "ref/features").rglob("*.npz"))) == 1
    config.data.max_bad_records = 0
    with pytest.raises(UsageError, match="1 records cannot be read"):
        compute_stats(config, None, f"{tmp_path}/ref", "efficientnet", batch_size=4)


def test_other_statistics_and_numbers_that_do_not_fit_are_refused(config, tmp_path):
    np.savez(tmp_path / "x.npz", np.random.default_rng(0).integers(0, 256, (9, 16, 16, 3), np.uint8))
    images, out = f"{tmp_path}/x.npz", f"{tmp_path}/ref"
    for num in (1, 10):
        with pytest.raises(UsageError, match=f"--num={num} must be from 2 to 9"):
            compute_stats(None, images, out, "efficientnet", num=num)
    compute_stats(None, images, out, "efficientnet", num=8)
    with pytest.raises(UsageError, match=r"holds statistics of something else \(num: 8 there, 9 here\)"):
        compute_stats(None, images, out, "efficientnet")


def test_the_command_line(tmp_path, capsys):
    """The quickstart's digits, of which a configuration tells the size."""
    arguments = ["stats", "--config=configs/quickstart.py", f"--out={tmp_path}", "--features=efficientnet", "--num=20"]
    cli.main([*arguments, "--config.data.image_size=32"])
    assert "20 of 20 images of 32×32, digits" in capsys.readouterr().out
    assert (tmp_path / "reference.npz").exists()


@pytest.mark.parametrize("keep", [0, 100, -1])
def test_damaged_features_are_named(tmp_path, keep):
    """A file that a full disk or a copy has cut off, and one with a wrong byte: zipfile has errors of its own."""
    part = Extraction(None, 3, None, tmp_path)
    np.savez(part.file(0), bad=np.zeros(0, int), pixels=np.zeros(32, np.uint8), pool=np.ones((3, 500), np.float32))
    assert next(part.read(("pool",))).features["pool"].shape == (3, 500)
    content = bytearray(part.file(0).read_bytes())
    content[len(content) // 2] ^= 1
    part.file(0).write_bytes(content if keep < 0 else content[:keep])
    with pytest.raises(UsageError, match="00000.npz is damaged .*; remove it and run the same command again"):
        list(part.read(("pool",)))
