"""`deco plan`: would this run fit on that hardware, and how fast could it be? Answered without the hardware.

The run's real program is compiled on this CPU: for TPUs by libtpu, for GPUs by jax's CUDA plugin, for `cpu:8` as a
simulated mesh. See docs/plan.md for how each number is made.
"""

import dataclasses
import datetime
import functools
import math
import re
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from deco_jax.config import load_config
from deco_jax.encoders.teacher import default_teacher
from deco_jax.encoders.text import default_text_encoder, stored_text
from deco_jax.errors import UsageError
from deco_jax.models.deco import TextDeCo
from deco_jax.models.flops import forward_flops
from deco_jax.parallel import mesh as meshes
from deco_jax.parallel.hardware import GIB, Accelerator
from deco_jax.parallel.mesh import Layout
from deco_jax.planning import cost, hlo
from deco_jax.planning.topology import Topology, make_devices, parse_topology
from deco_jax.sampling.sample import compiled_sampler
from deco_jax.sampling.settings import Sampling
from deco_jax.training.start import abstract_state, check_devices
from deco_jax.training.state import TrainState
from deco_jax.training.step import TrainStep, is_matrix, jit_step, make_train_step, step_flops

Report = dict[str, Any]  # what --json prints

# Of the compiler. Products in Triton are tuned on the device, which is not here; without Triton cuBLAS does them.
OPTIONS = {"gpu": {"xla_gpu_enable_triton_gemm": False, "xla_gpu_autotune_level": "0"}}


