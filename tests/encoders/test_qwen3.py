"""Qwen3 against the recorded network and against transformers, from folders as they are published."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from deco_jax.encoders.qwen3.model import SIZES, Qwen3
from deco_jax.encoders.qwen3.weights import parameter_shapes, read_qwen3
from deco_jax.errors import UsageError
from tests.helpers import Golden, relative_error


@pytest.fixture(scope="module")
def recorded():
    return Golden("qwen3")


def write_folder(path, tensors, config, parts=1):
    """As on Hugging Face: config.json, and model.safetensors or several files with their index."""
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps({"model_type": "qwen3", **config}))
    if parts == 1:
        safetensors.numpy.save_file(tensors, path / "model.safetensors")
        return path
    where = {name: f"model-{k % parts + 1:05}-of-{parts:05}.safetensors" for k, name in enumerate(tensors)}
    for file in set(where.values()):
        safetensors.numpy.save_file({n: x for n, x in tensors.items() if where[n] == file}, path / file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return path


@pytest.fixture
def folder(recorded, tmp_path):
    tensors = {f"model.{name}": value for name, value in recorded.group("param:").items()}
    return write_folder(tmp_path / "qwen", tensors, recorded.config, parts=2)


def tokens_of(recorded):
    return np.where(recorded["attention_mask"] > 0, recorded["input_ids"], -1).astype(np.int32)


@pytest.mark.parametrize("scan", [True, False])
def test_states_equal_the_recorded_ones(recorded, folder, scan):
    """Of all tokens, padding included, whose states reach the image."""
    model, params = read_qwen3(folder, jnp.float32)
    padding = int(recorded["input_ids"][recorded["attention_mask"] == 0][0])
    states = jax.jit(model.clone(padding=padding, scan=scan).apply)({"params": params}, tokens_of(recorded))
    for row, theirs in zip(states, recorded["last_hidden_state"], strict=True):
        assert relative_error(row, theirs) < 2e-5


def test_the_same_as_transformers(tmp_path):
    """Another shape, with random weights; a prompt without any token too, which upstream's guidance leads away from."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    config = transformers.Qwen3Config(
        vocab_size=99,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=16,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    network = transformers.Qwen3Model(config).eval()
    with torch.no_grad():
        for p in network.parameters():
            p.copy_(torch.randn_like(p) * 0.3)
    network.save_pretrained(tmp_path / "qwen")
    model, params = read_qwen3(tmp_path / "qwen", jnp.float32)
    ids = np.random.default_rng(0).integers(0, 98, (4, 24))
    real = np.arange(24) < np.array([24, 7, 1, 0])[:, None]
    ids[~real] = 98
    with torch.no_grad():
        theirs = network(torch.tensor(ids), attention_mask=torch.tensor(real.astype(int))).last_hidden_state.numpy()
    ours = model.clone(padding=98).apply({"params": params}, np.where(real, ids, -1).astype(np.int32))
    for row, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert relative_error(a, b) < 2e-5, row


@pytest.mark.parametrize("name, parameters", [("0.6B", 596_049_920), ("1.7B", 1_720_574_976), ("4B", 4_022_468_096)])
def test_published_sizes(name, parameters):
    """Without the head, which all three share with the table of tokens."""
    assert sum(x.size for x in jax.tree.leaves(parameter_shapes(Qwen3(**SIZES[name])))) == parameters


def test_matrices_are_kept_in_bfloat16(folder):
    """1.7 billion parameters in fp32 would take 7 GB of the host; norms stay as they are."""
    model, params = read_qwen3(folder)
    model = model.clone(padding=63)
    assert model.dtype == jnp.bfloat16
    assert params["table"].dtype == jnp.bfloat16 and params["layers"]["mlp"]["up"]["kernel"].dtype == jnp.bfloat16
    assert params["norm"]["scale"].dtype == np.float32
    exact, fp32 = model.clone(dtype=jnp.float32), read_qwen3(folder, jnp.float32)[1]
    tokens = np.array([[1, 2, 3, -1]], np.int32)
    states = model.apply({"params": params}, tokens)
    assert states.dtype == jnp.bfloat16
    assert 1e-4 < relative_error(states.astype(np.float32), exact.apply({"params": fp32}, tokens)) < 0.05


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_type": "llama"}, "of a 'llama', not of a qwen3"),
        ({"rope_scaling": {"type": "yarn"}}, "rope_scaling=.* the Qwen3 known here have None"),
        ({"num_attention_heads": 8}, "num_attention_heads=8, its tensors 4"),
    ],
)
def test_another_network_is_refused(folder, change, message):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(UsageError, match=message):
        read_qwen3(folder)


def test_missing_tensors_are_named(recorded, tmp_path):
    tensors = recorded.group("param:")
    del tensors["layers.1.mlp.up_proj.weight"]
    with pytest.raises(UsageError, match=r"missing layers\.1\.mlp\.up_proj\.weight"):
        read_qwen3(write_folder(tmp_path / "a", tensors, recorded.config))
    with pytest.raises(UsageError, match="do not make a Qwen3"):
        read_qwen3(write_folder(tmp_path / "b", {"a": np.zeros(1)}, recorded.config))
