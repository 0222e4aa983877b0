"""The baseline of the paper's comparisons: a Diffusion Transformer whose tokens become pixels by one linear layer."""

import jax.numpy as jnp
from jax import Array

from deco_jax.models.layers import Linear, layer_norm, modulate
from deco_jax.models.trunk import ClassConditional


class BaselineDiT(ClassConditional, kw_only=True):
    """Class-conditional DiT on pixels, with DeCo's blocks and no pixel decoder (docs/model.md, 3).

    v̂ = Linear(LN(s)(1 + scale) + shift) with (shift, scale) a linear function of SiLU(τ + label).
    """

    def decode(self, s_BxNxD: Array, pixels_BxNxPx3: Array, tau_BxD: Array, c_BxD: Array) -> Array:
        """See `Trunk`."""
        modulation_Bx2xD = Linear(
            (2, self.width), ("width", None, "modulation"), "zeros", dtype=self.dtype, name="out_modulation"
        )(c_BxD)
        shift, scale = modulation_Bx2xD[:, :1], modulation_Bx2xD[:, 1:]
        s_BxNxD = modulate(layer_norm(None, self.dtype, "out_norm")(s_BxNxD), shift, scale)
        # Ordered channel first, as the patch vector at the input.
        out = Linear((3, self.patch_size**2), ("width", None, "pixels"), "zeros", dtype=self.dtype, name="out")
        return out(s_BxNxD).swapaxes(-1, -2).astype(jnp.float32)
