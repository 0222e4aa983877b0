"""DeCo-XXL/16, text to image at 256²: the first of three stages. 1,133.8 M parameters, and Qwen3-1.7B as text encoder.

  deco train --config configs/t2i_pretrain256.py --workdir DIR --config.data.path=SHARDS

Data: captioned images as WebDataset shards; upstream took 36 million. This project has not run it yet.
Paper, after all three stages: GenEval 0.86, DPG 81.4 (not reproduced here).
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
    c.data.image_size = 256  # 256 tokens
    c.data.batch_size = 1536
    c.flow.time_shift = 2.0
    c.optimizer.lr = 2e-4  # constant
    c.optimizer.beta2 = 0.95
    c.train.steps = 200_000
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
