"""The baseline of the paper's comparisons: a Diffusion Transformer whose tokens become pixels by one linear layer."""

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from deco_jax.models.layers import Linear, from_patches, layer_norm, modulate
from deco_jax.models.trunk import to_velocity, trunk


class BaselineDiT(nn.Module):
    """Class-conditional DiT on pixels, with DeCo's blocks and no pixel decoder (SPEC section 3).

    v̂ = Linear(LN(s)(1 + scale) + shift) with (shift, scale) a linear function of SiLU(τ + label).
    """

    num_classes: int  # labels run from 0 to num_classes − 1; num_classes itself is the null label
    patch_size: int  # p
    width: int  # D, channels of a token
    depth: int  # L, DiT blocks
    heads: int  # h
    prediction: str = "velocity"  # what the last layer puts out: velocity, or image, turned into one (SPEC section 3)
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
        """Predicts the velocity v = image − noise. Arguments, results and errors are those of `DeCo`."""
        _, height, width, _ = x_BxHxWx3.shape
        p = self.patch_size
        s, _, _, condition_BxD, hidden = trunk(self, x_BxHxWx3, t_B, labels_B, hidden_layer)

        modulation_Bx2xD = Linear(
            (2, self.width), ("width", None, "modulation"), "zeros", dtype=self.dtype, name="out_modulation"
        )(condition_BxD)
        shift, scale = modulation_Bx2xD[:, :1], modulation_Bx2xD[:, 1:]
        s = modulate(layer_norm(None, self.dtype, "out_norm")(s), shift, scale)
        # Ordered channel first, as the patch vector at the input.
        out_BxNx3xP = Linear((3, p * p), ("width", None, "pixels"), "zeros", dtype=self.dtype, name="out")(s)
        out_BxHxWx3 = from_patches(out_BxNx3xP.swapaxes(-1, -2).astype(jnp.float32), height, width, p)
        v_BxHxWx3 = to_velocity(self, out_BxHxWx3, x_BxHxWx3, t_B)
        return v_BxHxWx3 if hidden_layer is None else (v_BxHxWx3, hidden)
