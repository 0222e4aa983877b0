"""How `deco plan` prints what it found."""

import re
from collections.abc import Iterator
from typing import Any

Report = dict[str, Any]

_MEMORY = {
    "parameters": "fp32",
    "ema": "fp32",
    "optimizer": "two moments, fp32",
    "teacher": "frozen; linear layers in the run's dtype",
    "batch": "",
    "temporaries": "activations, gradients, gathered parameters",
    "activations": "saved for the backward pass, and one block's",
    "gradients": "fp32",
    "program": "its instructions",
}


def to_text(report: Report) -> str:
    """The report of `deco_jax.plan.plan` as a page."""
    return "\n".join(_lines(report))


def _lines(r: Report) -> Iterator[str]:
    mesh = ", ".join(f"{axis} {size}" for axis, size in r["mesh"].items())
    slices = f" × {r['slices']} slices" if r["slices"] > 1 else ""
    millions = f"{r['parameters'] / 1e6:,.1f} M parameters"
    yield f"{r['program'].capitalize()}, {millions}, {r['image_size']}², on {r['topology']}{slices}"
    yield f"{r['devices']} devices as a mesh of {mesh}"
    yield f"Batch {r['per_device_batch']} a device, {r['global_batch']} in all; remat {r['remat']}"
    took = f" in {r['compile_seconds']:.0f} s" if "compile_seconds" in r else ""
    yield f"{r['method']}{took}, jax {r['jax']}, {r['date']}. All figures are for one device."
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
    if r.get("buffers"):
        yield ""
        yield "Largest arrays"
        for buffer in r["buffers"]:
            yield f"  {_binary(buffer['bytes']):>10}  {buffer['shape']:28} {_where(buffer['op_name'])}".rstrip()
    if r.get("unknown_loops"):
        yield f"Note: {r['unknown_loops']} loops of unknown length are counted as one turn."
    if "fit" in r:
        batch, step = r["fit"]["per_device_batch"], r["fit"]["step"]
        yield ""
        yield f"Largest batch: {batch} a device fits, {batch + step} does not (tried in steps of {step})."


def _memory(r: Report) -> Iterator[str]:
    memory = r["memory"]
    used, available = memory["used"], memory["available"]
    if available is None:
        yield f"Memory         {_binary(used):>12}   a simulated mesh has no limit"
    else:
        verdict = "Fits" if r["fits"] else "DOES NOT FIT"
        yield f"{verdict:14} {_binary(used):>12}   of {_binary(available)} ({100 * used / available:.0f}%)"
    for name, what in _MEMORY.items():
        if name in memory:
            yield f"  {name:12} {_binary(memory[name]):>12}   {what}".rstrip()
    if r["fits"] is False and "compile_seconds" in r:
        yield "  The compiler says no more when it gives up; --fit looks for the largest batch that fits."


def _network(r: Report) -> Iterator[str]:
    kinds = r["collectives"]
    wire, times = (sum(kind[field] for kind in kinds.values()) for field in ("wire_bytes", "times"))
    yield f"Network        {_decimal(wire):>12}   sent, in {times:,} collectives"
    for name, kind in sorted(kinds.items(), key=lambda item: -item[1]["wire_bytes"]):
        ring = "; gathers and scatters that run beside the products" if name == "collective-permute" else ""
        yield f"  {_decimal(kind['wire_bytes']):>10}  {name}, {kind['times']:,}{ring}"
    if r.get("largest_collectives"):
        yield "  most of it:"
    for c in r.get("largest_collectives", [])[:6]:
        what = f"{c['kind']} of {c['shape']} × {c['times']}"
        yield f"  {_decimal(c['wire_bytes']):>10}  {what:50} {_where(c['op_name'])}".rstrip()
    if r["slices"] > 1:
        yield "  Note: the network between slices is slower, and not modelled."


def _roofline(r: Report) -> Iterator[str]:
    roofline = r["roofline"]
    if roofline is None:
        yield "Roofline: none, since the speed of simulated devices says nothing."
        return
    seconds, bound = roofline["seconds"], roofline["bound"]
    times = ", ".join(f"{name} {_milliseconds(value)}" for name, value in seconds.items())
    yield f"Roofline       {_milliseconds(seconds[bound]):>9} ms   at least, bound by {bound} ({times})"
    yield f"               {roofline['images_per_second_a_chip']:>12,.0f}   images/s a chip at most"


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
    dull = r"(jit|jvp|vmap|transpose)\(.*\)|while|body|closed_call|layers|checkpoint|rematted_computation|"
    return direction + "/".join(part for part in op_name.split("/") if not re.fullmatch(dull, part))
