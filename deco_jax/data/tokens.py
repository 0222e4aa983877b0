"""How does a prompt become numbers? By its encoder's tokenizer.json, without a chat template, padded to one length.

The package `tokenizers` reads the file, which holds data and no code.
"""

import functools
import hashlib
import pathlib
import unicodedata
from collections.abc import Sequence

import numpy as np

from deco_jax.errors import UsageError

LONGEST = 10_000  # characters of a prompt
NONE = -1  # where there is no token


class Tokenizer:
    """Prompts → numbers of tokens. Pickles as the path of its file, which is read when first used."""

    def __init__(self, path: pathlib.Path, length: int):
        """`path`: of a tokenizer.json; `length`: tokens of a prompt, of which what is longer is cut off.

        Raises:
          UsageError: the package is missing, or the file is none.
        """
        self.path, self.length = path, length
        self.digest = hashlib.sha256(_read(path)).hexdigest()[:16]
        self.size = _load(path, length).get_vocab_size(with_added_tokens=True)

    @property
    def special(self) -> int:
        """How many tokens each prompt has beside its own, such as [CLS] and [SEP]."""
        return _load(self.path, self.length).num_special_tokens_to_add(False)

    def number(self, token: str) -> int:
        """Of a token by its name; KeyError if there is none."""
        found = _load(self.path, self.length).token_to_id(token)
        if found is None:
            raise KeyError(token)
        return found

    def __call__(self, prompts: Sequence[str]) -> np.ndarray:
        """(B,) → (B, length) int32, `NONE` after the last token of each.

        Raises:
          UsageError: a prompt is no text, has control characters, or more than `LONGEST` characters.
        """
        if isinstance(prompts, str):
            raise UsageError(f"prompts are a list, as [{prompts[:40]!r}]; a text alone would be one per letter.")
        for prompt in prompts:
            check_prompt(prompt)
        return np.array([self.encode(prompt) for prompt in prompts], np.int32).reshape(len(prompts), self.length)

    def too_long(self, prompts: Sequence[str]) -> list[str]:
        """Those of the prompts of which tokens are cut off."""
        tokenizer = _load(self.path, self.length)
        return [prompt for prompt in prompts if tokenizer.encode(prompt).overflowing]

    def encode(self, text: str) -> np.ndarray:
        """Any text, such as a caption → (length,) int32."""
        tokens, ids = np.full(self.length, NONE, np.int32), _load(self.path, self.length).encode(text).ids
        tokens[: len(ids)] = ids
        return tokens


def check_prompt(prompt: str) -> None:
    """Raises UsageError if nobody can have meant it."""
    if not isinstance(prompt, str):
        raise UsageError(f"a prompt is text; {prompt!r} is none.")
    if len(prompt) > LONGEST:
        raise UsageError(f"the prompt {prompt[:40]!r}… has {len(prompt):,} characters; at most {LONGEST:,} are read.")
    bad = [c for c in prompt if unicodedata.category(c) in ("Cc", "Cs") and c not in "\t\n\r"]
    if bad:
        raise UsageError(f"the prompt {prompt[:40]!r} has the control character {bad[0]!r}; write it without.")


def _read(path: pathlib.Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error}); a text encoder needs its tokenizer.json.") from error


@functools.lru_cache(maxsize=4)
def _load(path: pathlib.Path, length: int):
    try:
        import tokenizers
    except ImportError as error:
        raise UsageError("prompts need the package tokenizers: pip install -e '.[t2i]' in the repository") from error
    try:
        found = tokenizers.Tokenizer.from_str(_read(path).decode())
    except Exception as error:  # the package raises Exception itself
        raise UsageError(f"{path} is no tokenizer ({str(error)[:200]}).") from error
    found.no_padding()
    found.enable_truncation(length)
    return found
