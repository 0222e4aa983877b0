"""Makes the programs' texts that test_cost.py reads: gradients of a small stack of layers, compiled for hardware.

  JAX_PLATFORMS=cpu python tests/planning/data/make.py [NAME ...]

Needs the extras tpu and plan-gpu. Made on 2026-11-25 with jax 0.10.2, libtpu 0.0.42.1, jax-cuda13-plugin 0.10.2.
"""

import gzip
import pathlib
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from deco_jax.planning.plan import OPTIONS
from deco_jax.planning.topology import make_devices, parse_topology

LAYERS, WIDTH = 4, 1024
# name: (topology, slices, data × fsdp, accumulation steps)
PROGRAMS = {
    "v5e_mixed": ("v5e:16x16", 1, (16, 16), 1),
    "v5e_accumulation": ("v5e:4x4", 1, (16, 1), 2),
    "v5e_slices": ("v5e:2x2", 2, (8, 1), 1),
    "tpu7x_data": ("tpu7x:4x4x4", 1, (128, 1), 1),
    "h100_data": ("h100:8", 1, (8, 1), 1),
    "h100_fsdp": ("h100:8", 1, (1, 8), 1),
}


def compiled(name):
    """Gradients of dense layers; kernels (LAYERS, WIDTH, WIDTH) bf16 split over fsdp, 256 rows per device."""
    topology, slices, shape, parts = PROGRAMS[name]
    place = parse_topology(topology, slices)
    devices = np.array(make_devices(place)).reshape(shape)
    mesh = Mesh(devices, ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)

    def loss(kernels, x):
        x, _ = jax.lax.scan(lambda x, kernel: (jnp.tanh(x @ kernel), None), x, kernels)
        return (x.astype(jnp.float32) ** 2).mean()

    def gradients(kernels, x):
        if parts == 1:
            return jax.grad(loss)(kernels, x)
        x = x.reshape(-1, parts, WIDTH).swapaxes(0, 1)
        zeros = jnp.zeros(kernels.shape, jnp.float32)
        return jax.lax.scan(lambda total, x: (total + jax.grad(loss)(kernels, x), None), zeros, x)[0]

    def like(*dims, spec):
        return jax.ShapeDtypeStruct(dims, jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec(*spec)))

    kernels = like(LAYERS, WIDTH, WIDTH, spec=(None, "fsdp"))
    x = like(256 * mesh.size, WIDTH, spec=(("data", "fsdp"),))
    step = jax.jit(gradients, out_shardings=kernels.sharding)
    return step.lower(kernels, x).compile(OPTIONS.get(place.platform))


if __name__ == "__main__":
    for name in sys.argv[1:] or PROGRAMS:
        text = re.sub(r"\nFileNames\n.*?\n\n\n", "\n", compiled(name).as_text(), flags=re.S)
        path = pathlib.Path(__file__).with_name(f"{name}.hlo.gz")
        path.write_bytes(gzip.compress(text.encode(), mtime=0))
        print(f"{path.name}: {len(text):,} characters, {path.stat().st_size:,} bytes")
