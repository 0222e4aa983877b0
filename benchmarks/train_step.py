"""How fast is a training step beside the project's own PyTorch DeCo, and do both compute the same?

python benchmarks/train_step.py                on a GPU: XL-256 with REPA from a DINOv2-B in the step, bf16, batch 64;
                                               on a CPU: 21.7 M parameters, 32², fp32, batch 32
python benchmarks/train_step.py --size l --batch 32 --no-teacher
python benchmarks/train_step.py --set model.remat=full --variant model.scan=False --variant model.remat=none
python benchmarks/train_step.py --json FILE    all figures

Ours is the program that `deco train` runs (state donated), with weights that are random everywhere. Each --variant is
one contender more: ours with other settings. PyTorch's side has the same weights, batch, losses and dtype (see
speed_torch.py); "compiled" is torch.compile of the loss, whole or by repeated blocks. They take turns, see speed.py.

Before that, the loss and the gradient's norm of the first step are compared: same weights, images, times, noise and
dropped labels. In fp32 both must agree to 1e-5 (on a CPU), in bf16 to 1e-2.

MFU counts the products that the mathematics asks for (models/flops.py, the teacher's included), recomputed ones not.
"Peak memory" is what the compiler reports of our program with its arguments, and what PyTorch's allocator counted, its
parameters and optimiser included; the eager and the compiled contender share those.
"""

import argparse
import concurrent.futures
import functools
import math
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import speed
from flax import linen as nn
from ml_collections import ConfigDict
from speed import COMPILED, EAGER, OURS, Contender

from deco_jax.diffusion.flow import example_keys
from deco_jax.encoders.frozen import FrozenWeights
from deco_jax.parallel import mesh as meshes
from deco_jax.training.step import jit_step, make_train_step, step_flops

try:
    import speed_torch
    import torch
except ImportError:
    speed_torch = None

AGREE = {"float32": 1e-5, "bfloat16": 1e-2}  # relative, of losses and gradients' norms


class Run:
    """What all of ours share: a state, a batch, the teacher's weights."""

    def __init__(self, config: ConfigDict, with_teacher: bool):
        self.config = config
        self.layout = meshes.make_layout(config.mesh, jax.devices()[:1])
        self.frozen: tuple[FrozenWeights, ...] = ()
        if with_teacher:
            network = speed.random_teacher(config)
            boxed = jax.eval_shape(network.module.init, jax.random.key(0), network.example)["params"]
            self.frozen = (FrozenWeights.of(network, speed.random_params(boxed, 1)),)
        self.train_step = make_train_step(config, [weights.network for weights in self.frozen])
        boxed = jax.eval_shape(self.train_step.initial_state)
        shardings = meshes.state_shardings(boxed, self.layout)
        self.abstract = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), nn.meta.unbox(boxed), shardings
        )
        self.start = speed.random_params(boxed.params, 2)
        zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), self.abstract)
        state = zeros.replace(params=self.start, ema=self.start["network"])
        # may_alias: on a CPU, the state would otherwise be the very arrays that PyTorch gets.
        self.first_state = functools.partial(jax.device_put, state, shardings, may_alias=False)
        self.state = self.first_state()
        self.frozen_params = {weights.network.name: weights.place(self.layout) for weights in self.frozen}

        rng, number, size = np.random.default_rng(0), config.data.batch_size, config.data.image_size
        self.images = rng.integers(0, 256, (number, size, size, 3), np.uint8)
        self.labels = rng.integers(0, config.model.num_classes, number).astype(np.int32)
        mesh = self.layout.mesh
        rows = meshes.host_rows(mesh, number)
        self.batch = meshes.place_batch({"image": self.images, "label": self.labels}, mesh, rows, number)
        self.messages = meshes.place_messages(0, np.full(number, -1), mesh, rows, number)

    def compile(self, contender: Contender, config: ConfigDict) -> Any:
        """The program with these settings; all variants can go on with one another's state."""
        teacher = [speed.random_teacher(config)] if self.frozen else []
        step = make_train_step(config, teacher)
        with meshes.use_mesh(self.layout):
            began = time.perf_counter()
            program = jit_step(step, self.abstract, self.layout)
            shapes = self.abstract, self.batch, self.messages, self.frozen_params
            compiled = program.lower(*shapes).compile()
        contender.compile_seconds = time.perf_counter() - began
        memory = compiled.memory_analysis()
        if memory is not None:
            used = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
            contender.memory = used - memory.alias_size_in_bytes
            contender.details["temporaries"] = memory.temp_size_in_bytes
        return compiled

    def run(self, program: Any, steps: int) -> dict[str, float]:
        """So many steps; what the last one measured."""
        if self.state.step.is_deleted():  # a variant's memory did not suffice, and the state was already its own
            self.state = self.first_state()
        for _ in range(steps):
            self.state, metrics, _ = program(self.state, self.batch, self.messages, self.frozen_params)
        jax.block_until_ready(self.state)
        return jax.device_get(metrics)

    def first_draws(self) -> tuple[np.ndarray, ...]:
        """Of step 0: labels after some are dropped, times, noise."""
        keys_B = example_keys(jax.random.key(self.config.seed), jnp.int32(0), len(self.labels))
        draws = jax.jit(self.train_step.draw, static_argnums=1)(keys_B, self.images.shape[1:])
        labels = self.train_step.network.condition.drop({"label": jnp.asarray(self.labels)}, draws.drop_B)["label"]
        return tuple(map(np.asarray, (labels, draws.t_B, draws.noise_BxHxWx3)))


