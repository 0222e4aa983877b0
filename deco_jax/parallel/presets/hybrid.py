"""Several TPU slices, or GPU nodes: FSDP within one, where links are fast, and data parallelism between them.

Parameters are gathered over ICI or NVLink only. The slower network (DCN, Ethernet, InfiniBand) sees the sum of the
gradients once a step, of which each device sends its own part.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Sizes of the axes; −1 = the rest."""
    m = ConfigDict()
    m.slices = -1  # as many as the devices lie in; a number splits simulated devices
    m.data = 1
    m.fsdp = -1  # all devices of a slice
    m.tensor = 1
    return m
