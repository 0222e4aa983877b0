"""FSDP, and attention heads and MLP channels split over neighbouring devices.

For more devices than images in the batch, and for latency when sampling; every block then adds up activations over
the tensor axis, so it pays only where neighbours are connected fast. tensor must divide the network's heads.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Sizes of the axes; −1 = the rest."""
    m = ConfigDict()
    m.slices = 1
    m.data = 1
    m.fsdp = -1  # the rest
    m.tensor = 2  # neighbours that share one image
    return m
