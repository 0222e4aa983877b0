"""What do all networks here share? All but the way from tokens to pixels (docs/model.md, 2.1 to 2.6)."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax import Array

from deco_jax.conditions import ClassLabels
from deco_jax.diffusion.flow import velocity_to
from deco_jax.errors import UsageError
from deco_jax.models.dit import Transformer
from deco_jax.models.layers import LabelEmbedding, Linear, TimeEmbedding, from_patches, rotary_angles, to_patches


class Given(NamedTuple):
    """What a network computes of the time and the condition alone, before it sees an image.

    Rows are the batch, or a single one where all images share it. In the table that `Trunk.conditioning` makes, times
    stand before the rows.
    """

    tau_BxD: Array  # τ, embedding of the time
    c_BxD: Array  # modulates the blocks
    modulation_BxLx6D: Array  # of the transformer's L blocks, see `Block`
    text_BxTxD: Array | None = None  # what the blocks' attention looks at beside the image
    text_modulation_BxLx6D: Array | None = None  # of the text's own blocks; None: they are done, or there are none


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
    attention: str | None = None  # of ops/attention.py; None = auto

    wide = False  # see models/dit.py: Block

    def setup(self) -> None:
        """What sees no image; the rest is made where it is called."""
        self.time_embedding = TimeEmbedding(self.width, self.dtype)
        self.transformer = self.blocks(self.depth)

    @nn.compact
    def __call__(
        self,
        x_BxHxWx3: Array,
        t_B: Array,
        condition: Any,
        *,
        hidden_layer: int | None = None,
        given: Given | None = None,
    ) -> Array | tuple[Array, Array]:
        """Predicts the velocity v = image − noise.

        Args:
          x_BxHxWx3: noised RGB images, in [-1, 1] at t = 1; H and W are multiples of the patch size.
          t_B: times, 0 = noise, 1 = data.
          condition: what the network is told about each image, see `embed`.
          hidden_layer: also return the tokens after this block (1 is the first), for representation alignment.
          given: what is known of these times and conditions, see `conditioning`; then `condition` is not looked at.

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

        modulation_BxLx6D = None
        if given is None:
            tau_BxD = self.time_embedding(t_B)
            c_BxD, text_BxTxD = self.embed(condition, tau_BxD)
            c_BxD = nn.with_logical_constraint(c_BxD, ("batch", "activation_width"))
        else:
            tau_BxD, c_BxD, modulation_BxLx6D, text_BxTxD, _ = self.complete(given)
        angles_NxK = jnp.asarray(self.angles(height // p, width // p))
        s, hidden = self.transformer(s, c_BxD, angles_NxK, text_BxTxD, hidden_layer, modulation_BxLx6D)

        out_BxHxWx3 = from_patches(self.decode(s, pixels_BxNxPx3, tau_BxD, c_BxD), height, width, p)
        if self.prediction == "image":  # converted here: no solver, guidance or loss can mistake one for the other
            out_BxHxWx3 = velocity_to(out_BxHxWx3, x_BxHxWx3, t_B)
        v_BxHxWx3 = nn.with_logical_constraint(out_BxHxWx3, ("batch", None, None, None))
        return v_BxHxWx3 if hidden_layer is None else (v_BxHxWx3, hidden)

    def blocks(self, depth: int) -> Transformer:
        """Blocks as this network computes them."""
        return Transformer(depth, self.heads, self.dtype, self.attention, self.remat, self.scan, self.wide)

    def embed(self, condition: Any, tau_BxD: Array) -> tuple[Array, Array | None]:
        """The condition and τ → what modulates all blocks (B, D), and text for their attention (B, T, D) or None."""
        raise NotImplementedError

    def conditioning(self, t_S: Array, condition: Any, refined: bool = True) -> Given:
        """What this network knows of every one of S times with every one of K conditions, each computed once.

        Args:
          t_S: times.
          condition: a tree of arrays (K, …).
          refined: with text, also what its own blocks make of it at every time.

        Returns:
          Arrays (S, K, …); (S, 1, …) of what depends on the time alone, and (1, K, …) on the condition. One time of
          it is what a call takes as `given`.
        """
        raise NotImplementedError

    def complete(self, given: Given) -> Given:
        """What `conditioning` left to do at a time, done."""
        return given

    def angles(self, rows: int, columns: int) -> np.ndarray:
        """Of the rotary embedding of so many tokens: (N, D/h/2), fp32."""
        return rotary_angles(rows, columns, self.width // self.heads)

    def decode(self, s_BxNxD: Array, pixels_BxNxPx3: Array, tau_BxD: Array, c_BxD: Array) -> Array:
        """Tokens → what the last layer puts out, patch by patch: (B, N, p², 3), fp32. Called while compact.

        Args:
          s_BxNxD: after the last block.
          pixels_BxNxPx3: of the noised image.
          tau_BxD: τ, embedding of the time; of one row where all images have the same.
          c_BxD: what modulates the blocks; likewise.
        """
        raise NotImplementedError


class ClassConditional(Trunk, kw_only=True):
    """A network that is told a class (docs/model.md, 2.4)."""

    num_classes: int  # labels run from 0 to num_classes − 1; num_classes itself is the null label

    @property
    def condition(self) -> ClassLabels:
        """What the network is told about the image."""
        return ClassLabels(self.num_classes)

    def setup(self) -> None:
        """See `Trunk`."""
        super().setup()
        self.label_embedding = LabelEmbedding(self.num_classes, self.width, self.dtype)

    def embed(self, labels_B: Array, tau_BxD: Array) -> tuple[Array, None]:
        """Labels in [0, num_classes], num_classes for none, and τ → SiLU(τ + label)."""
        return nn.silu(tau_BxD + self.label_embedding(labels_B)), None

    def conditioning(self, t_S: Array, condition: Array, refined: bool = True) -> Given:
        """See `Trunk`: labels (K,)."""
        tau_SxD = self.time_embedding(t_S)
        c_KxSxD, _ = self.embed(condition[:, None], tau_SxD)  # K first: split over devices, it stays so in one axis
        modulation_KxSxLx6D = self.transformer.modulations(c_KxSxD)
        return Given(tau_SxD[:, None], c_KxSxD.swapaxes(0, 1), modulation_KxSxLx6D.swapaxes(0, 1))


def _check_sides(height: int, width: int, patch_size: int) -> None:
    for name, side in (("height", height), ("width", width)):
        if side % patch_size or side == 0:
            lower = side // patch_size * patch_size
            nearest = f"{lower} and {lower + patch_size}" if lower else f"{patch_size}"
            raise UsageError(
                f"image {name}={side} is not divisible by model.patch_size={patch_size}; nearest: {nearest}."
            )
