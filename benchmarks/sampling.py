"""How fast are images drawn beside the project's own PyTorch DeCo, and are they the same images?

python benchmarks/sampling.py                             on a GPU: XL-256, bf16, one image and several batches;
                                                          on a CPU: 21.7 M parameters, 8 images, 10 steps
python benchmarks/sampling.py --cases 1x50 1x100 64x100   BATCHxSTEPS, in Euler steps, guided
python benchmarks/sampling.py --size l --json FILE

Ours is `deco_jax.sample` as a user calls it, from given noise. PyTorch's is `DeCo.sample`, its weights in bf16: eager;
and with a compiled network, on a GPU as a CUDA graph that was captured of it: for one image, launching kernels takes
longer than they do. Compiled are the repeated blocks and the pixel decoder; with --torch-compile whole, the network as
one, by torch.compile's own CUDA graphs (mode="reduce-overhead").

Guidance acts where the size's configuration says (XL: on 0.1 < t ≤ 1, which is 89 of 100 steps); --guided all has it
act on every step but the one at t = 0.
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import speed
from speed import COMPILED, EAGER, OURS, Contender

import deco_jax
from deco_jax.config import build_model
from deco_jax.models.build import parameter_shapes
from deco_jax.models.flops import forward_flops
from deco_jax.pretrained import names
from deco_jax.sampling.settings import Sampling
from deco_jax.weights.translate import to_torch

try:
    import torch

    from deco_jax.export.torch_model import DeCo
except ImportError:
    torch = None


class Graphs:
    """A network's forward pass as CUDA graphs, one for each shape of its arguments. What it returns it writes again."""

    def __init__(self, forward: Callable[..., Any]):
        self.forward, self.captured = forward, {}

    def __call__(self, *arguments: Any) -> Any:
        """The network of these tensors."""
        key = tuple(x.shape for x in arguments)
        if key not in self.captured:
            fixed = [x.clone() for x in arguments]
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(3):  # compiles, and lets libraries make what they keep
                    self.forward(*fixed)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                out = self.forward(*fixed)
            self.captured[key] = graph, fixed, out
        graph, fixed, out = self.captured[key]
        for place, value in zip(fixed, arguments, strict=True):
            place.copy_(value)
        graph.replay()
        return out


class Network:
    """PyTorch's network, whose parts `use` replaces by compiled ones, and puts back."""

    def __init__(self, params: Any, dtype: str, how: str, device: str):
        tensors = {name: torch.tensor(value) for name, value in to_torch(names.DECO, params).items()}
        self.model = DeCo.from_state_dict(tensors).to(device, getattr(torch, dtype)).requires_grad_(False)
        self.parts: list[tuple[Any, Any]] = []
        if how == "whole":
            options = {"mode": "reduce-overhead"} if device == "cuda" else {}
            self.parts.append((self.model, torch.compile(self.model.forward, dynamic=False, **options)))
        elif how == "blocks":
            for module in (*self.model.blocks, self.model.dec_net):
                self.parts.append((module, torch.compile(module.forward, dynamic=False)))
            if device == "cuda":
                self.parts.append((self.model, Graphs(self.model.forward)))

    def use(self, compiled: bool) -> None:
        """From now on the network is compiled, or eager."""
        for module, forward in self.parts:
            if compiled:
                module.forward = forward
            else:
                module.__dict__.pop("forward", None)


def draw_ours(model: Any, params: Any, labels: list[int], noise: Any, settings: Sampling, times: int) -> Any:
    """The images of the last time."""
    for _ in range(times):
        images = deco_jax.sample(model, params, labels, noise=noise, settings=settings)
        images.block_until_ready()
    return images


def draw_theirs(network: Any, labels: list[int], noise: Any, settings: Sampling, times: int) -> Any:
    """Likewise."""
    for _ in range(times):
        images = network.model.sample(
            labels,
            noise=noise,
            steps=settings.steps,
            guidance=settings.guidance,
            guidance_interval=settings.guidance_interval,
        )
        if images.is_cuda:
            torch.cuda.synchronize()
    return images


def compile_all(
    cases: list[tuple[int, Sampling]], model: Any, params: Any, network: Any, size: int, together: bool
) -> None:
    """Draws something with each case's program, ours in threads: XLA tries out products for one at a time."""

    def first(case: tuple[int, Sampling]) -> None:
        batch, settings = case
        draw_ours(model, params, [0] * batch, jnp.zeros((batch, size, size, 3)), settings, 1)

    with concurrent.futures.ThreadPoolExecutor(len(cases) if together else 1) as pool:
        list(pool.map(first, cases))
    # Not beside each other: XLA captures CUDA graphs while it runs, and PyTorch cannot synchronise then.
    if network is not None:
        network.use(True)
        for batch, settings in dict(cases).items():
            few = dataclasses.replace(settings, steps=2)  # of which one is guided
            draw_theirs(network, [0] * batch, torch.zeros(batch, 3, size, size), few, 1)
        network.use(False)


