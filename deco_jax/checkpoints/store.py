"""What is in a run's checkpoints, and how are they or parts of them read?

    workdir/checkpoints/<step>/state   TrainState, as Orbax arrays
                              /data    position in the data: the number of global batches consumed, and the bad records
                              /meta    configuration, version, parameter count, hashes of data order and frozen networks
                              /checksums.<process>.json   see `checksums`

Saving is asynchronous and atomic: on a disk a step's folder gets its name when everything in it is written, in a bucket
a file says so (commit_success.txt). Steps that were damaged later are skipped, loudly, and never deleted.
"""

import contextlib
import itertools
import json
import logging as python_logging
import queue
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import optax
import orbax.checkpoint as ocp
from absl import logging
from ml_collections import ConfigDict
from orbax.checkpoint import checkpoint_managers as policies

from deco_jax.checkpoints import checksums
from deco_jax.config import restore_config, save_config
from deco_jax.errors import AgreedError, TransientError, UsageError
from deco_jax.parallel import processes
from deco_jax.storage import AnyPath, is_remote, is_transient, reading, retried, to_path, wait_until

FOLDER = "checkpoints"
ITEMS = ("state", "data", "meta")


class Checkpoints:
    """The checkpoints of one run; every process has one, and they save and restore together."""

    def __init__(self, workdir: AnyPath, keep: int, keep_every: int):
        _quiet_orbax()
        preserve = [policies.LatestN(keep)] + ([policies.EveryNSteps(keep_every)] if keep_every else [])
        self.folder = (workdir if is_remote(workdir) else workdir.absolute()) / FOLDER
        self.manager = ocp.CheckpointManager(
            self.folder,
            item_names=ITEMS,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policies.AnyPreservationPolicy(preserve),
                cleanup_tmp_directories=True,
            ),
        )
        self._noting: threading.Thread | None = None  # writes the checksums of the step that is being saved
        self._news: queue.SimpleQueue[str] = queue.SimpleQueue()

    def latest(self) -> int | None:
        """Step of the newest complete checkpoint."""
        return self.manager.latest_step()

    def agree_on_latest(self) -> int | None:
        """Step of the newest checkpoint that is whole, on every process; newer ones are renamed to <step>.damaged.

        Raises:
          AgreedError: there are checkpoints, and all are damaged.
          TimeoutError: this process does not come to see the one that process 0 sees.
        """
        damaged: dict[int, str] = {}
        while (step := self._newest_but(damaged)) is not None and (problem := self._damage(step)):
            damaged[step] = problem
            logging.warning("%s/%d is damaged and not used: %s.", self.folder, step, problem)
        if not damaged:
            return step
        if step is None:
            listed = "; ".join(f"{step}: {problem}" for step, problem in damaged.items())
            raise AgreedError(
                f"all checkpoints in {self.folder} are damaged ({listed}). Bring one back from a copy, or begin in "
                "another workdir."
            )
        if jax.process_index() == 0:
            for number in damaged:
                _set_aside(self.folder / str(number), "damaged")
        processes.broadcast("")  # they are renamed
        self._wait_to_see(step)
        logging.warning("Goes on from %s/%d.", self.folder, step)
        return step

    def _newest_but(self, damaged: Mapping[int, str]) -> int | None:
        steps = sorted(set(self.manager.all_steps()) - set(damaged))
        first = processes.broadcast(str(steps[-1]) if steps else "")
        if not damaged:
            self._wait_to_see(int(first) if first else None)
        return int(first) if first else None

    def _wait_to_see(self, step: int | None) -> None:
        """Until `step` is this process's newest, as it is that of process 0."""

        def sees_it() -> bool:
            if self.latest() != step:
                self.manager.reload()
            return self.latest() == step

        if not wait_until(sees_it):
            raise TimeoutError(f"{self.folder}: process 0 sees checkpoint {step}, this one {self.latest()}")

    def _damage(self, step: int) -> str:
        """What is wrong with a checkpoint, on every process; each has looked at its share."""
        problem = checksums.damage(self.folder / str(step), jax.process_index(), jax.process_count())
        return next(filter(None, processes.allgather(problem)), "")

    def save(self, step: int, state: Any, meta: dict[str, Any], bad: Sequence[int] = ()) -> None:
        """Starts writing; returns once the arrays are copied from the devices.

        Args:
          step: how many global batches are consumed.
          state: a TrainState.
          meta: see `make_meta`.
          bad: the records that could not be read so far, by number.

        Raises:
          TransientError: the storage fails, now or, with several processes, in the save before.
          UsageError: likewise, for a reason that does not pass by itself: a full disk.
        """
        if step in self.manager.all_steps():
            return
        try:
            self.wait()
        except (TransientError, UsageError) as error:
            if jax.process_count() > 1:
                raise
            logging.warning("%s. Step %d is saved instead.", error, step)
            self.manager.reload()  # it has forgotten what lies there
        with _failure_told(f"saving {self.folder / str(step)}"):
            started = time.monotonic()
            self.manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state),
                    data=ocp.args.JsonSave({"batches": step, "bad": list(bad)}),
                    meta=ocp.args.JsonSave(meta),
                ),
                force=True,
            )
        self._noting = threading.Thread(target=self._note, args=(step, started), daemon=True)
        self._noting.start()

    def _note(self, step: int, started: float) -> None:
        """Waits until a step is saved, writes its checksums, and has news of it."""
        while self.manager.is_saving_in_progress():
            time.sleep(0.1)
        folder = self.folder / str(step)
        try:
            # A network folder may show late what process 0 has renamed. Else an error, which the next `wait` raises.
            if is_complete(folder) or (jax.process_index() and wait_until(lambda: is_complete(folder))):
                seconds = time.monotonic() - started
                size = checksums.note(folder, jax.process_index(), jax.process_count())
                self._news.put(f"Saved: {folder} ({size / 1e6:.1f} MB, {seconds:.1f} s).")
            else:
                logging.warning("%s could not be saved; the next save says why, and is made all the same.", folder)
        except Exception as error:
            logging.warning("The checksums of %s could not be written (%s).", folder, error)

    def news(self) -> list[str]:
        """A line for each checkpoint that was completed since the last call; does not wait."""
        lines = []
        with contextlib.suppress(queue.Empty):
            while True:
                lines.append(self._news.get_nowait())
        return lines

    def meta(self, step: int) -> dict[str, Any]:
        """What `save` was given beside the state."""
        return read_meta(self.folder, step)

    def position(self, step: int) -> int:
        """How many global batches the run had consumed."""
        return _read_json(self.folder, step, "data")["batches"]

    def bad_records(self, step: int) -> list[int]:
        """The records that could not be read up to there, by number; empty if an older version saved it."""
        return _read_json(self.folder, step, "data").get("bad", [])

    def restore(self, step: int, abstract: Any) -> Any:
        """The TrainState, onto the devices and shardings that `abstract` (ShapeDtypeStructs) names.

        Raises:
          TransientError: the storage fails.
          UsageError: it cannot be read.
        """
        chained = _is_chained(self.meta(step))
        stored = abstract.replace(opt_state=(optax.EmptyState(), abstract.opt_state)) if chained else abstract
        with _readable(self.folder / str(step)):
            state = self.manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(stored))).state
        return state.replace(opt_state=state.opt_state[1]) if chained else state

    def wait(self) -> None:
        """Returns when everything saved is on disk, with its checksums.

        Raises:
          TransientError: the storage failed meanwhile.
          UsageError: so did the disk.
        """
        with _failure_told(f"saving to {self.folder}"):
            self.manager.wait_until_finished()
        if self._noting is not None:
            self._noting.join()

    def close(self) -> None:
        """Waits, and lets go of the manager."""
        self.wait()
        self.manager.close()


