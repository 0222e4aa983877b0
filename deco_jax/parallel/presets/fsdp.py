"""Fully sharded data parallelism: every device holds a part of the state, and gathers a layer's parameters to use them.

The choice for XL on chips with 16 to 40 GB, within one TPU slice or one fast network of GPUs. The number of devices
must divide the network's width; with more of them than that, --config.mesh.fsdp=64 leaves the rest to data.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Sizes of the axes; −1 = the rest."""
    m = ConfigDict()
    m.slices = 1  # one group, whatever lies between its devices
    m.data = 1
    m.fsdp = -1  # all devices
    m.tensor = 1
    return m
