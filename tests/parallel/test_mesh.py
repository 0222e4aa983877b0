"""The mesh and what is split over it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from ml_collections import ConfigDict

from deco_jax.config import build_model, default_config
from deco_jax.encoders.dinov2.model import DINOv2
from deco_jax.errors import UsageError
from deco_jax.models.build import KINDS
from deco_jax.parallel import hardware
from deco_jax.parallel import mesh as meshes
from deco_jax.training.start import abstract_state, check_devices
from deco_jax.training.step import make_train_step


def sizes(data=-1, fsdp=1, tensor=1, slices=1):
    return ConfigDict({"preset": "data", "slices": slices, "data": data, "fsdp": fsdp, "tensor": tensor})


def preset(name, **changes):
    config = default_config().mesh
    config.update(preset=name, **changes)
    return config


class Device:
    """As much of a device as a mesh of several slices looks at."""

    platform, device_kind = "gpu", "imagined"

    def __init__(self, number, slice_index):
        self.id, self.process_index, self.slice_index = number, slice_index, slice_index


def test_one_axis_takes_the_rest():
    assert dict(meshes.make_layout(sizes(fsdp=4)).mesh.shape) == {"data": 2, "fsdp": 4, "tensor": 1}
    assert dict(meshes.make_layout(sizes(data=1, fsdp=2, tensor=-1)).mesh.shape) == {"data": 1, "fsdp": 2, "tensor": 4}


@pytest.mark.parametrize(
    "config, shape",
    [
        (preset("data"), (8, 1, 1)),
        (preset("fsdp"), (1, 8, 1)),
        (preset("fsdp", data=2), (2, 4, 1)),
        (preset("fsdp_tensor"), (1, 4, 2)),
        (preset("fsdp_tensor", tensor=4), (1, 2, 4)),
        (preset("hybrid"), (1, 8, 1)),
        (preset("hybrid", slices=2), (2, 4, 1)),
    ],
)
def test_presets_and_what_is_set_beside_them(config, shape):
    assert tuple(meshes.make_layout(config).mesh.shape.values()) == shape


def test_slices_are_kept_together():
    """FSDP stays within a slice whatever the order of the devices; only the data axis crosses slices."""
    devices = [Device(number, number % 2) for number in range(8)]
    mesh = meshes.make_layout(preset("hybrid"), devices).mesh
    assert mesh.devices.shape == (2, 4, 1)
    assert [{d.slice_index for d in row.flat} for row in mesh.devices] == [{0}, {1}]
    one = meshes.make_layout(preset("fsdp"), devices).mesh
    assert [d.slice_index for d in one.devices.flat] == [0] * 4 + [1] * 4
    with pytest.raises(UsageError, match="mesh.slices=3: the 8 devices here lie in 2 slices"):
        meshes.make_layout(preset("hybrid", slices=3), devices)
    with pytest.raises(UsageError, match=r"slices here have \[4, 3\] devices"):
        meshes.make_layout(preset("hybrid"), devices[:7])


def test_a_preset_of_ones_own(tmp_path):
    file = tmp_path / "mine.py"
    text = "from ml_collections import ConfigDict\ndef get_config():\n    return ConfigDict({sizes})\n"
    file.write_text(text.format(sizes={"data": 2, "fsdp": -1}))
    assert tuple(meshes.make_layout(preset(str(file))).mesh.shape.values()) == (2, 4, 1)
    file.write_text(text.format(sizes={"data": 2, "expert": -1}))
    with pytest.raises(UsageError, match="names the axis 'expert', which does not exist; there are: slices, data"):
        meshes.axis_sizes(preset(str(file)))
    file.write_text("def get_config(:")
    with pytest.raises(UsageError, match=r"mine.py has no get_config\(\) that gives sizes: SyntaxError"):
        meshes.axis_sizes(preset(str(file)))
    with pytest.raises(UsageError, match="mesh.preset='fdsp' does not exist; there are: data, fsdp, fsdp_tensor, hyb"):
        meshes.axis_sizes(preset("fdsp"))


def test_a_preset_of_ones_own_may_replace_rules(tmp_path):
    """Here heads are split over fsdp in place of the width; the batch cannot be moved."""
    file = tmp_path / "mine.py"
    text = "def get_config():\n    return {{'data': 2, 'fsdp': 4, 'rules': {rules}}}\n"
    file.write_text(text.format(rules={"width": None, "heads": "fsdp"}))
    state = abstract_state(make_train_step(default_config()), meshes.make_layout(preset(str(file))))
    for tree in (state.params["network"], state.ema, state.opt_state[0].mu["network"]):
        block = tree["transformer"]["layers"]["block"]
        split = PartitionSpec(None, None, None, ("fsdp",), None)
        assert block["attention"]["qkv"]["kernel"].sharding.spec == split
        assert block["modulation"]["kernel"].sharding.is_fully_replicated
    for rules in ({"batch": "tensor"}, {"mlp": "expert"}, {"mlpp": "tensor"}, {"mlp": 5}):
        file.write_text(text.format(rules=rules))
        with pytest.raises(UsageError, match="mine.py has the rule .*; a rule sends one of activation_width, classes"):
            meshes.make_layout(preset(str(file)))


def test_rules_know_every_logical_axis():
    """Of all networks; one that does not stand in the list could not be named in a preset's rules."""
    found = set()
    inputs = [(build_model(dict_of(kind)), 3) for kind in KINDS] + [(DINOv2(64, 1, 1, registers=1), 1)]
    for model, arguments in inputs:
        given = (jnp.zeros((1, 16, 16, 3)), jnp.zeros(1), jnp.zeros(1, jnp.int32))[:arguments]
        boxed = jax.eval_shape(model.init, jax.random.key(0), *given)
        found |= {axis for leaf in jax.tree.leaves(boxed, is_leaf=meshes.is_boxed) for axis in leaf.names if axis}
    assert len(found) > 10 and found <= meshes.LOGICAL_AXES


