"""What does DINOv2 say about an image as a whole? The class token, for the Fréchet distance FD-DINOv2.

Stein et al., "Exposing flaws of generative model evaluation metrics", 2023, and their code, layer6ai-labs/dgm-eval
(`DINOv2Encoder.transform` without `clean_resize`, its default): the image is resized to 224² by PIL's bicubic filter,
which is antialiased and rounds to whole pixel values, and normalised by ImageNet's mean and deviation. The feature is
the class token after the final norm. They publish distances of ViT-L/14.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array

from deco_jax.encoders.dinov2.bicubic import resize_like_pillow
from deco_jax.encoders.dinov2.model import DINOv2

SIDE = 224  # pixels along a side that images are resized to
WHERE = (
    "The network is Meta's DINOv2 (facebookresearch/dinov2, Apache-2.0): take facebook/dinov2-base from Hugging Face, "
    "or as published distances do https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth."
)


def class_features(module: DINOv2) -> Callable[[Any, Array], dict[str, Array]]:
    """(params, uint8 pixels (B, H, W, 3)) → {"pool": (B, width) fp32}, the class token."""
    module = module.clone(dtype=jnp.float32, image_patch=module.patch_size, output="class")

    def apply(params: Any, images_BxHxWx3: Array) -> dict[str, Array]:
        resized = resize_like_pillow(images_BxHxWx3, SIDE, SIDE)
        return {"pool": module.apply({"params": params}, resized / 255)}

    return apply
