"""Which hardware, that is not here, does `--topology` name? Devices that stand for it."""

import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import os
import re
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental import topologies

from deco_jax.errors import UsageError
from deco_jax.parallel.hardware import ACCELERATORS, Accelerator

PLANES = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")  # slices of TPUs wired in two dimensions
SIDES = {2, *range(4, 25, 4)}  # of those wired in three; a single host, 2x2x1, is allowed as well
NODE = 8  # GPUs that NVLink connects
# (package, extra that brings it)
COMPILERS = {"tpu": ("libtpu", "tpu"), "gpu": ("jax-cuda13-plugin", "plan-gpu"), "cpu": ("", "")}


@dataclasses.dataclass(frozen=True)
class Topology:
    """Hardware to plan for."""

    name: str  # v5e:4x4, h100:8, cpu:8
    slices: int  # so many of them, behind a slower network
    platform: str  # tpu, gpu or cpu
    accelerator: Accelerator | None  # None for simulated devices

    @property
    def compiler(self) -> str:
        """What compiles for it, and its version."""
        package, _ = COMPILERS[self.platform]
        return f"{package} {importlib.metadata.version(package)}" if package else "XLA for CPUs"


def parse_topology(name: str, slices: int = 1) -> Topology:
    """Reads `--topology` and `--slices` of `deco plan`.

    Raises:
      UsageError: there is no such hardware.
    """
    if slices < 1:
        raise UsageError(f"--slices={slices} must be 1 or more.")
    kind, _, size = name.partition(":")
    sides = [int(side) for side in size.split("x")] if re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", size) else []
    accelerator = ACCELERATORS.get(kind)
    dimensions = accelerator.sides if accelerator else 0
    if (accelerator is None and kind != "cpu") or (not dimensions and len(sides) != 1):
        gpus = ", ".join(f"{kind}:{NODE}" for kind, known in ACCELERATORS.items() if not known.sides)
        raise UsageError(
            f"--topology={name} is not known. TPU slices: v4:2x2x4, v5p:2x2x4, tpu7x:2x2x1 (AxBxC chips), v5e:4x4, "
            f"v6e:4x4 (AxB chips); GPUs: {gpus}; simulated devices: cpu:8."
        )
    has = ""
    if dimensions == 2 and size not in PLANES:
        has = f"has {', '.join(PLANES)}"
    elif dimensions == 3 and size != "2x2x1" and (len(sides) != 3 or not set(sides) <= SIDES):
        has = "has 2x2x1, and AxBxC with sides of 2 or a multiple of 4 up to 24: 2x2x2, 2x2x4, 2x4x4, 4x4x4, 4x4x8, …"
    elif accelerator and not dimensions and sides[0] > NODE:
        has = f"comes in nodes of up to {NODE}; --slices=2 plans for two"
    if has:
        raise UsageError(f"--topology={name} does not exist; {kind} {has}.")
    return Topology(name, slices, "tpu" if dimensions else "gpu" if accelerator else "cpu", accelerator)


def make_devices(topology: Topology) -> Sequence[Any]:
    """Devices to lay a mesh over: descriptions of TPUs and GPUs, or this machine's simulated ones.

    Raises:
      UsageError: the compiler is not installed, or this process has fewer simulated devices already.
    """
    kind, _, size = topology.name.partition(":")
    package, extra = COMPILERS[topology.platform]
    if package and importlib.util.find_spec(package.replace("-", "_")) is None:
        raise UsageError(
            f"--topology={topology.name} needs {package}, which compiles for {topology.platform.upper()}s on any Linux "
            f"machine with an x86 CPU; it comes with the extra `{extra}`: pip install -e '.[{extra}]' in the "
            "repository."
        )
    if topology.platform == "tpu":
        os.environ.update(
            TPU_SKIP_MDS_QUERY="1",  # do not ask a cloud machine what it is
            ALLOW_MULTIPLE_LIBTPU_LOAD="1",  # no TPU is opened, so two plans at a time are safe
            TPU_ACCELERATOR_TYPE="v5litepod-4",  # this and the rest keep it from warning; the topology says which TPU
            TPU_WORKER_HOSTNAMES="localhost",
            TPU_MIN_LOG_LEVEL="3",
            TPU_STDERR_LOG_LEVEL="3",
        )
        options = {"num_slices": topology.slices} if topology.slices > 1 else {}
        if kind == "v4":
            options["chip_config_name"] = "megacore"  # a chip's two cores as one device, as on Cloud TPU
        if size == "1x1":
            options["chips_per_host_bounds"] = [1, 1, 1]
        return topologies.get_topology_desc(platform="tpu", topology_name=topology.name, **options).devices
    if topology.platform == "gpu":
        shape = f"{topology.slices}x1x{size}"  # NVLink domains × hosts in one × GPUs of a host
        target = _gpu_target(topology.accelerator)
        return topologies.get_topology_desc("", "cuda", topology=shape, target_config=target).devices
    number = int(size) * topology.slices
    with contextlib.suppress(RuntimeError):  # the backend has started: a program calls this, not the command line
        jax.config.update("jax_num_cpu_devices", number)
    if (there := len(jax.devices("cpu"))) < number:
        raise UsageError(f"--topology={topology.name}: this process has {there} simulated devices.")
    return jax.devices("cpu")[:number]


def _gpu_target(gpu: Accelerator) -> str:
    """A GPU for XLA's compiler: a GpuTargetConfigProto as text."""
    capability, cores, units, shared, cache, clock = gpu.chip
    return f"""gpu_device_info {{
      cuda_compute_capability {{major: {capability} minor: 0}} core_count: {cores} fpus_per_core: {units}
      clock_rate_ghz: {clock} memory_bandwidth: {gpu.hbm_bandwidth:.0f} device_memory_size: {gpu.hbm / 0.9:.0f}
      l2_cache_size: {cache} shared_memory_per_core: {shared * 2**10} shared_memory_per_block: {48 * 2**10}
      shared_memory_per_block_optin: {(shared - 1) * 2**10} threads_per_warp: 32 threads_per_block_limit: 1024
      threads_per_core_limit: 2048 registers_per_core_limit: 65536 registers_per_block_limit: 65536
      block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
    }} platform_name: "CUDA" dnn_version_info {{major: 9 minor: 10}} device_description_str: "{gpu.kind}" """
