"""Several processes as one run: who they are, what they agree on, and how one that is lost ends the others.

Words are those of MPI and of jax.experimental.multihost_utils: broadcast, allgather.
"""

import contextlib
import dataclasses
import os
import re
import socket
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from deco_jax.errors import AgreedError, AgreedTransient, BrokenRun, UsageError
from deco_jax.parallel.hardware import has_tpu
from deco_jax.storage import is_transient, with_causes

T = TypeVar("T")
COORDINATOR = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
MESSAGE_BYTES = 1024  # of what one process tells the others
PASSES = "try again: "  # how the message of an error begins that passes by itself
# In messages, when a process is gone: of collectives and jax's coordination service; and, from jax only, of transport.
SIGNS_OF_LOSS = ("gloo", "nccl", "coordination", "heartbeat")
SIGNS_FROM_JAX = ("connection", "socket closed", "unavailable", "barrier", "process 0")
PATH = re.compile(r"(?<![^\s\"'(\[:=])(\w+:/)?/\S*")  # of a file, or an address: a run's folder may have any name


@dataclasses.dataclass(frozen=True)
class Decision:
    """Whether and how `jax.distributed.initialize` is called."""

    text: str  # what was decided, and from what
    arguments: dict[str, Any] | None  # None = not called: a single process


def decide(environment: Mapping[str, str], tpu_vm: bool) -> Decision:
    """Decides from the environment variables of a process; the first of these that holds:

    an explicit coordinator (JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID; a JobSet sets them on GPUs),
    a SLURM step of several tasks, TPU hosts on GKE (its webhook names them), a TPU VM, a single process.

    Args:
      environment: usually `os.environ`.
      tpu_vm: whether this machine has TPU chips; jax then asks the metadata server for the other hosts.

    Raises:
      UsageError: the explicit coordinator's variables are incomplete or no numbers that fit each other.
    """
    env = environment
    if any(name in env for name in COORDINATOR):
        return _explicit(env)
    if "SLURM_STEP_NODELIST" in env and int(env.get("SLURM_NTASKS", 1)) > 1:
        text = f"SLURM job {env['SLURM_JOB_ID']}, task {env['SLURM_PROCID']} of {env['SLURM_NTASKS']}"
        return Decision(text, {"cluster_detection_method": "slurm", "local_device_ids": _slurm_gpus(env)})
    hosts = (env.get("TPU_PROCESS_ADDRESSES") or env.get("TPU_WORKER_HOSTNAMES") or "").split(",")
    slices = int(env.get("MEGASCALE_NUM_SLICES") or 1)
    if tpu_vm and (len(hosts) > 1 or slices > 1):
        return Decision(f"TPU on GKE, host {env.get('TPU_WORKER_ID')} of {len(hosts)}, {slices} slice(s)", {})
    if tpu_vm and hosts == [""] and "TPU_SKIP_MDS_QUERY" not in env:
        return Decision("TPU VM; its metadata server names the hosts", {})
    return Decision("a single process", None)


def _explicit(env: Mapping[str, str]) -> Decision:
    missing = [name for name in COORDINATOR if not env.get(name)]
    if missing:
        raise UsageError(f"{', '.join(missing)} is not set; an explicit coordinator needs {', '.join(COORDINATOR)}.")
    address, count, index = (env[name] for name in COORDINATOR)
    if not (count.isdigit() and index.isdigit() and int(index) < int(count)):
        raise UsageError(
            f"JAX_NUM_PROCESSES={count} and JAX_PROCESS_ID={index} must be numbers, the second below the first."
        )
    if not address.rpartition(":")[2].isdigit() or ":" not in address:
        raise UsageError(f"JAX_COORDINATOR_ADDRESS={address} must be HOST:PORT of process 0.")
    jobset = f" (JobSet {env['JOBSET_NAME']})" if "JOBSET_NAME" in env else ""
    arguments = {
        "coordinator_address": address,
        "num_processes": int(count),
        "process_id": int(index),
        "cluster_detection_method": "deactivate",  # nothing is left to detect
    }
    return Decision(f"coordinator {address}{jobset}, process {index} of {count}", arguments)


def _slurm_gpus(env: Mapping[str, str]) -> list[int] | None:
    """Which of the GPUs that this task sees it uses. jax alone would take one, also where a node has a single task."""
    visible = [gpu for gpu in env.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu]
    tasks = _tasks_of_nodes(env.get("SLURM_STEP_TASKS_PER_NODE", "1"))[int(env.get("SLURM_NODEID", 0))]
    if not visible:
        return None
    given = "SLURM_GPUS_PER_TASK" in env or "SLURM_TRES_PER_TASK" in env or len(visible) < tasks
    if given:  # each task sees its own only
        return list(range(len(visible)))
    each = len(visible) // tasks
    first = int(env["SLURM_LOCALID"]) * each
    return list(range(first, first + each))


