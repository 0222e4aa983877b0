"""DeCo: a Diffusion Transformer for the semantics, a pixel decoder for the high frequencies (arXiv 2511.19365)."""

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from deco_jax.errors import UsageError
from deco_jax.models.dit import Transformer
from deco_jax.models.layers import LabelEmbedding, Linear, TimeEmbedding, from_patches, rotary_angles, to_patches
from deco_jax.models.pixel_decoder import PixelDecoder


class DeCo(nn.Module):
    """Class-conditional DeCo (paper, section 3; SPEC section 2)."""

    num_classes: int  # labels run from 0 to num_classes − 1; num_classes itself is the null label
    patch_size: int  # p
    width: int  # D, channels of a token
    depth: int  # L, DiT blocks
    heads: int  # h
    decoder_width: int  # d, channels of a pixel
    decoder_depth: int  # residual blocks of the pixel decoder
    dtype: jnp.dtype = jnp.bfloat16  # of the matrix products; parameters and statistics are fp32
    remat: str = "none"  # what the backward pass recomputes: none, dots or full
    scan: bool = True  # one compiled block looped over, or all blocks unrolled
    attention: str | None = None  # implementation of jax.nn.dot_product_attention

    @property
    def null_label(self) -> int:
        """The label that means "no class"."""
        return self.num_classes

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
        _check_sides(height, width, p)
        if hidden_layer is not None and not 1 <= hidden_layer <= self.depth:
            raise UsageError(
                f"hidden_layer={hidden_layer} does not exist; model.depth={self.depth} allows 1 to {self.depth}."
            )

        pixels_BxNxPx3 = to_patches(x_BxHxWx3, p)
        # The patch vector is ordered channel first: c·p² + i·p + j.
        patch_BxNx3P = pixels_BxNxPx3.swapaxes(-1, -2).reshape(*pixels_BxNxPx3.shape[:2], -1)
        s = Linear(self.width, ("patch", "width"), "xavier", dtype=self.dtype, name="patch_embedding")(patch_BxNx3P)
        s = nn.with_logical_constraint(s, ("batch", "tokens", "activation_width"))

        tau_BxD = TimeEmbedding(self.width, self.dtype, name="time_embedding")(t_B)
        label_BxD = LabelEmbedding(self.num_classes, self.width, self.dtype, name="label_embedding")(labels_B)
        angles_NxK = rotary_angles(height // p, width // p, self.width // self.heads)
        s, hidden = Transformer(
            self.depth, self.heads, self.dtype, self.attention, self.remat, self.scan, name="transformer"
        )(s, nn.silu(tau_BxD + label_BxD), jnp.asarray(angles_NxK), hidden_layer)
        s = nn.silu(tau_BxD[:, None, :] + s)

        v_BxNxPx3 = PixelDecoder(self.decoder_width, self.decoder_depth, p, self.dtype, self.remat, name="decoder")(
            pixels_BxNxPx3, s
        )
        v_BxHxWx3 = from_patches(v_BxNxPx3, height, width, p)
        v_BxHxWx3 = nn.with_logical_constraint(v_BxHxWx3, ("batch", None, None, None))
        return v_BxHxWx3 if hidden_layer is None else (v_BxHxWx3, hidden)


def _check_sides(height: int, width: int, patch_size: int) -> None:
    for name, side in (("height", height), ("width", width)):
        if side % patch_size or side == 0:
            lower = side // patch_size * patch_size
            nearest = f"{lower} and {lower + patch_size}" if lower else f"{patch_size}"
            raise UsageError(
                f"image {name}={side} is not divisible by model.patch_size={patch_size}; nearest: {nearest}."
            )