def plan(
    path: str,
    overrides: Sequence[str],
    topology: str,
    *,
    preset: str | None = None,
    slices: int = 1,
    per_device_batch: int | None = None,
    sampler: bool = False,
    fit: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> Report:
    """Plans the run that `deco train` would start.

    Args:
      path, overrides: see `load_config`.
      topology, slices: see `parse_topology`.
      preset: replaces `mesh.preset`.
      per_device_batch: images per device that splits the batch; the configuration's global batch unless given.
      sampler: plan drawing images with the settings of `config.sample`, not the training step.
      fit: also look for the largest batch per device.
      say: told what is being done.

    Raises:
      UsageError: the configuration, the hardware or both together do not exist.
    """
    place = parse_topology(topology, slices)
    if per_device_batch is not None and per_device_batch < 1:
        raise UsageError(f"--per-device-batch={per_device_batch} must be 1 or more.")
    if fit and place.accelerator is None:
        raise UsageError(f"--fit needs hardware with a limit; --topology={topology} simulates devices without one.")
    config = load_config(path, [*overrides, *([f"--config.mesh.preset={preset}"] if preset else [])])
    if slices > 1:
        config.mesh.slices = slices
    devices = make_devices(place)
    layout = meshes.make_layout(config.mesh, devices)

    def analyse_batch(batch: int | None, config: ConfigDict = config, layout: Layout = layout) -> Report:
        if batch is not None:
            config.data.batch_size = batch * meshes.batch_devices(layout.mesh)
        program = Program(config, layout, place, sampler)
        say(f"{place.name}: {program.name} with preset {config.mesh.preset}, {program.per_device} images per device …")
        report = analyse(program)
        if report["fits"] is not None:
            used, available = (report["memory"][name] / GIB for name in ("used", "available"))
            say(f"  {'fits' if report['fits'] else 'does not fit'}: {used:.2f} of {available:.2f} GiB")
        return report

    report = analyse_batch(per_device_batch)
    if report["fits"] is False and (found := _fsdp_layout(config, layout, devices)):
        with_fsdp, other = found
        # Of which the state goes, and what is as large as the parameters: gradients, copies.
        parts = ("parameters", "ema", "optimizer", *report["frozen"], "parameters")
        used = report["memory"]["used"] - sum(report["memory"].get(part, 0.0) for part in parts)
        report["fsdp"] = {"fits": False, "used": used}
        if used < report["memory"]["available"]:
            tried = analyse_batch(report["per_device_batch"], with_fsdp, other)
            report["fsdp"] = {"fits": tried["fits"], "used": tried["memory"]["used"]}
    if fit:

        def measure(batch: int) -> tuple[float, float, bool]:
            at = report if batch == report["per_device_batch"] else analyse_batch(batch)
            return at["memory"]["used"], at["memory"]["available"], at["fits"]

        unit = 1 if sampler else config.optimizer.accumulation
        batch, step = largest_fit(measure, report["per_device_batch"], unit)
        report["fit"] = {"per_device_batch": batch, "step": step}
    return report


def _fsdp_layout(config: ConfigDict, layout: Layout, devices: Sequence[Any]) -> tuple[ConfigDict, Layout] | None:
    """(configuration, layout) with the preset fsdp, where that splits the state over more devices than `layout`."""
    config = config.copy_and_resolve_references()
    config.mesh.preset = "fsdp"
    try:
        other = meshes.make_layout(config.mesh, devices)
        check_devices(config, other.mesh)
    except UsageError:  # sizes that are set beside the preset do not go with this one
        return None
    return (config, other) if other.mesh.shape["fsdp"] > layout.mesh.shape["fsdp"] else None


class Program:
    """One program to plan: a training step or the sampler of a run, at one batch size."""

    def __init__(self, config: ConfigDict, layout: Layout, topology: Topology, sampler: bool):
        check_devices(config, layout.mesh)
        self.config, self.layout, self.topology, self.sampler = config, layout, topology, sampler
        self.name, self.settings = "sampler" if sampler else "train step", Sampling.from_config(config.sample)
        self.per_device = config.data.batch_size // meshes.batch_devices(layout.mesh)  # that splits the batch
        live = config.loss.alignment_weight and not config.teacher.stored and not sampler
        frozen = [default_teacher(config)] if live else []
        if config.model.kind == "deco_text" and not sampler:
            frozen.append(stored_text(config) if config.text.stored else default_text_encoder(config))
        self.train_step: TrainStep = make_train_step(config, frozen)

    @functools.cached_property
    def state(self) -> TrainState:
        """Shapes and shardings of the run's state."""
        return abstract_state(self.train_step, self.layout)

    @functools.cached_property
    def arguments(self) -> dict[str, Any]:
        """What the program is called with, by what it is: trees of shapes and shardings."""
        config, side, mesh = self.config, self.config.data.image_size, self.layout.mesh

        def batched(shape: Sequence[int], dtype: Any) -> jax.ShapeDtypeStruct:
            shape = (config.data.batch_size, *shape)
            return jax.ShapeDtypeStruct(shape, dtype, sharding=meshes.batch_sharding(mesh))

        condition = self.train_step.network.condition
        fields = {name: batched(field.shape, field.dtype) for name, field in condition.fields.items()}
        if self.sampler:
            one = jax.eval_shape(lambda: condition.example(1))
            wanted = jax.tree.map(lambda x: batched(x.shape[1:], x.dtype), one)
            keys = batched((), jax.random.key(0).dtype)
            whole = meshes.replicated(mesh)  # one null for all images
            null = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), one)
            return {"ema": self.state.ema, "batch": (batched((side, side, 3), jnp.float32), keys, wanted, null)}
        batch = {"image": batched((side, side, 3), jnp.uint8), **fields}
        if config.model.kind == "deco_text" and config.text.stored:
            del batch["tokens"]
            batch["text"] = batched((config.model.text_tokens, config.model.text_features), jnp.bfloat16)
        if config.loss.alignment_weight and "teacher" not in {frozen.name for frozen in self.train_step.frozen}:
            tokens = (side // config.model.patch_size) ** 2
            batch["features"] = batched((tokens, config.loss.alignment_features), jnp.float16)
        messages = jax.ShapeDtypeStruct(
            (mesh.size, 1 + self.per_device), jnp.int32, sharding=meshes.messages_sharding(mesh)
        )
        state = self.state
        parts = {"parameters": state.params, "ema": state.ema, "optimizer": state.opt_state, "batch": (batch, messages)}
        return parts | {frozen.name: frozen.abstract_params(self.layout) for frozen in self.train_step.frozen}

    def lower(self) -> Any:
        """The program as the run would call it, traced for the mesh."""
        arguments, state = self.arguments, self.state  # made before the mesh is set: nothing can run on its devices
        with meshes.use_mesh(self.layout):
            if self.sampler:
                run = compiled_sampler(self.train_step.network, self.settings)
                return run.lower(arguments["ema"], *arguments["batch"])
            frozen = {frozen.name: arguments[frozen.name] for frozen in self.train_step.frozen}
            return jit_step(self.train_step, state, self.layout).lower(state, *arguments["batch"], frozen)

    def flops(self) -> tuple[float, float]:
        """(model, executed) FLOPs per device: what the mathematics asks for, and with what remat does again."""
        network, side = self.train_step.network, self.config.data.image_size
        forward = forward_flops(network, side, side)
        images = self.config.data.batch_size / self.layout.mesh.size
        if self.sampler:
            return (images * forward * self.settings.evaluations,) * 2
        tokens, text = (side // network.patch_size) ** 2, {}
        attention = network.depth * 4 * tokens**2 * network.width
        if isinstance(network, TextDeCo):
            text = {"text_depth": 0}
            seen = network.depth * tokens * network.text_tokens + network.text_depth * network.text_tokens**2
            attention += 4 * seen * network.width
        blocks = forward - forward_flops(network.clone(depth=0, **text), side, side)
        # Of attention, dots does the product of queries and keys again; on GPUs all, as cuDNN runs forward once more.
        attention_again = attention if self.topology.platform == "gpu" else attention / 2
        again = {"none": 0.0, "dots": attention_again, "full": blocks}[network.remat]
        model = step_flops(self.train_step, side)
        return images * model, images * (model + again)


def analyse(program: Program) -> Report:
    """Everything `deco plan` prints about one program."""
    topology, config, mesh = program.topology, program.config, program.layout.mesh
    model, executed = program.flops()
    report = {
        "program": program.name,
        "topology": topology.name,
        "slices": topology.slices,
        "method": topology.compiler,
        "jax": jax.__version__,
        "date": datetime.date.today().isoformat(),
        "devices": mesh.size,
        "mesh": dict(mesh.shape),
        "parameters": sum(x.size for x in jax.tree.leaves(program.state.ema)),
        "image_size": config.data.image_size,
        "per_device_batch": program.per_device,
        "global_batch": config.data.batch_size,
        "remat": config.model.remat,
        "frozen": [network.name for network in program.train_step.frozen],
        "flops": {"model": model, "executed": executed},
    }
    known = {name: local_bytes(part) for name, part in program.arguments.items()}
    lowered, start = program.lower(), time.perf_counter()
    try:
        compiled = lowered.compile(OPTIONS.get(topology.platform))
    except jax.errors.JaxRuntimeError as error:
        used, available = memory_of_refusal(str(error))
        memory = known | {"temporaries": used - sum(known.values()), "used": used, "available": available}
        seconds = time.perf_counter() - start
        return report | {"compile_seconds": seconds, "fits": False, "memory": memory, "roofline": None}
    report["compile_seconds"] = time.perf_counter() - start
    accelerator = topology.accelerator
    memory = report["memory"] = known | _memory(compiled.memory_analysis(), sum(known.values()), topology)
    report["fits"] = memory["used"] <= memory["available"] if accelerator else None
    found = cost.read(compiled.as_text())
    if not program.sampler:
        check_gradients(found, program)
    report["hbm_bytes"] = found.hbm_bytes
    report["collectives"] = kinds = {}
    for c in found.collectives:
        sums = kinds.setdefault(c.kind, {"times": 0, "bytes": 0.0, "wire_bytes": 0.0})
        for name, value in (("times", c.times), ("bytes", c.times * c.bytes), ("wire_bytes", c.wire_bytes)):
            sums[name] += value
    largest = found.collectives[:6]
    report["largest_collectives"] = [dataclasses.asdict(c) | {"wire_bytes": c.wire_bytes} for c in largest]
    report["roofline"] = _roofline(accelerator, report) if accelerator else None
    return report


def _memory(stats: Any, known: float, topology: Topology) -> dict[str, float | None]:
    """What the compiler adds to the arguments' `known` bytes on a device."""
    arguments, program = stats.argument_size_in_bytes, stats.generated_code_size_in_bytes
    held = arguments + stats.output_size_in_bytes - stats.alias_size_in_bytes + stats.temp_size_in_bytes
    if topology.platform == "tpu":  # it is this that libtpu holds against the limit; the sum has some donated twice
        held = stats.peak_memory_in_bytes
    return {
        "padding": arguments - known,
        "temporaries": held - arguments,
        "program": program,
        "used": held + program,
        "available": topology.accelerator and topology.accelerator.hbm,
    }


def local_bytes(tree: Any) -> float:
    """What a device holds of a tree of shapes and shardings, without the padding of its layouts."""
    return float(sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)))


