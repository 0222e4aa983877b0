"""The run itself, and the only place with side effects: sample → save → next batch → step → report."""

import contextlib
import pathlib
import time
from typing import Any

import jax
import numpy as np
from clu import parameter_overview
from flax import linen as nn
from jax.sharding import Mesh
from ml_collections import ConfigDict

import deco_jax
from deco_jax.data import pipeline
from deco_jax.data.sources import Source, open_source
from deco_jax.diffusion.flow import to_uint8
from deco_jax.diffusion.samplers import SETTINGS
from deco_jax.errors import UsageError
from deco_jax.evaluation.images import make_grid, save_png
from deco_jax.models.flops import forward_flops
from deco_jax.parallel import mesh as meshes
from deco_jax.parallel.hardware import peak_flops
from deco_jax.sampling import image_noise, sample
from deco_jax.training import checkpoint
from deco_jax.training.metrics import Clock, Progress, Writers
from deco_jax.training.preemption import StopRequest, stop_request
from deco_jax.training.state import TrainState, init_state
from deco_jax.training.step import Trainer, make_trainer

GRID_COLUMNS = 8


def train(config: ConfigDict, workdir: str) -> None:
    """Trains until `config.train.steps`, from the newest checkpoint in `workdir` if there is one.

    Args:
      config: checked (see `deco_jax.config`).
      workdir: gets checkpoints/, samples/, tensorboard/, metrics.jsonl and config.json.

    Raises:
      UsageError: the configuration does not fit the data, the devices or the checkpoint; the data has too many
        unreadable records; or the loss was not finite for too many steps in a row.
    """
    folder = pathlib.Path(workdir).expanduser()
    if "://" in workdir or (folder.exists() and not folder.is_dir()):
        raise UsageError(f"--workdir={workdir} is no folder. A bucket must be mounted (with gcsfuse, say).")
    with stop_request() as stop:
        _train(config, folder, stop)


def _train(config: ConfigDict, folder: pathlib.Path, stop: StopRequest) -> None:
    clock = Clock()
    with contextlib.ExitStack() as closing:
        with clock.phase("start"):
            mesh = meshes.make_mesh(config.mesh)
            _check_devices(config, mesh)
            source = open_source(config.data)
            _check_data(config, source)
            trainer = make_trainer(config)
            abstract = abstract_state(trainer, mesh)
            parameters = sum(x.size for x in jax.tree.leaves(abstract.params["network"]))
            fingerprint = pipeline.fingerprint(config.data, config.seed, source)
            meta = checkpoint.make_meta(config, fingerprint, parameters, deco_jax.__version__)
            checkpoints = checkpoint.Checkpoints(folder, config.train.keep, config.train.keep_every)
            closing.callback(checkpoints.close)
            latest = checkpoints.latest()
            if latest is None:
                state, step = first_state(trainer, abstract, mesh), 0
            else:
                checkpoint.check_resumable(checkpoints.meta(latest), meta, folder)
                if latest >= config.train.steps:
                    print(f"{folder} is done: step {latest} of {config.train.steps}.")
                    return
                state, step = checkpoints.restore(latest, abstract), checkpoints.position(latest)
        if jax.process_index() == 0:
            (folder / "config.json").write_text(config.to_json_best_effort(indent=2))
            print(_summary(config, state, mesh, parameters, latest))
        run = _Run(config, folder, mesh, trainer, source, checkpoints, meta, clock)
        closing.callback(run.close)
        run.loop(state, step, stop)
        with clock.phase("checkpoint"):
            checkpoints.wait()
        if stop:
            saved = checkpoints.latest()
            what = "nothing was trained" if saved is None else f"step {saved} is saved"
            run.progress.say(f"Stopped by {stop.signal.name}; {what}. The same command resumes from there.")


