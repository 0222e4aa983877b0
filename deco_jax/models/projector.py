"""The projector of representation alignment: from tokens to the teacher's features (docs/model.md, 5)."""

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from deco_jax.models.layers import Linear


class Projector(nn.Module):
    """Linear–SiLU–Linear–SiLU–Linear, D → D → D → features. Trained with the network, not needed after."""

    features: int  # of the teacher: 768 for DINOv2 ViT-B/14
    dtype: jnp.dtype = jnp.bfloat16

    @nn.compact
    def __call__(self, tokens_BxNxD: Array) -> Array:
        """(B, N, D) → (B, N, features), in `dtype`."""
        width = tokens_BxNxD.shape[-1]
        h = nn.silu(Linear(width, ("width", "mlp"), dtype=self.dtype, name="in")(tokens_BxNxD))
        h = nn.silu(Linear(width, ("mlp", "width"), dtype=self.dtype, name="middle")(h))
        return Linear(self.features, ("width", None), dtype=self.dtype, name="out")(h)