class Ours:
    """Our contenders: the default one, and each variant."""

    def __init__(self, run: Run, args: argparse.Namespace):
        self.run, self.pool = run, concurrent.futures.ThreadPoolExecutor(1)
        self.contenders, self.configs, self.compiling = [], [], []
        for changes in ["", *args.variant]:
            changed = [*args.set, *filter(None, changes.split(","))]
            self.configs.append(speed.configuration(args.size, args.batch, args.dtype, changed))
            self.contenders.append(Contender(f"{OURS} {changes}".strip(), lambda steps: None))

    def start(self) -> None:
        """Compiles, in a thread of its own; only once, however often it is called."""
        if not self.compiling:
            for contender, config in zip(self.contenders, self.configs, strict=True):
                compiles = functools.partial(self.run.compile, contender, config)
                self.compiling.append(self.pool.submit(speed.attempt, contender, compiles))

    def finish(self) -> dict[str, float] | None:
        """Waits for that, and makes the first step: what it measured."""
        self.start()
        first = None
        for contender, compiling in zip(self.contenders, self.compiling, strict=True):
            program = compiling.result()
            if program is None:
                continue
            contender.run = functools.partial(self.run.run, program)
            found = speed.attempt(contender, functools.partial(contender.run, 1))
            first = first or found
            print(f"{contender.name}: compiled in {contender.compile_seconds:.0f} s", flush=True)
        self.pool.shutdown()
        return first


def theirs(
    run: Run, args: argparse.Namespace, before_compiling: Callable[[], Any]
) -> tuple[list[Contender], dict[str, dict[str, float]]]:
    """PyTorch's contenders, compiled; and each one's loss and gradient norm at the start.

    `before_compiling` is called when the device has little to do for a while.
    """
    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    torch.manual_seed(0)
    teacher = (run.frozen[0].network.module, run.frozen[0].params) if run.frozen else None
    training = speed_torch.Training(run.config, run.start, teacher, device)
    images = torch.tensor(run.images).permute(0, 3, 1, 2).contiguous().to(device)
    labels = torch.tensor(run.labels, dtype=torch.int64, device=device)
    dropped, t, noise = (torch.tensor(x) for x in run.first_draws())
    first = dropped.long().to(device), t.to(device), noise.permute(0, 3, 1, 2).contiguous().to(device)

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    def start_turn(switch: Any) -> None:
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        switch()

    def end_turn(switch: Any) -> None:
        switch()
        training.optimizer.zero_grad(set_to_none=True)
        if device == "cuda":
            torch.cuda.empty_cache()

    def steps(loss: Any, number: int) -> None:
        for _ in range(number):
            training.step(loss, images, labels)
        wait()

    def at_the_start(loss: Any) -> dict[str, float]:
        value = loss(images, *first)
        value.backward()
        norm = torch.linalg.vector_norm(torch.stack([p.grad.norm() for p in training.parameters]))
        wait()
        training.optimizer.zero_grad(set_to_none=True)
        return {"loss": value.item(), "gradient_norm": norm.item()}

    contenders, starts = [], {}
    modes = {EAGER: None}
    if args.torch_compile != "none":
        whole = [False] if args.torch_compile in ("whole", "both") else []
        blocks = [True] if args.torch_compile in ("blocks", "both") else []
        modes |= {f"{COMPILED}, {'by blocks' if by else 'whole'}": by for by in whole + blocks}
    for name, by_blocks in modes.items():
        if by_blocks is not None:
            before_compiling()
        part = speed_torch.Compiled(training, by_blocks) if by_blocks is not None else None
        loss = training.loss if part is None else part.loss
        contender = Contender(
            name,
            functools.partial(steps, loss),
            before=functools.partial(start_turn, part.on if part else _nothing),
            after=functools.partial(end_turn, part.off if part else _nothing),
            peak=(lambda: float(torch.cuda.max_memory_allocated())) if device == "cuda" else (lambda: None),
        )
        contender.before()
        began = time.perf_counter()
        found = speed.attempt(contender, functools.partial(at_the_start, loss))
        if found is not None:
            contender.compile_seconds = time.perf_counter() - began if part else None
            starts[name] = found
        contender.after()
        contenders.append(contender)
        print(f"{name}: first step after {time.perf_counter() - began:.0f} s", flush=True)
    return contenders, starts


def _nothing() -> None:
    pass


