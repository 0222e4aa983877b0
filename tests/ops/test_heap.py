"""Memory that a program on a CPU frees serves the next one."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
from deco_jax.ops.heap import keep_freed_memory
assert "numpy" not in sys.modules and "jax" not in sys.modules, "too late: their threads have heaps of their own"
if sys.argv[1] == "keep":
    assert keep_freed_memory()
import jax, jax.numpy as jnp
step = jax.jit(lambda x: jnp.sum(jax.lax.fori_loop(0, 2, lambda i, big: big[::-1] + i, jnp.zeros((16, 2**20)) + x)))
x = jnp.float32(1)
faults = []
for _ in range(6):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    step(x).block_until_ready()
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(min(faults))
"""


def page_faults(mode):
    """Of a program with temporaries of 64 MiB and more; the fewest, as the last call may not have freed its own yet."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.getcwd()}
    environment.pop("GLIBC_TUNABLES", None)
    done = subprocess.run([sys.executable, "-c", PROGRAM, mode], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only glibc has these options")
def test_the_next_step_finds_its_memory_where_the_last_one_left_it():
    """Else the kernel clears 16,384 pages of 4 KiB or more: a quarter of a training step's time on a CPU."""
    kept, given_back = page_faults("keep"), page_faults("leave")
    assert kept < 2000, f"{kept} page faults: memory goes back to the kernel all the same"
    assert given_back > 10000, f"{given_back} page faults without it: XLA keeps memory by itself now; drop ops/heap.py"
