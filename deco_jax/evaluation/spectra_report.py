"""How are spectra reported? As a table in JSON and CSV, the paper's Figure 4 as PNG, and a few words on the screen."""

import csv
import dataclasses
import datetime
import io
import json
from typing import Any

import jax
import numpy as np

from deco_jax.diffusion.frequency import BLOCK
from deco_jax.errors import UsageError
from deco_jax.storage import AnyPath, write_bytes
from deco_jax.version import __version__

FILES = ("spectra.json", "spectra.csv", "spectra.png")
PARTS = {"transformer": "DiT output", "velocity": "Velocity"}  # properties of Spectra, and how a reader calls them
# Figure 4 of the paper: networks of size L on ImageNet 256², S of the last bin.
PAPER = {"transformer": {"DeCo": 0.13, "baseline": 0.385}, "velocity": {"DeCo": 0.295, "baseline": 0.295}}


# JPEG's order of the 64 coefficients, vertical and horizontal frequency of each (ITU-T T.81, figure A.6): diagonal
# after diagonal, from (0, 0) to (7, 7); odd diagonals run downwards, even ones upwards.
ZIGZAG_64x2 = np.array(sorted(np.ndindex(BLOCK, BLOCK), key=lambda uv: (sum(uv), uv[0] if sum(uv) % 2 else uv[1])))


@dataclasses.dataclass(frozen=True, eq=False)
class Spectra:
    """Energies of one network, a bin for each DCT coefficient in zig-zag order, fp64.

    E is the squared coefficient summed over channels, on average over images, steps and blocks.
    """

    transformer_energy_64: np.ndarray  # E of the tokens after the last block
    velocity_energy_64: np.ndarray  # E of the predicted velocity, RGB
    images: int
    seed: int  # of the noise
    image_size: int | tuple[int, int]  # side, or height and width where they differ, in pixels
    steps: int  # of the Euler solver, all of them counted
    shift: float  # of its time grid
    origin: str = ""  # where the weights come from

    @property
    def transformer(self) -> np.ndarray:
        """S of the tokens: log(1 + E) divided by its largest value, (64,)."""
        return _normalised_log(self.transformer_energy_64)

    @property
    def velocity(self) -> np.ndarray:
        """S of the velocity, as `transformer`."""
        return _normalised_log(self.velocity_energy_64)


def _normalised_log(energy_64: np.ndarray) -> np.ndarray:
    s_64 = np.log1p(energy_64)
    return s_64 / s_64.max() if s_64.max() > 0 else s_64  # a fresh network's velocity is 0 everywhere


def half_bin(s_64: np.ndarray) -> int | None:
    """The first bin from which S stays below one half; None if the last bin is not below."""
    above = np.flatnonzero(s_64 >= 0.5)
    first = above[-1] + 1 if len(above) else 0
    return int(first) if first < len(s_64) else None


def require_matplotlib() -> None:
    """Raises UsageError if the figure cannot be drawn here."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise UsageError(
            "The figure of the spectra needs matplotlib: pip install -e '.[eval]' in the repository."
        ) from error


def write_spectra(out: AnyPath, spectra: dict[str, Spectra]) -> str:
    """Writes spectra.json, spectra.csv and spectra.png into `out`, and returns what they show as a few lines.

    Args:
      out: a folder, made if missing; these files in it are replaced.
      spectra: by the networks' names.

    Needs matplotlib, see `require_matplotlib`.
    """
    contents = (_to_json(spectra), _to_csv(spectra), _to_png(spectra))
    for name, content in zip(FILES, contents, strict=True):
        write_bytes(out / name, content)
    return _reading(spectra)


def _reading(spectra: dict[str, Spectra]) -> str:
    lines, width = [], max(map(len, spectra))
    for part, title in PARTS.items():
        lines.append(f"{title}, log energy over its largest:")
        for name, measured in spectra.items():
            s_64 = getattr(measured, part)
            half = half_bin(s_64)
            falls = "not below half there" if half is None else f"below half from bin {half} on"
            lines.append(f"  {name:{width}}  {s_64[-1]:.3f} at the last bin, {falls}")
    dit, velocity = PAPER["transformer"], PAPER["velocity"]
    lines.append(
        f"In the paper (Figure 4, ImageNet 256²) the DiT output falls to {dit['DeCo']} in DeCo and to "
        f"{dit['baseline']} in the baseline; both velocities to {velocity['DeCo']}."
    )
    return "\n".join(lines)


def _to_json(spectra: dict[str, Spectra]) -> bytes:
    def describe(measured: Spectra) -> dict[str, Any]:
        fields = dataclasses.asdict(measured)
        curves = {}
        for part in PARTS:
            energy_64, s_64 = fields.pop(f"{part}_energy_64"), getattr(measured, part)
            numbers = {"energy": energy_64.tolist(), "normalised_log": s_64.tolist()}
            curves[part] = {"last_bin": float(s_64[-1]), "half_bin": half_bin(s_64)} | numbers
        return fields | curves

    content = {
        "deco_jax": __version__,
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "paper_last_bin": PAPER,
        "networks": {name: describe(measured) for name, measured in spectra.items()},
        "zigzag": ZIGZAG_64x2.tolist(),
    }
    return json.dumps(content, indent=1, ensure_ascii=False).encode()


def _to_csv(spectra: dict[str, Spectra]) -> bytes:
    columns = {"bin": range(len(ZIGZAG_64x2)), "u": ZIGZAG_64x2[:, 0].tolist(), "v": ZIGZAG_64x2[:, 1].tolist()}
    for name, measured in spectra.items():
        for part in PARTS:
            columns[f"{name} {part} E"] = getattr(measured, f"{part}_energy_64").tolist()
            columns[f"{name} {part} S"] = getattr(measured, part).tolist()
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(zip(*columns.values(), strict=True))
    return text.getvalue().encode()


def _to_png(spectra: dict[str, Spectra]) -> bytes:
    """Two panels, tokens and velocity; a line for each network, named below with its last bin."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4 + 0.23 * len(spectra)), dpi=150, layout="constrained")
    for axes, (part, title) in zip(figure.subplots(1, 2, sharey=True), PARTS.items(), strict=True):
        for i, (name, measured) in enumerate(spectra.items()):
            s_64 = getattr(measured, part)
            style = ("-", "--", "-.", ":")[i % 4]
            axes.plot(s_64, style, color=f"C{i % 10}", linewidth=1.8, label=f"{s_64[-1]:.3f}  {name}")
        axes.set(title=title, xlabel="DCT coefficient in zig-zag order", xlim=(0, 63), ylim=(0, 1.05))
        axes.set_xticks([*range(0, 57, 8), 63])
        axes.grid(alpha=0.3, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        legend = axes.legend(
            loc="upper left", bbox_to_anchor=(-0.02, -0.14), frameon=False, title="at the last bin", alignment="left"
        )
        for text in legend.get_texts():
            text.set_parse_math(False)  # a path may have $ in it
        if part == "transformer":
            axes.set_ylabel("log(1 + energy), divided by its largest")
    png = io.BytesIO()
    figure.savefig(png, format="png")
    return png.getvalue()
