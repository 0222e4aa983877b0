"""What is a network told about the image it makes? One interface for batches, training, sampling and planning.

A condition knows the fields of a batch that carry it, how examples lose it in training, and how users write it. What
a network gets is a tree of arrays with the batch as leading axis; only the network, and the encoder before it if there
is one, look into it. The encoder of `ClassLabels` is a table inside the network, that of `Text` a network of its own.
"""

import dataclasses
import difflib
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from deco_jax.errors import UsageError


@dataclasses.dataclass(frozen=True)
class ClassLabels:
    """One of `num_classes` classes, or none: labels 0 … num_classes − 1, and num_classes for "no class"."""

    num_classes: int
    nothing = "null"  # how a user asks for no class

    @property
    def fields(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The batch's fields that carry the condition: shape and dtype of one example."""
        return {"label": jax.ShapeDtypeStruct((), np.int32)}

    def drop(self, batch: Mapping[str, Array], drop_B: Array) -> dict[str, Array]:
        """The batch, in which the examples that `drop_B` marks have lost their class."""
        return {**batch, "label": jnp.where(drop_B, self.num_classes, batch["label"])}

    def from_batch(self, batch: Mapping[str, Array]) -> Array:
        """What the network gets: labels (B,) int32."""
        return batch["label"]

    def example(self, batch_size: int) -> Array:
        """Some condition, (B,), to initialise a network with."""
        return jnp.zeros(batch_size, jnp.int32)

    def read(self, requests: Array | Sequence[int | str]) -> np.ndarray:
        """What users ask for, as the network takes it: (B,) int32.

        Args:
          requests: a list of integers or "null"; or an array of labels as the network takes them, where num_classes is
            no class.

        Raises:
          UsageError: one is neither a class of the network nor none.
        """
        is_array = hasattr(requests, "dtype")
        values, end = list(np.asarray(requests) if is_array else requests), self.num_classes + is_array
        wrong = [
            value
            for value in values
            if not (isinstance(value, str) and value == self.nothing)
            and not (isinstance(value, int | np.integer) and 0 <= value < end)
        ]
        if wrong:
            shown = ", ".join(str(value) for value in wrong[:5])
            raise UsageError(
                f"labels {shown} do not exist; the network has the classes 0 to {self.num_classes - 1} "
                'and, by that name, "null".'
            )
        return np.array([self.num_classes if isinstance(value, str) else value for value in values], np.int32)

    def parse(self, text: str, names: Sequence[str] = (), option: str = "--labels") -> list[int | str]:
        """The command line's "0,5-7,golden retriever,null" → [0, 5, 6, 7, 207, "null"]; "all" → every class.

        A number is always a class's number, whatever its name. Names are those of `find_class`; one may contain commas.

        Args:
          text: as above.
          names: of the classes 0, 1, …, where they are known.
          option: where the text comes from.

        Raises:
          UsageError: the text is not understood, or names no class, or several.
        """
        if text == "all":
            return list(range(self.num_classes))
        labels: list[int | str] = []
        parts, start = text.split(","), 0
        numbers = _by_name(tuple(names))
        longest = max((name.count(",") + 1 for name in numbers), default=1)
        while start < len(parts):
            stop = min(len(parts), start + longest)  # of several parts that are a name together, the most
            while stop > start + 1 and _plain(",".join(parts[start:stop])) not in numbers:
                stop -= 1
            part = ",".join(parts[start:stop]).strip()
            match = re.fullmatch(r"([0-9]+)(?:-([0-9]+))?|null", part)
            if match is None and names:
                labels.append(find_class(part, names, option))
            elif match is None or (match[2] and int(match[2]) < int(match[1])):
                raise UsageError(f"{option}={text} is not understood; write for instance 0,1,5-9 or null or all.")
            elif match[1] is None:
                labels.append("null")
            else:  # of what does not exist, only as much as the message shows
                first, last = int(match[1]), int(match[2] or match[1])
                labels += range(first, min(last, max(first, self.num_classes) + 4) + 1)
            start = stop
        self.read(labels)
        return labels

    def parse_one(self, text: str, names: Sequence[str] = (), option: str = "--negative") -> int | str:
        """The one label that `text` says; arguments and errors as of `parse`.

        Raises:
          UsageError: it says several.
        """
        labels = self.parse(text, names, option)
        if len(labels) != 1:
            raise UsageError(f"{option}={text} says {len(labels)} labels; write one.")
        return labels[0]

    def spread(self, number: int) -> list[int | str]:
        """`number` requests that show the variety there is: classes, as far apart as they can be."""
        return (np.arange(number) * self.num_classes // number).tolist()

    def cycle(self, indices: Array) -> Any:
        """The conditions of images with these numbers where nobody asks for any: class i modulo their number."""
        return indices % self.num_classes

    def check_data(self, offered: "ClassLabels") -> None:
        """Raises UsageError if a network of this condition cannot learn from data that come with the one `offered`."""
        if not isinstance(offered, ClassLabels):
            raise UsageError(
                "the network learns from class labels, and the images of data.source have captions; "
                "model.kind='deco_text' learns from these."
            )
        if offered.num_classes > self.num_classes:
            raise UsageError(
                f"model.num_classes={self.num_classes} is too few; the data has {offered.num_classes} classes."
            )


def find_class(text: str, names: Sequence[str], option: str) -> int:
    """The number of the class that is called so, whether in capitals or not.

    Args:
      text: a whole name, one of the synonyms that commas part in it, or the WordNet id in front of it.
      names: of the classes 0, 1, …, such as "digit" or "n02099601 golden retriever".
      option: where the text comes from.

    Raises:
      UsageError: none is called so, and the nearest are named; or several are, and they are listed.
    """
    numbers = _by_name(tuple(names))
    found = numbers.get(_plain(text), [])
    if len(found) == 1:
        return found[0]
    if found:
        told = "; ".join(f"{number} ({names[number]})" for number in found)
        raise UsageError(f"{option}: {text!r} is the name of several classes, {told}; write the number.")
    nearest = difflib.get_close_matches(_plain(text), numbers, cutoff=0.5)
    told = ", ".join(f"{name} ({' or '.join(map(str, numbers[name]))})" for name in nearest)
    raise UsageError(
        f"{option}: no class is called {text!r}; " + (f"the nearest are {told}." if told else "write its number.")
    )


@functools.lru_cache(maxsize=4)
def _by_name(names: tuple[str, ...]) -> dict[str, list[int]]:
    """The classes of every name and synonym. ImageNet's names are all synonyms; another whole name beats them."""
    synonyms: dict[str, list[int]] = {}
    whole: dict[str, list[int]] = {}
    for number, line in enumerate(names):
        wordnet, name = re.fullmatch(r"(n[0-9]{8} )?(.*)", line, re.DOTALL).groups()
        for found in {_plain(part) for part in [*name.split(","), name, wordnet or name]}:
            synonyms.setdefault(found, []).append(number)
        if wordnet is None:
            whole.setdefault(_plain(name), []).append(number)
    return synonyms | whole


def _plain(text: str) -> str:
    """A name as it is compared: without capitals, and with single spaces."""
    return re.sub(r"\s*,\s*", ", ", " ".join(text.casefold().split()))


@dataclasses.dataclass(frozen=True)
class Text:
    """States of a text encoder for a prompt: `tokens` of `features` numbers, those of padding included.

    A batch has the tokens' numbers, and in the step the encoder, a frozen network, puts the states beside them; or it
    has stored states, of which the step replaces those that are dropped. Nothing is the empty prompt.
    """

    tokens: int  # L
    features: int  # E
    nothing = ""

    @property
    def fields(self) -> dict[str, jax.ShapeDtypeStruct]:
        """As of `ClassLabels`: numbers of tokens, below zero where there is none."""
        return {"tokens": jax.ShapeDtypeStruct((self.tokens,), np.int32)}

    def drop(self, batch: Mapping[str, Array], drop_B: Array) -> dict[str, Array]:
        """The batch, in which it stands which examples have lost their prompt; the encoder then takes the empty one."""
        return {**batch, "dropped": drop_B}

    def from_batch(self, batch: Mapping[str, Array]) -> Array:
        """What the network gets: states (B, L, E)."""
        return batch["text"]

    def example(self, batch_size: int) -> Array:
        """Some condition, (B, L, E), to initialise a network with."""
        return jnp.zeros((batch_size, self.tokens, self.features))

    def read(self, requests: Array | Sequence[str], encoder: Callable[[Sequence[str]], Array] | None = None) -> Array:
        """Prompts, or an encoder's states of them, as the network takes them: (B, L, E).

        Raises:
          UsageError: prompts without an encoder, or states of another shape.
        """
        if isinstance(requests, str):
            raise UsageError(f"prompts are a list, as [{requests[:40]!r}]; a text alone would be one per letter.")
        if not hasattr(requests, "ndim") and any(isinstance(request, str) for request in requests):
            if encoder is None:
                raise UsageError("prompts need their encoder: sample(…, encoder=deco_jax.load_text_encoder(NAME)).")
            requests = encoder(requests)
        shape = np.shape(requests)
        if len(shape) != 3 or shape[1:] != (self.tokens, self.features):
            raise UsageError(
                f"text has the shape {shape}; the network takes (B, {self.tokens}, {self.features}), as of "
                f"load_text_encoder(NAME, tokens={self.tokens})."
            )
        return requests

    def check_data(self, offered: Any) -> None:
        """Raises UsageError if a network of this condition cannot learn from data that come with the one `offered`."""
        if not isinstance(offered, Captions):
            raise UsageError(
                "model.kind='deco_text' learns from captions, and the images of data.source have classes; sources of "
                "captions are webdataset, parquet and captions."
            )


@dataclasses.dataclass(frozen=True)
class Captions:
    """What a source of captioned images knows about each: a text, which becomes the numbers of its tokens."""

    name = "caption"  # of the record's entry, text, which is in no batch
