"""DeCo-L/16, ImageNet 256², class-conditional. 200k steps at batch 256 (40 epochs); 426.9 M parameters.

  deco train --config configs/imagenet256_deco_l.py --workdir DIR --config.data.path=TFDS_DIR

The teacher, DINOv2 ViT-B/14, is downloaded from Hugging Face
or found as `deco_jax/config/fields.py` says for `teacher`.
Hardware: upstream used 8 × A800 80 GB, 0.24 s per step, 27.5 GB per GPU (paper, Table 1). Not run here yet.
Expected with Euler-50 and no guidance: FID-50K 31.35, sFID 9.34, IS 48.35 (paper, Table 1; not reproduced here).
"""

from ml_collections import ConfigDict

from deco_jax.config import default_config


def get_config() -> ConfigDict:
    """The run's configuration."""
    c = default_config()
    c.model.width = 1024  # D; heads of 64
    c.model.depth = 22  # L
    c.model.heads = 16
    c.model.decoder_width = 32  # d
    c.model.decoder_depth = 3
    c.data.name = "imagenet2012"  # prepared as ArrayRecord: tfds build imagenet2012 --file_format=array_record
    c.data.image_size = 256
    c.data.batch_size = 256
    c.flow.null_probability = 0.1  # the L runs; XL uses 0.2
    c.loss.alignment_weight = 0.5  # REPA: tokens after block 8, DINOv2 ViT-B/14
    c.loss.alignment_layer = 8
    c.loss.alignment_features = 768
    c.optimizer.lr = 1e-4  # constant
    c.train.steps = 200_000
    c.sample.steps = 50  # Euler
    c.sample.guidance = 1.0  # the paper compares L without guidance
    return c
