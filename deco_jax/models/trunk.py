"""What do all networks here share? All but the way from tokens to pixels (docs/model.md, 2.1 to 2.6)."""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax import Array

from deco_jax.conditions import ClassLabels
from deco_jax.diffusion.flow import velocity_to
from deco_jax.errors import UsageError
from deco_jax.models.dit import Transformer
from deco_jax.models.layers import LabelEmbedding, Linear, TimeEmbedding, from_patches, rotary_angles, to_patches


class Trunk(nn.Module, kw_only=True):
    """Embeddings and a transformer; kinds differ in their `condition` and `embed` it, and in how they `decode`."""

    patch_size: int  # p, pixels along a patch's side
    width: int  # D, channels of a token
    depth: int  # L, DiT blocks
    heads: int  # h, of attention
    prediction: str = "velocity"  # what the last layer puts out: velocity, or image, turned into one
    dtype: jnp.dtype = jnp.bfloat16  # of the matrix products; parameters and statistics are fp32
    remat: str = "none"  # what the backward pass recomputes: none, dots or full
    scan: bool = True  # one compiled block looped over, or all blocks unrolled
    attention: str | None = None  # implementation of jax.nn.dot_product_attention

    wide = False  # see models/dit.py: Block

    @nn.compact
    def __call__(
        self, x_BxHxWx3: Array, t_B: Array, condition: Array, *, hidden_layer: int | None = None
    ) -> Array | tuple[Array, Array]:
        """Predicts the velocity v = image − noise.

        Args:
          x_BxHxWx3: noised RGB images, in [-1, 1] at t = 1; H and W are multiples of the patch size.
          t_B: times, 0 = noise, 1 = data.
          condition: what the network is told about each image, see `embed`.
          hidden_layer: also return the tokens after this block (1 is the first), for representation alignment.

        Returns:
          v̂ (B, H, W, 3), fp32; with `hidden_layer`, (v̂, tokens (B, N, D) in `dtype`).

        Raises:
          UsageError: an image side is no multiple of the patch size, or there is no such block.
        """
        _, height, width, _ = x_BxHxWx3.shape
        p, depth = self.patch_size, self.depth
        _check_sides(height, width, p)
        if hidden_layer is not None and not 1 <= hidden_layer <= depth:
            raise UsageError(f"hidden_layer={hidden_layer} does not exist; model.depth={depth} allows 1 to {depth}.")

        pixels_BxNxPx3 = to_patches(x_BxHxWx3, p)
        # The patch vector is ordered channel first: c·p² + i·p + j.
        patch_BxNx3P = pixels_BxNxPx3.swapaxes(-1, -2).reshape(*pixels_BxNxPx3.shape[:2], -1)
        s = Linear(self.width, ("patch", "width"), "xavier", dtype=self.dtype, name="patch_embedding")(patch_BxNx3P)
        s = nn.with_logical_constraint(s, ("batch", "tokens", "activation_width"))

        tau_BxD = TimeEmbedding(self.width, self.dtype, name="time_embedding")(t_B)
        c_BxD, text_BxLxD = self.embed(condition, tau_BxD)
        c_BxD = nn.with_logical_constraint(c_BxD, ("batch", "activation_width"))
        angles_NxK = self.angles(height // p, width // p)
        transformer = self.transformer(depth, "transformer")
        s, hidden = transformer(s, c_BxD, jnp.asarray(angles_NxK), text_BxLxD, hidden_layer)

        out_BxHxWx3 = from_patches(self.decode(s, pixels_BxNxPx3, tau_BxD, c_BxD), height, width, p)
        if self.prediction == "image":  # converted here: no solver, guidance or loss can mistake one for the other
            out_BxHxWx3 = velocity_to(out_BxHxWx3, x_BxHxWx3, t_B)
        v_BxHxWx3 = nn.with_logical_constraint(out_BxHxWx3, ("batch", None, None, None))
        return v_BxHxWx3 if hidden_layer is None else (v_BxHxWx3, hidden)

    def transformer(self, depth: int, name: str) -> Transformer:
        """Blocks as this network computes them."""
        return Transformer(depth, self.heads, self.dtype, self.attention, self.remat, self.scan, self.wide, name=name)

    def embed(self, condition: Array, tau_BxD: Array) -> tuple[Array, Array | None]:
        """The condition and τ → what modulates all blocks (B, D), and text for their attention (B, L, D) or None."""
        raise NotImplementedError

    def angles(self, rows: int, columns: int) -> np.ndarray:
        """Of the rotary embedding of so many tokens: (N, D/h/2), fp32."""
        return rotary_angles(rows, columns, self.width // self.heads)

    def decode(self, s_BxNxD: Array, pixels_BxNxPx3: Array, tau_BxD: Array, c_BxD: Array) -> Array:
        """Tokens → what the last layer puts out, patch by patch: (B, N, p², 3), fp32. Called while compact.

        Args:
          s_BxNxD: after the last block.
          pixels_BxNxPx3: of the noised image.
          tau_BxD: τ, embedding of the time.
          c_BxD: what modulates the blocks.
        """
        raise NotImplementedError


class ClassConditional(Trunk, kw_only=True):
    """A network that is told a class (docs/model.md, 2.4)."""

    num_classes: int  # labels run from 0 to num_classes − 1; num_classes itself is the null label

    @property
    def condition(self) -> ClassLabels:
        """What the network is told about the image."""
        return ClassLabels(self.num_classes)

    def embed(self, labels_B: Array, tau_BxD: Array) -> tuple[Array, None]:
        """Labels in [0, num_classes], num_classes for none, and τ → SiLU(τ + label)."""
        label_BxD = LabelEmbedding(self.num_classes, self.width, self.dtype, name="label_embedding")(labels_B)
        return nn.silu(tau_BxD + label_BxD), None


def _check_sides(height: int, width: int, patch_size: int) -> None:
    for name, side in (("height", height), ("width", width)):
        if side % patch_size or side == 0:
            lower = side // patch_size * patch_size
            nearest = f"{lower} and {lower + patch_size}" if lower else f"{patch_size}"
            raise UsageError(
                f"image {name}={side} is not divisible by model.patch_size={patch_size}; nearest: {nearest}."
            )
