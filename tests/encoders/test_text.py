"""Text encoders as users take them: prompts to states, in and outside of a step; folders whose parts do not fit."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import deco_jax
from deco_jax.encoders.text import load_text_encoder
from deco_jax.errors import UsageError
from deco_jax.parallel import mesh as meshes
from tests.helpers import Golden, new_tiny_config, relative_error

tokenizers = pytest.importorskip("tokenizers")
WORDS = ["a", "red", "blue", "circle", "<|endoftext|>", "[UNK]"]


def write_encoder(path, words=WORDS, **changes):
    """The recorded Qwen3, with a tokenizer of whole words."""
    g = Golden("qwen3")
    path.mkdir(exist_ok=True)
    safetensors.numpy.save_file(
        {f"model.{name}": value for name, value in g.group("param:").items()}, path / "model.safetensors"
    )
    (path / "config.json").write_text(json.dumps({"model_type": "qwen3", **g.config}))
    made = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: k for k, word in enumerate(words)}, unk_token="[UNK]")
    )
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"pad_token": "<|endoftext|>"} | changes))
    return str(path)


@pytest.fixture
def encoder(tmp_path):
    return load_text_encoder(write_encoder(tmp_path / "qwen"), tokens=12, dtype="float32")


def test_prompts_become_states(encoder):
    states = encoder(["a red circle", ""])
    assert states.shape == (2, 12, 32) and encoder.weights.network.module.padding == 4
    alone = encoder(["a red circle"])
    np.testing.assert_allclose(states[0], alone[0], rtol=1e-5, atol=1e-6)
    assert relative_error(encoder(["a blue circle"])[0, :3], alone[0, :3]) > 0.01
    assert relative_error(states[1], alone[0]) > 0.1


def test_in_a_step_dropped_examples_have_the_empty_prompt(encoder):
    """So the null condition of training is what `sample` leads away from."""
    network = encoder.weights.network
    batch = {
        "tokens": encoder.tokenizer(["a red circle", "a red circle"]),
        "dropped": np.array([False, True]),
        "image": np.zeros((2, 8, 8, 3)),
    }
    layout = meshes.make_layout(new_tiny_config().mesh)
    seen = jax.jit(network)(encoder.weights.place(layout), batch)
    np.testing.assert_allclose(seen["text"], encoder(["a red circle", ""]), rtol=1e-5, atol=1e-6)
    assert seen["image"] is not None and seen.keys() == {*batch, "text"}


def test_bfloat16_keeps_matrices_in_it(tmp_path):
    encoder = load_text_encoder(write_encoder(tmp_path / "qwen"), tokens=12)
    assert encoder.weights.params["table"].dtype == jnp.bfloat16
    assert encoder(["a red circle"]).dtype == jnp.bfloat16


@pytest.mark.slow
def test_sampling_from_prompts(encoder):
    """Images depend on prompt and negative prompt; states in place of prompts give the same."""
    g = Golden("deco_t2i")
    model = g.model().clone(text_features=32)
    key, size = jax.random.key(0), 16
    params = jax.jit(model.init)(jax.random.key(1), jnp.zeros((1, 8, 8, 3)), jnp.zeros(1), model.condition.example(1))
    params = jax.tree.map(lambda x: x + 0.05 * jax.random.normal(key, x.shape), params["params"])
    from flax import linen as nn

    params = nn.meta.unbox(params)
    settings = {"image_size": size, "steps": 2, "guidance": 3.0, "solver": "adams2", "shift": 3.0}
    prompts = ["a red circle", "a blue circle"]
    images = deco_jax.sample(model, params, prompts, key, encoder=encoder, **settings)
    assert images.shape == (2, size, size, 3)
    states = deco_jax.sample(model, params, encoder(prompts), key, negative=encoder(["", ""]), **settings)
    np.testing.assert_allclose(images, states, rtol=1e-4, atol=1e-5)
    away = deco_jax.sample(model, params, prompts, key, encoder=encoder, negative=["red", "red"], **settings)
    assert relative_error(away, images) > 1e-3
    unguided = deco_jax.sample(model, params, encoder(prompts), key, **settings | {"guidance": 1.0})
    assert relative_error(unguided, images) > 1e-3
    for requests, more, message in (
        (prompts, {}, "prompts need their encoder"),
        (encoder(prompts), {}, "prompts need their encoder"),  # of the empty one, which guidance leads away from
        (encoder(prompts)[:, 1:], {"encoder": encoder}, r"shape \(2, 11, 32\); the network takes \(B, 12, 32\)"),
        (["x" * 10_001, "a"], {"encoder": encoder}, "10,001 characters"),
        ("ab", {"encoder": encoder}, r"prompts are a list, as \['ab'\]"),
        ([3, 4], {}, r"text has the shape \(2,\)"),
    ):
        with pytest.raises(UsageError, match=message):
            deco_jax.sample(model, params, requests, key, **settings, **more)


def test_parts_that_do_not_fit(tmp_path):
    with pytest.raises(UsageError, match="tokenizer has 70 tokens, its network a table for 64"):
        load_text_encoder(write_encoder(tmp_path / "a", words=[*WORDS, *map(str, range(64))]))
    with pytest.raises(UsageError, match="names no padding that its tokenizer has"):
        load_text_encoder(write_encoder(tmp_path / "b", pad_token="<pad>"))
    (tmp_path / "b" / "tokenizer_config.json").unlink()
    assert load_text_encoder(str(tmp_path / "b")).weights.network.module.padding == 4
    write_encoder(tmp_path / "c", words=["[PAD]", "a", "[UNK]"])  # a BERT's, beside a Qwen3
    (tmp_path / "c" / "tokenizer_config.json").unlink()
    with pytest.raises(
        UsageError, match=r"no padding that its tokenizer has .*<.endoftext.>.* may not belong together"
    ):
        load_text_encoder(str(tmp_path / "c"))
    with pytest.raises(UsageError, match=r"'/nowhere' is no file or folder here, nor in text\.cache=.*Qwen/Qwen3-1.7B"):
        load_text_encoder("/nowhere")
    (tmp_path / "a" / "tokenizer.json").unlink()
    with pytest.raises(UsageError, match="needs its tokenizer.json"):
        load_text_encoder(str(tmp_path / "a"))


def test_a_plain_text_is_no_list_of_prompts(encoder):
    with pytest.raises(UsageError, match=r"prompts are a list, as \['a red circle'\]"):
        encoder("a red circle")


def test_the_hash_is_that_of_the_numbers_whatever_they_are_kept_in(tmp_path):
    """Published weights are bfloat16, and runs in float32 and bfloat16 listen to the same encoder."""
    path = tmp_path / "a"
    write_encoder(path)
    tensors = safetensors.numpy.load_file(path / "model.safetensors")
    rounded = {name: np.asarray(jnp.asarray(x, jnp.bfloat16), np.float32) for name, x in tensors.items()}
    safetensors.numpy.save_file(rounded, path / "model.safetensors")
    half, full = (load_text_encoder(str(path), dtype=dtype).weights for dtype in ("bfloat16", "float32"))
    assert half.digest == full.digest
    dtypes = [{x.dtype for x in jax.tree.leaves(weights.params)} for weights in (half, full)]
    assert dtypes[0] > dtypes[1] == {np.dtype("float32")}


def test_another_tokenizer_is_another_encoder(tmp_path):
    one = load_text_encoder(write_encoder(tmp_path / "a"))
    other = load_text_encoder(write_encoder(tmp_path / "b", words=WORDS[::-1]))
    digests = [encoder.weights.digest.split("-") for encoder in (one, other)]
    assert digests[0][0] == digests[1][0] and digests[0][1] != digests[1][1]