def dict_of(kind):
    config = default_config().model
    config.update(kind=kind, width=32, depth=1, heads=2)
    return config


@pytest.mark.parametrize(
    "model, mesh, batch, message",
    [
        ({}, preset("fsdp"), 12, "data.batch_size=12 is not divisible by 8 devices .* nearest: 8 and 16"),
        ({"heads": 2}, preset("fsdp_tensor", tensor=4), 16, "mesh.tensor=4 must divide model.heads=2"),
        ({"width": 24, "heads": 2}, preset("fsdp", fsdp=8), 16, None),
        ({"width": 12, "heads": 1}, preset("fsdp"), 16, "mesh.fsdp=8 does not divide model.width=12.* mesh.fsdp=4"),
    ],
)
def test_runs_that_do_not_fit_the_devices_are_named(tiny_config, model, mesh, batch, message):
    tiny_config.model.update(model)
    tiny_config.data.batch_size = batch
    made = meshes.make_layout(mesh).mesh
    if message is None:
        check_devices(tiny_config, made)
    else:
        with pytest.raises(UsageError, match=message):
            check_devices(tiny_config, made)


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
        meshes.make_layout(mesh)


def test_full_size_parameters_are_split_with_their_moments_and_average():
    config = default_config()
    state = abstract_state(make_train_step(config), meshes.make_layout(sizes(fsdp=4, tensor=2)))
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
    mesh = meshes.make_layout(sizes(fsdp=4)).mesh
    x = np.arange(32).reshape(16, 2)
    placed = meshes.place_batch({"x": x}, mesh, meshes.host_rows(mesh, 16), 16)["x"]
    assert {s.data.shape for s in placed.addressable_shards} == {(2, 2)}
    np.testing.assert_array_equal(meshes.fetch(placed + jnp.int32(1), mesh), x + 1)


def test_messages_of_a_process_reach_all_whatever_the_mesh():
    """One row per device, so that copies on the tensor axis, which may lie in different processes, cannot disagree."""
    mesh = meshes.make_layout(sizes(data=2, fsdp=2, tensor=2)).mesh
    bad = np.array([-1, 7, -1, -1, 5, -1, -1, -1])
    messages = meshes.place_messages(1, bad, mesh, np.arange(8), 8)
    assert {shard.data.shape for shard in messages.addressable_shards} == {(1, 3)}
    np.testing.assert_array_equal(messages[:, 0], np.ones(8))
    np.testing.assert_array_equal(messages[:, 1:], np.repeat(bad.reshape(4, 2), 2, axis=0))


@pytest.mark.parametrize(
    "kind, peak", [("TPU v5 lite", 197e12), ("TPU v5p", 459e12), ("NVIDIA H100 80GB HBM3", 989e12), ("cpu", None)]
)
def test_peak_speeds(kind, peak):
    class Device:
        device_kind = kind

    assert hardware.peak_flops(Device()) == peak
