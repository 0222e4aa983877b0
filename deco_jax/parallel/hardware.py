"""Which accelerators does this machine have, and what do their makers promise of them?"""

import dataclasses
import importlib.util
import os
import pathlib

import jax

GIB = 2**30
PCI = pathlib.Path("/sys/bus/pci/devices")
GOOGLE = "0x1ae0"  # as a maker of PCI devices
# Its TPUs that jax 0.12 knows, from v2 to 8.
TPUS = {"0x0027", "0x0056", "0x005e", "0x0062", "0x0063", "0x006f", "0x0076", "0x007c", "0x0083"}
OTHERS = ("/dev/nvidia0", "/dev/nvidiactl", "/dev/dxg", "/dev/kfd")  # what a machine with a GPU has one of
LIBRARIES = ("libtpu", "jax_cuda12_plugin", "jax_cuda13_plugin")


@dataclasses.dataclass(frozen=True)
class Accelerator:
    """One device as JAX counts devices."""

    kind: str  # how its `device_kind` begins
    flops: float  # dense bf16 matrix products, FLOP/s
    hbm: float  # bytes that a program may use
    hbm_bandwidth: float  # bytes/s
    network: float  # bytes/s to its neighbours, one direction, all links together: ICI or NVLink
    devices_per_chip: int = 1
    sides: int = 0  # a TPU's topology is written with so many numbers; 0 = a GPU
    # Of a GPU: compute capability, multiprocessors, fp32 units and shared memory (KiB) of one, L2 (bytes), clock (GHz).
    chip: tuple[int, int, int, int, int, float] | None = None


# TPUs: cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}, read in stored copies on 2026-11-23. ICI is half of what they
# call "bidirectional ICI bandwidth per chip"; for v4, where nothing stands, 6 links of 50 GB/s. `hbm` is what libtpu
# 0.0.42.1 calls available when a program is too large; of v4, with a chip's two cores as one device, as on Cloud TPU.
# A TPU7x chip is two devices.
# GPUs: NVIDIA's data sheets and architecture papers of the SXM modules; NVLink is half the bidirectional figure. `hbm`
# is 0.9 of the memory that CUDA reports, as launch/common.sh lets JAX take (alone it would take 0.75).
ACCELERATORS = {
    "v4": Accelerator("TPU v4", 275e12, 30.75 * GIB, 1200e9, 300e9, sides=3),
    "v5e": Accelerator("TPU v5 lite", 197e12, 15.75 * GIB, 819e9, 200e9, sides=2),
    "v5p": Accelerator("TPU v5", 459e12, 95.74 * GIB, 2765e9, 600e9, sides=3),
    "v6e": Accelerator("TPU v6 lite", 918e12, 31.25 * GIB, 1638e9, 400e9, sides=2),
    "tpu7x": Accelerator("TPU7x", 2307e12 / 2, 94.75 * GIB, 7380e9 / 2, 600e9 / 2, devices_per_chip=2, sides=3),
    "a100": Accelerator("NVIDIA A100", 312e12, 0.9 * 85.1e9, 2039e9, 300e9, chip=(8, 108, 64, 164, 40 * 2**20, 1.41)),
    "h100": Accelerator("NVIDIA H100", 989e12, 0.9 * 84.9e9, 3350e9, 450e9, chip=(9, 132, 128, 228, 50 * 2**20, 1.98)),
    "h200": Accelerator("NVIDIA H200", 989e12, 0.9 * 151e9, 4800e9, 450e9, chip=(9, 132, 128, 228, 50 * 2**20, 1.98)),
    "b200": Accelerator("NVIDIA B200", 2250e12, 0.9 * 191e9, 8e12, 900e9, chip=(10, 148, 128, 228, 126 * 2**20, 1.965)),
}


def peak_flops(device: jax.Device) -> float | None:
    """Peak bf16 FLOP/s of a device, None where it is not known (a CPU, say)."""
    matches = [known for known in ACCELERATORS.values() if device.device_kind.startswith(known.kind)]
    return max(matches, key=lambda known: len(known.kind)).flops if matches else None


def has_tpu() -> bool:
    """Whether this machine has TPU chips, and the library for them. Google's network cards and disks are none."""

    def says(device: pathlib.Path, what: str) -> str:
        return (device / what).read_text().strip()

    devices = PCI.iterdir() if PCI.is_dir() else ()
    chips = (says(device, "vendor") == GOOGLE and says(device, "device") in TPUS for device in devices)
    return importlib.util.find_spec("libtpu") is not None and any(chips)


def skip_absent_accelerators() -> None:
    """On a machine without accelerators, their libraries (`deco plan` uses them) are not asked: they would complain.

    Call it before anything touches JAX's devices. JAX_PLATFORMS, where set, wins.
    """
    installed = any(importlib.util.find_spec(name) for name in LIBRARIES)
    if installed and not (jax.config.jax_platforms or has_tpu() or any(map(os.path.exists, OTHERS))):
        jax.config.update("jax_platforms", "cpu")
