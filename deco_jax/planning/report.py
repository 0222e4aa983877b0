"""How does `deco plan` print what it found?"""

import re
from collections.abc import Iterator
from typing import Any

Report = dict[str, Any]

_NOTES = {
    "padding": "of these, in the device's layout",
    "temporaries": "activations, gradients, gathered parameters",
    "collective-permute": "gathers and scatters that run beside the products",
    "send": "between slices, over a slower network that is not in the roofline",
}


def to_text(report: Report) -> str:
    """The report of `deco_jax.planning.plan.plan` as a page."""
    return "\n".join(_lines(report))


def _lines(r: Report) -> Iterator[str]:
    mesh = ", ".join(f"{axis} {size}" for axis, size in r["mesh"].items())
    slices = f" × {r['slices']} slices" if r["slices"] > 1 else ""
    millions = f"{r['parameters'] / 1e6:,.1f} M parameters"
    yield f"{r['program'].capitalize()}, {millions}, {r['image_size']}², on {r['topology']}{slices}"
    yield f"{r['devices']} devices as a mesh of {mesh}"
    yield f"Batch {r['per_device_batch']} per device, {r['global_batch']} in all; remat {r['remat']}"
    took = f"{r['method']} in {r['compile_seconds']:.0f} s, jax {r['jax']}, {r['date']}"
    yield f"{took}. All figures are for one device."
    yield ""
    yield from _memory(r)
    yield ""
    model, executed = (_decimal(r["flops"][name], "FLOP") for name in ("model", "executed"))
    yield f"Arithmetic     {executed:>12}   {model} without what remat does again"
    if "hbm_bytes" in r:
        yield f"Memory traffic {_decimal(r['hbm_bytes']):>12}   read and written"
        yield from _network(r)
        yield ""
        yield from _roofline(r)
    if "fit" in r:
        batch, step = r["fit"]["per_device_batch"], r["fit"]["step"]
        yield ""
        yield f"Largest batch: {batch} per device fits, {batch + step} does not (tried in steps of {step})."


def _memory(r: Report) -> Iterator[str]:
    memory = dict(r["memory"])
    used, available = memory.pop("used"), memory.pop("available")
    if available is None:
        yield f"Memory         {_binary(used):>12}   a simulated mesh has no limit"
    else:
        verdict = "Fits" if r["fits"] else "DOES NOT FIT"
        yield f"{verdict:14} {_binary(used):>12}   of {_binary(available)} ({100 * used / available:.0f}%)"
    for name, size in memory.items():
        if size >= 512:
            yield f"  {name:12} {_binary(size):>12}   {_NOTES.get(name, '')}".rstrip()
    if "fsdp" in r:
        verdict = "`--preset fsdp` would, with" if r["fsdp"]["fits"] else "nor would `--preset fsdp`, with at least"
        yield f"  {verdict} {_binary(r['fsdp']['used'])} for as many images per device."
    if r["fits"] is False and "fit" not in r:
        yield "  --fit looks for the largest batch that fits."


def _network(r: Report) -> Iterator[str]:
    kinds = r["collectives"]
    wire, times = (sum(kind[field] for kind in kinds.values()) for field in ("wire_bytes", "times"))
    yield f"Network        {_decimal(wire):>12}   sent, in {times:,} collectives"
    for name, kind in sorted(kinds.items(), key=lambda item: -item[1]["wire_bytes"]):
        note = f"; {_NOTES[name]}" if name in _NOTES else ""
        yield f"  {_decimal(kind['wire_bytes']):>10}  {name}, {kind['times']:,}{note}"
    if kinds:
        yield "  most of it, with the times in one run of the program:"
    for c in r["largest_collectives"]:
        what = f"{c['kind']} of {c['shape']} ({_decimal(c['bytes'])}) × {c['times']}"
        yield f"  {_decimal(c['wire_bytes']):>10}  {what:64} {_where(c['op_name'])}".rstrip()


def _roofline(r: Report) -> Iterator[str]:
    roofline = r["roofline"]
    if roofline is None:
        yield "Roofline: none, since the speed of simulated devices says nothing."
        return
    seconds, bound = roofline["seconds"], roofline["bound"]
    times = ", ".join(f"{name} {_milliseconds(value)}" for name, value in seconds.items())
    yield f"Roofline       {_milliseconds(seconds[bound]):>9} ms   at least, bound by {bound} ({times})"
    yield f"               {roofline['images_per_second_a_chip']:>12,.0f}   images/s per chip at most"


def _binary(size: float) -> str:
    """Memory, in the units libtpu uses."""
    unit, name = next((u, n) for u, n in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")) if size >= u or u == 2**10)
    return f"{size / unit:.2f} {name}"


def _decimal(size: float, unit: str = "B") -> str:
    """Traffic and arithmetic, in the units of data sheets."""
    power, prefix = next((p, n) for p, n in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")) if size >= p or p == 1e3)
    return f"{size / power:.2f} {prefix}{unit}"


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:,.0f}" if seconds >= 0.1 else f"{1e3 * seconds:.3g}"


def _where(op_name: str) -> str:
    """jit(step)/transpose(jvp(DeCo))/transformer/while/body/…/block/mlp/up/dot_general → backward …"""
    direction = "backward " if "transpose(jvp" in op_name else "forward " if "jvp(" in op_name else ""
    op_name = re.sub(r"\[[\\']*([^]\\']*)[\\']*\]", r"/\1", op_name)  # an argument: state.params['a']['b']
    op_name, *others = op_name.replace("/(", "/").split(":")  # several operations in one
    dull = r"(jit|jvp|vmap|transpose)\(.*\)|while|body|closed_call|layers|checkpoint|rematted_computation|\w+\.decode|"
    kept = "/".join(part for part in op_name.split("/") if not re.fullmatch(dull, part))
    return direction + kept + (", …" if others else "")
