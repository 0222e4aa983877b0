"""What is a source of images, and how do two of them differ in words?

Opening a source looks at no image. Loading a broken record raises; an error of the storage that does not pass is a
`TransientError`.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from deco_jax.conditions import ClassLabels

Record = dict[str, np.ndarray]
SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")  # with more, folders of runs that are under way would change
FEW = 1000  # records whose names are kept in a checkpoint


class Source(Protocol):
    """Images by number, each with the fields of a condition."""

    identity: str  # changes when the records' names, labels or order do
    decoding: str  # how files become images, in words; "" = as upstream's loader does
    condition: ClassLabels  # what is known about an image, and the fields of a record that say it
    class_names: tuple[str, ...]  # of the labels 0, 1, …

    def __len__(self) -> int: ...

    def load(self, index: int, offset: float | None = None) -> Record:
        """ "image", (size, size, 3) uint8, and the condition's fields.

        Args:
          index: the record's number.
          offset: of the square in its image, see `square_crop`; nothing where images are stored as squares.

        Raises:
          TransientError: the storage still fails after a while.
          UsageError: the bucket may not be read.
          Exception: whatever else a decoder raises: the record cannot be read.
        """
        ...

    def describe(self, index: int) -> str:
        """Where the record lies, for a person to find it."""
        ...

    def summary(self) -> list[str]:
        """For the top of a run's output, line by line: how many images of which classes, and what was ignored."""
        ...

    def contents(self) -> dict[str, Any]:
        """What is kept in checkpoints, as JSON, for `compare`."""
        ...


def compare(then: dict[str, Any], now: dict[str, Any]) -> str:
    """In words, how what two sources hold (their `contents`) differs; "" if it does not."""
    changes = []
    if then["source"] != now["source"]:
        changes.append(f"{then['source']} there, {now['source']} here")
    if then["records"] != now["records"]:
        changes.append(f"{then['records']:,} records there, {now['records']:,} here")
    classes = []
    for name in sorted(then["classes"].keys() | now["classes"].keys()):
        (there, hash_there), (here, hash_here) = (c["classes"].get(name, [0, ""]) for c in (then, now))
        if there != here:
            classes.append(f"class {name!r}: {there:,} there, {here:,} here")
        elif hash_there != hash_here:
            classes.append(f"class {name!r}: {here:,} there and here, of other names")
    if then.get("captions") != now.get("captions") and then["records"] == now["records"]:
        changes.append("other captions")
    names_then, names_now = set(then["names"]), set(now["names"])
    changes += classes[:5] + ([f"{len(classes) - 5:,} more classes"] if len(classes) > 5 else [])
    if names_then and names_now:
        changes += [
            f"{word}: {first_of(sorted(names))}"
            for word, names in (("gone", names_then - names_now), ("new", names_now - names_then))
            if names
        ]
    return "; ".join(changes)


def first_of(names: Sequence[str], number: int = 5) -> str:
    """ "a, b, c, d, e and 1,000 more"."""
    more = f" and {len(names) - number:,} more" if len(names) > number else ""
    return ", ".join(names[:number]) + more


def images_line(records: int, class_names: Sequence[str], counts: Sequence[int] = ()) -> str:
    """ "Images: 1,000 in 4 classes: 0 cat (250), 1 dog (250), …"; of many classes the first three and the last."""
    shown = [f"{label} {name}" + (f" ({counts[label]:,})" if counts else "") for label, name in enumerate(class_names)]
    if len(shown) > 5:
        shown[3:-1] = ["…"]
    return f"Images: {records:,} in {len(class_names):,} classes: {', '.join(shown)}."
