"""How do the benchmarks of a part of the network time it? Forward alone, and forward with backward, in turns.

Every implementation of ours that can run here is a contender; so is PyTorch's, eager and compiled.
"""

import argparse
import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import speed
from speed import COMPILED, EAGER, OURS, Contender

from deco_jax.errors import UsageError
from deco_jax.ops.door import Implementation

try:
    import torch
except ImportError:
    torch = None


@dataclasses.dataclass(frozen=True)
class Ours:
    """One of our implementations."""

    name: str
    function: Callable[..., Any]  # of `arguments`, to an array
    arguments: tuple[Any, ...]  # trees of arrays, all of which have gradients


@dataclasses.dataclass(frozen=True)
class Theirs:
    """PyTorch's function, of which the eager and the compiled contender are made."""

    function: Callable[..., Any]  # of `arguments`, to a tensor
    arguments: tuple[Any, ...]
    differentiated: Sequence[Any]  # tensors that get gradients, that of the comparison first
    to_ours: Callable[[Any], Any] = lambda x: x  # a numpy array of theirs as ours lies, both outputs and gradients


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the benchmarks of a part."""
    speed.add_arguments(parser)
    parser.add_argument("--steps", type=int, help="timed in a turn (default: 20 on a GPU, 3 on a CPU)")


def each_implementation(table: Sequence[Implementation], make: Callable[[str], Ours]) -> list[Ours]:
    """Ours, of each of the table's that can run here; says of the others why not."""
    found = []
    for implementation in table:
        part = make(implementation.name)
        try:
            jax.eval_shape(part.function, *part.arguments)
        except UsageError as error:
            print(f"{implementation.name}: {error}", flush=True)
        else:
            found.append(part)
    return found


def compare(
    args: argparse.Namespace, title: str, ours: Sequence[Ours], theirs: Theirs | None, flops: float = 0.0
) -> list[dict[str, Any]]:
    """Checks, times and reports.

    Args:
      args: see `add_arguments`.
      title: of the report.
      ours, theirs: the same function with the same arguments.
      flops: of one forward pass, 0 if they do not matter; the backward pass has twice as many.

    Returns:
      What is written as the JSON's results.
    """
    steps = args.steps or (20 if jax.default_backend() == "gpu" else 3)
    cotangent = np.random.default_rng(9).standard_normal(
        jax.eval_shape(ours[0].function, *ours[0].arguments).shape, np.float32
    )
    made = [made for part in ours for made in _ours(part, cotangent)]
    if theirs is not None:
        made += _theirs(theirs, cotangent, args.torch_compile != "none")
    reference: dict[str, Any] = {}
    contenders: list[Contender] = []
    for contender, first in made:
        began = time.perf_counter()
        values = speed.attempt(contender, first)
        contender.compile_seconds = time.perf_counter() - began
        if values is not None:
            for name, value in values.items():
                reference.setdefault(name, value)
                contender.details[f"{name} differs by"] = _error(value, reference[name])
        contenders.append(contender)
        errors = ", ".join(f"{name} {value:.1e}" for name, value in contender.details.items() if "differs" in name)
        print(f"{contender.name}: first call {contender.compile_seconds:.1f} s; {errors}", flush=True)
    speed.take_turns(contenders, args.rounds, steps)

    rows = []
    for forward, both in zip(contenders[::2], contenders[1::2], strict=True):
        rows.append([forward.details["of"], *(c.problem or speed.spread(c.seconds, 1e3, 3) for c in (forward, both))])
        if flops:
            middle = speed.median(both.seconds)
            rows[-1].append(f"{3 * flops / middle / 1e12:.3g}" if middle else "–")
    header = ["", "forward, ms", "forward + backward, ms", *(["TFLOP/s"] if flops else [])]
    lines = [speed.table(header, rows)]
    others = [c for c in contenders[1::2] if not c.details["of"].startswith(OURS)]
    for contender in contenders[1::2]:
        value = speed.ratio(contender, others)
        if value and contender not in others:
            lines.append(f"{contender.details['of']} ÷ the faster of PyTorch's, forward + backward: {value:.2f}")
    results = [speed.figures(contender) for contender in contenders]
    speed.report(args, f"{title}, {args.rounds} rounds of {steps}", lines, results)
    return results


def _ours(part: Ours, cotangent: np.ndarray) -> list[tuple[Contender, Callable[[], dict[str, Any]]]]:
    """Two contenders, each with what computes the values that all must agree on."""

    def both(cotangent: Any, *arguments: Any) -> tuple[Any, Any]:
        out, backward = jax.vjp(part.function, *arguments)
        return out, backward(cotangent.astype(out.dtype))

    forward, both = jax.jit(part.function), functools.partial(jax.jit(both), jax.numpy.asarray(cotangent))

    def run(program: Callable[..., Any], steps: int) -> None:
        for _ in range(steps):
            out = program(*part.arguments)
        jax.block_until_ready(out)

    def first() -> dict[str, Any]:
        out, gradients = both(*part.arguments)
        return {
            "output": np.asarray(out, np.float32),
            "gradient": np.asarray(jax.tree.leaves(gradients)[0], np.float32),
        }

    name, details = f"{OURS} {part.name}", {"of": f"{OURS} {part.name}"}
    alone = Contender(f"{name}, forward", functools.partial(run, forward), details={**details})
    return [
        (alone, lambda: {"output": np.asarray(forward(*part.arguments), np.float32)}),
        (Contender(f"{name}, both", functools.partial(run, both), details={**details}), first),
    ]


def _theirs(
    part: Theirs, cotangent: np.ndarray, compiled: bool
) -> list[tuple[Contender, Callable[[], dict[str, Any]]]]:
    """Likewise of PyTorch's, eager and perhaps compiled."""
    device, made = part.arguments[0].device, []

    def forward(function: Callable[..., Any], steps: int) -> Any:
        with torch.no_grad():
            for _ in range(steps):
                out = function(*part.arguments)
        return _wait(device, out)

    def both(function: Callable[..., Any], steps: int) -> Any:
        for _ in range(steps):
            out = function(*part.arguments)
            gradients = torch.autograd.grad(out, part.differentiated, given.to(out.dtype))
        return _wait(device, (out.detach(), gradients[0]))

    def values(run: Callable[[int], Any]) -> dict[str, Any]:
        out = run(1)
        out = out if isinstance(out, tuple) else (out,)
        arrays = (part.to_ours(x.float().cpu().numpy()) for x in out)
        return dict(zip(("output", "gradient"), arrays, strict=False))

    shape = tuple(part.function(*part.arguments).shape)
    like_ours = cotangent if cotangent.shape == shape else np.moveaxis(cotangent, -1, 1)
    given = torch.tensor(like_ours).to(device)
    functions = {EAGER: part.function}
    if compiled:
        functions[COMPILED] = torch.compile(part.function, dynamic=False)
    for name, function in functions.items():
        for which, run in (("forward", forward), ("both", both)):
            contender = Contender(f"{name}, {which}", functools.partial(run, function), details={"of": name})
            made.append((contender, functools.partial(values, contender.run)))
    return made


def _wait(device: Any, value: Any) -> Any:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return value


def _error(value: np.ndarray, reference: np.ndarray) -> float:
    """‖a − b‖/‖b‖."""
    value, reference = np.float64(value).ravel(), np.float64(reference).ravel()
    return float(np.linalg.norm(value - reference) / np.linalg.norm(reference))
