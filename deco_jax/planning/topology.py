"""Hardware that is not here: names of slices and nodes, and devices that stand for theirs."""

import dataclasses
import importlib.util
import os
import re
from collections.abc import Sequence
from typing import Any

import jax

from deco_jax.errors import UsageError
from deco_jax.parallel.hardware import ACCELERATORS, Accelerator

PLANES = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")  # slices of TPUs wired in two dimensions
SIDES = (2, *range(4, 25, 4))  # of those wired in three; a single host, 2x2x1, is allowed as well


@dataclasses.dataclass(frozen=True)
class Topology:
    """Hardware to plan for."""

    name: str  # v5e:4x4, h100:8, cpu:8
    slices: int  # so many of them, behind a slower network

    @property
    def kind(self) -> str:
        """What stands before the colon."""
        return self.name.partition(":")[0]

    @property
    def size(self) -> str:
        """What stands after it."""
        return self.name.partition(":")[2]

    @property
    def accelerator(self) -> Accelerator | None:
        """None for a simulated mesh."""
        return ACCELERATORS.get(self.kind)

    @property
    def is_tpu(self) -> bool:
        """Whether its compiler may be here."""
        return self.accelerator is not None and self.accelerator.sides > 0

    @property
    def is_gpu(self) -> bool:
        """Whether it can only be estimated."""
        return self.accelerator is not None and self.accelerator.sides == 0


def parse_topology(name: str, slices: int = 1) -> Topology:
    """Reads `--topology` and `--slices` of `deco plan`.

    Raises:
      UsageError: there is no such hardware.
    """
    if slices < 1:
        raise UsageError(f"--slices={slices} must be 1 or more.")
    topology = Topology(name, slices)
    size = topology.size
    sides = [int(side) for side in size.split("x")] if re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", size) else []
    if not topology.is_tpu:
        if (topology.kind != "cpu" and not topology.is_gpu) or len(sides) != 1:
            gpus = ", ".join(f"{kind}:8" for kind, known in ACCELERATORS.items() if not known.sides)
            raise UsageError(
                f"--topology={name} is not known. TPU slices: v4:2x2x4, v5p:2x2x4, tpu7x:2x2x1 (AxBxC chips), v5e:4x4, "
                f"v6e:4x4 (AxB chips); estimates for GPUs: {gpus}; simulated devices: cpu:8."
            )
    elif topology.accelerator.sides == 2 and size not in PLANES:
        raise UsageError(f"--topology={name} does not exist; {topology.kind} has {', '.join(PLANES)}.")
    elif topology.accelerator.sides == 3 and size != "2x2x1" and (len(sides) != 3 or not set(sides) <= set(SIDES)):
        raise UsageError(
            f"--topology={name} does not exist; {topology.kind} has 2x2x1, and AxBxC with sides of 2 or a multiple of "
            "4 up to 24: 2x2x2, 2x2x4, 2x4x4, 4x4x4, 4x4x8, …"
        )
    return topology


def make_devices(topology: Topology) -> Sequence[Any]:
    """Devices to lay a mesh over: descriptions of TPUs, or this machine's simulated ones in place of CPUs and GPUs.

    Raises:
      UsageError: libtpu is not installed, or this process has fewer simulated devices already.
    """
    if topology.is_tpu:
        return _tpu_devices(topology)
    number = int(topology.size) * topology.slices
    try:
        jax.config.update("jax_num_cpu_devices", number)
    except RuntimeError as error:  # the backend has started: a program calls this, not the command line
        if len(jax.devices("cpu")) < number:
            raise UsageError(
                f"--topology={topology.name}: this process has {len(jax.devices('cpu'))} simulated devices."
            ) from error
    return jax.devices("cpu")[:number]


def _tpu_devices(topology: Topology) -> Sequence[Any]:
    if importlib.util.find_spec("libtpu") is None:
        raise UsageError(
            f"--topology={topology.name} needs libtpu, which compiles for TPUs on any Linux machine with an x86 CPU; "
            "it comes with the extra `tpu`: pip install 'deco-jax[tpu]'."
        )
    os.environ.update(
        TPU_SKIP_MDS_QUERY="1",  # do not ask a cloud machine what it is
        ALLOW_MULTIPLE_LIBTPU_LOAD="1",  # no TPU is opened, so two plans at a time are safe
        TPU_ACCELERATOR_TYPE="v5litepod-4",  # this and the rest keep it from warning; the topology says which TPU
        TPU_WORKER_HOSTNAMES="localhost",
        TPU_MIN_LOG_LEVEL="3",
        TPU_STDERR_LOG_LEVEL="3",
    )
    from jax.experimental import topologies

    options = {"num_slices": topology.slices} if topology.slices > 1 else {}
    if topology.kind == "v4":
        options["chip_config_name"] = "megacore"  # a chip's two cores as one device, as on Cloud TPU
    if topology.size == "1x1":
        options["chips_per_host_bounds"] = [1, 1, 1]
    return topologies.get_topology_desc(platform="tpu", topology_name=topology.name, **options).devices
