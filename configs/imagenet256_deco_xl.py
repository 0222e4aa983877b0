"""DeCo-XL/16, ImageNet 256², class-conditional. 4M steps at batch 256 (800 epochs); 682.3 M parameters.

  deco train --config configs/imagenet256_deco_xl.py --workdir DIR --config.data.path=TFDS_DIR --config.mesh.fsdp=8

The teacher, DINOv2 ViT-B/14, is downloaded from Hugging Face
or found as `deco_jax/config/fields.py` says for `teacher`.
Hardware: a node of 8 GPUs with 80 GB or a TPU slice. This project has not run it yet.
Expected with Euler-100 and guidance in (0.1, 1]: FID-50K 2.57 at 80 epochs, 1.90 at 320 (guidance 3.2), 1.71 at 800
(guidance 3.0) (paper; not reproduced here).
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
    c.data.name = "imagenet2012"  # prepared as ArrayRecord: tfds build imagenet2012 --file_format=array_record
    c.data.image_size = 256
    c.data.batch_size = 256
    c.flow.null_probability = 0.2
    c.loss.alignment_weight = 0.5  # REPA: tokens after block 8, DINOv2 ViT-B/14
    c.loss.alignment_layer = 8
    c.loss.alignment_features = 768
    c.optimizer.lr = 1e-4  # constant
    c.train.steps = 4_000_000
    c.train.keep_every = 200_000  # 40 epochs; the paper reports 320, 600 and 800
    c.sample.steps = 100  # Euler
    c.sample.guidance = 3.0  # 3.2 at 320 epochs
    c.sample.guidance_interval = (0.1, 1.0)
    return c
