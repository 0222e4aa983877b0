"""Checkpoints of a run: what is in one, which may be resumed by which configuration, and reading parts of one.

    workdir/checkpoints/<step>/state   TrainState, as Orbax arrays
                              /data    position in the data: the number of global batches consumed
                              /meta    configuration, version, parameter count, hashes of data order and teacher

Saving is asynchronous and atomic: a step's folder gets its name when everything in it is written.
"""

import contextlib
import fcntl
import itertools
import json
import logging as python_logging
import os
import pathlib
import time
from collections.abc import Iterator
from typing import IO, Any

import jax
import orbax.checkpoint as ocp
from absl import logging
from ml_collections import ConfigDict
from orbax.checkpoint import checkpoint_managers as policies

from deco_jax.config import default_config, flatten
from deco_jax.errors import UsageError
from deco_jax.parallel import processes as distributed

FOLDER = "checkpoints"
ITEMS = ("state", "data", "meta")
TOKEN = ".first_process"
SHARED_FOLDER_DELAY = 60  # seconds until a host surely sees what another has written to a network folder
# What may differ between a checkpoint and the run that resumes it; everything else may not.
FREE_FIELDS = (
    "train.",  # but see train.steps in check_resumable
    "sample.",
    "mesh.",
    "teacher.",  # but see the teacher's digest in check_resumable
    "data.workers",
    "data.path",
    "data.max_bad_records",
    "model.remat",
    "model.scan",
    "model.attention",
)


@contextlib.contextmanager
def claim(workdir: pathlib.Path) -> Iterator[None]:
    """Within it, this run alone uses `workdir`; remains of a save that was cut off are set aside first.

    As far as the folder's locks reach: on gcsfuse that is one host.

    Raises:
      UsageError: another run holds it, or it is not the same folder on every process.
    """
    token = distributed.from_first(f"{os.getpid()} {time.time_ns()}")

    def take() -> IO[str] | None:
        if jax.process_index() > 0:
            return None
        workdir.mkdir(parents=True, exist_ok=True)
        lock = (workdir / ".lock").open("a")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UsageError(f"--workdir={workdir} is in use by another process.") from error
        except OSError as error:  # Lustre without -o flock, NFS without a lock daemon
            logging.warning("%s cannot be locked (%s): see to it yourself that one run uses it.", workdir, error)
        if jax.process_count() > 1:
            (workdir / TOKEN).write_text(token)  # a file of its own: network folders show what is closed
        _set_aside_incomplete(workdir / FOLDER)
        return lock

    def look() -> None:
        end = time.monotonic() + SHARED_FOLDER_DELAY
        while jax.process_index() > 0 and not _holds(workdir / TOKEN, token):
            if time.monotonic() > end:
                raise UsageError(f"--workdir={workdir} is not the folder that process 0 writes to; it must be shared.")
            time.sleep(0.5)

    lock = distributed.together(take)
    try:
        distributed.together(look)
        yield
    finally:
        if lock is not None:
            lock.close()


def _holds(path: pathlib.Path, text: str) -> bool:
    return path.is_file() and path.read_text() == text


class Checkpoints:
    """The checkpoints of one run; every process has one, and they save and restore together."""

    def __init__(self, workdir: pathlib.Path, keep: int, keep_every: int):
        _quiet_orbax()
        preserve = [policies.LatestN(keep)] + ([policies.EveryNSteps(keep_every)] if keep_every else [])
        self.folder = workdir.absolute() / FOLDER
        self.manager = ocp.CheckpointManager(
            self.folder,
            item_names=ITEMS,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policies.AnyPreservationPolicy(preserve),
                cleanup_tmp_directories=True,
            ),
        )

    def latest(self) -> int | None:
        """Step of the newest complete checkpoint."""
        return self.manager.latest_step()

    def agree_on_latest(self) -> int | None:
        """`latest` as process 0 sees it; the others wait until they see that one too.

        Raises:
          TimeoutError: they do not.
        """
        first = distributed.from_first(str(self.latest()))
        end = time.monotonic() + SHARED_FOLDER_DELAY
        while str(self.latest()) != first:
            if time.monotonic() > end:
                raise TimeoutError(f"{self.folder}: process 0 sees checkpoint {first}, this one {self.latest()}")
            time.sleep(0.5)
            self.manager.reload()
        return self.latest()

    def save(self, step: int, state: Any, meta: dict[str, Any]) -> None:
        """Starts writing; returns once the arrays are copied from the devices."""
        if step in self.manager.all_steps():
            return
        self.manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state),
                data=ocp.args.JsonSave({"batches": step}),
                meta=ocp.args.JsonSave(meta),
            ),
            force=True,
        )

    def meta(self, step: int) -> dict[str, Any]:
        """What `save` was given beside the state."""
        return self.manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())).meta

    def position(self, step: int) -> int:
        """How many global batches the run had consumed."""
        return self.manager.restore(step, args=ocp.args.Composite(data=ocp.args.JsonRestore())).data["batches"]

    def restore(self, step: int, abstract: Any) -> Any:
        """The state, onto the devices and shardings that `abstract` (ShapeDtypeStructs) names."""
        return self.manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract))).state

    def wait(self) -> None:
        """Returns when everything saved is on disk."""
        self.manager.wait_until_finished()

    def close(self) -> None:
        """Waits, and lets go of the manager."""
        self.wait()
        self.manager.close()


