"""What is in a run's checkpoints, who may write them, and how are they or parts of them read?

    workdir/checkpoints/<step>/state   TrainState, as Orbax arrays
                              /data    position in the data: the number of global batches consumed
                              /meta    configuration, version, parameter count, hashes of data order and frozen networks

Saving is asynchronous and atomic: a step's folder gets its name when everything in it is written.
"""

import contextlib
import itertools
import json
import logging as python_logging
import os
import pathlib
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import optax
import orbax.checkpoint as ocp
from absl import logging
from ml_collections import ConfigDict
from orbax.checkpoint import checkpoint_managers as policies

from deco_jax.config import restore_config, save_config
from deco_jax.errors import UsageError
from deco_jax.parallel import processes
from deco_jax.storage import locked, wait_until

FOLDER = "checkpoints"
ITEMS = ("state", "data", "meta")
TOKEN = ".first_process"


@contextlib.contextmanager
def exclusive(workdir: pathlib.Path) -> Iterator[None]:
    """Within it, this run alone uses `workdir`; remains of a save that was cut off are set aside first.

    Raises:
      UsageError: another run uses it, or it is not the same folder on every process.
    """
    token, path = processes.broadcast(f"{os.getpid()} {time.time_ns()}"), workdir / TOKEN

    def lock() -> None:
        if jax.process_index() > 0:
            return
        closing.enter_context(locked(workdir, f"--workdir={workdir}"))
        if jax.process_count() > 1:
            path.write_text(token)  # a file of its own: network folders show what is closed
        _set_aside_incomplete(workdir / FOLDER)

    def find() -> None:
        if jax.process_index() > 0 and not wait_until(lambda: path.is_file() and path.read_text() == token):
            raise UsageError(f"--workdir={workdir} is not the folder that process 0 writes to; it must be shared.")

    with contextlib.ExitStack() as closing:
        processes.agree(lock)
        processes.agree(find)
        yield


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
        first = processes.broadcast(str(self.latest()))

        def sees_it() -> bool:
            if str(self.latest()) != first:
                self.manager.reload()
            return str(self.latest()) == first

        if not wait_until(sees_it):
            raise TimeoutError(f"{self.folder}: process 0 sees checkpoint {first}, this one {self.latest()}")
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
        """The TrainState, onto the devices and shardings that `abstract` (ShapeDtypeStructs) names."""
        chained = _is_chained(self.meta(step))
        stored = abstract.replace(opt_state=(optax.EmptyState(), abstract.opt_state)) if chained else abstract
        state = self.manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(stored))).state
        return state.replace(opt_state=state.opt_state[1]) if chained else state

    def wait(self) -> None:
        """Returns when everything saved is on disk."""
        self.manager.wait_until_finished()

    def close(self) -> None:
        """Waits, and lets go of the manager."""
        self.manager.close()


def restore_part(folder: pathlib.Path, step: int, abstract: dict[str, Any]) -> dict[str, Any]:
    """Reads only the parts of a state that `abstract` names (for instance {"ema": …}), and nothing else from disk."""
    chained = "opt_state" in abstract and _is_chained(read_meta(folder, step))
    if chained:
        abstract = abstract | {"opt_state": (optax.EmptyState(), abstract["opt_state"])}
    restore_args = jax.tree.map(lambda x: ocp.ArrayRestoreArgs(sharding=x.sharding, global_shape=x.shape), abstract)
    args = ocp.args.PyTreeRestore(abstract, restore_args=restore_args, partial_restore=True)
    with ocp.PyTreeCheckpointer() as reader:
        part = reader.restore(folder / str(step) / "state", args=args)
    return part | {"opt_state": part["opt_state"][1]} if chained else part


def _is_chained(meta: dict[str, Any]) -> bool:
    """Whether the optimiser's state is (nothing, AdamW's), as clipping made it while configurations had no version."""
    return "config_version" not in meta and restore_config(meta).optimizer.clip_norm > 0


def find_checkpoint(path: str) -> tuple[pathlib.Path, int]:
    """Where a workdir's newest checkpoint lies, or the one at `path` itself: (folder of checkpoints, step).

    Raises:
      UsageError: there is none.
    """
    given = pathlib.Path(path).expanduser().absolute()
    for folder in (given / FOLDER, given):
        if steps := [int(p.name) for p in _step_folders(folder) if _is_complete(p)]:
            return folder, max(steps)
    if given.name.isdigit() and _is_complete(given):
        return given.parent, int(given.name)
    what = "holds no finished checkpoint" if given.exists() else "does not exist"
    raise UsageError(f"{path} {what}; expected a workdir of `deco train` or one of its checkpoints/<step>.")


def read_meta(folder: pathlib.Path, step: int) -> dict[str, Any]:
    """The meta of a checkpoint found by `find_checkpoint`."""
    with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as reader:
        return reader.restore(folder / str(step) / "meta")


def read_config(folder: pathlib.Path, step: int) -> ConfigDict:
    """The whole configuration of the run that wrote a checkpoint, whichever version it was.

    Raises:
      UsageError: see `restore_config`.
    """
    return restore_config(read_meta(folder, step), folder / str(step))


def frozen_digests(meta: Mapping[str, Any]) -> dict[str, str]:
    """The hashes of frozen networks in a meta; up to version 0.1.0 there was the teacher's alone."""
    teacher = meta.get("teacher")
    return meta.get("frozen", {"teacher": teacher} if teacher else {})


def make_meta(
    config: ConfigDict, fingerprint: str, parameters: int, version: str, frozen: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """What is stored beside a state; `frozen` are the hashes of the networks that worked in its steps, by name."""
    return {
        **save_config(config),
        "fingerprint": fingerprint,
        "parameters": parameters,
        "version": version,
        "frozen": dict(frozen or {}),
    }


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
