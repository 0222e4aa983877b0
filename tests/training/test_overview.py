"""The table at the start of a run: what is shown of the large parameters, and that nothing is lost by folding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import Mesh

from deco_jax.models.build import KINDS
from deco_jax.models.projector import Projector
from deco_jax.parallel.mesh import AXES, Layout
from deco_jax.training.overview import parameter_table

DECO_L = {
    "num_classes": 1000,
    "patch_size": 16,
    "width": 1024,
    "depth": 22,
    "heads": 16,
    "decoder_width": 32,
    "decoder_depth": 3,
}
PIXNERD_L = DECO_L | {"decoder_width": 64, "decoder_depth": 2, "decoder_expansion": 2}


@pytest.fixture
def layout():
    """Eight devices: parameters are split over four, heads and MLP channels over two."""
    return Layout(Mesh(np.array(jax.devices()).reshape(1, 4, 2), AXES))


def boxed_params(kind, sizes):
    """Shapes of a network of this size and of its projector."""
    network, projector = KINDS[kind](**sizes), Projector(768)
    p, key = network.patch_size, jax.random.key(0)
    image, t, label = jnp.zeros((1, p, p, 3)), jnp.zeros(1), jnp.zeros(1, jnp.int32)
    return {
        "network": jax.eval_shape(network.init, key, image, t, label)["params"],
        "projector": jax.eval_shape(projector.init, key, jnp.zeros((1, 1, network.width)))["params"],
    }


def read(table):
    """({name: the other cells}, the last line)."""
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("|")]
    header, *rows = lines
    assert header == ["Name", "Shape", "Axes", "Split", "Size", "Bytes"]
    return {row[0]: row[1:] for row in rows}, table.splitlines()[-1]


def test_the_table_says_what_lies_on_a_device(layout):
    rows, last = read(parameter_table(boxed_params("deco", DECO_L), layout))
    assert rows["network/transformer/layers/block/attention/qkv/kernel"] == [
        "22×1024×3×16×64",
        "layers, width, ·, heads, head_dim",
        "·, fsdp, ·, tensor, ·",
        f"{22 * 1024 * 3 * 1024:,}",
        f"{22 * 1024 * 3 * 1024 * 4 // 8:,}",
    ]
    assert rows["network/decoder/*"][:3] == ["31 small ones", "", "copied"]
    assert rows["projector/*"][:3] == ["6 small ones", "", "in part"], "its biases are copied, its kernels are split"
    total = int(last.split()[1].replace(",", ""))
    assert 429_824_419 * 4 / 8 < total < 429_824_419 * 4 / 5  # modulations are split over fsdp only


@pytest.mark.parametrize("kind, sizes", [("deco", DECO_L), ("pixnerd", PIXNERD_L)])
def test_folding_loses_no_parameter_and_no_byte(layout, kind, sizes):
    params = boxed_params(kind, sizes)
    rows, last = read(parameter_table(params, layout))
    assert len(rows) <= 15, "a dozen rows is what a reader takes in"
    size, bytes_ = (sum(int(row[column].replace(",", "")) for row in rows.values()) for column in (3, 4))
    assert size == sum(x.size for x in jax.tree.leaves(nn.meta.unbox(params)))
    assert last.startswith(f"Parameters: {bytes_:,} bytes per device; EMA and both moments are as large")


def test_equal_parameters_of_numbered_blocks_share_a_row(layout):
    """PixNerd's decoder has a generator of 16.8 million numbers in each of its two blocks, which are not stacked."""
    rows, _ = read(parameter_table(boxed_params("pixnerd", PIXNERD_L), layout))
    assert rows["network/decoder/block_*/generator/kernel"] == [
        "2 of 1024×2×8192",
        "width, ·, generated",
        "fsdp, ·, ·",
        f"{2 * 1024 * 2 * 8192:,}",
        f"{2 * 1024 * 2 * 8192 * 4 // 4:,}",
    ]
