"""Which text does a network learn of an image? What stands in a file, cleaned, perhaps with a prefix."""

import dataclasses
import json
import unicodedata
from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import ConfigDict

from deco_jax.data.tokens import LONGEST
from deco_jax.errors import UsageError

FIELD = "caption"  # data.caption_field's default
WIDTH = 60  # characters of a caption at the top of a run's output


@dataclasses.dataclass(frozen=True)
class Wording:
    """How captions are read."""

    field: str  # the JSON's, or the column, that holds them
    prefix: str  # of captions with fewer words than `short`
    short: int

    @classmethod
    def from_config(cls, config: ConfigDict) -> "Wording":
        """As `config`, the `data` part of a configuration, says."""
        return cls(config.caption_field, config.caption_prefix, config.short_caption)

    def __call__(self, text: Any) -> str:
        """The caption; raises ValueError if the text is none, or empty."""
        if not isinstance(text, str):
            raise ValueError(f"its caption is no text, but {str(text)[:WIDTH]!r}")
        caption = clean(text)
        if not caption:
            raise ValueError("its caption is empty")
        if len(caption.split()) < self.short:
            caption = (self.prefix + caption)[:LONGEST]
        return caption

    def of_bytes(self, content: bytes) -> str:
        """The caption that is a file's whole text; raises ValueError as above, and if it is not UTF-8."""
        return self(content.decode("utf-8-sig"))

    def of_json(self, content: bytes, *others: str) -> str:
        """The caption in a JSON object's field, or in the first of `others` that it has; raises ValueError as above."""
        return self(find_field(json.loads(content.decode("utf-8-sig")), self.field, *others))


def clean(text: str) -> str:
    """Without control characters, lone surrogates and space around it, and of no more than `LONGEST` characters."""
    kept = "".join(c for c in text if c in "\t\n\r" or unicodedata.category(c) not in ("Cc", "Cs"))
    return kept.strip()[:LONGEST].rstrip()


def find_field(values: Any, *names: str) -> Any:
    """What an object of JSON says in the first of these fields that it has.

    Raises:
      ValueError: it has none of them; the fields that it has are named.
    """
    if isinstance(values, Mapping):
        for name in names:
            if name in values:
                return values[name]
        has = f"the fields {', '.join(map(str, values))}" if values else "no field"
        raise ValueError(f"it has {has[:200]}; data.caption_field={names[0]!r} is none of them")
    raise ValueError(f"it holds {type(values).__name__}, where an object with the field {names[0]!r} is expected")


def captions_line(records: int, caption_of: Callable[[int], str]) -> str:
    """ "Images: 1,000 with captions, for instance: “a red circle”, …": the first, one in the middle and the last."""
    shown = []
    for number in sorted({0, records // 2, records - 1}):
        try:
            text = " ".join(caption_of(number).split())
        except UsageError:
            raise
        except (ValueError, OSError):  # a record that cannot be read; it is named when its turn comes
            continue
        shown.append(f"“{text if len(text) <= WIDTH else text[: WIDTH - 1] + '…'}”")
    told = f", for instance: {', '.join(shown)}" if shown else ""
    return f"Images: {records:,} with captions{told}."
