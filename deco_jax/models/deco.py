"""DeCo: a Diffusion Transformer for the semantics, a pixel decoder for the high frequencies (arXiv 2511.19365)."""

import flax.linen as nn
from jax import Array

from deco_jax.models.layers import from_patches
from deco_jax.models.pixel_decoder import PixelDecoder
from deco_jax.models.trunk import ClassConditional, to_velocity, trunk


class DeCo(ClassConditional, kw_only=True):
    """Class-conditional DeCo (paper, section 3; docs/model.md, 2)."""

    decoder_width: int  # d, channels of a pixel
    decoder_depth: int  # residual blocks of the pixel decoder
    decoder_patch: int = 1  # r: a query of the pixel decoder stands for r × r pixels
    decoder_interaction: str = "adaln"  # how the tokens reach the queries, adaln or add (see PixelDecoder)

    @nn.compact
    def __call__(
        self, x_BxHxWx3: Array, t_B: Array, labels_B: Array, *, hidden_layer: int | None = None
    ) -> Array | tuple[Array, Array]:
        """Predicts the velocity v = image − noise.

        Args:
          x_BxHxWx3: noised RGB images, in [-1, 1] at t = 1; H and W are multiples of the patch size.
          t_B: times, 0 = noise, 1 = data.
          labels_B: integers in [0, num_classes]; num_classes is the null label.
          hidden_layer: also return the tokens after this block (1 is the first), for representation alignment.

        Returns:
          v̂ (B, H, W, 3), fp32; with `hidden_layer`, (v̂, tokens (B, N, D) in `dtype`).

        Raises:
          UsageError: an image side is no multiple of the patch size, or there is no such block.
        """
        _, height, width, _ = x_BxHxWx3.shape
        p = self.patch_size
        s, pixels_BxNxPx3, tau_BxD, _, hidden = trunk(self, x_BxHxWx3, t_B, labels_B, hidden_layer)
        s = nn.silu(tau_BxD[:, None, :] + s)

        out_BxNxPx3 = PixelDecoder(
            self.decoder_width,
            self.decoder_depth,
            p,
            self.decoder_patch,
            self.decoder_interaction,
            self.dtype,
            self.remat,
            name="decoder",
        )(pixels_BxNxPx3, s)
        v_BxHxWx3 = to_velocity(self, from_patches(out_BxNxPx3, height, width, p), x_BxHxWx3, t_B)
        return v_BxHxWx3 if hidden_layer is None else (v_BxHxWx3, hidden)