def compare(
    mine: dict[str, float], starts: dict[str, dict[str, float]], dtype: str
) -> tuple[list[str], dict[str, Any]]:
    """How far each contender's loss and gradient norm at the start are from ours: lines, and the same as figures."""
    lines = [f"first step, {OURS}: loss {mine['loss']:.6f}, gradient norm {mine['gradient_norm']:.6f}"]
    errors: dict[str, Any] = {}
    for name, found in starts.items():
        errors[name] = {key: abs(value / mine[key] - 1) for key, value in found.items()}
        lines.append(f"{name}: " + ", ".join(f"{key} off by {value:.1e}" for key, value in errors[name].items()))
        worst = max(errors[name].values())
        if math.isnan(worst) or worst > AGREE[dtype]:
            lines.append(f"THEY DO NOT COMPUTE THE SAME: {worst:.1e} is more than {AGREE[dtype]:.0e}.")
    return lines, errors


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    speed.add_arguments(parser)
    parser.add_argument("--steps", type=int, help="timed in a turn (default: 10 on a GPU, 2 on a CPU)")
    parser.add_argument(
        "--teacher", action=argparse.BooleanOptionalAction, help="DINOv2 in the step (default: as the size's run)"
    )
    parser.add_argument("--set", action="append", default=[], metavar="PART.FIELD=VALUE", help="a setting of ours")
    parser.add_argument(
        "--variant",
        action="append",
        default=[],
        metavar="SETTINGS",
        help="ours once more, with these settings (commas between them)",
    )
    parser.add_argument("--apart", action="store_true", help="compile one contender after the other, on a GPU as well")
    args = speed.parse(parser)
    args.steps = args.steps or (10 if jax.default_backend() == "gpu" else 2)
    if args.teacher is False:
        args.set.append("loss.alignment_weight=0.0")
    return args


def main() -> None:
    args = parse()
    config = speed.configuration(args.size, args.batch, args.dtype, args.set)
    if args.teacher and not config.loss.alignment_weight:
        sys.exit(f"--size {args.size} has no teacher: its patches are of {config.model.patch_size} pixels, not 16.")
    if speed_torch is None and not args.no_torch:
        print("torch is not installed: only ours is timed.", flush=True)
    run = Run(config, bool(config.loss.alignment_weight))

    # A GPU's machine has cores enough for both sides to compile at once, and little runs on the GPU then, where XLA
    # tries out which products are fastest; on a CPU, and with --apart, one compiles after the other.
    together = jax.default_backend() == "gpu" and not args.apart
    ours, others, starts = Ours(run, args), [], {}
    if not together:
        mine = ours.finish()
    if speed_torch is not None and not args.no_torch:
        others, starts = theirs(run, args, ours.start)
    if together:
        mine = ours.finish()
    agreement, errors = compare(mine, starts, config.model.dtype) if mine else ([], {})
    print("\n".join(agreement), flush=True)
    speed.take_turns([*ours.contenders, *others], args.rounds, args.steps)

    lines, results = report(ours.contenders, others, args.batch, step_flops(run.train_step, config.data.image_size))
    results["start"] = {"ours": mine, "theirs": starts, "errors": errors}
    size = f"{config.model.width} wide, {config.model.depth} deep, {config.data.image_size}², {config.model.dtype}"
    title = f"Training step: {args.size} ({size}), batch {args.batch}, {'with' if run.frozen else 'without'} a teacher"
    speed.report(args, f"{title}, {args.rounds} rounds of {args.steps}", [*agreement, "", *lines], results)


def report(own: list[Contender], others: list[Contender], batch: int, flops: float) -> tuple[list[str], dict[str, Any]]:
    """The table and the figures; `flops` of one image's step."""
    rows = []
    for contender in [*own, *others]:
        if contender.seconds:
            contender.details["images_per_second"] = batch / speed.median(contender.seconds)
            contender.details["mfu"] = speed.utilisation(flops * contender.details["images_per_second"])
        rows.append(_row(contender, batch, flops))
    header = ["", "images/s", "ms/step", "MFU", "TFLOP/s", "peak memory", "compile"]
    ratios = {contender.name: speed.ratio(contender, others) for contender in own}
    lines = [speed.table(header, rows)]
    lines += [f"{name} ÷ the faster of PyTorch's: {value:.2f}" for name, value in ratios.items() if value]
    peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    if peak:
        lines.append(f"JAX's allocator counted {peak / 1e9:.2f} GB at most, compilation included")
    contenders = [speed.figures(contender) for contender in [*own, *others]]
    return lines, {"contenders": contenders, "ratios": ratios, "flops_per_image": flops, "our_peak_bytes": peak}


def _row(contender: Contender, batch: int, flops: float) -> list[str]:
    if contender.problem:
        return [contender.name, contender.problem, *["–"] * 5]
    rates = [batch / seconds for seconds in contender.seconds]
    mfu = contender.details["mfu"]
    return [
        contender.name,
        speed.spread(rates),
        speed.spread(contender.seconds, 1e3),
        "–" if mfu is None else f"{mfu:.1%}",
        f"{flops * contender.details['images_per_second'] / 1e12:.3g}",
        "–" if contender.memory is None else f"{contender.memory / 1e9:.2f} GB",
        "–" if contender.compile_seconds is None else f"{contender.compile_seconds:.0f} s",
    ]


if __name__ == "__main__":
    main()
