"""DeCo-XL/16, ImageNet 512²: 100k steps more from a 256² checkpoint. The same 682.3 M parameters.

  deco train --config configs/imagenet512_deco_xl.py --workdir DIR --config.data.path=TFDS_DIR \\
    --config.train.init_from=WORKDIR_OF_THE_256_RUN/checkpoints/1600000

Rotary positions span [0, 16] at every size and the decoder works in its patch, so no parameter is new or changes shape.
The teacher, DINOv2 ViT-B/14, sees 448² of these images: 32×32 features for 32×32 tokens.
Hardware: upstream used 16 examples × 8 GPUs × 2 accumulation steps. This project has not run it yet.
A workdir alone means its newest checkpoint; 1,600,000 steps are 320 epochs.
Expected from 256² at 320 epochs, Euler-100, guidance 5.0: FID-50K 2.22 (paper; not reproduced here).
"""

from ml_collections import ConfigDict

from deco_jax.config import default_config


def get_config() -> ConfigDict:
    """The run's configuration."""
    c = default_config()
    c.model.width = 1152  # D; heads of 72
    c.model.depth = 28  # L
    c.model.heads = 16
    c.model.decoder_width = 32  # d
    c.model.decoder_depth = 3
    c.data.name = "imagenet2012"
    c.data.image_size = 512  # 1024 tokens
    c.data.batch_size = 256
    c.flow.null_probability = 0.2
    c.loss.alignment_weight = 0.5  # REPA: tokens after block 8, DINOv2 ViT-B/14
    c.loss.alignment_layer = 8
    c.loss.alignment_features = 768
    c.optimizer.lr = 1e-4  # constant
    c.optimizer.accumulation = 2  # as upstream; 1 where memory allows, with the same result
    c.train.steps = 100_000
    c.train.init_from = "WORKDIR_OF_THE_256_RUN"  # its workdir or a checkpoint in it: give it on the command line
    c.sample.steps = 100  # Euler
    c.sample.guidance = 5.0
    return c
