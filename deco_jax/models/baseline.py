"""The baseline of the paper's comparisons: a Diffusion Transformer whose tokens become pixels by one linear layer."""

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from deco_jax.models.layers import Linear, from_patches, layer_norm, modulate
from deco_jax.models.trunk import ClassConditional, to_velocity, trunk


class BaselineDiT(ClassConditional, kw_only=True):
    """Class-conditional DiT on pixels, with DeCo's blocks and no pixel decoder (docs/model.md, 3).

    v̂ = Linear(LN(s)(1 + scale) + shift) with (shift, scale) a linear function of SiLU(τ + label).
    """

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
