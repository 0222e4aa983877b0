"""A run of milliseconds per step on real digits, for the launch scripts: sbatch … --config tests/launch/tiny.py."""

from ml_collections import ConfigDict

from deco_jax.config import default_config


def get_config() -> ConfigDict:
    """The run's configuration."""
    c = default_config()
    c.model.update(
        num_classes=10, patch_size=7, width=16, depth=2, heads=2, decoder_width=8, decoder_depth=1, dtype="float32"
    )
    c.model.remat = "none"
    c.data.update(source="digits", image_size=28, batch_size=16, workers=0)
    c.train.update(steps=200, log_every=50, save_every=100, sample_every=0)
    c.sample.update(steps=2, num=8)
    return c
