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
from deco_jax.training.start import abstract_state, check_devices, parameter_table
from deco_jax.training.step import make_trainer

pytestmark = pytest.mark.usefixtures("quick_compile")


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
    assert dict(meshes.make_mesh(sizes(fsdp=4)).shape) == {"data": 2, "fsdp": 4, "tensor": 1}
    assert dict(meshes.make_mesh(sizes(data=1, fsdp=2, tensor=-1)).shape) == {"data": 1, "fsdp": 2, "tensor": 4}


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
    assert tuple(meshes.make_mesh(config).shape.values()) == shape


def test_slices_are_kept_together():
    """FSDP stays within a slice whatever the order of the devices; only the data axis crosses slices."""
    devices = [Device(number, number % 2) for number in range(8)]
    mesh = meshes.make_mesh(preset("hybrid"), devices)
    assert mesh.devices.shape == (2, 4, 1)
    assert [{d.slice_index for d in row.flat} for row in mesh.devices] == [{0}, {1}]
    one = meshes.make_mesh(preset("fsdp"), devices)
    assert [d.slice_index for d in one.devices.flat] == [0] * 4 + [1] * 4
    with pytest.raises(UsageError, match="mesh.slices=3: the 8 devices here lie in 2 slices"):
        meshes.make_mesh(preset("hybrid", slices=3), devices)
    with pytest.raises(UsageError, match=r"slices here have \[4, 3\] devices"):
        meshes.make_mesh(preset("hybrid"), devices[:7])


def test_a_preset_of_ones_own(tmp_path):
    file = tmp_path / "mine.py"
    text = "from ml_collections import ConfigDict\ndef get_config():\n    return ConfigDict({sizes})\n"
    file.write_text(text.format(sizes={"data": 2, "fsdp": -1}))
    assert tuple(meshes.make_mesh(preset(str(file))).shape.values()) == (2, 4, 1)
    file.write_text(text.format(sizes={"data": 2, "expert": -1}))
    with pytest.raises(UsageError, match="names the axis 'expert', which does not exist; there are: slices, data"):
        meshes.axis_sizes(preset(str(file)))
    file.write_text("def get_config(:")
    with pytest.raises(UsageError, match=r"mine.py has no get_config\(\) that gives sizes: SyntaxError"):
        meshes.axis_sizes(preset(str(file)))
    with pytest.raises(UsageError, match="mesh.preset='fdsp' does not exist; there are: data, fsdp, fsdp_tensor, hyb"):
        meshes.axis_sizes(preset("fdsp"))


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
    made = meshes.make_mesh(mesh)
    if message is None:
        check_devices(tiny_config, made)
    else:
        with pytest.raises(UsageError, match=message):
            check_devices(tiny_config, made)


def test_the_table_says_what_lies_on_a_device():
    config = default_config()
    table = parameter_table(make_trainer(config), meshes.make_mesh(preset("fsdp_tensor")))
    (line,) = (line.split("  ") for line in table.splitlines() if "attention/qkv/kernel" in line)
    cells = [cell.strip() for cell in line if cell.strip()]
    assert cells == [
        "network/transformer/layers/block/attention/qkv/kernel",
        "22×1024×3×16×64",
        "layers, width, ·, heads, head_dim",
        "·, fsdp, ·, tensor, ·",
        f"{22 * 1024 * 3 * 1024 * 4 // 8:,}",
    ]
    total = int(table.splitlines()[-1].split()[1].replace(",", ""))
    assert 426_938_019 * 4 / 8 < total < 426_938_019 * 4 / 5  # modulations are split over fsdp only


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


def test_notes_of_a_process_reach_all_whatever_the_mesh():
    """A row a device, so that copies on the tensor axis, which may lie in different processes, cannot disagree."""
    mesh = meshes.make_mesh(sizes(data=2, fsdp=2, tensor=2))
    bad = np.array([-1, 7, -1, -1, 5, -1, -1, -1])
    notes = meshes.place_notes(True, bad, mesh, np.arange(8), 8)
    assert {shard.data.shape for shard in notes.addressable_shards} == {(1, 3)}
    np.testing.assert_array_equal(notes[:, 0], np.ones(8))
    np.testing.assert_array_equal(notes[:, 1:], np.repeat(bad.reshape(4, 2), 2, axis=0))


@pytest.mark.parametrize(
    "kind, peak", [("TPU v5 lite", 197e12), ("TPU v5p", 459e12), ("NVIDIA H100 80GB HBM3", 989e12), ("cpu", None)]
)
def test_peak_speeds(kind, peak):
    class Device:
        device_kind = kind

    assert hardware.peak_flops(Device()) == peak
