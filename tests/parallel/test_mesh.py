"""The mesh and what is split over it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from ml_collections import ConfigDict

from deco_jax.config import default_config
from deco_jax.errors import UsageError
from deco_jax.parallel import hardware
from deco_jax.parallel import mesh as meshes
from deco_jax.training.start import abstract_state
from deco_jax.training.step import make_trainer

pytestmark = pytest.mark.usefixtures("quick_compile")


def sizes(data=-1, fsdp=1, tensor=1, slices=1):
    return ConfigDict({"slices": slices, "data": data, "fsdp": fsdp, "tensor": tensor})


def test_one_axis_takes_the_rest():
    assert dict(meshes.make_mesh(sizes(fsdp=4)).shape) == {"data": 2, "fsdp": 4, "tensor": 1}
    assert dict(meshes.make_mesh(sizes(data=1, fsdp=2, tensor=-1)).shape) == {"data": 1, "fsdp": 2, "tensor": 4}


@pytest.mark.parametrize(
    "mesh, message",
    [
        (sizes(fsdp=3), "mesh.slices=1, mesh.data=-1, mesh.fsdp=3, mesh.tensor=1 do not multiply to the 8 devices"),
        (sizes(data=2), "do not multiply to the 8 devices"),
        (sizes(data=-1, fsdp=-1), "one of data, fsdp, tensor may be -1"),
        (sizes(fsdp=-2), "sizes are positive"),
    ],
)
def test_sizes_that_do_not_fit_are_named(mesh, message):
    with pytest.raises(UsageError, match=message):
        meshes.make_mesh(mesh)


def test_full_size_parameters_are_split_with_their_moments_and_average():
    config = default_config()
    trainer, mesh = make_trainer(config), meshes.make_mesh(sizes(fsdp=4, tensor=2))
    state = abstract_state(trainer, mesh)
    block = state.params["network"]["transformer"]["layers"]["block"]
    assert block["attention"]["qkv"]["kernel"].sharding.spec == PartitionSpec(None, ("fsdp",), None, ("tensor",), None)
    assert block["mlp"]["down"]["kernel"].sharding.spec == PartitionSpec(None, ("tensor",), ("fsdp",))
    assert block["attention"]["key_norm"]["scale"].sharding.spec == PartitionSpec()
    params = jax.tree.leaves(state.params["network"])
    for tree in (state.ema, state.opt_state[0].mu["network"], state.opt_state[0].nu["network"]):
        for a, b in zip(params, jax.tree.leaves(tree), strict=True):
            assert (a.sharding, a.shape) == (b.sharding, b.shape)
    on_one = sum(x.sharding.shard_shape(x.shape) and np.prod(x.sharding.shard_shape(x.shape)) for x in params)
    assert on_one < 0.25 * sum(x.size for x in params)


def test_placed_batches_are_split_and_fetched_whole():
    mesh = meshes.make_mesh(sizes(fsdp=4))
    x = np.arange(32).reshape(16, 2)
    placed = meshes.place_batch({"x": x}, mesh, meshes.host_rows(mesh, 16), 16)["x"]
    assert {s.data.shape for s in placed.addressable_shards} == {(2, 2)}
    np.testing.assert_array_equal(meshes.fetch(placed + jnp.int32(1), mesh), x + 1)


@pytest.mark.parametrize(
    "kind, peak", [("TPU v5 lite", 197e12), ("TPU v5p", 459e12), ("NVIDIA H100 80GB HBM3", 989e12), ("cpu", None)]
)
def test_peak_speeds(kind, peak):
    class Device:
        device_kind = kind

    assert hardware.peak_flops(Device()) == peak