def _tasks_of_nodes(text: str) -> list[int]:
    """SLURM's "4(x2),1" → [4, 4, 1]."""
    parts = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
    return [int(tasks) for tasks, nodes in parts for _ in range(int(nodes or 1))]


def initialize(heartbeat_timeout: int) -> None:
    """Joins this process to the others of its run, if there are any, and prints what was decided.

    Call it before anything else touches JAX's devices.

    Args:
      heartbeat_timeout: seconds of silence after which a process counts as dead and jax ends the others.

    Raises:
      UsageError: jax does not take what the environment says.
      BrokenRun: the others did not come; to be tried again.
    """
    decision = decide(os.environ, has_tpu() and "tpu" in os.environ.get("JAX_PLATFORMS", "tpu"))
    print(f"Processes: {decision.text}.", flush=True)
    if decision.arguments is None:
        return
    try:
        jax.distributed.initialize(
            **decision.arguments,
            heartbeat_timeout_seconds=heartbeat_timeout,
            shutdown_timeout_seconds=heartbeat_timeout,
        )
    except ValueError as error:
        raise UsageError(f"this run ({decision.text}) cannot begin: {error}") from error
    except (RuntimeError, OSError) as error:
        raise BrokenRun(f"the processes of this run ({decision.text}) did not find each other: {error}", 75) from error


def agree(check: Callable[[], T]) -> T:
    """Runs `check` on every process. If it fails on any of them, all raise the same.

    Raises:
      AgreedError: one of them raised a UsageError; another error is this process's alone, and comes through.
      AgreedTransient: one raised an error that may pass by itself, and none a UsageError.
    """
    if jax.process_count() == 1:
        return check()
    result, message = None, ""
    try:
        result = check()
    except UsageError as error:
        message = str(error)
    except Exception as error:
        if isinstance(error, jax.errors.JaxRuntimeError) or not is_transient(error):
            raise
        message = f"{PASSES}{error}"
    said, me = allgather(message), jax.process_index()
    for kind, passes in ((AgreedError, False), (AgreedTransient, True)):
        for index in sorted(range(len(said)), key=lambda index: index != me):  # its own mistake first
            if said[index] and said[index].startswith(PASSES) == passes:
                text = said[index].removeprefix(PASSES)
                raise kind(text if index == me else f"process {index} stopped: {text}")
    return result


def assert_equal(what: str, value: str) -> None:
    """Raises an AgreedError unless `value` is the same on every process."""
    values = allgather(value)
    for index, other in enumerate(values):
        if other != values[0]:
            raise AgreedError(f"{what} of process {index} is {other}, of process 0 {values[0]}.")


def broadcast(value: str) -> str:
    """Process 0's `value`, on every process."""
    return allgather(value)[0]


def allgather(text: str) -> list[str]:
    """The `text` of every process, on every process; cut to MESSAGE_BYTES."""
    if jax.process_count() == 1:
        return [text]
    row = np.frombuffer(text.encode()[:MESSAGE_BYTES].ljust(MESSAGE_BYTES, b"\0"), np.uint8)
    rows = np.asarray(multihost_utils.process_allgather(row, tiled=False))
    return [row.tobytes().rstrip(b"\0").decode(errors="ignore") for row in rows]


@contextlib.contextmanager
def fail_together(closing: contextlib.ExitStack | None = None) -> Iterator[None]:
    """Within it, an error that this process of several has alone ends all of them, instead of leaving them to wait.

    Args:
      closing: what is not to be closed then, since closing would wait for processes that do not come.

    Raises:
      BrokenRun: in place of an error that is not agreed on.
    """
    try:
        yield
    except (AgreedError, AgreedTransient):
        raise
    except BaseException as error:
        if jax.process_count() == 1:
            raise
        if closing is not None:
            closing.pop_all()
        raise broken_run(error) from error


def says_loss(error: BaseException) -> bool:
    """Whether `error`, or what it was raised from, says that another process of this run went away."""
    for one in with_causes(error):
        signs = SIGNS_OF_LOSS
        if isinstance(one, jax.errors.JaxRuntimeError | TimeoutError):
            signs += SIGNS_FROM_JAX
        if any(sign in PATH.sub("", str(one)).lower() for sign in signs):
            return True
    return False


def broken_run(error: BaseException) -> BrokenRun:
    """What `error`, raised by this process of several and not agreed on, means for the run."""
    where = f"process {jax.process_index()} on {socket.gethostname()} stops"
    if isinstance(error, UsageError):
        return BrokenRun(f"{where}: {error}", 2)
    if isinstance(error, KeyboardInterrupt):
        return BrokenRun(f"{where}: Ctrl-C, twice", 130)
    if says_loss(error):
        reason = str(error).strip().splitlines()[0][:300]
        return BrokenRun(f"{where}: another process of this run ended or no longer answers ({reason})", 75)
    if is_transient(error):
        return BrokenRun(f"{where}: {error}", 75)
    return BrokenRun(f"{where}: {type(error).__name__}: {error}", 1)
