"""DeCo: a Diffusion Transformer for the semantics, a pixel decoder for the high frequencies (arXiv 2511.19365)."""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax import Array

from deco_jax.conditions import Text
from deco_jax.models.layers import TextEmbedding, rotary_angles
from deco_jax.models.pixel_decoder import PixelDecoder
from deco_jax.models.trunk import ClassConditional, Given, Trunk


class DeCo(ClassConditional, kw_only=True):
    """Class-conditional DeCo (paper, section 3; docs/model.md, 2)."""

    decoder_width: int  # d, channels of a pixel
    decoder_depth: int  # residual blocks of the pixel decoder
    decoder_patch: int = 1  # r: a query of the pixel decoder stands for r × r pixels
    decoder_interaction: str = "adaln"  # how the tokens reach the queries, adaln or add (see PixelDecoder)
    decoder_implementation: str = "auto"  # of ops/decoder.py

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
            implementation=self.decoder_implementation,
            name="decoder",
        )(pixels_BxNxPx3, nn.silu(tau_BxD[:, None, :] + s_BxNxD))


class TextDeCo(Trunk, kw_only=True):
    """Text-conditional DeCo (paper, section 4.3; docs/model.md, 4)."""

    text_tokens: int  # T, of a prompt, padding included
    text_features: int  # channels of the text encoder
    text_depth: int  # blocks of the text alone, before the DiT blocks
    decoder_width: int  # d, channels of a pixel
    decoder_depth: int  # residual blocks of the pixel decoder
    decoder_implementation: str = "auto"  # of ops/decoder.py

    wide = True

    @property
    def condition(self) -> Text:
        """What the network is told about the image."""
        return Text(self.text_tokens, self.text_features)

    def setup(self) -> None:
        """See `Trunk`."""
        super().setup()
        self.text_embedding = TextEmbedding(self.text_tokens, self.width, self.dtype)
        self.text = self.blocks(self.text_depth)

    def embed(self, text_BxTxE: Array, tau_BxD: Array) -> tuple[Array, Array]:
        """A text encoder's states, padding included, and τ → SiLU(τ), text (B, T, D)."""
        c_BxD = nn.silu(tau_BxD)
        text_BxTxD, _ = self.text(self.text_embedding(text_BxTxE), c_BxD, None)
        return c_BxD, text_BxTxD

    def conditioning(self, t_S: Array, condition: Array, refined: bool = True) -> Given:
        """See `Trunk`: text (K, T, E). Modulations depend on the time alone."""
        tau_Sx1xD = self.time_embedding(t_S)[:, None]
        c_Sx1xD, text_KxTxD = nn.silu(tau_Sx1xD), self.text_embedding(condition)
        modulation, text_modulation = (blocks.modulations(c_Sx1xD) for blocks in (self.transformer, self.text))
        if not refined:
            return Given(tau_Sx1xD, c_Sx1xD, modulation, text_KxTxD[None], text_modulation)
        texts, *shape = text_KxTxD.shape
        known_PxLx6D = jnp.tile(text_modulation[:, 0], (texts, 1, 1))
        pairs_PxTxD = jnp.repeat(text_KxTxD, len(t_S), axis=0)  # all times of a text follow each other
        pairs_PxTxD, _ = self.text(pairs_PxTxD, None, None, modulation_BxLx6D=known_PxLx6D)
        text_SxKxTxD = pairs_PxTxD.reshape(texts, len(t_S), *shape).swapaxes(0, 1)
        return Given(tau_Sx1xD, c_Sx1xD, modulation, text_SxKxTxD)

    def complete(self, given: Given) -> Given:
        """See `Trunk`: the text's own blocks."""
        if given.text_modulation_BxLx6D is None:
            return given
        text_BxTxD, _ = self.text(given.text_BxTxD, None, None, modulation_BxLx6D=given.text_modulation_BxLx6D)
        return given._replace(text_BxTxD=text_BxTxD, text_modulation_BxLx6D=None)

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
            implementation=self.decoder_implementation,
            name="decoder",
        )
        return decoder(pixels_BxNxPx3, nn.silu(tau_BxD[:, None, :] + s_BxNxD))
