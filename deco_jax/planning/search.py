"""`deco plan --search`: how should a run be laid out on that hardware? Tried on short networks, and extrapolated.

A candidate is a way of laying out the run's step: which axes split what, what remat keeps, in how many parts the batch
is worked through. Batch and network are the run's. Of each, programs of DEPTHS blocks are compiled; memory, traffic and
what is sent grow by the same amount with every further block, so those of the whole network follow. One block alone
would not do: its loop is no loop, and compiled differently.
"""

import dataclasses
import math
import shlex
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ml_collections import ConfigDict

from deco_jax.config import load_config
from deco_jax.errors import UsageError
from deco_jax.parallel import mesh as meshes
from deco_jax.parallel.hardware import GIB
from deco_jax.planning.plan import Program, Report, analyse
from deco_jax.planning.topology import Topology, make_devices, parse_topology
from deco_jax.training.start import check_devices

DEPTHS = (2, 4)  # blocks of the programs that are compiled
REMAT = ("none", "dots", "full")  # from what needs most memory to what needs least
PARTS = (1, 2, 4, 8)  # gradient accumulation, tried in this order until the run fits
SHORT = 16  # fsdp that is tried beside the largest possible: parameters are gathered from so many devices


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A way of laying out a run."""

    preset: str
    data: int
    fsdp: int
    tensor: int
    remat: str
    accumulation: int

    def settings(self) -> list[str]:
        """The same for the command line of `deco train`."""
        mesh = [f"--config.mesh.{axis}={getattr(self, axis)}" for axis in meshes.AXES]
        rest = [f"--config.model.remat={self.remat}", f"--config.optimizer.accumulation={self.accumulation}"]
        return [f"--config.mesh.preset={self.preset}", *mesh, *rest]


def search(
    path: str,
    overrides: Sequence[str],
    topology: str,
    *,
    slices: int = 1,
    per_device_batch: int | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Report:
    """Tries the layouts there are for the run that `deco train` would start.

    Args:
      path, overrides: see `load_config`; what they say of the mesh, of remat and of accumulation is not looked at.
      topology, slices: see `parse_topology`.
      per_device_batch: images per device; the configuration's global batch unless given.
      say: told what is being done.

    Returns:
      "candidates": those that fit, the fastest bound first; then those that do not. "command": that of the first.

    Raises:
      UsageError: the configuration, the hardware or both together do not exist; or there is no hardware to compare.
    """
    place = parse_topology(topology, slices)
    if place.accelerator is None:
        raise UsageError(f"--search compares bounds of hardware; --topology={topology} simulates devices without any.")
    config = load_config(path, overrides)
    if config.model.depth <= max(DEPTHS):
        raise UsageError(f"--search compiles {DEPTHS} blocks; model.depth={config.model.depth} is planned as a whole.")
    devices = make_devices(place)
    if per_device_batch is not None:
        if per_device_batch < 1:
            raise UsageError(f"--per-device-batch={per_device_batch} must be 1 or more.")
        config.data.batch_size = per_device_batch * len(devices)
    found: list[Report] = []
    for mesh in _meshes(config, len(devices) // slices):
        for remat in REMAT:
            for parts in PARTS:
                report = _try(Candidate(*mesh, remat, parts), config, devices, place, slices, say)
                if report is not None:
                    found.append(report)
                if report is None or report["fits"]:
                    break
    if not found:
        raise UsageError(
            f"data.batch_size={config.data.batch_size} is not divisible over {len(devices)} devices by any layout."
        )
    found.sort(key=lambda r: (not r["fits"], max(r["seconds"].values(), default=math.inf), sum(r["seconds"].values())))
    batch = f"--config.data.batch_size={config.data.batch_size}"
    settings = found[0]["settings"]
    chosen = {setting.partition("=")[0] for setting in (batch, *settings)}
    kept = [override for override in overrides if override.partition("=")[0] not in chosen]
    command = ["deco", "train", "--config", path, *kept, batch, *settings]
    return {
        "topology": topology,
        "slices": slices,
        "devices": len(devices),
        "global_batch": config.data.batch_size,
        "depths": DEPTHS,
        "candidates": found,
        "fits": found[0]["fits"],
        "command": shlex.join(command),
    }


def _meshes(config: ConfigDict, devices: int) -> Iterator[tuple[str, int, int, int]]:
    """(preset, data, fsdp, tensor) of all that is worth a try on the devices of a slice."""
    yield "data", devices, 1, 1
    for tensor in (1, 2):
        if devices % tensor or config.model.heads % tensor:
            continue
        rest = devices // tensor
        largest = max(n for n in range(1, rest + 1) if rest % n == 0 and config.model.width % n == 0)
        short = {SHORT} if largest % SHORT == 0 and tensor == 1 else set()
        for fsdp in sorted(({largest} | short) - {1}, reverse=True):
            for preset in ("fsdp", "zero1") if tensor == 1 else ("fsdp_tensor",):
                yield preset, rest // fsdp, fsdp, tensor


def _try(
    candidate: Candidate,
    config: ConfigDict,
    devices: Sequence[Any],
    place: Topology,
    slices: int,
    say: Callable[[str], None],
) -> Report | None:
    """What a step of the whole network needs so, extrapolated; None if the run cannot be laid out so."""
    config = config.copy_and_resolve_references()
    config.mesh.update(
        preset=candidate.preset,
        slices=slices,
        data=candidate.data,
        fsdp=candidate.fsdp,
        tensor=candidate.tensor,
    )
    config.model.remat, config.optimizer.accumulation = candidate.remat, candidate.accumulation
    layout = meshes.make_layout(config.mesh, devices)
    try:
        check_devices(config, layout.mesh)
    except UsageError:
        return None
    say(f"{place.name}: {describe(candidate)} …")
    short = []
    for depth in DEPTHS:
        shrunk = config.copy_and_resolve_references()
        shrunk.model.depth = depth
        shrunk.loss.alignment_layer = min(config.loss.alignment_layer, depth)
        short.append(analyse(Program(shrunk, layout, place, False)))
    whole = Program(config, layout, place, False)
    report = {**dataclasses.asdict(candidate), "settings": candidate.settings(), "per_device_batch": whole.per_device}
    if any(r["roofline"] is None for r in short):
        used, available = (short[-1]["memory"][name] for name in ("used", "available"))
        return {**report, "memory": used, "available": available, "fits": False, "seconds": {}}
    values = extrapolate([_figures(r) for r in short], config.model.depth)
    accelerator = place.accelerator
    seconds = {
        "compute": whole.flops()[1] / accelerator.flops,
        "memory": values["hbm_bytes"] / accelerator.hbm_bandwidth,
        "network": values["sent_bytes"] / accelerator.network,
    }
    images = config.data.batch_size / len(devices) * accelerator.devices_per_chip
    report |= values | {"available": accelerator.hbm, "fits": values["memory"] <= accelerator.hbm, "seconds": seconds}
    report["images_per_second_a_chip"] = images / max(seconds.values())
    say(f"  {values['memory'] / GIB:.2f} GiB, bound {1e3 * max(seconds.values()):.0f} ms")
    return report


def _figures(report: Report) -> dict[str, float]:
    """What grows with the depth."""
    sent = sum(sums["wire_bytes"] for kind, sums in report["collectives"].items() if kind != "send")
    return {"memory": report["memory"]["used"], "hbm_bytes": report["hbm_bytes"], "sent_bytes": sent}


def extrapolate(short: Sequence[dict[str, float]], depth: int) -> dict[str, float]:
    """Figures of programs with DEPTHS blocks → those of `depth` blocks, along the straight line through both."""
    (low, high), (first, second) = DEPTHS, short
    return {name: first[name] + (second[name] - first[name]) * (depth - low) / (high - low) for name in first}


def describe(candidate: Candidate | Report) -> str:
    """A candidate in a few words."""
    c = candidate if isinstance(candidate, dict) else dataclasses.asdict(candidate)
    axes = " × ".join(f"{axis} {c[axis]}" for axis in meshes.AXES if c[axis] > 1) or "one device"
    return f"{c['preset']} ({axes}), remat {c['remat']}, accumulation {c['accumulation']}"


def to_text(report: Report, best: int = 5) -> str:
    """The best few as a table, and the command of the first."""
    slices = f" × {report['slices']} slices" if report["slices"] > 1 else ""
    lines = [f"{report['topology']}{slices}, {report['devices']} devices, batch {report['global_batch']} in all"]
    fitting = [r for r in report["candidates"] if r["fits"]]
    number = len(report["candidates"])
    lines += [f"{number} layouts, {len(fitting)} fit; figures of short networks, extrapolated. Per device:", ""]
    lines.append(f"{'layout':64} {'GiB':>6} {'bound':>7} {'compute':>8} {'memory':>7} {'network':>8} {'images/s':>9}")
    for r in fitting[:best]:
        ms = {name: 1e3 * value for name, value in r["seconds"].items()}
        lines.append(
            f"{describe(r):64} {r['memory'] / GIB:6.2f} {max(ms.values()):7.1f} {ms['compute']:8.1f} "
            f"{ms['memory']:7.1f} {ms['network']:8.1f} {r['images_per_second_a_chip']:9,.0f}"
        )
    if not fitting:
        closest = min(report["candidates"], key=lambda r: r["memory"])
        lines.append(f"None fits; the smallest, {describe(closest)}, needs {closest['memory'] / GIB:.2f} GiB.")
    else:
        lines += ["", "Times are bounds in ms, images/s those of a chip at the bound. To train so:", report["command"]]
    return "\n".join(lines)
