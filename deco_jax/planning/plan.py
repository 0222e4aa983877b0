"""`deco plan`: would this run fit on that hardware, and how fast could it be? Answered without the hardware.

For a TPU topology the run's real program is compiled by libtpu on this CPU; `cpu:8` is a simulated mesh; for GPUs
there is an estimate. See docs/plan.md for how each number is made.
"""

import dataclasses
import datetime
import functools
import importlib.metadata
import math
import re
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from deco_jax.config import load_config
from deco_jax.diffusion.flow import Draws
from deco_jax.encoders.teacher import abstract_params, default_teacher
from deco_jax.errors import UsageError
from deco_jax.models.flops import forward_flops
from deco_jax.parallel import mesh as meshes
from deco_jax.parallel.hardware import GIB, Accelerator
from deco_jax.planning import hlo
from deco_jax.planning.topology import Topology, make_devices, parse_topology
from deco_jax.sampling.sample import compiled_sampler
from deco_jax.sampling.solvers import guided_steps, time_grid
from deco_jax.training.start import abstract_state, check_devices
from deco_jax.training.state import TrainState
from deco_jax.training.step import Trainer, jit_step, make_trainer, step_flops

Report = dict[str, Any]  # what --json prints


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
      per_device_batch: images a device that splits the batch; the configuration's global batch unless given.
      sampler: plan drawing images with the settings of `config.sample`, not the training step.
      fit: also look for the largest batch a device.
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
    mesh = meshes.make_mesh(config.mesh, devices)
    if place.is_gpu:
        config.model.attention = "default"  # nothing is compiled; cuDNN's needs a GPU to be traced

    def analyse_batch(batch: int | None) -> Report:
        if batch is not None:
            config.data.batch_size = batch * meshes.batch_devices(mesh)
        check_devices(config, mesh)
        teacher = default_teacher(config) if config.loss.alignment_weight and not config.teacher.stored else None
        program = Program(config, make_trainer(config, teacher), mesh, place, sampler)
        say(f"{place.name}: {program.name} at {program.per_device} images a device …")
        report = analyse(program)
        used, available = (report["memory"][name] for name in ("used", "available"))
        if available:
            verdict = "fits" if report["fits"] else "does not fit"
            say(f"  {verdict}: {used / GIB:.2f} of {available / GIB:.2f} GiB")
        return report

    report = analyse_batch(per_device_batch)
    if fit:

        def measure(batch: int) -> tuple[float, float, bool]:
            at = report if batch == report["per_device_batch"] else analyse_batch(batch)
            return at["memory"]["used"], at["memory"]["available"], at["fits"]

        unit = 1 if sampler else config.optimizer.accumulation
        batch, step = largest_fit(measure, report["per_device_batch"], unit)
        report["fit"] = {"per_device_batch": batch, "step": step}
    return report


