"""A small network that is told text, random, in a file as others write it; and prompts in the benchmarks' layouts."""

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from deco_jax.config import build_model
from deco_jax.pretrained import names
from deco_jax.weights import translate
from tests.helpers import new_tiny_config

GENEVAL = [
    {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a red circle"},
    {
        "tag": "colors",
        "include": [{"class": "bus", "count": 1, "color": "red"}],
        "exclude": [],
        "prompt": "a blue circle",
    },
    {"tag": "counting", "include": [], "prompt": "rephrased — a circle, blue"},
]


def write_text_network(path, seed=0):
    """For the recorded Qwen3 of tests/encoders/test_text.py: 12 tokens of 32 channels."""
    c = new_tiny_config().model
    c.update(kind="deco_text", patch_size=8, text_tokens=12, text_features=32, text_depth=1, dtype="float32")
    model = build_model(c)
    x, t = jnp.zeros((1, 16, 16, 3)), jnp.zeros(1)
    params = nn.meta.unbox(model.init(jax.random.key(seed), x, t, model.condition.example(1))["params"])
    draw = np.random.default_rng(seed)  # its own beginning has zeros, of which nothing is seen
    params = jax.tree.map(lambda x: np.asarray(x) + draw.normal(0, 0.2, x.shape).astype(np.float32), params)
    tensors = translate.to_torch(names.DECO_TEXT, params)
    metadata = {"dtype": "float32", "prediction": "velocity"}
    safetensors.numpy.save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, path, metadata)
    return str(path)


def write_geneval(path, lines=GENEVAL):
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    return str(path)


def write_dpg(path):
    path.mkdir()
    for name, text in (("partiprompts10", "a red circle\n"), ("256", "a blue circle"), ("COCOval2014_1", "a circle")):
        (path / f"{name}.txt").write_text(text)
    (path / "notes.md").write_text("not a prompt")
    return str(path)
