"""How is an image to be drawn? The settings of a sampler and the image's size, checked in one place."""

import dataclasses
import math
import re
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from deco_jax.diffusion.flow import shift_time
from deco_jax.errors import UsageError
from deco_jax.sampling.solvers import SOLVERS


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Settings of a sampler (docs/model.md, section 7); UsageError if one is out of range."""

    steps: int = 50  # of the solver
    solver: str = "euler"  # one of SOLVERS
    guidance: float = 1.0  # weight of classifier-free guidance; 1 is none, and half the work
    guidance_interval: tuple[float, float] = (
        0.0,
        1.0,
    )  # guidance acts on steps that start at low < t ≤ high
    shift: float = 1.0  # time shift; above 1 spends more steps near noise
    last: float = 0.0  # length of the last step, before the shift; 0 = 1/steps

    def __post_init__(self):
        interval = tuple(self.guidance_interval)
        if self.steps < 1:
            raise UsageError(f"steps={self.steps} must be at least 1.")
        if not 0 <= self.guidance < math.inf:
            raise UsageError(
                f"guidance={self.guidance} must be a finite number, 0 or more; 1 is none, and 0 leaves only the null."
            )
        numbers = len(interval) == 2 and all(isinstance(t, int | float) for t in interval)
        if not numbers or not 0 <= interval[0] <= interval[1] <= 1:
            raise UsageError(f"guidance_interval={interval} must be (low, high) with 0 ≤ low ≤ high ≤ 1.")
        if not 0 < self.shift < math.inf:
            raise UsageError(f"shift={self.shift} must be positive; 1 is no shift.")
        if not 0 <= self.last < 1:
            raise UsageError(f"last={self.last} must be from 0 to below 1; 0 is 1/steps.")
        if self.last and self.steps == 1:
            raise UsageError(f"last={self.last} needs at least 2 steps; steps=1 is one step from noise to data.")
        if self.solver not in SOLVERS:
            raise UsageError(f"solver={self.solver!r} is not known; allowed: {', '.join(SOLVERS)}.")
        # Equal settings are equal keys of the compiled samplers.
        object.__setattr__(self, "guidance_interval", (float(interval[0]), float(interval[1])))
        for name in ("guidance", "shift", "last"):
            object.__setattr__(self, name, float(getattr(self, name)))

    @classmethod
    def from_config(cls, config: ConfigDict, **changes: Any) -> "Sampling":
        """The settings in the `sample` part of a configuration, with those changes that are not None."""
        values = {field.name: config[field.name] for field in dataclasses.fields(cls)}
        return cls(**values | {name: value for name, value in changes.items() if value is not None})

    @property
    def times(self) -> np.ndarray:
        """The times a solver visits, (steps + 1,), float64: from 0 = noise to 1 = data.

        linspace(0, 1 − last, steps), then 1, shifted towards noise by `shift`.
        """
        last = self.last or 1 / self.steps
        return shift_time(np.append(np.linspace(0, 1 - last, self.steps), 1.0), self.shift)

    @property
    def guided_steps(self) -> np.ndarray:
        """Which steps use guidance, (steps,): those that start at t with low < t ≤ high; none if guidance is 1.

        So the first step, from t = 0, is never guided. Adams is open on both sides, and Heun asks for slopes ahead
        (`Solver.guided`).
        """
        low, high = np.float32(self.guidance_interval)
        return SOLVERS[self.solver].guided(self._fp32_starts, low, high) & (self.guidance != 1)

    @property
    def _fp32_starts(self) -> np.ndarray:
        """`times` without the last, (steps,), as PyTorch's fp32 `linspace` and shift round them.

        Where a bound of the interval is a time of the grid, their last bit decides: of 50 steps the 45th starts at
        0.90000004, beyond 0.9. The first half is counted from the start, the rest from the end, each rounded once.
        """
        end = np.float32(1 - (self.last or 1 / self.steps))
        step = np.float64(end / np.float32(max(self.steps - 1, 1)))
        number = np.arange(self.steps)
        ahead = number < self.steps // 2
        starts = np.where(ahead, number * step, end - (self.steps - 1 - number) * step) if self.steps > 1 else [0.0]
        return shift_time(np.float32(starts), self.shift)

    @property
    def evaluations(self) -> int:
        """How often an image goes through the network, of which guidance needs two per slope."""
        return int((SOLVERS[self.solver].evaluations(self.steps) * (1 + self.guided_steps)).sum())


def parse_image_size(text: str | int | None, option: str = "--image-size") -> tuple[int, int] | None:
    """ "256" → (256, 256) and "256x384" → (256, 384), height and width in pixels; None → None.

    Raises:
      UsageError: naming `option`, the text is neither, or a side is 0.
    """
    if text is None:
        return None
    match = re.fullmatch(r"([1-9][0-9]{0,5})(?:[x×]([1-9][0-9]{0,5}))?", str(text).strip().lower(), re.ASCII)
    if match is None:
        raise UsageError(f"{option}={text} is no image size; write a side as 256, or height and width as 256x384.")
    return int(match[1]), int(match[2] or match[1])


def check_image_size(size: tuple[int, int], patch_size: int, option: str = "--image-size") -> None:
    """Raises UsageError, naming `option`, unless height and width are positive multiples of the patch size."""
    if any(side < 1 or side % patch_size for side in size):
        raise UsageError(
            f"{option}={write_image_size(size)} must be a positive multiple of the network's patch size, {patch_size}"
            f"{', in height and width' if size[0] != size[1] else ''}."
        )


def write_image_size(size: tuple[int, int]) -> str:
    """As `parse_image_size` reads it: "256", or "256x384"."""
    return str(size[0]) if size[0] == size[1] else f"{size[0]}x{size[1]}"