class _Run:
    """One call of `train`: the loop, and what it reports."""

    def __init__(self, config, folder, mesh, trainer, source, checkpoints, meta, clock):
        self.config: ConfigDict = config
        self.folder: pathlib.Path = folder
        self.mesh: Mesh = mesh
        self.trainer: Trainer = trainer
        self.source: Source = source
        self.checkpoints: checkpoint.Checkpoints = checkpoints
        self.meta: dict[str, Any] = meta
        self.clock: Clock = clock
        active = jax.process_index() == 0
        self.writers = Writers(folder, active)
        self.progress = Progress(config.train.steps, checkpoints.latest() or 0, active)
        self.step_flops = 3 * forward_flops(trainer.network, config.data.image_size, config.data.image_size)
        self.peak = peak_flops(jax.devices()[0])

    def loop(self, state: TrainState, step: int, stop: StopRequest) -> None:
        """Steps to the end, from `step`. The order makes resuming exact: what is saved has not seen the next batch."""
        config, start = self.config.train, step
        bad = pipeline.BadRecords(self.source, self.config.data.max_bad_records)
        host_batches = pipeline.batches(
            self.config.data, self.config.seed, self.source, step, jax.process_index(), jax.process_count()
        )
        train_step = jax.jit(self.trainer.step, donate_argnums=0)
        logged = None  # (step, its metrics, still on the devices): read when the next step is under way
        with meshes.use_mesh(self.mesh), contextlib.closing(host_batches):
            while True:
                finished = step >= config.steps
                to_sample = config.sample_every and (finished or step % config.sample_every == 0)
                to_save = finished or stop or step % config.save_every == 0
                if step > start and (to_sample or to_save):
                    if logged is not None:
                        self.report(*logged)
                        logged = None
                    if to_sample:
                        self.sample(step, state)
                    if to_save:
                        with self.clock.phase("checkpoint"):
                            self.checkpoints.save(step, state, self.meta)
                if finished or stop:
                    break
                with self.clock.phase("data"):
                    host_batch = next(host_batches)
                    bad.check(host_batch.pop("bad"))
                    batch = meshes.place_batch(host_batch, self.mesh)
                if step == start:
                    with self.clock.phase("compile"):
                        state, metrics = train_step(state, batch)
                        jax.block_until_ready(metrics)
                    self.since = (step + 1, self.busy(), self.clock.seconds["data"])
                else:
                    with self.clock.phase("step"), jax.transfer_guard("disallow"):
                        before, (state, metrics) = metrics, train_step(state, batch)
                        # One step runs while this waits for the one before: batches do not pile up.
                        self.check_finite(step, int(jax.device_get(before["skipped_in_a_row"])))
                    if logged is not None:
                        self.report(*logged)
                        logged = None
                step += 1
                if step % config.log_every == 0 or step == config.steps:
                    logged = step, metrics
            self.check_finite(step, int(jax.device_get(state.skipped_in_a_row)))

    def close(self) -> None:
        """Ends logs and bar, and says where the time went."""
        self.writers.close()
        self.progress.close()
        self.progress.say(f"Time: {self.clock.summary()}.")

    def busy(self) -> float:
        """A clock that stands still while the run samples, saves or compiles."""
        return time.perf_counter() - sum(self.clock.seconds[name] for name in ("sample", "checkpoint", "compile"))

    def report(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Writes the scalars of `step`."""
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        now, data = self.busy(), self.clock.seconds["data"]
        last_step, last_time, last_data = self.since
        self.since = (step, now, data)
        if step > last_step:  # else it is the first step, whose time is the compiler's
            values["step_seconds"] = (now - last_time) / (step - last_step)
            values["data_wait_seconds"] = (data - last_data) / (step - last_step)
            values["images_per_second"] = self.config.data.batch_size / values["step_seconds"]
        if self.peak is not None and "images_per_second" in values:
            values["mfu"] = values["images_per_second"] * self.step_flops / (self.peak * jax.device_count())
        self.writers.scalars(step, values)
        self.progress.update(step, values)

    def check_finite(self, step: int, skipped_in_a_row: int) -> None:
        """Ends the run if loss or gradients have not been finite for too many steps up to `step`."""
        if skipped_in_a_row >= self.config.train.max_nonfinite:
            good = self.checkpoints.latest()
            raise UsageError(
                f"loss or gradient not finite for {skipped_in_a_row} steps up to step {step} "
                f"(train.max_nonfinite={self.config.train.max_nonfinite}); these steps changed no weights. "
                f"Last checkpoint: {'none' if good is None else self.checkpoints.folder / str(good)}. "
                "A lower optimizer.lr, optimizer.clip_norm=1 or optimizer.beta2=0.95 may help."
            )

    def sample(self, step: int, state: TrainState) -> None:
        """Draws a grid from the EMA weights and the same noise every time; rows are classes."""
        config, classes = self.config.sample, self.config.model.num_classes
        with self.clock.phase("sample"):
            rows = -(-config.num // GRID_COLUMNS)
            labels = np.repeat(np.arange(rows) * classes // rows, GRID_COLUMNS)[: config.num]
            side = self.config.data.image_size
            noise = image_noise(jax.random.key(self.config.seed), np.arange(config.num), (side, side, 3))
            images = sample(
                self.trainer.network,
                state.ema,
                labels,
                noise=noise,
                **{name: config[name] for name in SETTINGS},
            )
            grid = make_grid(meshes.fetch(to_uint8(images), self.mesh), GRID_COLUMNS)
            if jax.process_index() == 0:
                save_png(grid, self.folder / "samples" / f"step_{step:08d}.png")
            self.writers.picture(step, grid)


def _check_devices(config: ConfigDict, mesh: Mesh) -> None:
    batch, parts, devices = config.data.batch_size, config.optimizer.accumulation, meshes.batch_devices(mesh)
    unit = parts * devices
    if batch % unit:
        raise UsageError(
            f"data.batch_size={batch} is not divisible by {devices} devices × optimizer.accumulation={parts}; "
            f"nearest: {max(batch // unit, 1) * unit} and {(batch // unit + 1) * unit}."
        )
    if config.model.attention == "cudnn" and jax.default_backend() != "gpu":
        raise UsageError("model.attention='cudnn' needs an NVIDIA GPU; 'default' runs everywhere.")


def _check_data(config: ConfigDict, source: Source) -> None:
    if source.num_classes > config.model.num_classes:
        raise UsageError(
            f"model.num_classes={config.model.num_classes} is too few; the data has {source.num_classes} classes."
        )
    if config.loss.alignment_weight:
        raise UsageError(
            f"loss.alignment_weight={config.loss.alignment_weight} needs a teacher's features in every batch; "
            f"data.source={config.data.source!r} has none. 0 trains without."
        )


def _initialise(trainer: Trainer, image_size: int):
    """The function that makes a fresh state from the run's seed, still with logical axis names."""
    return lambda: init_state(
        jax.random.fold_in(jax.random.key(trainer.config.seed), 2**31 - 1),  # no step draws from this key
        trainer.network,
        trainer.projector,
        trainer.optimizer,
        image_size,
    )


def abstract_state(trainer: Trainer, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of a run's state, without computing it."""
    with meshes.use_mesh(mesh):
        boxed = jax.eval_shape(_initialise(trainer, trainer.config.model.patch_size))
    shardings = meshes.state_shardings(boxed, mesh)
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), nn.meta.unbox(boxed), shardings
    )


