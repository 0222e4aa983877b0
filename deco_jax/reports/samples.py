"""Which sample grids does a page carry, and as what? Few and small enough that the page can be sent to somebody."""

import base64
import dataclasses
import io

import numpy as np
from PIL import Image

from deco_jax.reports.runs import Run
from deco_jax.storage import retried

SHOWN = 30  # grids of a run
LARGEST = 400_000  # bytes of a grid as it is; larger ones are made smaller
SHARP = 720  # pixels a side up to which small ones are shown larger
SIDE, QUALITY = 1200, 85  # of those, at most so many pixels, as JPEG


@dataclasses.dataclass(frozen=True)
class Grid:
    """One picture of samples."""

    step: int
    source: str  # data: address
    shown_width: int  # pixels on the page
    shown_height: int
    sharp: bool  # small, and shown larger, pixel by pixel


def read_grids(run: Run) -> list[Grid]:
    """At most SHOWN of the run's grids, evenly chosen, the last always among them; a note says what is not as it was.

    Raises:
      TransientError: the storage fails.
    """
    count = len(run.grids)
    chosen = np.unique(np.linspace(count - 1, 0, min(count, SHOWN)).round().astype(int)) if count else []
    if count > SHOWN:
        run.notes.append(f"{len(chosen)} of {count} sample grids are shown, evenly chosen, and the last.")
    grids, smaller = [], 0
    for k in chosen:
        step, file = run.grids[k]
        content = retried(f"reading {file}", file.read_bytes)
        try:
            with Image.open(io.BytesIO(content)) as picture:
                width, height = picture.size
                kind = "png"
                if len(content) > LARGEST or picture.format != "PNG":
                    content, kind, smaller = _smaller(picture), "jpeg", smaller + 1
        except (OSError, ValueError, Image.DecompressionBombError):  # half of it is written
            run.notes.append(f"The grid of step {step} is no picture yet, or no longer: {file}.")
            continue
        source = f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
        times = max(1, min(SHARP // width, SHARP // height))
        grids.append(Grid(step, source, times * width, times * height, times > 1))
    if smaller:
        run.notes.append(
            f"{smaller} sample grids are here as JPEG of at most {SIDE} pixels a side; samples/ has them as drawn."
        )
    return grids


def _smaller(picture: Image.Image) -> bytes:
    smaller = picture.convert("RGB")
    smaller.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    out = io.BytesIO()
    smaller.save(out, "JPEG", quality=QUALITY)
    return out.getvalue()
