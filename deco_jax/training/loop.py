"""The run itself, and the only place with side effects: evaluate → save → next batch → step → report."""

import contextlib
from collections.abc import Iterator

import jax
from ml_collections import ConfigDict

from deco_jax import storage
from deco_jax.checkpoints import store
from deco_jax.checkpoints.resume import check_resumable
from deco_jax.config import restore_config
from deco_jax.data import pipeline
from deco_jax.jobs import open_job
from deco_jax.parallel import mesh as meshes
from deco_jax.parallel import processes
from deco_jax.storage import AnyPath, Mirror
from deco_jax.training import start
from deco_jax.training.feed import Feed
from deco_jax.training.goodput import Clock
from deco_jax.training.hooks import Profile, SampleGrids
from deco_jax.training.online import OnlineEvaluation
from deco_jax.training.optimizer import check_schedule
from deco_jax.training.report import Reporter, data_in_words
from deco_jax.training.state import TrainState
from deco_jax.training.step import jit_step, step_flops
from deco_jax.training.watch import Watch
from deco_jax.version import __version__


def train(config: ConfigDict, workdir: str) -> None:
    """Trains until `config.train.steps`, from the newest whole checkpoint in `workdir` if there is one.

    Args:
      config: checked (see `deco_jax.config`).
      workdir: gets checkpoints/, samples/, tensorboard/, metrics.jsonl, goodput.jsonl and config.json; a folder or an
        address in a bucket that all processes see.

    Raises:
      BrokenRun: this process of several fails alone, or others went away.
      TransientError: the data or the storage no longer answer; what was trained is saved.
      UsageError: the configuration does not fit the data, the devices or the checkpoint; the data has too many
        unreadable records; or the loss was not finite for too many steps in a row.
    """
    with open_job("--workdir", workdir) as job:
        folder = job.folder
        config, kept = start.keep_decoding(config, folder)
        _use_compilation_cache(config, folder)
        clock = Clock()
        with clock.phase("init"):
            processes.agree(lambda: start.list_data(config, folder))
            parts = processes.agree(lambda: start.open_parts(config, folder))
            start.check_processes_agree(config, parts)
            layout, mesh, train_step, source = parts.layout, parts.layout.mesh, parts.train_step, parts.source
            abstract = start.abstract_state(train_step, layout)
            parameters = sum(x.size for x in jax.tree.leaves(abstract.params["network"]))
            meta = store.make_meta(
                config, parts.fingerprint, parameters, __version__, parts.digests, source.class_names
            ) | {
                "data_contents": source.contents(),
                "device": f"{jax.device_count()} × {jax.devices()[0].device_kind}",
            }
            job.claim(lambda: store.set_aside_incomplete(folder))
            checkpoints = store.Checkpoints(folder, config.train.keep, config.train.keep_every)
            job.closing.callback(checkpoints.close)
            latest, changes, seen = checkpoints.agree_on_latest(), [], []
            if latest is None:
                weights = processes.agree(lambda: start.find_weights(config))
                state, step = start.first_state(train_step, abstract, layout, weights), 0
                begin = f"starts from {config.train.init_from or 'random weights'}"
            else:
                changes = processes.agree(lambda: _changes(checkpoints.meta(latest), meta, folder, latest))
                if latest >= config.train.steps:
                    job.say(f"{folder} is done: step {latest} of {config.train.steps}.")
                    return
                state, step = checkpoints.restore(latest, abstract), checkpoints.position(latest)
                begin, seen = f"resumes at step {latest}", checkpoints.bad_records(latest)
        if job.first:
            storage.write_bytes(folder / "config.json", config.to_json_best_effort(indent=2).encode())
        job.say("\n".join([*source.summary(), start.summary(config, parts, parameters, begin)]))
        for line in kept:
            job.say(line)
        for change in changes:
            job.say(f"Changed since the checkpoint: {change}.")

        batch_size, rows = config.data.batch_size, meshes.host_rows(mesh, config.data.batch_size)
        program = jit_step(train_step, abstract, layout)
        prompts = start.encode_prompts(config, parts)
        frozen = {weights.network.name: weights.place(layout) for weights in parts.frozen}
        beside, judge = (parts.features, parts.tokenizer, parts.states), parts.judge
        del parts  # and with it the frozen networks' copies on this host

        flops, mirror = step_flops(train_step, config.data.image_size), Mirror(folder)
        reporter = Reporter(config.train, batch_size, mirror, step, clock, flops, data_in_words(config.data))
        job.closing.push(reporter.close)
        profile = Profile(config, mirror.folder)
        job.closing.callback(profile.running.close)
        bad = pipeline.BadRecords(source, config.data, seen, log=job.first)
        watch = Watch(bad, config.train.max_nonfinite, checkpoints, config.train.save_minutes)
        sample_grid = SampleGrids(config, train_step.network, layout, prompts)
        evaluation = OnlineEvaluation(config, train_step.network, layout, judge)
        job.closing.callback(evaluation.close)

        def save(step: int, state: TrainState) -> None:
            with clock.phase("checkpoint"):
                checkpoints.save(step, state, meta, sorted(bad.seen))
            reporter.saving(step)
            watch.saved()

        started_at, batches = step, pipeline.batches(config.data, config.seed, source, step, rows, *beside)
        with meshes.use_mesh(layout), contextlib.closing(Feed(batches, job.stop)) as feed:
            while True:
                job.check()
                reporter.tell(checkpoints.news())
                reporter.evaluated(evaluation.news())
                finished, stopping = step >= config.train.steps, watch.told_to_stop(job.stop)
                ending = finished or stopping
                to_sample = _due(step, config.train.sample_every, finished) and (finished or not stopping)
                to_evaluate = _due(step, config.train.evaluate_every, finished) and (finished or not stopping)
                to_save = watch.save_agreed or _due(step, config.train.save_every, ending)
                if to_sample or to_evaluate or to_save:
                    watch.finish()  # nothing is saved as a step that it is not
                if watch.last_whole is not None:
                    step, to_sample, to_evaluate, to_save, ending = watch.last_whole, False, False, True, True
                    reporter.return_to(step)

                if step > started_at and (to_sample or to_evaluate or to_save):
                    reporter.write()
                    if to_save and not finished:  # first: the rest may take minutes, and no signal ends it
                        save(step, state)
                    if to_sample:
                        with clock.phase("eval"):
                            reporter.picture(step, sample_grid(state.ema))
                    if to_evaluate:
                        with clock.phase("eval"):
                            evaluation(step, state.ema)
                    if to_save and finished:  # last: a run that is done draws nothing more
                        save(step, state)
                if ending:
                    break

                with clock.phase("data wait"):
                    batch = feed.next()
                    flags = watch.flags(job.stop, feed.absent)
                    messages = meshes.place_messages(flags, batch.pop("bad"), mesh, rows, batch_size)
                    batch = meshes.place_batch(batch, mesh, rows, batch_size)

                profile(step)
                first = step == started_at
                with clock.phase("compile" if first else "step"), contextlib.nullcontext() if first else _hot():
                    state, metrics, messages = program(state, batch, messages, frozen)
                    step += 1
                    watch(step, metrics, messages)
                    if first:
                        watch.finish()

                if watch.last_whole is None:
                    reporter.after(step, metrics)
        with clock.phase("checkpoint"):
            checkpoints.wait()
        with clock.phase("eval"):
            reporter.evaluated(evaluation.news(wait=True))
        reporter.tell(checkpoints.news())
        saved = checkpoints.latest()
        what = "nothing was trained" if saved is None else f"step {saved} is saved"
        if watch.last_whole is not None:
            job.say(f"Stopped as data do not come; {what}.")
            processes.agree(feed.check)
        if stopping and not finished:
            by = job.stop.by or "a signal to another process"
            job.say(f"Stopped by {by}; {what}. The same command resumes from there.")