@dataclasses.dataclass
class Program:
    """One program to plan: a training step or the sampler of a run, at one batch size."""

    config: ConfigDict
    trainer: Trainer
    mesh: Mesh
    topology: Topology
    sampler: bool

    @property
    def name(self) -> str:
        """What it is."""
        return "sampler" if self.sampler else "train step"

    @property
    def per_device(self) -> int:
        """Images a device that splits the batch."""
        return self.config.data.batch_size // meshes.batch_devices(self.mesh)

    @functools.cached_property
    def state(self) -> TrainState:
        """Shapes and shardings of the run's state."""
        return abstract_state(self.trainer, self.mesh)

    @functools.cached_property
    def batch(self) -> tuple[Any, ...]:
        """Shapes and shardings of the program's other arguments."""
        config, side = self.config, self.config.data.image_size

        def batched(*shape: int, dtype: Any) -> jax.ShapeDtypeStruct:
            shape = (config.data.batch_size, *shape)
            return jax.ShapeDtypeStruct(shape, dtype, sharding=meshes.batch_sharding(self.mesh))

        if self.sampler:
            return batched(side, side, 3, dtype=jnp.float32), batched(dtype=jnp.int32)
        batch = {"image": batched(side, side, 3, dtype=jnp.uint8), "label": batched(dtype=jnp.int32)}
        if config.loss.alignment_weight and self.trainer.teacher is None:
            tokens = (side // config.model.patch_size) ** 2
            batch["features"] = batched(tokens, config.loss.alignment_features, dtype=jnp.float16)
        notes = (self.mesh.size, 1 + self.per_device)
        return batch, jax.ShapeDtypeStruct(notes, jnp.int32, sharding=meshes.notes_sharding(self.mesh))

    @functools.cached_property
    def teacher(self) -> Any:
        """Shapes and shardings of the teacher's parameters; None if it does not take part."""
        teacher = self.trainer.teacher
        return None if self.sampler or teacher is None else abstract_params(teacher, self.mesh)

    def memory(self) -> dict[str, float]:
        """Bytes of the program's arguments on a device."""
        parts = {"ema": self.state.ema, "batch": self.batch}
        if not self.sampler:
            parts |= {"parameters": self.state.params, "optimizer": self.state.opt_state}
        if self.teacher is not None:
            parts["teacher"] = self.teacher
        return {
            name: float(
                sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(part))
            )
            for name, part in parts.items()
        }

    def lower(self) -> Any:
        """The program as the run would call it, traced for the mesh."""
        state, batch = self.state, self.batch
        with meshes.use_mesh(self.mesh):
            if not self.sampler:
                return jit_step(self.trainer, state, self.mesh).lower(state, *batch, self.teacher)
            c = self.config.sample
            run = compiled_sampler(
                self.trainer.network, c.steps, float(c.guidance), tuple(c.guidance_interval), float(c.shift), c.solver
            )
            return run.lower(state.ema, *batch)

    def flops(self) -> tuple[float, float]:
        """(model, executed) FLOPs a device: what the mathematics asks for, and with what remat does again."""
        config, network = self.config, self.trainer.network
        side = config.data.image_size
        forward = forward_flops(network, side, side)
        images = config.data.batch_size / self.mesh.size
        if self.sampler:
            c = config.sample
            guided = guided_steps(time_grid(c.steps, c.shift), c.guidance, c.guidance_interval)
            return (images * forward * (len(guided) + int(guided.sum())),) * 2
        blocks = forward - forward_flops(network.clone(depth=0), side, side)
        attention = network.depth * 4 * (side // network.patch_size) ** 4 * network.width
        again = {"none": 0.0, "dots": attention, "full": blocks}[network.remat]
        model = step_flops(self.trainer, side)
        return images * model, images * (model + again)


def analyse(program: Program) -> Report:
    """Everything `deco plan` prints about one program."""
    topology, config = program.topology, program.config
    if topology.is_gpu:
        report, method = _estimate(program), "estimate, not compiled"
    else:
        report = _compile(program)
        method = "libtpu " + importlib.metadata.version("libtpu") if topology.is_tpu else "XLA for CPUs"
    model, executed = program.flops()
    mesh = program.mesh
    return {
        "program": program.name,
        "topology": topology.name,
        "slices": topology.slices,
        "method": method,
        "jax": jax.__version__,
        "date": datetime.date.today().isoformat(),
        "devices": mesh.size,
        "mesh": dict(mesh.shape),
        "parameters": sum(x.size for x in jax.tree.leaves(program.state.ema)),
        "image_size": config.data.image_size,
        "per_device_batch": program.per_device,
        "global_batch": config.data.batch_size,
        "remat": config.model.remat,
        "flops": {"model": model, "executed": executed},
        **report,
        "roofline": _roofline(topology.accelerator, executed, report, config.data.batch_size / mesh.size),
    }


def _compile(program: Program) -> Report:
    accelerator = program.topology.accelerator
    memory = program.memory()
    lowered, start = program.lower(), time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        used, available = _memory_of_error(str(error))
        memory |= {"temporaries": used - sum(memory.values()), "used": used, "available": available}
        return {"compile_seconds": time.perf_counter() - start, "fits": False, "memory": memory}
    seconds, stats = time.perf_counter() - start, compiled.memory_analysis()
    # The peak holds arguments, results and temporaries; the results of a step are its donated arguments.
    memory["program"] = float(stats.generated_code_size_in_bytes)
    used = stats.peak_memory_in_bytes + memory["program"]
    memory = memory | {"temporaries": used - sum(memory.values()), "used": used}
    memory["available"] = accelerator.hbm if accelerator else None
    cost = hlo.read(compiled.as_text())
    kinds: dict[str, Report] = {}
    places: dict[tuple[str, ...], Report] = {}  # the same thing done for the same reason, together
    for c in cost.collectives:
        kind = kinds.setdefault(c.kind, {"times": 0, "bytes": 0.0, "wire_bytes": 0.0})
        which = {"kind": c.kind, "shape": c.shape, "group": c.group, "op_name": c.op_name}
        place = places.setdefault(tuple(which.values()), which | {"name": c.name, "times": 0, "wire_bytes": 0.0})
        for sums in (kind, place):
            sums["times"] += c.times
            sums["wire_bytes"] += c.wire_bytes
        kind["bytes"] += c.times * c.bytes
    return {
        "compile_seconds": seconds,
        "fits": used <= accelerator.hbm if accelerator else None,
        "memory": memory,
        "hbm_bytes": cost.hbm_bytes,
        "collectives": kinds,
        "largest_collectives": sorted(places.values(), key=lambda place: -place["wire_bytes"])[:12],
        "buffers": [dataclasses.asdict(buffer) for buffer in cost.buffers[:8]],
        "unknown_loops": cost.unknown_loops,
    }


def _memory_of_error(message: str) -> tuple[float, float]:
    """(needed, available) of libtpu's RESOURCE_EXHAUSTED; any other error of the compiler is raised again."""
    size = r"([\d.]+)([KMGT])"
    found = re.search(rf"\({size}\) exceeds available HBM \({size}\)", message) or re.search(
        rf"Used {size} of {size} hbm", message
    )
    if not found:
        raise RuntimeError(f"The compiler gave up: {message}")
    units = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    return float(found[1]) * units[found[2]], float(found[3]) * units[found[4]]


def _estimate(program: Program) -> Report:
    """Of a training step, from shapes alone: for hardware whose compiler is not here."""
    config, trainer, mesh = program.config, program.trainer, program.mesh
    if program.sampler:
        raise UsageError(f"--sample cannot be estimated for {program.topology.name}; TPU topologies and cpu:N can.")
    accelerator = program.topology.accelerator
    memory = program.memory()
    images = program.per_device / config.optimizer.accumulation
    block = dataclasses.replace(trainer, network=trainer.network.clone(depth=1, remat="none"))
    two_blocks = dataclasses.replace(trainer, network=trainer.network.clone(depth=2, remat="none"))
    saved = images * _saved_bytes(trainer, mesh)
    memory["activations"] = saved
    if config.model.remat != "none":  # the block whose backward pass is running has all of its activations
        memory["activations"] += images * (_saved_bytes(two_blocks, mesh) - _saved_bytes(block, mesh))
    memory["gradients"] = memory["parameters"]
    used = sum(memory.values())
    # Parameters are read twice, gradients written and read, activations too; state is read and written by the update.
    state = memory["parameters"] + memory["ema"] + memory["optimizer"]
    parts = config.optimizer.accumulation  # each reads the parameters and adds to the gradients
    traffic = parts * (2 * memory["parameters"] + 2 * memory["gradients"] + 2 * saved) + 2 * state
    traffic += parts * memory.get("teacher", 0.0)
    width = jnp.dtype(config.model.dtype).itemsize
    whole = sum(x.size for x in jax.tree.leaves(program.state.params)) * width
    fsdp, data = mesh.shape["fsdp"], mesh.shape["data"]
    kinds = {}
    if fsdp > 1:
        part = whole * (fsdp - 1) / fsdp
        teacher = memory.get("teacher", 0.0) * fsdp
        gathered = 2 * whole + teacher
        kinds["all-gather"] = {
            "times": (2 + bool(teacher)) * parts,
            "bytes": parts * gathered,
            "wire_bytes": parts * gathered * (fsdp - 1) / fsdp,
        }
        kinds["reduce-scatter"] = {"times": parts, "bytes": parts * whole, "wire_bytes": parts * part}
    if data > 1:
        kinds["all-reduce"] = {"times": 1, "bytes": whole / fsdp, "wire_bytes": 2 * whole / fsdp * (data - 1) / data}
    memory |= {"used": used, "available": accelerator.hbm}
    return {"fits": used <= accelerator.hbm, "memory": memory, "hbm_bytes": traffic, "collectives": kinds}


def _saved_bytes(trainer: Trainer, mesh: Mesh) -> float:
    """Bytes an image that the forward pass keeps for the backward pass."""
    config = trainer.config
    side, tokens = config.data.image_size, (config.data.image_size // config.model.patch_size) ** 2
    params = abstract_state(trainer, mesh).params

    def backward(params: Any, *inputs: Any) -> Any:
        return jax.vjp(lambda params: trainer.loss(params, *inputs), params, has_aux=True)[1]

    def saved(images: int) -> float:
        def shape(*dims: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((images, *dims), dtype)

        image = shape(side, side, 3)
        draws = Draws(shape(), image, shape(dtype=jnp.bool_))
        features = shape(tokens, config.loss.alignment_features) if config.loss.alignment_weight else None
        residuals = jax.eval_shape(backward, params, image, shape(dtype=jnp.int32), draws, features)
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(residuals))

    return saved(2) - saved(1)  # what does not grow with the batch are parameters and constants


def _roofline(accelerator: Accelerator | None, flops: float, report: Report, images: float) -> Report | None:
    """The time below which no program can do this work on this hardware, and why; `images` a device."""
    if accelerator is None or "hbm_bytes" not in report:
        return None
    wire = sum(kind["wire_bytes"] for kind in report["collectives"].values())
    seconds = {
        "compute": flops / accelerator.flops,
        "memory": report["hbm_bytes"] / accelerator.hbm_bandwidth,
        "network": wire / accelerator.network,
    }
    bound = max(seconds, key=seconds.get)
    chip = accelerator.devices_a_chip
    return {
        "seconds": seconds,
        "bound": bound,
        "images_per_second_a_chip": chip * images / seconds[bound],
    }


def largest_fit(measure: Callable[[int], tuple[float, float, bool]], start: int, unit: int) -> tuple[int, int]:
    """(largest batch that fits, step): it fits, and a batch larger by `step` does not; 0 if not even `unit` fits.

    Args:
      measure: batch → (bytes used, bytes available, whether it fits); every call may take minutes.
      start: a batch to begin with, a multiple of unit.
      unit: batches are multiples of it.
    """
    known: dict[int, tuple[float, float, bool]] = {}

    def fits(batch: int) -> bool:
        if batch not in known:
            known[batch] = measure(batch)
        return known[batch][2]

    fits(start), fits(2 * start)
    slope = max((known[2 * start][0] - known[start][0]) / start, 1.0)
    guess = max(start + (known[start][1] - known[start][0]) / slope, unit)
    step = max(2 ** int(math.log2(guess / unit / 8)) if guess > 8 * unit else 1, 1) * unit
    best = max(int(guess // step) * step, step)
    while best > 0 and not fits(best):
        best -= step
    while best > 0 and fits(best + step):
        best += step
    return best, step
