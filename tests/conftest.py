"""Eight simulated devices for every test, one compilation cache for all of them."""

import importlib.metadata
import os
import tempfile

# Tests and the processes they start compile the same small programs again and again.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", tempfile.mkdtemp(prefix="deco_jax_tests_"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
# What is tested is what a program computes; compiling takes most of the time, and optimising half of that.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")  # where libtpu or CUDA is installed, too
if importlib.metadata.version("jaxlib").startswith("0.10."):  # XLA's older code for CPUs compiles sooner
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_use_fusion_emitters=false"

import jax

jax.config.update("jax_num_cpu_devices", 8)

import json

import orbax.checkpoint as ocp
import pytest

from tests.bucket import bucket, emulator  # noqa: F401
from tests.helpers import GOLDEN, new_tiny_config

# Of an array that eight devices hold each writes an eighth: thousands of slices for a tiny network, most of a save's
# time. Runs of several processes, which are started, save as users do.
ocp.type_handlers.get_type_handler(jax.Array)._min_slice_bytes_for_replica_parallel = 2**20


@pytest.fixture(scope="module")
def optimised():
    """For tests of programs as users compile them."""
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.clear_caches()  # whose keys do not tell the two apart
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.clear_caches()
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture
def tiny_config():
    return new_tiny_config()


@pytest.fixture(scope="session")
def full_size_shapes():
    """{network: {PyTorch name: shape}} of the published sizes."""
    return json.loads((GOLDEN / "full_size_state_dict_shapes.json").read_text())


SLOW = (
    "test_processes",
    "test_cli",
    "test_loop",
    "test_before_redesign",
    "test_bucket",
    "test_resume",
    "test_equivalence",
    "test_plan",
    "test_scripts",
    "test_convert",
)


def pytest_collection_modifyitems(items):
    """Long files first, so that both workers end at about the same time."""
    items.sort(key=lambda item: SLOW.index(item.path.stem) if item.path.stem in SLOW else len(SLOW))