def _changes(saved: dict, now: dict, folder: AnyPath, step: int) -> list[str]:
    """What is different now from the run that saved a checkpoint; raises UsageError if this run must not go on."""
    changes = check_resumable(saved, now, folder)
    if "decisive" in saved:  # converted: nobody knows its schedule
        return changes
    return changes + check_schedule(restore_config(saved), restore_config(now), step)


def _use_compilation_cache(config: ConfigDict, folder: AnyPath) -> None:
    """The environment variable JAX_COMPILATION_CACHE_DIR, where set, wins."""
    if config.train.compilation_cache and jax.config.jax_compilation_cache_dir is None:
        cache = storage.to_path(config.train.compilation_cache)
        within = not storage.is_remote(cache) and not cache.is_absolute()
        jax.config.update("jax_compilation_cache_dir", str(folder / str(cache) if within else cache))


def _due(step: int, every: int, always: bool) -> bool:
    """Whether something that happens every so many steps, 0 = never, and also where `always` holds, happens now."""
    return every > 0 and (always or step % every == 0)


@contextlib.contextmanager
def _hot() -> Iterator[None]:
    """Within it, copies between host and devices that nobody asked for are errors, and so is compiling again."""
    with jax.transfer_guard("disallow"), jax.no_tracing():
        yield
