"""What shall each of very many images show? Balanced labels, or what a file says."""

import dataclasses
import hashlib
import itertools
from collections.abc import Sequence

from deco_jax import storage
from deco_jax.conditions import ClassLabels
from deco_jax.errors import UsageError

NUM = 50_000  # images, unless told otherwise: what FID is reported with
LONGEST = 200  # characters of labels in messages and settings


@dataclasses.dataclass(frozen=True)
class Requests:
    """What `num` images show: image i label i modulo their number."""

    labels: tuple[int | str, ...]
    num: int
    negative: int | str | None  # what guidance leads away from; None = no class
    from_file: bool

    @property
    def shown(self) -> list[int | str]:
        """The label of every image."""
        return list(itertools.islice(itertools.cycle(self.labels), self.num))

    def __str__(self) -> str:
        """As short as it can be: "0-999", "0-4,7,null", or the number of labels and their hash."""
        text = ",".join(f"{first}-{last}" if last != first else f"{first}" for first, last in _ranges(self.labels))
        if len(text) <= LONGEST:
            return text
        return f"{len(self.labels)} labels, sha256 {hashlib.sha256(text.encode()).hexdigest()[:16]}"

    @property
    def balance(self) -> str:
        """In words."""
        each, more = divmod(self.num, len(self.labels))
        if self.from_file:
            return "labels as the file says"
        if more:
            return f"unbalanced: of {len(self.labels)} labels the first {more} have {each + 1} each, the others {each}"
        return f"{each} of each of {len(self.labels)} labels"


def _ranges(labels: Sequence[int | str]) -> list[list[int | str]]:
    """[first, last] of every run of labels that rise by one."""
    found: list[list[int | str]] = []
    for label in labels:
        if found and isinstance(label, int) and isinstance(found[-1][1], int) and label == found[-1][1] + 1:
            found[-1][1] = label
        else:
            found.append([label, label])
    return found


def read_requests(
    condition: ClassLabels,
    names: Sequence[str],
    num: int | None,
    per_class: int | None,
    labels: str,
    label_file: str | None,
    negative: str | None,
) -> Requests:
    """What the user asks for; arguments as of `generate_samples`, `names` of the classes.

    Raises:
      UsageError: a label does not exist, arguments contradict each other, or the file has too few lines.
    """
    leads_away = None if negative is None else condition.parse_one(negative, names)
    if label_file is None:
        chosen = condition.parse(labels, names)
        if per_class is not None and per_class < 1:
            raise UsageError(f"--per-class={per_class} must be at least 1.")
        count = num if per_class is None else per_class * len(chosen)
        return Requests(tuple(chosen), NUM if count is None else count, leads_away, False)
    if per_class is not None:
        raise UsageError(f"--per-class={per_class} contradicts --label-file={label_file}, which says it of each image.")
    path = storage.to_path(label_file)
    with storage.reading(path):
        lines = storage.retried(f"reading {path}", path.read_bytes).decode(errors="replace").rstrip().splitlines()
    num = len(lines) if num is None else num
    if not 1 <= num <= len(lines):
        raise UsageError(f"--label-file={label_file} has {len(lines)} lines; --num={num} images need as many.")
    known: dict[str, int | str] = {}
    for k, line in enumerate(lines[:num], 1):
        if line not in known:
            try:
                known[line] = condition.parse_one(line.strip(), names, "label")
            except UsageError as error:
                raise UsageError(f"--label-file={label_file}, line {k}: {error}") from error
    return Requests(tuple(known[line] for line in lines[:num]), num, leads_away, True)
