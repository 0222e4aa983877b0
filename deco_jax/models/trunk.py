"""What all networks here share: from noised pixels to tokens (docs/model.md, 2.1 to 2.6), and what they return."""

from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from deco_jax.conditions import ClassLabels
from deco_jax.diffusion.flow import velocity_to
from deco_jax.errors import UsageError
from deco_jax.models.dit import Transformer
from deco_jax.models.layers import LabelEmbedding, Linear, TimeEmbedding, rotary_angles, to_patches


class ClassConditional(nn.Module, kw_only=True):
    """The fields that every class-conditional network has."""

    num_classes: int  # labels run from 0 to num_classes − 1; num_classes itself is the null label
    patch_size: int  # p, pixels along a patch's side
    width: int  # D, channels of a token
    depth: int  # L, DiT blocks
    heads: int  # h, of attention
    prediction: str = "velocity"  # what the last layer puts out: velocity, or image, turned into one
    dtype: jnp.dtype = jnp.bfloat16  # of the matrix products; parameters and statistics are fp32
    remat: str = "none"  # what the backward pass recomputes: none, dots or full
    scan: bool = True  # one compiled block looped over, or all blocks unrolled
    attention: str | None = None  # implementation of jax.nn.dot_product_attention

    @property
    def condition(self) -> ClassLabels:
        """What the network is told about the image."""
        return ClassLabels(self.num_classes)


class Trunk(NamedTuple):
    """What a decoder may need."""

    tokens_BxNxD: Array  # after the last block
    pixels_BxNxPx3: Array  # the noised image, patch by patch
    tau_BxD: Array  # τ, embedding of the time
    condition_BxD: Array  # SiLU(τ + label)
    hidden_BxNxD: Array | None  # tokens after the block that was asked for


def trunk(network: ClassConditional, x_BxHxWx3: Array, t_B: Array, labels_B: Array, hidden_layer: int | None) -> Trunk:
    """Embeds patches, time and label, and runs the transformer. To be called in `network`'s own compact method.

    Raises:
      UsageError: an image side is no multiple of the patch size, or there is no block `hidden_layer`.
    """
    n, p = network, network.patch_size
    _, height, width, _ = x_BxHxWx3.shape
    _check_sides(height, width, p)
    if hidden_layer is not None and not 1 <= hidden_layer <= n.depth:
        raise UsageError(f"hidden_layer={hidden_layer} does not exist; model.depth={n.depth} allows 1 to {n.depth}.")

    pixels_BxNxPx3 = to_patches(x_BxHxWx3, p)
    # The patch vector is ordered channel first: c·p² + i·p + j.
    patch_BxNx3P = pixels_BxNxPx3.swapaxes(-1, -2).reshape(*pixels_BxNxPx3.shape[:2], -1)
    s = Linear(n.width, ("patch", "width"), "xavier", dtype=n.dtype, name="patch_embedding")(patch_BxNx3P)
    s = nn.with_logical_constraint(s, ("batch", "tokens", "activation_width"))

    tau_BxD = TimeEmbedding(n.width, n.dtype, name="time_embedding")(t_B)
    label_BxD = LabelEmbedding(n.num_classes, n.width, n.dtype, name="label_embedding")(labels_B)
    condition_BxD = nn.with_logical_constraint(nn.silu(tau_BxD + label_BxD), ("batch", "activation_width"))
    angles_NxK = rotary_angles(height // p, width // p, n.width // n.heads)
    s, hidden = Transformer(n.depth, n.heads, n.dtype, n.attention, n.remat, n.scan, name="transformer")(
        s, condition_BxD, jnp.asarray(angles_NxK), hidden_layer
    )
    return Trunk(s, pixels_BxNxPx3, tau_BxD, condition_BxD, hidden)


def to_velocity(network: ClassConditional, out_BxHxWx3: Array, x_BxHxWx3: Array, t_B: Array) -> Array:
    """The velocity that `network` returns: its last layer's output, converted if that is an image.

    As the network itself converts, no solver, guidance or loss can mistake one for the other.
    """
    if network.prediction == "image":
        out_BxHxWx3 = velocity_to(out_BxHxWx3, x_BxHxWx3, t_B)
    return nn.with_logical_constraint(out_BxHxWx3, ("batch", None, None, None))


def _check_sides(height: int, width: int, patch_size: int) -> None:
    for name, side in (("height", height), ("width", width)):
        if side % patch_size or side == 0:
            lower = side // patch_size * patch_size
            nearest = f"{lower} and {lower + patch_size}" if lower else f"{patch_size}"
            raise UsageError(
                f"image {name}={side} is not divisible by model.patch_size={patch_size}; nearest: {nearest}."
            )
