"""The run itself, and the only place with side effects: evaluate → save → next batch → step → report."""

import contextlib
import pathlib
from collections.abc import Iterator

import jax
from ml_collections import ConfigDict

from deco_jax.checkpoints import store
from deco_jax.checkpoints.resume import check_resumable
from deco_jax.data import pipeline
from deco_jax.parallel import mesh as meshes
from deco_jax.parallel import processes
from deco_jax.sampling.pictures import save_png
from deco_jax.storage import local_folder, write_beside
from deco_jax.training import start
from deco_jax.training.goodput import Clock
from deco_jax.training.hooks import Profile, SampleGrids
from deco_jax.training.preemption import stop_request
from deco_jax.training.report import Reporter
from deco_jax.training.step import jit_step, step_flops
from deco_jax.training.watch import Watch
from deco_jax.version import __version__


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
    first_process = jax.process_index() == 0
    folder = processes.agree(lambda: local_folder("--workdir", workdir))
    _use_compilation_cache(config, folder)
    with stop_request() as stop, contextlib.ExitStack() as closing, processes.fail_together(closing):
        clock = Clock()
        with clock.phase("init"):
            parts = processes.agree(lambda: start.open_parts(config))
            start.check_processes_agree(config, parts)
            layout, mesh, train_step = parts.layout, parts.layout.mesh, parts.train_step
            abstract = start.abstract_state(train_step, layout)
            parameters = sum(x.size for x in jax.tree.leaves(abstract.params["network"]))
            meta = store.make_meta(config, parts.fingerprint, parameters, __version__, parts.digests)
            closing.enter_context(store.exclusive(folder))
            checkpoints = store.Checkpoints(folder, config.train.keep, config.train.keep_every)
            closing.callback(checkpoints.close)
            latest, changes = checkpoints.agree_on_latest(), []
            if latest is None:
                weights = processes.agree(lambda: start.find_weights(config))
                state, step = start.first_state(train_step, abstract, layout, weights), 0
                begin = f"starts from {config.train.init_from or 'random weights'}"
            else:
                changes = processes.agree(lambda: check_resumable(checkpoints.meta(latest), meta, folder))
                if latest >= config.train.steps:
                    if first_process:
                        print(f"{folder} is done: step {latest} of {config.train.steps}.")
                    return
                state, step = checkpoints.restore(latest, abstract), checkpoints.position(latest)
                begin = f"resumes at step {latest}"
        if first_process:
            with write_beside(folder / "config.json") as draft:
                draft.write_text(config.to_json_best_effort(indent=2))
            print(start.summary(config, parts, parameters, begin))
            for change in changes:
                print(f"Changed since the checkpoint: {change}.")

        batch_size, rows = config.data.batch_size, meshes.host_rows(mesh, config.data.batch_size)
        program = jit_step(train_step, abstract, layout)
        frozen = {weights.network.name: weights.place(layout) for weights in parts.frozen}
        source, features = parts.source, parts.features
        del parts  # and with it the frozen networks' copies on this host

        reporter = Reporter(
            config.train, batch_size, folder, step, clock, step_flops(train_step, config.data.image_size)
        )
        closing.push(reporter.close)
        profile = Profile(config, folder)
        closing.callback(profile.running.close)
        bad = pipeline.BadRecords(source, config.data.max_bad_records, first_process)
        watch = Watch(bad, config.train.max_nonfinite, checkpoints)
        sample_grid = SampleGrids(config, train_step.network, layout)
        started_at, batches = step, pipeline.batches(config.data, config.seed, source, step, rows, features)
        with meshes.use_mesh(layout), contextlib.closing(batches):
            while True:
                finished, stopping = step >= config.train.steps, watch.told_to_stop(stop)
                ending = finished or stopping
                to_sample = _due(step, config.train.sample_every, finished) and (finished or not stopping)
                to_save = _due(step, config.train.save_every, ending)

                if step > started_at and (to_sample or to_save):
                    reporter.write()
                    if to_sample:
                        with clock.phase("eval"):
                            grid = sample_grid(state.ema)
                            if first_process:
                                save_png(grid, folder / "samples" / f"step_{step:08d}.png")
                                reporter.writers.picture(step, grid)
                    if to_save:
                        with clock.phase("checkpoint"):
                            checkpoints.save(step, state, meta)
                        reporter.saved(step)
                if ending:
                    break

                with clock.phase("data wait"):
                    batch = next(batches)
                    messages = meshes.place_messages(bool(stop), batch.pop("bad"), mesh, rows, batch_size)
                    batch = meshes.place_batch(batch, mesh, rows, batch_size)

                profile(step)
                first = step == started_at
                with clock.phase("compile" if first else "step"), contextlib.nullcontext() if first else _hot():
                    state, metrics, messages = program(state, batch, messages, frozen)
                    step += 1
                    watch(step, metrics, messages)
                    if first:
                        watch.finish()

                reporter.after(step, metrics)
            watch.finish()
        with clock.phase("checkpoint"):
            checkpoints.wait()
        if stopping and not finished:
            saved = checkpoints.latest()
            what = "nothing was trained" if saved is None else f"step {saved} is saved"
            by = stop.signal.name if stop else "a signal to another process"
            reporter.progress.say(f"Stopped by {by}; {what}. The same command resumes from there.")


def _use_compilation_cache(config: ConfigDict, folder: pathlib.Path) -> None:
    """The environment variable JAX_COMPILATION_CACHE_DIR, where set, wins."""
    if config.train.compilation_cache and jax.config.jax_compilation_cache_dir is None:
        cache = folder.absolute() / pathlib.Path(config.train.compilation_cache).expanduser()
        jax.config.update("jax_compilation_cache_dir", str(cache))


def _due(step: int, every: int, always: bool) -> bool:
    """Whether something that happens every so many steps, 0 = never, and also where `always` holds, happens now."""
    return every > 0 and (always or step % every == 0)


@contextlib.contextmanager
def _hot() -> Iterator[None]:
    """Within it, copies between host and devices that nobody asked for are errors, and so is compiling again."""
    with jax.transfer_guard("disallow"), jax.no_tracing():
        yield