def restore_part(folder: AnyPath, step: int, abstract: dict[str, Any]) -> dict[str, Any]:
    """Reads only the parts of a state that `abstract` names (for instance {"ema": …}), and nothing else from disk.

    Raises:
      TransientError: the storage fails.
      UsageError: they cannot be read.
    """
    chained = "opt_state" in abstract and _is_chained(read_meta(folder, step))
    if chained:
        abstract = abstract | {"opt_state": (optax.EmptyState(), abstract["opt_state"])}
    restore_args = jax.tree.map(lambda x: ocp.ArrayRestoreArgs(sharding=x.sharding, global_shape=x.shape), abstract)
    args = ocp.args.PyTreeRestore(abstract, restore_args=restore_args, partial_restore=True)
    with _readable(folder / str(step)), ocp.PyTreeCheckpointer() as reader:
        part = reader.restore(folder / str(step) / "state", args=args)
    return part | {"opt_state": part["opt_state"][1]} if chained else part


def _is_chained(meta: dict[str, Any]) -> bool:
    """Whether the optimiser's state is (nothing, AdamW's), as clipping made it while configurations had no version."""
    return "config_version" not in meta and restore_config(meta).optimizer.clip_norm > 0


def find_checkpoint(path: str) -> tuple[AnyPath, int]:
    """Where a workdir's newest whole checkpoint lies, or the one at `path` itself: (folder of checkpoints, step).

    Raises:
      TransientError: the storage fails.
      UsageError: there is none, or the one that `path` names is damaged.
    """
    given = to_path(path)
    given = given if is_remote(given) else given.absolute()
    with reading(given):
        for folder in (given / FOLDER, given):
            if steps := [int(p.name) for p in _step_folders(folder) if is_complete(p)]:
                return folder, _newest_whole(folder, steps)
        if given.name.isdigit() and is_complete(given):
            if problem := checksums.damage(given):
                raise UsageError(f"{path} is damaged: {problem}. Name another checkpoint.")
            return given.parent, int(given.name)
        what = "holds no finished checkpoint" if retried(f"reading {given}", given.exists) else "does not exist"
    raise UsageError(
        f"{path} {what}; expected a workdir of `deco train`, one of its checkpoints/<step>, or a file or Hugging Face "
        "folder of weights."
    )


