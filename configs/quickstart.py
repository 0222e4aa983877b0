"""A small DeCo on 5,000 real handwritten digits, in minutes on two CPU cores. `launch/quickstart.sh` runs it.

deco train --config configs/quickstart.py --workdir runs/quickstart
"""

from ml_collections import ConfigDict

from deco_jax.config import default_config


def get_config() -> ConfigDict:
    """The run's configuration."""
    c = default_config()
    c.model.num_classes = 10
    c.model.patch_size = 4  # 7×7 tokens
    c.model.width = 128
    c.model.depth = 4
    c.model.heads = 4
    c.model.decoder_width = 16
    c.model.decoder_depth = 2
    c.model.dtype = "float32"  # CPUs are slow in bfloat16
    c.model.remat = "none"
    c.model.scan = False  # four blocks compile fast enough, and run faster unrolled
    c.data.source = "digits"
    c.data.image_size = 28  # as they are
    c.data.batch_size = 32
    c.data.workers = 0  # reading is a memory copy
    c.flow.time_shift = 3.0  # more steps near noise, where the class is decided
    c.optimizer.lr = 3e-3
    c.optimizer.warmup_steps = 50
    c.optimizer.decay_steps = 800
    c.ema.decay = 0.995
    c.ema.warmup = True
    c.train.steps = 1100
    c.train.log_every = 20
    c.train.save_every = 200
    c.train.sample_every = 550
    c.train.keep = 2
    c.train.keep_every = 0
    c.sample.steps = 25
    c.sample.guidance = 4.0
    c.sample.num = 80
    return c
