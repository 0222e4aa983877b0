"""The run itself, and the only place with side effects: sample → save → next batch → step → report."""

import contextlib
import dataclasses
import hashlib
import pathlib
import time
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

import deco_jax
from deco_jax.checkpoints import store as checkpoint
from deco_jax.data import pipeline
from deco_jax.data.features import StoredFeatures, open_features
from deco_jax.data.sources import Source, open_source
from deco_jax.diffusion.flow import to_uint8
from deco_jax.encoders import teacher as teachers
from deco_jax.encoders.teacher import Teacher, load_teacher
from deco_jax.errors import AgreedError, UsageError
from deco_jax.parallel import mesh as meshes
from deco_jax.parallel import processes as distributed
from deco_jax.parallel.hardware import peak_flops
from deco_jax.sampling.pictures import make_grid, save_png
from deco_jax.sampling.sample import image_noise, sample
from deco_jax.sampling.solvers import SETTINGS
from deco_jax.training.metrics import Clock, Goodput, Progress, Writers
from deco_jax.training.preemption import StopRequest, stop_request
from deco_jax.training.start import abstract_state, check_devices, find_weights, first_state, parameter_table
from deco_jax.training.state import TrainState
from deco_jax.training.step import Trainer, jit_step, make_trainer, step_flops

GRID_COLUMNS = 8
PROFILED_STEPS = 5


def train(config: ConfigDict, workdir: str) -> None:
    """Trains until `config.train.steps`, from the newest checkpoint in `workdir` if there is one.

    Args:
      config: checked (see `deco_jax.config`).
      workdir: gets checkpoints/, samples/, tensorboard/, metrics.jsonl, goodput.jsonl and config.json; with several
        processes, a folder they all see.

    Raises:
      BrokenRun: this process of several fails alone, or others went away.
      UsageError: the configuration does not fit the data, the devices or the checkpoint; the data has too many
        unreadable records; or the loss was not finite for too many steps in a row.
    """
    folder = pathlib.Path(workdir).expanduser()
    distributed.together(lambda: _check_workdir(workdir, folder))
    _use_compilation_cache(config, folder)
    with stop_request() as stop, contextlib.ExitStack() as closing:
        try:
            _train(config, folder, stop, closing)
        except AgreedError:
            raise
        except BaseException as error:
            if jax.process_count() == 1:
                raise
            closing.pop_all()  # most of it would wait for processes that do not come
            raise distributed.broken_run(error) from error


def _check_workdir(workdir: str, folder: pathlib.Path) -> None:
    if "://" in workdir or (folder.exists() and not folder.is_dir()):
        raise UsageError(f"--workdir={workdir} is no folder. A bucket must be mounted (with gcsfuse, say).")


def _use_compilation_cache(config: ConfigDict, folder: pathlib.Path) -> None:
    """The environment variable JAX_COMPILATION_CACHE_DIR, where set, wins."""
    if config.train.compilation_cache and jax.config.jax_compilation_cache_dir is None:
        cache = folder.absolute() / pathlib.Path(config.train.compilation_cache).expanduser()
        jax.config.update("jax_compilation_cache_dir", str(cache))


