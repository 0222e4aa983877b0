"""DeCo-XXL/16, text to image at 512²: the second of three stages, 80k to 100k steps from a 256² checkpoint.

  deco train --config configs/t2i_pretrain512.py --workdir DIR --config.data.path=SHARDS \\
    --config.train.init_from=WORKDIR_OF_THE_256_RUN

Parameters and their average are taken over, the optimiser starts anew. Rotary positions grow with the image, so no
parameter changes shape. This project has not run it yet.
"""

from ml_collections import ConfigDict

from deco_jax.config import default_config


def get_config() -> ConfigDict:
    """The run's configuration."""
    c = default_config()
    c.model.kind = "deco_text"
    c.model.width = 1536  # D; heads of 64
    c.model.depth = 16  # DiT blocks
    c.model.heads = 24
    c.model.text_depth = 4  # blocks of the text alone
    c.model.text_tokens = 128
    c.model.text_features = 2048  # of Qwen3-1.7B
    c.model.decoder_width = 32  # d
    c.model.decoder_depth = 3
    c.text.encoder = "Qwen/Qwen3-1.7B"
    c.data.source = "webdataset"
    c.data.image_size = 512  # 1024 tokens
    c.data.batch_size = 512
    c.flow.time_shift = 4.0
    c.optimizer.lr = 1e-4  # constant
    c.optimizer.beta2 = 0.95
    c.train.steps = 100_000
    c.train.init_from = "WORKDIR_OF_THE_256_RUN"  # its workdir or a checkpoint in it: give it on the command line
    c.flow.null_probability = 0.1
    c.loss.alignment_weight = 0.5  # REPA: tokens after block 6, DINOv2 ViT-B/14
    c.loss.alignment_layer = 6
    c.loss.alignment_features = 768
    c.optimizer.clip_norm = 1.0
    c.sample.solver = "adams2"
    c.sample.steps = 25
    c.sample.guidance = 4.0
    c.sample.shift = 3.0
    c.sample.prompts = (
        "a photo of a corgi on a beach at sunset",
        "a red cube on top of a blue sphere",
        "an oil painting of a lighthouse in a storm",
        "three green apples in a wooden bowl",
        "a street in the rain at night, neon signs",
        "a portrait of an old man with a white beard",
        "a bowl of ramen with an egg, from above",
        "the word HELLO written in chalk",
    )
    return c
