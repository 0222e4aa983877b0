"""Data parallelism: every device holds the whole state and works on its share of the batch.

For networks whose parameters, EMA and moments fit a device (16 bytes a parameter: 7 GB for L, 11 GB for XL). The only
communication is the sum of the gradients.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Sizes of the axes; −1 = the rest."""
    m = ConfigDict()
    m.slices = -1  # groups of devices behind a slower network, as many as there are
    m.data = -1  # all devices of a group
    m.fsdp = 1
    m.tensor = 1
    return m
