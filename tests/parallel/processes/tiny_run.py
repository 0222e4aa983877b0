"""The quickstart shrunk until a step takes milliseconds, for runs of several processes."""

from deco_jax.config import default_config


def get_config():
    """A run of six steps on digits."""
    c = default_config()
    c.model.update(num_classes=10, patch_size=7, width=16, depth=2, heads=2, decoder_width=8, decoder_depth=1)
    c.model.update(dtype="float32", remat="none")
    c.data.update(source="digits", image_size=28, batch_size=16, workers=0)
    c.optimizer.lr = 1e-3
    c.train.update(steps=6, log_every=1, save_every=3, sample_every=0, keep=10, heartbeat_timeout=10)
    c.sample.update(steps=2, num=8)
    return c
