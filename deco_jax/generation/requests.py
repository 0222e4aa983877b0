"""What shall each of very many images show? Balanced labels, labels of a file, or prompts."""

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Sequence

from deco_jax import storage
from deco_jax.conditions import ClassLabels, Text
from deco_jax.errors import UsageError
from deco_jax.generation.prompts import Prompt, checked_negative, choose_prompts

NUM = 50_000  # images, unless told otherwise: what FID is reported with
LONGEST = 200  # characters of labels in messages and settings


@dataclasses.dataclass(frozen=True)
class Asked:
    """What a command's flags ask for; None, or nothing, where one is not given."""

    num: int | None = None
    negative: str | None = None
    labels: str | None = None  # as in "0,5-9,golden retriever,null", or "all"
    label_file: str | None = None  # with one label on each line
    per_class: int | None = None
    prompt: Sequence[str] = ()
    prompts: str | None = None  # see generation/prompts.py
    per_prompt: int | None = None
    text_encoder: str | None = None


@dataclasses.dataclass(frozen=True)
class Requests:
    """What `num` images show: image i label i modulo their number. Labels are classes, or prompts."""

    labels: tuple[int | str, ...]
    num: int
    negative: int | str | None  # what guidance leads away from; None = no class, or the empty prompt
    from_file: bool = False
    prompts: tuple[Prompt, ...] = ()  # as they were asked for, of a network that is told text
    each: int = 1  # images of a prompt, one after the other

    @property
    def shown(self) -> list[int | str]:
        """The label of every image."""
        return list(itertools.islice(itertools.cycle(self.labels), self.num))

    def __str__(self) -> str:
        """As short as it can be: "0-999", "0-4,7,null", or the number of labels or prompts and their hash."""
        if self.prompts:
            text = json.dumps([prompt.text for prompt in self.prompts], ensure_ascii=False)
            text, what = text + (f" × {self.each}" if self.each > 1 else ""), f"{len(self.prompts)} prompts"
            what += f" × {self.each}" if self.each > 1 else ""
        else:
            text = ",".join(f"{first}-{last}" if last != first else f"{first}" for first, last in _ranges(self.labels))
            what = f"{len(self.labels)} labels"
        return text if len(text) <= LONGEST else f"{what}, sha256 {hashlib.sha256(text.encode()).hexdigest()[:16]}"

    @property
    def balance(self) -> str:
        """In words."""
        if self.from_file:
            return "labels as the file says"
        what, number = ("prompts", len(self.prompts)) if self.prompts else ("labels", len(self.labels))
        each, more = divmod(self.num, number)
        if more:
            return f"unbalanced: of {number} {what} the first {more} have {each + 1} each, the others {each}"
        return f"{each} of each of {number} {what}"


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
    condition: ClassLabels | Text, names: Sequence[str], asked: Asked, num: int = NUM, rounds: int = 1
) -> Requests:
    """What the user asks for.

    Args:
      condition: of the network.
      names: of its classes.
      asked: the flags.
      num: images of classes, unless asked otherwise.
      rounds: images of each prompt in turn, unless asked otherwise.

    Raises:
      UsageError: a label does not exist, a prompt is none, flags contradict each other or are of another kind of
        network, or a file has too few lines.
    """
    if isinstance(condition, Text):
        return _read_prompts(asked, rounds)
    if given := _given(asked, "prompt", "prompts", "per_prompt", "text_encoder"):
        raise UsageError(f"{given} is for networks that are told text; this one knows classes: --labels.")
    leads_away = None if asked.negative is None else condition.parse_one(asked.negative, names)
    if asked.label_file is not None:
        return _read_label_file(condition, names, asked, leads_away)
    chosen = condition.parse("all" if asked.labels is None else asked.labels, names)
    if asked.per_class is not None and asked.per_class < 1:
        raise UsageError(f"--per-class={asked.per_class} must be at least 1.")
    count = asked.num if asked.per_class is None else asked.per_class * len(chosen)
    return Requests(tuple(chosen), num if count is None else count, leads_away)


def _read_prompts(asked: Asked, rounds: int) -> Requests:
    if given := _given(asked, "labels", "label_file", "per_class"):
        raise UsageError(f"{given} is for networks of classes; this one is told text: --prompt or --prompts.")
    if asked.per_prompt is not None and asked.num is not None:
        raise UsageError(f"--per-prompt={asked.per_prompt} contradicts --num={asked.num}; give one of them.")
    if asked.per_prompt is not None and asked.per_prompt < 1:
        raise UsageError(f"--per-prompt={asked.per_prompt} must be at least 1.")
    chosen = tuple(choose_prompts(asked.prompt, asked.prompts))
    each = asked.per_prompt or 1
    labels = tuple(prompt.text for prompt in chosen for _ in range(each))
    num = len(labels) * (rounds if asked.per_prompt is None else 1) if asked.num is None else asked.num
    return Requests(labels, num, checked_negative(asked.negative), prompts=chosen, each=each)


def _read_label_file(
    condition: ClassLabels, names: Sequence[str], asked: Asked, leads_away: int | str | None
) -> Requests:
    option = f"--label-file={asked.label_file}"
    if asked.per_class is not None:
        raise UsageError(f"--per-class={asked.per_class} contradicts {option}, which says it of each image.")
    path = storage.to_path(asked.label_file)
    with storage.reading(path):
        lines = storage.retried(f"reading {path}", path.read_bytes).decode(errors="replace").rstrip().splitlines()
    num = len(lines) if asked.num is None else asked.num
    if not 1 <= num <= len(lines):
        raise UsageError(f"{option} has {len(lines)} lines; --num={num} images need as many.")
    known: dict[str, int | str] = {}
    for k, line in enumerate(lines[:num], 1):
        if line not in known:
            try:
                known[line] = condition.parse_one(line.strip(), names, "label")
            except UsageError as error:
                raise UsageError(f"{option}, line {k}: {error}") from error
    return Requests(tuple(known[line] for line in lines[:num]), num, leads_away, from_file=True)


def _given(asked: Asked, *names: str) -> str:
    """The first of these flags that is given, as its user writes it."""
    name = next((name for name in names if getattr(asked, name) not in (None, ())), None)
    return "" if name is None else f"--{name.replace('_', '-')}"