def measure(
    args: argparse.Namespace, batch: int, settings: Sampling, model: Any, params: Any, network: Any, size: int
) -> list[Contender]:
    """Times one batch and number of steps."""
    rng = np.random.default_rng(batch)
    noise = rng.standard_normal((batch, size, size, 3), np.float32)
    labels = rng.integers(0, model.num_classes, batch).tolist()
    first: list[tuple[Contender, Callable[[], np.ndarray]]] = []
    draw = functools.partial(draw_ours, model, params, labels, jnp.asarray(noise), settings)
    first.append((Contender(OURS, draw), lambda: np.asarray(draw(1))))
    if network is not None:
        given = torch.tensor(np.moveaxis(noise, -1, 1).copy(), device=network.model.device)
        theirs = functools.partial(draw_theirs, network, labels, given, settings)
        for name, compiled in ((EAGER, False), (COMPILED, True))[: 1 if args.torch_compile == "none" else 2]:
            contender = Contender(name, theirs, before=functools.partial(network.use, compiled))
            first.append((contender, lambda: np.moveaxis(theirs(1).float().cpu().numpy(), 1, -1)))
    reference = None
    for contender, images in first:
        contender.before()
        began = time.perf_counter()
        drawn = speed.attempt(contender, images)
        seconds = time.perf_counter() - began
        if drawn is not None:
            reference = drawn if reference is None else reference
            error = float(np.linalg.norm(np.float64(drawn) - reference) / np.linalg.norm(np.float64(reference)))
            contender.details["images differ by"] = error
            text = f"{batch} images, {settings.steps} steps, {contender.name}: first in"
            print(f"{text} {seconds:.1f} s, images differ by {error:.1e}", flush=True)
    contenders = [contender for contender, _ in first]
    speed.take_turns(contenders, args.rounds, args.steps or 1, warm=0)
    return contenders


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    speed.add_arguments(parser, rounds=3)
    parser.add_argument("--cases", nargs="+", help="BATCHxSTEPS (default: 1x50 1x100 16x50 64x50; on a CPU 8x10)")
    parser.add_argument("--guided", choices=("config", "all"), default="config", help="which steps are guided")
    parser.add_argument("--steps", type=int, help="drawings in a turn (default: 1)")
    parser.add_argument("--set", action="append", default=[], metavar="PART.FIELD=VALUE", help="a setting of ours")
    args = speed.parse(parser)
    gpu = jax.default_backend() == "gpu"
    args.cases = args.cases or (["1x50", "1x100", "16x50", "64x50"] if gpu else ["8x10"])
    args.torch_compile = "blocks" if args.torch_compile == "both" else args.torch_compile
    config = speed.configuration(args.size, args.batch, args.dtype, args.set)
    model, size = build_model(config.model), config.data.image_size
    params = speed.random_params(parameter_shapes(model), 0)
    network = None
    if torch is not None and not args.no_torch:
        network = Network(params, config.model.dtype, args.torch_compile, "cuda" if gpu else "cpu")
    params = jax.device_put(params, jax.devices()[0])

    interval = (0.0, 1.0) if args.guided == "all" else config.sample.guidance_interval
    cases = []
    for case in args.cases:
        batch, steps = map(int, case.split("x"))
        cases.append((batch, Sampling(steps, "euler", config.sample.guidance, interval)))
    began = time.perf_counter()
    compile_all(cases, model, params, network, size, together=gpu)
    print(f"all compiled after {time.perf_counter() - began:.0f} s", flush=True)

    rows, lines, results = [], [], []
    for batch, settings in cases:
        steps = settings.steps
        contenders = measure(args, batch, settings, model, params, network, size)
        evaluations = steps + int(settings.guided_steps.sum())
        flops = batch * evaluations * forward_flops(model, size, size)
        for contender in contenders:
            contender.details |= {"batch": batch, "steps": steps, "flops": flops, "evaluations": evaluations}
            rows.append(_row(contender, batch, steps, flops))
            results.append(speed.figures(contender))
        value = speed.ratio(contenders[0], contenders[1:])
        if value:
            lines.append(f"{batch} images, {steps} steps: {OURS} ÷ the faster of PyTorch's: {value:.2f}")
    lines += best(results)
    header = ["", "images", "steps", "s per image", "images/s", "TFLOP/s", "MFU"]
    title = f"Sampling: {args.size}, {size}², {config.model.dtype}, guidance {config.sample.guidance} on {interval}"
    speed.report(args, f"{title}, {args.rounds} rounds", [speed.table(header, rows), *lines], results)


def best(results: list[dict[str, Any]]) -> list[str]:
    """Each contender's batch with the most images a second, for each number of steps that was tried with several."""
    lines = []
    for steps in sorted({r["steps"] for r in results}):
        rates: dict[str, dict[int, float]] = {}
        for r in results:
            if r["steps"] == steps and r["seconds"]:
                rates.setdefault(r["name"], {})[r["batch"]] = r["batch"] / speed.median(r["seconds"])
        if any(len(of_batch) > 1 for of_batch in rates.values()):
            found = (f"{name} {max(of.values()):.2f} (batch {max(of, key=of.get)})" for name, of in rates.items())
            lines.append(f"most images/s at {steps} steps: {', '.join(found)}")
    return lines


def _row(contender: Contender, batch: int, steps: int, flops: float) -> list[str]:
    seconds = [value / batch for value in contender.seconds]
    if contender.problem:
        return [contender.name, str(batch), str(steps), contender.problem, *["–"] * 3]
    rate = flops / speed.median(contender.seconds)
    mfu = speed.utilisation(rate)
    return [
        contender.name,
        str(batch),
        str(steps),
        speed.spread(seconds, digits=4),
        f"{1 / speed.median(seconds):.2f}",
        f"{rate / 1e12:.3g}",
        "–" if mfu is None else f"{mfu:.1%}",
    ]


if __name__ == "__main__":
    main()
