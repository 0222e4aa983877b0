"""`deco plan --search`: how should a run be laid out on that hardware? Layouts are compiled and compared.

A candidate is a way of laying out the run's step: which axes split what, what remat keeps, in how many parts the batch
is worked through. Batch and network are the run's. Each is planned as `deco plan` would: whole, as a scanned network
compiles as fast as a short one. What cannot be faster than the best so far by arithmetic alone is left out.
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

REMAT = ("none", "dots", "full")  # from what needs most memory to what needs least
PARTS = (1, 2, 4, 8)  # gradient accumulation, tried in this order until the run fits
SHORT = 16  # fsdp that is tried beside the largest possible: parameters are gathered from so many devices


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A way of laying out a run."""

    preset: str
    slices: int
    data: int
    fsdp: int
    tensor: int
    remat: str
    accumulation: int

    def settings(self) -> list[str]:
        """The same for the command line of `deco train`."""
        mesh = [f"--config.mesh.{name}={getattr(self, name)}" for name in ("slices", *meshes.AXES)]
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
    devices = make_devices(place)
    if per_device_batch is not None:
        if per_device_batch < 1:
            raise UsageError(f"--per-device-batch={per_device_batch} must be 1 or more.")
        config.data.batch_size = per_device_batch * len(devices)
    found: list[Report] = []
    for mesh in _meshes(config, len(devices), slices):
        for remat in REMAT:
            for parts in PARTS:
                candidate = Candidate(*mesh, remat, parts)
                program = _program(candidate, config, devices, place)
                if program is None or _bound_by_arithmetic(program, place) > min(map(_bound, found), default=math.inf):
                    break
                say(f"{place.name}: {describe(candidate)} …")
                found.append(report := _report(candidate, program))
                bound = f"bound {1e3 * _bound(report):.0f} ms" if report["fits"] else "does not fit"
                say(f"  {report['memory'] / GIB:.2f} GiB, {bound}")
                if report["fits"]:
                    break
    if not found:
        raise UsageError(
            f"data.batch_size={config.data.batch_size} is not divisible over {len(devices)} devices by any layout."
        )
    found.sort(key=lambda r: (not r["fits"], _bound(r), sum(r["seconds"].values())))
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
        "candidates": found,
        "fits": found[0]["fits"],
        "command": shlex.join(command),
    }


def _meshes(config: ConfigDict, devices: int, slices: int) -> Iterator[tuple[str, int, int, int, int]]:
    """(preset, slices, data, fsdp, tensor) of all that is worth a try."""
    devices //= slices
    yield "data", slices, devices, 1, 1
    for tensor in (1, 2):
        if devices % tensor or config.model.heads % tensor:
            continue
        rest = devices // tensor
        largest = max(n for n in range(1, rest + 1) if rest % n == 0 and config.model.width % n == 0)
        short = {SHORT} if largest % SHORT == 0 and tensor == 1 else set()
        for fsdp in sorted(({largest} | short) - {1}, reverse=True):
            for preset in ("fsdp", "zero1") if tensor == 1 else ("fsdp_tensor",):
                yield preset, slices, rest // fsdp, fsdp, tensor


def _program(candidate: Candidate, config: ConfigDict, devices: Sequence[Any], place: Topology) -> Program | None:
    """The run's step, laid out so; None if it cannot be."""
    config = config.copy_and_resolve_references()
    config.mesh.update({name: getattr(candidate, name) for name in ("preset", "slices", *meshes.AXES)})
    config.model.remat, config.optimizer.accumulation = candidate.remat, candidate.accumulation
    layout = meshes.make_layout(config.mesh, devices)
    try:
        check_devices(config, layout.mesh)
    except UsageError:
        return None
    return Program(config, layout, place, False)


def _bound_by_arithmetic(program: Program, place: Topology) -> float:
    """Seconds."""
    return program.flops()[1] / place.accelerator.flops


def _report(candidate: Candidate, program: Program) -> Report:
    """What `deco plan` says, in brief."""
    planned = analyse(program)
    used, available = (planned["memory"][name] for name in ("used", "available"))
    report = {**dataclasses.asdict(candidate), "settings": candidate.settings(), "memory": used, "available": available}
    report |= {"per_device_batch": program.per_device, "fits": planned["fits"], "seconds": {}}
    if planned["roofline"]:
        report |= {name: planned["roofline"][name] for name in ("seconds", "images_per_second_a_chip")}
    return report


def _bound(report: Report) -> float:
    """Seconds below which no step can be; none where it does not fit."""
    return max(report["seconds"].values()) if report["fits"] else math.inf


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
    lines += [f"{number} layouts compiled, {len(fitting)} fit. Per device:", ""]
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