def restore_part(folder: pathlib.Path, step: int, abstract: dict[str, Any]) -> dict[str, Any]:
    """Reads only the parts of a state that `abstract` names (for instance {"ema": …}), and nothing else from disk."""
    restore_args = jax.tree.map(lambda x: ocp.ArrayRestoreArgs(sharding=x.sharding, global_shape=x.shape), abstract)
    args = ocp.args.PyTreeRestore(abstract, restore_args=restore_args, partial_restore=True)
    with ocp.PyTreeCheckpointer() as reader:
        return reader.restore(folder / str(step) / "state", args=args)


def find_checkpoint(path: str) -> tuple[pathlib.Path, int]:
    """Where a workdir's newest checkpoint lies, or the one at `path` itself: (folder of checkpoints, step).

    Raises:
      UsageError: there is none.
    """
    given = pathlib.Path(path).expanduser().absolute()
    for folder in (given / FOLDER, given, given.parent):
        steps = [int(p.name) for p in _step_folders(folder) if _is_complete(p)]
        if folder == given.parent:
            steps = [step for step in steps if given.name == str(step)]
        if steps:
            return folder, max(steps)
    what = "holds no finished checkpoint" if given.exists() else "does not exist"
    raise UsageError(f"{path} {what}; expected a workdir of `deco train` or one of its checkpoints/<step>.")


def read_meta(folder: pathlib.Path, step: int) -> dict[str, Any]:
    """The meta of a checkpoint found by `find_checkpoint`."""
    with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as reader:
        return reader.restore(folder / str(step) / "meta")


def make_meta(config: ConfigDict, fingerprint: str, parameters: int, version: str, teacher: str = "") -> dict[str, Any]:
    """What is stored beside a state; `teacher` is the digest of the one that representations are aligned to."""
    return {
        "config": json.loads(config.to_json_best_effort()),
        "fingerprint": fingerprint,
        "parameters": parameters,
        "version": version,
        "teacher": teacher,
    }


def check_resumable(saved: dict[str, Any], now: dict[str, Any], where: pathlib.Path) -> None:
    """Raises UsageError, listing the fields, if a run described by `now` must not continue the one of `saved`."""
    if saved.get("weights_only"):
        raise UsageError(
            f"{where} holds converted weights without an optimiser's state; start another workdir with "
            f"--config.train.init_from={where}, or convert with --train-state."
        )
    today = flatten(now["config"])
    # A field that is younger than the checkpoint had, in effect, its default.
    defaults = flatten(json.loads(default_config().to_json_best_effort()))
    then = defaults | flatten(saved["config"])
    schedule = ("train.steps",) if today["optimizer.decay_steps"] else ()  # the learning rate's fall depends on it
    changed = [
        f"{field}: {then[field]} there, {today[field]} here"
        for field in sorted(today)
        if then[field] != today[field] and (field in schedule or not field.startswith(FREE_FIELDS))
    ]
    if "decisive" in saved:  # converted: what it was trained on, and how, was not in the file
        changed = [change for change in changed if change.partition(":")[0] in saved["decisive"]]
        if any(change.startswith("loss.alignment") for change in changed):
            changed.append("to train without alignment, convert again with --without-projector")
    elif not changed and saved["fingerprint"] != now["fingerprint"]:
        changed = [f"data fingerprint: {saved['fingerprint']} there, {now['fingerprint']} here (the records changed)"]
    if not changed and saved.get("teacher") and saved["teacher"] != now["teacher"]:
        changed = [f"teacher: weights {saved['teacher']} there, {now['teacher']} here (hashes)"]
    if changed:
        raise UsageError(
            f"{where} was trained with another configuration: {'; '.join(changed)}. Restore these values, or start a "
            "new workdir (with --config.train.init_from to begin from these weights)."
        )


def _step_folders(folder: pathlib.Path) -> list[pathlib.Path]:
    return [p for p in folder.iterdir() if p.name.isdigit()] if folder.is_dir() else []


def _is_complete(step_folder: pathlib.Path) -> bool:
    """Orbax notes the time of the commit last, when everything else is on disk."""
    try:
        metadata = json.loads((step_folder / "_CHECKPOINT_METADATA").read_text())
    except (OSError, ValueError):
        return False
    return bool(metadata.get("commit_timestamp_nsecs")) and all((step_folder / item).is_dir() for item in ITEMS)


def _set_aside_incomplete(folder: pathlib.Path) -> None:
    for path in _step_folders(folder):
        if not _is_complete(path):
            names = (path.with_name(f"{path.name}.incomplete{n or ''}") for n in itertools.count())
            aside = next(name for name in names if not name.exists())
            logging.warning("%s is incomplete; renamed to %s.", path, aside.name)
            path.rename(aside)


def _quiet_orbax() -> None:
    """Orbax logs its every step through absl; only its warnings concern a user."""
    for name in ("absl", "orbax"):
        python_logging.getLogger(name).setLevel(python_logging.WARNING)