def _train(config: ConfigDict, folder: pathlib.Path, stop: StopRequest, closing: contextlib.ExitStack) -> None:
    clock = Clock()
    with clock.phase("init"):
        parts = distributed.together(lambda: _prepare(config))
        mesh, trainer = parts.mesh, parts.trainer
        abstract = abstract_state(trainer, mesh)
        parameters = sum(x.size for x in jax.tree.leaves(abstract.params["network"]))
        fingerprint = pipeline.fingerprint(config.data, config.seed, parts.source)
        meta = checkpoint.make_meta(config, fingerprint, parameters, deco_jax.__version__, parts.teacher_digest)
        _check_processes_agree(config, fingerprint, parts.teacher_digest)
        closing.enter_context(checkpoint.claim(folder))
        checkpoints = checkpoint.Checkpoints(folder, config.train.keep, config.train.keep_every)
        closing.callback(checkpoints.close)
        latest = checkpoints.agree_on_latest()
        if latest is None:
            source_of_weights = distributed.together(lambda: find_weights(config))
            state, step = first_state(trainer, abstract, mesh, source_of_weights), 0
        else:
            distributed.together(lambda: checkpoint.check_resumable(checkpoints.meta(latest), meta, folder))
            if latest >= config.train.steps:
                if jax.process_index() == 0:
                    print(f"{folder} is done: step {latest} of {config.train.steps}.")
                return
            state, step = checkpoints.restore(latest, abstract), checkpoints.position(latest)
    if jax.process_index() == 0:
        (folder / "config.json").write_text(config.to_json_best_effort(indent=2))
        print(_summary(config, parts, parameters, latest))
    run = _Run(config, folder, parts, checkpoints, meta, clock)
    del parts  # the run lets go of the teacher's copy on this host
    closing.push(run.close)
    run.loop(state, abstract, step, stop)
    with clock.phase("checkpoint"):
        checkpoints.wait()
    if run.told_to_stop(stop) and run.step < config.train.steps:
        saved = checkpoints.latest()
        what = "nothing was trained" if saved is None else f"step {saved} is saved"
        by = stop.signal.name if stop else "a signal to another process"
        run.progress.say(f"Stopped by {by}; {what}. The same command resumes from there.")


@dataclasses.dataclass(frozen=True)
class _Parts:
    """What a run is made of, apart from its state."""

    mesh: Mesh
    source: Source
    trainer: Trainer
    teacher: Teacher | None  # None if nothing is aligned, or if its features are stored
    features: StoredFeatures | None

    @property
    def teacher_digest(self) -> str:
        """Which teacher's features the run is aligned to; "" = none's."""
        teacher = self.teacher or self.features
        return "" if teacher is None else teacher.digest


def _prepare(config: ConfigDict) -> _Parts:
    mesh = meshes.make_mesh(config.mesh)
    check_devices(config, mesh)
    source = open_source(config.data)
    if source.num_classes > config.model.num_classes:
        raise UsageError(
            f"model.num_classes={config.model.num_classes} is too few; the data has {source.num_classes} classes."
        )
    teacher = features = None
    if config.loss.alignment_weight and config.teacher.stored:
        features = open_features(config, source)
    elif config.loss.alignment_weight:
        teacher = load_teacher(config)
    return _Parts(mesh, source, make_trainer(config, teacher and teacher.module), teacher, features)


def _check_processes_agree(config: ConfigDict, fingerprint: str, teacher_digest: str) -> None:
    """A run whose processes differ in program, settings or data would hang, or train on what nobody asked for."""
    distributed.check_same("the version of deco_jax and jax", f"{deco_jax.__version__}, {jax.__version__}")
    settings = hashlib.sha256(config.to_json_best_effort().encode()).hexdigest()[:16]
    distributed.check_same("the configuration (a hash)", settings)
    distributed.check_same("the data's fingerprint", fingerprint)
    distributed.check_same("the teacher (a hash)", teacher_digest)


