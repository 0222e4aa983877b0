"""DeCo: a Diffusion Transformer for the semantics, a pixel decoder for the high frequencies (arXiv 2511.19365)."""

import flax.linen as nn
import numpy as np
from jax import Array

from deco_jax.conditions import Text
from deco_jax.models.layers import TextEmbedding, rotary_angles
from deco_jax.models.pixel_decoder import PixelDecoder
from deco_jax.models.trunk import ClassConditional, Trunk


class DeCo(ClassConditional, kw_only=True):
    """Class-conditional DeCo (paper, section 3; docs/model.md, 2)."""

    decoder_width: int  # d, channels of a pixel
    decoder_depth: int  # residual blocks of the pixel decoder
    decoder_patch: int = 1  # r: a query of the pixel decoder stands for r × r pixels
    decoder_interaction: str = "adaln"  # how the tokens reach the queries, adaln or add (see PixelDecoder)

    def decode(self, s_BxNxD: Array, pixels_BxNxPx3: Array, tau_BxD: Array, c_BxD: Array) -> Array:
        """See `Trunk`."""
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


class TextDeCo(Trunk, kw_only=True):
    """Text-conditional DeCo (paper, section 4.3; docs/model.md, 4)."""

    text_tokens: int  # L, of a prompt, padding included
    text_features: int  # channels of the text encoder
    text_depth: int  # blocks of the text alone, before the DiT blocks
    decoder_width: int  # d, channels of a pixel
    decoder_depth: int  # residual blocks of the pixel decoder

    wide = True

    @property
    def condition(self) -> Text:
        """What the network is told about the image."""
        return Text(self.text_tokens, self.text_features)

    def embed(self, text_BxLxE: Array, tau_BxD: Array) -> tuple[Array, Array]:
        """A text encoder's states, padding included, and τ → SiLU(τ), text (B, L, D)."""
        c_BxD = nn.silu(tau_BxD)
        text_BxLxD = TextEmbedding(self.text_tokens, self.width, self.dtype, name="text_embedding")(text_BxLxE)
        text_BxLxD, _ = self.transformer(self.text_depth, "text")(text_BxLxD, c_BxD, None)
        return c_BxD, text_BxLxD

    def angles(self, rows: int, columns: int) -> np.ndarray:
        """Positions grow with the image; x ends with the number of rows, y with that of columns, as upstream has it."""
        return rotary_angles(rows, columns, self.width // self.heads, rows, columns)

    def decode(self, s_BxNxD: Array, pixels_BxNxPx3: Array, tau_BxD: Array, c_BxD: Array) -> Array:
        """See `Trunk`."""
        decoder = PixelDecoder(
            self.decoder_width,
            self.decoder_depth,
            self.patch_size,
            1,
            "adaln",
            self.dtype,
            self.remat,
            positions="rotary",
            name="decoder",
        )
        return decoder(pixels_BxNxPx3, nn.silu(tau_BxD[:, None, :] + s_BxNxD))