def _newest_whole(folder: AnyPath, steps: list[int]) -> int:
    problems = []
    for step in sorted(steps, reverse=True):
        problem = checksums.damage(folder / str(step))
        if not problem:
            return step
        logging.warning("%s/%d is damaged and not used: %s.", folder, step, problem)
        problems.append(f"{step}: {problem}")
    raise UsageError(f"all checkpoints in {folder} are damaged ({'; '.join(problems)}).")


def read_meta(folder: AnyPath, step: int) -> dict[str, Any]:
    """The meta of a checkpoint found by `find_checkpoint`."""
    return _read_json(folder, step, "meta")


def _read_json(folder: AnyPath, step: int, item: str) -> dict[str, Any]:
    """As any process may for itself: Orbax's own reading waits for all processes of the run."""
    file = folder / str(step) / item / "metadata"
    with _readable(folder / str(step)):
        return json.loads(retried(f"reading {file}", file.read_text))


def read_config(folder: AnyPath, step: int) -> ConfigDict:
    """The whole configuration of the run that wrote a checkpoint, whichever version it was.

    Raises:
      UsageError: see `restore_config`.
    """
    return restore_config(read_meta(folder, step), folder / str(step))


def newest_meta(workdir: AnyPath) -> dict[str, Any]:
    """The meta of the newest complete checkpoint of which it can be read; {} if there is none.

    Raises:
      TransientError: the storage fails.
      UsageError: the bucket may not be read.
    """
    folder = workdir / FOLDER
    with reading(workdir):
        steps = sorted((int(p.name) for p in _step_folders(folder) if is_complete(p)), reverse=True)
    for step in steps:
        with contextlib.suppress(UsageError):  # what is wrong is said when it is to be resumed
            return read_meta(folder, step)
    return {}


def frozen_digests(meta: Mapping[str, Any]) -> dict[str, str]:
    """The hashes of frozen networks in a meta; up to version 0.1.0 there was the teacher's alone."""
    teacher = meta.get("teacher")
    return meta.get("frozen", {"teacher": teacher} if teacher else {})


