"""DeCo: a Diffusion Transformer for the semantics, a pixel decoder for the high frequencies (arXiv 2511.19365)."""

import flax.linen as nn
from jax import Array

from deco_jax.models.pixel_decoder import PixelDecoder
from deco_jax.models.trunk import ClassConditional


class DeCo(ClassConditional, kw_only=True):
    """Class-conditional DeCo (paper, section 3; docs/model.md, 2)."""

    decoder_width: int  # d, channels of a pixel
    decoder_depth: int  # residual blocks of the pixel decoder
    decoder_patch: int = 1  # r: a query of the pixel decoder stands for r × r pixels
    decoder_interaction: str = "adaln"  # how the tokens reach the queries, adaln or add (see PixelDecoder)

    def decode(self, s_BxNxD: Array, pixels_BxNxPx3: Array, tau_BxD: Array, c_BxD: Array) -> Array:
        """See `ClassConditional`."""
        return PixelDecoder(
            self.decoder_width,
            self.decoder_depth,
            self.patch_size,
            self.decoder_patch,
            self.decoder_interaction,
            self.dtype,
            self.remat,
            name="decoder",
        )(pixels_BxNxPx3, nn.silu(tau_BxD[:, None, :] + s_BxNxD))