class _Run:
    """One call of `train`: the loop, and what it reports."""

    def __init__(self, config, folder, parts, checkpoints, meta, clock):
        self.config: ConfigDict = config
        self.folder: pathlib.Path = folder
        self.parts: _Parts = parts
        self.mesh: Mesh = parts.mesh
        self.trainer: Trainer = parts.trainer
        self.checkpoints: checkpoint.Checkpoints = checkpoints
        self.meta: dict[str, Any] = meta
        self.clock: Clock = clock
        active = jax.process_index() == 0
        self.step = checkpoints.latest() or 0
        self.writers = Writers(folder, active)
        self.progress = Progress(config.train.steps, self.step, active)
        self.goodput = Goodput(folder, self.step, clock, active)
        self.image_flops = step_flops(self.trainer, config.data.image_size)
        self.peak = peak_flops(jax.devices()[0])
        self.bad = pipeline.BadRecords(parts.source, config.data.max_bad_records, active)
        self.profile = contextlib.ExitStack()
        self.told = False  # that some process was asked to stop

    def loop(self, state: TrainState, abstract: TrainState, step: int, stop: StopRequest) -> None:
        """Steps to the end, from `step`. The order makes resuming exact: what is saved has not seen the next batch."""
        config, start = self.config.train, step
        rows = meshes.host_rows(self.mesh, self.config.data.batch_size)
        source, features = self.parts.source, self.parts.features
        host_batches = pipeline.batches(self.config.data, self.config.seed, source, step, rows, features)
        train_step = jit_step(self.trainer, abstract, self.mesh)
        teacher = None if self.parts.teacher is None else teachers.place(self.parts.teacher, self.mesh)
        self.parts = dataclasses.replace(self.parts, teacher=None)
        logged = None  # (step, its metrics, still on the devices): read when the next step is under way
        unheard = None  # (metrics, notes) of the step under way
        with meshes.use_mesh(self.mesh), contextlib.closing(host_batches):
            while True:
                finished, stopping = step >= config.steps, self.told_to_stop(stop)
                to_sample = config.sample_every and (finished or (step % config.sample_every == 0 and not stopping))
                to_save = finished or stopping or step % config.save_every == 0
                if step > start and (to_sample or to_save):
                    if logged is not None:
                        self.report(*logged)
                        logged = None
                    if to_sample:
                        self.sample(step, state)
                    if to_save:
                        with self.clock.phase("checkpoint"):
                            self.checkpoints.save(step, state, self.meta)
                        self.goodput.note(step)
                        self.writers.flush()
                if finished or stopping:
                    break
                with self.clock.phase("data wait"):
                    batch, notes = self.place(next(host_batches), rows, stop)
                self.profile_five_steps(step)
                if step == start:
                    with self.clock.phase("compile"):
                        state, metrics, notes = train_step(state, batch, notes, teacher)
                        self.listen(step + 1, metrics, notes)
                    self.since = (step + 1, self.busy(), self.clock.seconds["data wait"])
                else:
                    with self.clock.phase("step"), jax.transfer_guard("disallow"), jax.no_tracing():
                        before, (state, metrics, notes) = unheard, train_step(state, batch, notes, teacher)
                        # One step runs while this waits for the one before: batches do not pile up.
                        self.listen(step, *before)
                    if logged is not None:
                        self.report(*logged)
                        logged = None
                unheard = metrics, notes
                step += 1
                self.step = step
                if step % config.log_every == 0 or step == config.steps:
                    logged = step, metrics
            if unheard is not None:
                self.listen(step, *unheard)

    def told_to_stop(self, stop: StopRequest) -> bool:
        """Whether this is the step to stop at, the same one on every process."""
        return bool(stop) if jax.process_count() == 1 else self.told

    def place(self, host_batch: pipeline.Batch, rows: np.ndarray, stop: StopRequest) -> tuple[Any, jax.Array]:
        """This process's rows of a batch, and what it has to tell the others, as global arrays."""
        size = self.config.data.batch_size
        notes = meshes.place_notes(bool(stop), host_batch.pop("bad"), self.mesh, rows, size)
        return meshes.place_batch(host_batch, self.mesh, rows, size), notes

    def listen(self, step: int, metrics: dict[str, jax.Array], notes: jax.Array) -> None:
        """Takes note of what came out of `step` and of what the processes said in it; waits for that step.

        Raises:
          AgreedError: too many bad steps in a row, or bad records; on every process at the same step.
        """
        skipped_in_a_row, notes = jax.device_get((metrics["skipped_in_a_row"], notes))
        self.told = self.told or bool(notes[:, 0].any())
        try:
            self.bad.check(notes[:, 1:].ravel())
            self.check_finite(step, int(skipped_in_a_row))
        except UsageError as error:
            raise AgreedError(str(error)) from error

    def profile_five_steps(self, step: int) -> None:
        """Starts and ends the profile that `train.profile_at` asks for."""
        at = self.config.train.profile_at
        if at and step == at:
            where = self.folder / "profile" / f"process_{jax.process_index()}"  # hosts may have the same name
            self.profile.enter_context(jax.profiler.trace(str(where)))
        elif step >= at + PROFILED_STEPS:
            self.profile.close()

    def close(self, error_type: type | None, *_: Any) -> None:
        """Ends logs and bar, and says where the time went; called as the run ends, with the exception's type if any."""
        ended = error_type is None and self.step >= self.config.train.steps
        self.profile.close()
        self.writers.close()
        self.progress.close()
        self.progress.say(self.goodput.close(self.step, ended))

    def busy(self) -> float:
        """A clock that stands still while the run samples, saves or compiles."""
        return time.perf_counter() - sum(self.clock.seconds[name] for name in ("eval", "checkpoint", "compile"))

    def report(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Writes the scalars of `step`."""
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        now, data = self.busy(), self.clock.seconds["data wait"]
        last_step, last_time, last_data = self.since
        self.since = (step, now, data)
        if step > last_step:  # else it is the first step, whose time is the compiler's
            values["step_seconds"] = (now - last_time) / (step - last_step)
            values["data_wait_seconds"] = (data - last_data) / (step - last_step)
            values["images_per_second"] = self.config.data.batch_size / values["step_seconds"]
        if self.peak is not None and "images_per_second" in values:
            values["mfu"] = values["images_per_second"] * self.image_flops / (self.peak * jax.device_count())
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
        with self.clock.phase("eval"):
            grid_rows = -(-config.num // GRID_COLUMNS)
            labels = np.repeat(np.arange(grid_rows) * classes // grid_rows, GRID_COLUMNS)
            drawn = -(-len(labels) // meshes.batch_devices(self.mesh)) * meshes.batch_devices(self.mesh)
            noise = jax.jit(self.noise, static_argnums=0, out_shardings=meshes.batch_sharding(self.mesh))(drawn)
            images = sample(
                self.trainer.network,
                state.ema,
                np.resize(labels, drawn),
                noise=noise,
                **{name: config[name] for name in SETTINGS},
            )
            grid = make_grid(meshes.fetch(to_uint8(images), self.mesh)[: config.num], GRID_COLUMNS)
            if jax.process_index() == 0:
                save_png(grid, self.folder / "samples" / f"step_{step:08d}.png")
            self.writers.picture(step, grid)

    def noise(self, number: int) -> jax.Array:
        """What the images of a grid start from, (number, H, W, 3)."""
        side = self.config.data.image_size
        return image_noise(jax.random.key(self.config.seed), jax.numpy.arange(number), (side, side, 3))


def _summary(config: ConfigDict, parts: _Parts, parameters: int, latest: int | None) -> str:
    """What stands at the top of a run's output."""
    mesh, table = parts.mesh, parameter_table(parts.trainer, parts.mesh)
    teacher = "."
    if parts.features is not None:
        teacher = f", aligned to the features in {config.teacher.stored}."
    elif parts.teacher is not None:
        size = sum(x.size for x in jax.tree.leaves(parts.teacher.params))
        teacher = f", aligned to the teacher {config.teacher.weights} ({size:,} parameters)."
    shape = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    begin = f"resumes at step {latest}" if latest else f"starts from {config.train.init_from or 'random weights'}"
    return (
        f"{table}\nNetwork: {parameters:,} parameters{teacher} {jax.device_count()} × {jax.devices()[0].device_kind} "
        f"as a mesh of {shape}; {jax.process_count()} process(es). "
        f"Global batch {config.data.batch_size}. The run {begin}."
    )