def first_state(trainer: Trainer, abstract: TrainState, mesh: Mesh) -> TrainState:
    """A run's state before its first step: random, or with the weights of `train.init_from`."""
    make = _initialise(trainer, trainer.config.model.patch_size)
    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    with meshes.use_mesh(mesh):
        state = jax.jit(lambda: nn.meta.unbox(make()), out_shardings=shardings)()
    path = trainer.config.train.init_from
    if not path:
        return state
    folder, step = checkpoint.find_checkpoint(path)
    theirs, ours = checkpoint.read_meta(folder, step)["config"]["model"], trainer.config.model.to_dict()
    different = [
        f"model.{field}: {theirs.get(field)} there, {value} here"
        for field, value in ours.items()
        if theirs.get(field) != value and field not in ("dtype", "remat", "scan", "attention")
    ]
    if different:
        raise UsageError(f"train.init_from={path} holds another network: {'; '.join(different)}.")
    wanted = {"params": {"network": abstract.params["network"]}, "ema": abstract.ema}
    part = checkpoint.restore_part(folder, step, wanted)
    return state.replace(params={**state.params, **part["params"]}, ema=part["ema"])


def _summary(config: ConfigDict, state: TrainState, mesh: Mesh, parameters: int, latest: int | None) -> str:
    """What stands at the top of a run's output."""
    table = parameter_overview.get_parameter_overview(state.params, include_stats="sharding")
    shape = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    begin = f"resumes at step {latest}" if latest else f"starts from {config.train.init_from or 'random weights'}"
    return (
        f"{table}\nNetwork: {parameters:,} parameters. {jax.device_count()} × {jax.devices()[0].device_kind} "
        f"as a mesh of {shape}; {jax.process_count()} process(es). "
        f"Global batch {config.data.batch_size}. The run {begin}."
    )
