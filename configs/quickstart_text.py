"""A small DeCo that learns from captions, on 2 CPU cores: coloured shapes. `launch/quickstart_text.sh` runs it.

deco train --config configs/quickstart_text.py --workdir runs/quickstart_text --config.data.path=SHARDS

SHARDS is what `benchmarks/shapes_data.py` writes. Of MiniLM the states of all tokens are taken, as the network attends
to tokens. The pooled vector would tell as much here: from either, a linear probe fitted to the captions of training
reads colour and shape of all prompts with wordings, or pairs of colour and shape, that it has not seen.
"""

from ml_collections import ConfigDict

from deco_jax.config import default_config


def get_config() -> ConfigDict:
    """The run's configuration."""
    c = default_config()
    c.model.kind = "deco_text"
    c.model.patch_size = 4  # 8×8 tokens
    c.model.width = 128
    c.model.depth = 4
    c.model.heads = 4
    c.model.text_depth = 1
    c.model.text_tokens = 16
    c.model.text_features = 384  # of MiniLM
    c.model.decoder_width = 16
    c.model.decoder_depth = 2
    c.model.dtype = "float32"  # CPUs are slow in bfloat16
    c.model.remat = "none"
    c.model.scan = False  # few blocks compile fast enough, and run faster unrolled
    c.text.encoder = "minilm"
    c.data.source = "webdataset"
    c.data.image_size = 32
    c.data.batch_size = 32
    c.data.workers = 0
    c.flow.time_shift = 3.0  # more steps near noise, where colour and shape are decided
    c.optimizer.lr = 2e-3
    c.optimizer.warmup_steps = 100
    c.optimizer.decay_steps = 2000
    c.optimizer.beta2 = 0.99
    c.optimizer.clip_norm = 1.0
    c.ema.decay = 0.998
    c.ema.warmup = True
    c.train.steps = 4000
    c.train.log_every = 20
    c.train.save_every = 500
    c.train.sample_every = 1000
    c.train.keep = 2
    c.train.keep_every = 0
    c.sample.solver = "adams2"
    c.sample.steps = 25
    c.sample.guidance = 4.0
    c.sample.shift = 3.0
    c.sample.num = 40
    c.sample.prompts = (
        "a red circle",
        "a blue triangle",
        "a black rectangle",
        "a yellow circle",
        "a teal triangle",
    )
    return c
