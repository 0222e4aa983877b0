"""The state a run starts from: its shapes and shardings, and its first values."""

import math
import pathlib

import jax
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh
from ml_collections import ConfigDict

from deco_jax.checkpoints import store as checkpoint
from deco_jax.config import default_config
from deco_jax.errors import UsageError
from deco_jax.models.build import KINDS
from deco_jax.parallel import mesh as meshes
from deco_jax.training.state import TrainState, init_state
from deco_jax.training.step import Trainer, make_trainer


def check_devices(config: ConfigDict, mesh: Mesh) -> None:
    """Raises UsageError if a run of `config` cannot be laid out over `mesh`."""
    batch, parts, devices = config.data.batch_size, config.optimizer.accumulation, meshes.batch_devices(mesh)
    unit = parts * devices
    if batch % unit:
        raise UsageError(
            f"data.batch_size={batch} is not divisible by {devices} devices × optimizer.accumulation={parts}; "
            f"nearest: {max(batch // unit, 1) * unit} and {(batch // unit + 1) * unit}."
        )
    width, heads, fsdp, tensor = config.model.width, config.model.heads, mesh.shape["fsdp"], mesh.shape["tensor"]
    if width % fsdp:
        fits = max(n for n in range(1, fsdp) if fsdp % n == 0 and width % n == 0)
        raise UsageError(
            f"mesh.fsdp={fsdp} does not divide model.width={width}, so nothing would be split; "
            f"mesh.fsdp={fits} with mesh.data=-1 fits."
        )
    if heads % tensor:
        raise UsageError(f"mesh.tensor={tensor} must divide model.heads={heads}.")
    if config.model.attention == "cudnn" and jax.default_backend() != "gpu":
        raise UsageError("model.attention='cudnn' needs an NVIDIA GPU; 'default' runs everywhere.")


def _initialise(trainer: Trainer, image_size: int):
    """The function that makes a fresh state from the run's seed, still with logical axis names."""
    return lambda: init_state(
        jax.random.fold_in(jax.random.key(trainer.config.seed), 2**31 - 1),  # no step draws from this key
        trainer.network,
        trainer.projector,
        trainer.optimizer,
        image_size,
    )


def _boxed_state(trainer: Trainer, mesh: Mesh) -> TrainState:
    """Shapes and dtypes, still with logical axis names."""
    with meshes.use_mesh(mesh):
        return jax.eval_shape(_initialise(trainer, trainer.config.model.patch_size))


def parameter_table(trainer: Trainer, mesh: Mesh) -> str:
    """A line for each parameter: name, shape, logical axes, mesh axes it is split over, bytes a device (fp32)."""
    boxed = _boxed_state(trainer, mesh).params
    rows, total = [("parameter", "shape", "logical axes", "split over", "bytes a device")], 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(boxed, is_leaf=meshes.is_boxed):
        sharding, shape = meshes.state_shardings(leaf, mesh), leaf.value.shape
        size = 4 * math.prod(sharding.shard_shape(shape))
        total += size
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        axes = ", ".join(axis or "·" for axis in leaf.names)
        parts = [part if isinstance(part, str) else "+".join(part or "·") for part in sharding.spec]
        split = ", ".join(parts) if any(sharding.spec) else "copied"
        rows.append((name, "×".join(map(str, shape)), axes, split, f"{size:,}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(
        [*lines, f"Parameters: {total:,} bytes a device; EMA and both moments are as large and split alike."]
    )


def abstract_state(trainer: Trainer, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of a run's state, without computing it."""
    boxed = _boxed_state(trainer, mesh)
    shardings = meshes.state_shardings(boxed, mesh)
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), nn.meta.unbox(boxed), shardings
    )


def abstract_on_host(config: ConfigDict) -> TrainState:
    """`abstract_state` of a run that has one device, a CPU: accelerators may be too small for a whole state."""
    mesh = Mesh(np.array(jax.local_devices(backend="cpu")[:1]).reshape(1, 1, 1), meshes.AXES)
    return abstract_state(make_trainer(config), mesh)


def find_weights(config: ConfigDict) -> tuple[pathlib.Path, int] | None:
    """The checkpoint that `train.init_from` names, (its folder, step); None if a run starts from random weights.

    Raises:
      UsageError: there is none, or it holds another network.
    """
    path = config.train.init_from
    if not path:
        return None
    folder, step = checkpoint.find_checkpoint(path)
    theirs = default_config().model.to_dict() | checkpoint.read_meta(folder, step)["config"]["model"]
    different = [
        f"model.{field}: {theirs[field]} there, {config.model[field]} here"
        for field in ("kind", *KINDS[config.model.kind][1])
        if theirs[field] != config.model[field]
    ]
    if different:
        raise UsageError(f"train.init_from={path} holds another network: {'; '.join(different)}.")
    return folder, step


def first_state(
    trainer: Trainer, abstract: TrainState, mesh: Mesh, weights: tuple[pathlib.Path, int] | None = None
) -> TrainState:
    """A run's state before its first step: random, or with the weights that `find_weights` found.

    The projector is taken over as well where both runs align to features of the same size.
    """
    make = _initialise(trainer, trainer.config.model.patch_size)
    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    with meshes.use_mesh(mesh):
        state = jax.jit(lambda: nn.meta.unbox(make()), out_shardings=shardings)()
    if weights is None:
        return state
    wanted = {"params": {"network": abstract.params["network"]}, "ema": abstract.ema}
    meta, ours = checkpoint.read_meta(*weights), trainer.config.loss
    theirs = meta["config"]["loss"]
    aligned = ours.alignment_weight and theirs["alignment_weight"] and not meta.get("weights_only")
    if aligned and theirs["alignment_features"] == ours.alignment_features:
        wanted["params"]["projector"] = abstract.params["projector"]
    part = checkpoint.restore_part(*weights, wanted)
    return state.replace(params={**state.params, **part["params"]}, ema=part["ema"])
