"""What does somebody ask of the page, and may they? Fields as a person filled them in become checked settings."""

import dataclasses
import math
from typing import Any

from deco_jax.conditions import ClassLabels, Text
from deco_jax.data.tokens import check_prompt
from deco_jax.errors import UsageError
from deco_jax.sampling.settings import Sampling, check_image_size

MOST_STEPS = 250  # of the solver: who asks for more keeps the others waiting
MOST_SEED = 2**32 - 1


@dataclasses.dataclass(frozen=True)
class Limits:
    """What one drawing may ask for at most; UsageError if one is out of range."""

    images: int = 4
    side: int = 1024  # pixels

    def __post_init__(self):
        for option, value in (("--max-images", self.images), ("--max-side", self.side)):
            if value < 1:
                raise UsageError(f"{option}={value} must be at least 1.")


@dataclasses.dataclass(frozen=True)
class Fields:
    """The page's fields, unchecked: numbers may be missing (None) or broken, texts anything."""

    shown: str  # a prompt, or a class by number or name
    negative: str  # the same; empty = nothing in particular
    images: float | None
    seed: float | None
    height: float | None
    width: float | None
    film: bool  # also how the images come about
    steps: float | None
    guidance: float | None
    low: float | None  # guidance acts from low < t
    high: float | None  # to t ≤ high
    solver: str
    shift: float | None


@dataclasses.dataclass(frozen=True)
class Wish:
    """What is drawn: `images` times the same request, from different noise."""

    request: int | str  # a class, "null", or a prompt
    negative: int | str | None  # what guidance leads away from; None = no class, or the empty prompt
    images: int
    seed: int
    size: tuple[int, int]  # height, width
    settings: Sampling
    film: bool


def read_wish(
    fields: Fields,
    condition: ClassLabels | Text,
    names: tuple[str, ...],
    patch_size: int,
    trained: Sampling,
    limits: Limits,
) -> Wish:
    """The wish behind the fields.

    Args:
      fields: as they were filled in.
      condition: of the network; names: of its classes.
      patch_size: of the network.
      trained: settings of its run, of which those without a field are kept.
      limits: of the page.

    Raises:
      UsageError: naming the field, its value, and what is allowed.
    """
    low, high = _number("guidance from", fields.low), _number("guidance to", fields.high)
    changes = {"solver": fields.solver, "guidance_interval": (low, high)}
    changes |= {name: _number(name, getattr(fields, name)) for name in ("guidance", "shift")}
    settings = dataclasses.replace(trained, steps=_whole("steps", fields.steps, 1, MOST_STEPS), **changes)
    size = _whole("height", fields.height, 1, limits.side), _whole("width", fields.width, 1, limits.side)
    check_image_size(size, patch_size, "height and width")
    negative = fields.negative if isinstance(fields.negative, str) and fields.negative.strip() else None
    return Wish(
        _request(fields.shown, condition, names, "prompt" if isinstance(condition, Text) else "class"),
        None if negative is None else _request(negative, condition, names, "negative"),
        _whole("images", fields.images, 1, limits.images),
        _whole("seed", fields.seed, 0, MOST_SEED),
        size,
        settings,
        bool(fields.film),
    )


def _request(text: Any, condition: ClassLabels | Text, names: tuple[str, ...], field: str) -> int | str:
    check_prompt(text)
    if not text.strip():
        what = "what the images shall show" if isinstance(condition, Text) else "a number or a name"
        raise UsageError(f"The {field} is empty; write {what}.")
    if isinstance(condition, Text):
        return text.strip()
    return condition.parse_one(text.strip(), names, field)


def _number(field: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UsageError(f"{field}={'' if value is None else value} must be a number.")
    return value


def _whole(field: str, value: Any, least: int, most: int) -> int:
    number = _number(field, value)
    if number != int(number) or not least <= number <= most:
        raise UsageError(f"{field}={number:.12g} must be a whole number from {least} to {most}.")
    return int(number)
