"""A text encoder's states of every caption, stored in a folder (`stored`): are they those that a run would compute?

A row is a caption's states of all tokens, those of padding too: these depend on the caption as well. After the rows of
the records there is one more, of the empty prompt. A caption's text may change while its place does not, so a few
captions are compared with those that the states were made of.
"""

import dataclasses
import hashlib
import json
from typing import ClassVar

import ml_dtypes
import numpy as np
from ml_collections import ConfigDict

from deco_jax.data import stored
from deco_jax.data.records import Source
from deco_jax.data.stored import Stored
from deco_jax.errors import TransientError, UsageError

COMPARED = 8  # captions


@dataclasses.dataclass(frozen=True)
class Contents(stored.Contents):
    """What the states in a folder are of. NaN stands where a caption was unreadable."""

    encoder: str  # hash of its weights and its tokenizer
    computed: str  # dtype of the encoder's matrix products
    wording: str  # how captions were read: what `data` says about it
    captions: str  # hash of a few of them
    version: int = 1  # of the format

    kind: ClassVar = "states"
    option: ClassVar = "--text"
    setting: ClassVar = "text.stored"
    made_of: ClassVar = "images, captions"
    dtype: ClassVar = np.dtype(ml_dtypes.bfloat16)

    @property
    def rows(self) -> int:
        """The records, and the empty prompt."""
        return self.records + 1


class StoredStates(Stored[Contents]):
    """See `Stored`; (L, E) bfloat16 of each caption."""

    kind = Contents

    @property
    def digest(self) -> str:
        """A hash of the encoder's weights and tokenizer."""
        return self.contents.encoder

    @property
    def nothing_LxE(self) -> np.ndarray:
        """States of the empty prompt."""
        return self[self.contents.records]


def wording_of(config: ConfigDict) -> str:
    """How captions are read, as `config`, the `data` part of a configuration, says."""
    return json.dumps([config.caption_field, config.caption_prefix, config.short_caption], ensure_ascii=False)


def captions_of(source: Source) -> str:
    """A hash of a few captions, which are spread over all records; an unreadable one is none.

    Raises:
      TransientError: the storage still fails after a while.
      UsageError: the source may not be read.
    """
    texts = []
    for record in sorted(set(np.linspace(0, len(source) - 1, COMPARED).astype(int).tolist())):
        try:
            texts.append(source.caption(record))
        except (TransientError, UsageError, MemoryError):
            raise
        except Exception:  # whatever reading a broken file throws
            texts.append(None)
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:16]


def open_states(config: ConfigDict, source: Source) -> StoredStates:
    """The states in `config.text.stored`, which must be of `source` as the whole configuration `config` says.

    Raises:
      UsageError: they are not, or not all there, or damaged.
    """
    name = f"text.stored={config.text.stored}"
    folder, contents, complete = stored.open_contents(Contents, config.text.stored, source)
    if (wording := wording_of(config.data)) != contents.wording:
        raise UsageError(
            f"{name} was made with [data.caption_field, data.caption_prefix, data.short_caption] = "
            f"{contents.wording}, and the run has {wording}; they must be equal."
        )
    if contents.computed != config.model.dtype:
        raise UsageError(
            f"{name} was computed with model.dtype={contents.computed}, and the run has {config.model.dtype}; "
            "they must be equal."
        )
    if captions_of(source) != contents.captions:
        raise UsageError(f"{name} holds states of other captions of these images. Prepare into another folder.")
    length, width = config.model.text_tokens, config.model.text_features
    wanted = {
        "tokens": (length, f"model.text_tokens={length}"),
        "features": (width, f"model.text_features={width}"),
    }
    stored.check_sizes(name, contents, wanted)
    stored.check_complete(name, folder, contents, complete)
    return StoredStates(folder)