def check_gradients(found: cost.Cost, program: Program) -> None:
    """Raises TextError if less is sent than the gradients that a device must get from the others.

    Where the batch is split, a device sends at least once, in the dtype of `optimizer.gradient_dtype`, the size of the
    gradients that it keeps; those of parameters that are no matrices are few, and counted in the run's dtype: of tables
    in parts rows are sent.
    """
    config = program.config
    width = {True: jnp.dtype(config.optimizer.gradient_dtype).itemsize, False: jnp.dtype(config.model.dtype).itemsize}
    gradients = 0.0
    if meshes.batch_devices(program.layout.mesh) > 1:
        for path, leaf in jax.tree_util.tree_leaves_with_path(program.state.params):
            gradients += local_bytes(leaf) / leaf.dtype.itemsize * width[is_matrix(path)]
    sent = sum(c.wire_bytes for c in found.collectives)
    if sent < 0.9 * gradients:  # some are equal, and sent once
        raise hlo.TextError(
            f"the collectives found in the program's text send {sent:.3g} bytes, and the gradients alone have "
            f"{gradients:.3g}: {program.topology.compiler} writes some in a form that is not read yet."
        )


def memory_of_refusal(message: str) -> tuple[float, float]:
    """(needed, available) of libtpu's RESOURCE_EXHAUSTED; any other error of the compiler is raised again."""
    size = r"([\d.]+)([KMGT])"
    forms = rf"\({size}\) exceeds available HBM \({size}\)", rf"Used {size} of {size} hbm"
    found = next((found for form in forms if (found := re.search(form, message))), None)
    if not found:
        raise RuntimeError(f"The compiler gave up: {message}")
    units = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    return float(found[1]) * units[found[2]], float(found[3]) * units[found[4]]