def make_meta(
    config: ConfigDict,
    fingerprint: str,
    parameters: int,
    version: str,
    frozen: Mapping[str, str] | None = None,
    class_names: Sequence[str] = (),
) -> dict[str, Any]:
    """What is stored beside a state; `frozen` are the hashes of the networks that worked in its steps, by name."""
    return {
        **save_config(config),
        "fingerprint": fingerprint,
        "parameters": parameters,
        "version": version,
        "frozen": dict(frozen or {}),
        "class_names": list(class_names),
    }


def is_complete(step_folder: AnyPath) -> bool:
    """Whether everything of a step was written. Orbax notes the time of the commit last.

    Raises:
      TransientError: the storage fails.
    """
    file = step_folder / "_CHECKPOINT_METADATA"
    try:
        metadata = json.loads(retried(f"reading {file}", file.read_text))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return False
    needed = [step_folder / item for item in ITEMS]
    if is_remote(step_folder):
        needed.append(step_folder / "commit_success.txt")
    return bool(metadata.get("commit_timestamp_nsecs")) and all(retried(f"reading {p}", p.exists) for p in needed)


def set_aside_incomplete(workdir: AnyPath) -> None:
    """Renames what a save that was cut off left on a disk; in a bucket Orbax does not take that for a step."""
    for path in [] if is_remote(workdir) else _step_folders(workdir / FOLDER):
        if not is_complete(path):
            logging.warning("%s is incomplete; renamed to %s.", path, _set_aside(path, "incomplete").name)


def _set_aside(path: AnyPath, ending: str) -> AnyPath:
    names = (path.with_name(f"{path.name}.{ending}{n or ''}") for n in itertools.count())
    aside = next(name for name in names if not name.exists())
    path.rename(aside)
    return aside


def _step_folders(folder: AnyPath) -> list[AnyPath]:
    def find() -> list[AnyPath]:
        return [p for p in folder.iterdir() if p.name.isdigit()] if folder.is_dir() else []

    return retried(f"reading {folder}", find)


@contextlib.contextmanager
def _readable(path: AnyPath) -> Iterator[None]:
    """Within it, what a library says of a checkpoint that it cannot read is one line."""
    with _transient_told(f"reading {path}"):
        try:
            yield
        except Exception as error:  # Orbax raises bare ones
            if _is_clear(error):
                raise
            raise UsageError(f"{path} cannot be read: {_reason(error)}. Name an earlier checkpoint.") from error


@contextlib.contextmanager
def _failure_told(what: str) -> Iterator[None]:
    """Within it, what a library says when it cannot write is one line."""
    with _transient_told(what):
        try:
            yield
        except Exception as error:  # TensorStore has bare ones, for a full disk too
            if _is_clear(error):
                raise
            raise UsageError(f"{what} failed: {_reason(error)}") from error


@contextlib.contextmanager
def _transient_told(what: str) -> Iterator[None]:
    """Within it, errors that may pass, of which libraries have tried again what could be, are TransientErrors."""
    try:
        yield
    except TransientError:
        raise
    except Exception as error:
        if not is_transient(error):
            raise
        raise TransientError(f"{what} failed ({_reason(error)})") from error


def _is_clear(error: BaseException) -> bool:
    """Whether `error` says what it is, and no file is to blame: jax's collectives raise bare ones too."""
    kinds = UsageError | MemoryError | jax.errors.JaxRuntimeError
    if isinstance(error, kinds) or is_transient(error):
        return True
    return processes.says_loss(error) and jax.process_count() > 1  # in this order: counting starts jax


def _reason(error: BaseException) -> str:
    """What was wrong in the first place, in one line; libraries add pages of their settings."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def _quiet_orbax() -> None:
    """Orbax logs its every step through absl; only its warnings concern a user, and errors are told where they end."""
    for name in ("absl", "orbax"):
        python_logging.getLogger(name).setLevel(python_logging.WARNING)
    python_logging.getLogger("absl").addFilter(_without_traceback)


def _without_traceback(record: python_logging.LogRecord) -> bool:
    return not (record.exc_info and "orbax" in record.pathname)