def _roofline(accelerator: Accelerator, report: Report) -> Report:
    """The time below which no program can do this work on this hardware, and why."""
    # What is sent between slices takes another network.
    sent = {kind: sums["wire_bytes"] for kind, sums in report["collectives"].items() if kind != "send"}
    seconds = {
        "compute": report["flops"]["executed"] / accelerator.flops,
        "memory": report["hbm_bytes"] / accelerator.hbm_bandwidth,
        "network": sum(sent.values()) / accelerator.network,
    }
    bound = max(seconds, key=seconds.get)
    images = report["global_batch"] / report["devices"] * accelerator.devices_per_chip
    return {"seconds": seconds, "bound": bound, "images_per_second_a_chip": images / seconds[bound]}


def largest_fit(measure: Callable[[int], tuple[float, float, bool]], start: int, unit: int) -> tuple[int, int]:
    """(largest batch that fits, step): it fits, and a batch larger by `step` does not; 0 if not even `unit` fits.

    Args:
      measure: batch → (bytes used, bytes available, whether it fits); every call may take minutes.
      start: a batch to begin with, a multiple of unit.
      unit: batches are multiples of it.
    """
    measure = functools.cache(measure)
    (used, available, _), (used_twice, _, _) = measure(start), measure(2 * start)
    slope = max((used_twice - used) / start, 1.0)
    guess = max(start + (available - used) / slope, unit)
    step = max(2 ** int(math.log2(guess / unit / 8)) if guess > 8 * unit else 1, 1) * unit
    best = max(int(guess // step) * step, step)
    while best > 0 and not measure(best)[2]:
        best -= step
    while best > 0 and measure(best + step)[2]:
        best += step
    return best, step
