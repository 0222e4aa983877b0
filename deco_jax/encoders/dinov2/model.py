"""DINOv2, the vision transformer whose patch features are the target of representation alignment (docs/model.md, 5).

Oquab et al., "DINOv2", 2023; with registers: Darcet et al., "Vision Transformers Need Registers", 2023.
Weights come from `dinov2/weights.py`. Axis letters as in `models/layers.py`; R register tokens.
"""

from typing import Literal

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax import Array

from deco_jax.encoders.dinov2.bicubic import resize_bicubic
from deco_jax.errors import UsageError
from deco_jax.models.dit import Attention
from deco_jax.models.layers import Linear, layer_norm, to_patches

# The published sizes; all have patches of 14 pixels and a table of 37×37 positions.
SIZES = {
    "small": {"width": 384, "depth": 12, "heads": 6},
    "base": {"width": 768, "depth": 12, "heads": 12},
    "large": {"width": 1024, "depth": 24, "heads": 16},
    "giant": {"width": 1536, "depth": 40, "heads": 24, "mlp": "swiglu"},
}
IMAGENET_MEAN = np.array([0.485, 0.456, 0.406], np.float32)
IMAGENET_STD = np.array([0.229, 0.224, 0.225], np.float32)


def mlp_width(width: int, mlp: str) -> int:
    """Hidden channels of an MLP: 4D; of SwiGLU two thirds of that, rounded up to a multiple of 8."""
    return 4 * width if mlp == "gelu" else (8 * width // 3 + 7) // 8 * 8


def prepare_image(image_BxHxWx3: Array, patch_size: int = 14, image_patch: int = 16) -> Array:
    """RGB in [0, 1] → what the network sees: ImageNet's mean and deviation, then bicubic by patch_size/image_patch.

    Raises:
      UsageError: the image is not a whole number of patches high or wide.
    """
    _, height, width, _ = image_BxHxWx3.shape
    if height % image_patch or width % image_patch:
        raise UsageError(
            f"images of {height}×{width} do not divide into the teacher's patches of {image_patch}×{image_patch} "
            f"pixels; take multiples of {image_patch}, or train without REPA: loss.alignment_weight=0."
        )
    normal = (image_BxHxWx3.astype(jnp.float32) - IMAGENET_MEAN) / IMAGENET_STD
    return resize_bicubic(normal, height // image_patch * patch_size, width // image_patch * patch_size)


def forward_flops(model: "DINOv2", height: int, width: int) -> float:
    """Floating-point operations of one forward pass on one image, 2 per multiply-add, matrix products only."""
    d, patches = model.width, (height // model.image_patch) * (width // model.image_patch)
    tokens = patches + 1 + model.registers
    mlp = (2 if model.mlp == "gelu" else 3) * mlp_width(d, model.mlp)
    block = tokens * (4 * d * d + mlp * d) + 2 * tokens**2 * d
    return 2.0 * (model.depth * block + patches * 3 * model.patch_size**2 * d)


class Mlp(nn.Module):
    """down(GELU(in x)) with the exact, erf GELU; or SwiGLU, down(SiLU(a)·b) with (a, b) = in x. With biases."""

    mlp: str
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x_BxNxD: Array) -> Array:
        """(B, N, D) → (B, N, D)."""
        width = x_BxNxD.shape[-1]
        hidden = mlp_width(width, self.mlp)
        if self.mlp == "swiglu":
            both = Linear((2, hidden), ("width", None, "mlp"), dtype=self.dtype, name="in")(x_BxNxD)
            h = nn.silu(both[:, :, 0]) * both[:, :, 1]
        else:
            h = nn.gelu(Linear(hidden, ("width", "mlp"), dtype=self.dtype, name="in")(x_BxNxD), approximate=False)
        return Linear(width, ("mlp", "width"), dtype=self.dtype, name="down")(h)


class Block(nn.Module):
    """s ← s + λ₁·Attention(LN(s)); s ← s + λ₂·MLP(LN(s)), λ one learned factor per channel. s is fp32."""

    heads: int
    mlp: str
    dtype: jnp.dtype
    attention: str | None

    @nn.compact
    def __call__(self, s_BxNxD: Array) -> tuple[Array, None]:
        """Tokens → (tokens, nothing for the scan to collect)."""
        ones = nn.with_logical_partitioning(nn.initializers.ones, ("width",))
        scale_a, scale_m = (self.param(f"{of}_scale", ones, s_BxNxD.shape[-1:]) for of in ("attention", "mlp"))
        h = layer_norm("width", self.dtype, "attention_norm")(s_BxNxD)
        attention = Attention(self.heads, self.dtype, self.attention, use_bias=True, use_norm=False, name="attention")
        s_BxNxD = s_BxNxD + scale_a * attention(h)
        h = layer_norm("width", self.dtype, "mlp_norm")(s_BxNxD)
        s_BxNxD = s_BxNxD + scale_m * Mlp(self.mlp, self.dtype, name="mlp")(h)
        return nn.with_logical_constraint(s_BxNxD, ("batch", "tokens", "activation_width")), None


class DINOv2(nn.Module):
    """Image → patch features. A token stands for `image_patch` pixels of the image, so grids match the student's.

    Positions are interpolated from the table as the published networks do it: by the scale factor
    (n + position_offset)/table_side, a historical offset; those with registers without it, by size and antialiased.
    On the table's own grid nothing is interpolated.
    """

    width: int
    depth: int
    heads: int
    mlp: Literal["gelu", "swiglu"] = "gelu"
    patch_size: int = 14
    image_patch: int = 16
    table_side: int = 37
    registers: int = 0
    position_offset: float = 0.1  # 0.0 with registers
    position_antialias: bool = False  # True with registers
    dtype: jnp.dtype = jnp.bfloat16  # of matrix products; the residual stream and all statistics are fp32
    attention: str | None = None  # see ops/attention.py; None = auto
    output: Literal["patches", "class"] = "patches"
    scan: bool = True  # False unrolls the loop in the compiled program; the parameters are the same

    @nn.compact
    def __call__(self, image_BxHxWx3: Array) -> Array:
        """RGB in [0, 1] → features of the patches, row-major, after the final norm: (B, N, D), fp32.

        With output="class" it is the class token after the same norm, (B, D).

        Raises:
          UsageError: the image is not a whole number of patches high or wide.
        """
        x = prepare_image(image_BxHxWx3, self.patch_size, self.image_patch)
        rows, columns = x.shape[1] // self.patch_size, x.shape[2] // self.patch_size
        patches = to_patches(x, self.patch_size).reshape(x.shape[0], rows * columns, -1)
        s = Linear(self.width, ("patch", "width"), dtype=self.dtype, name="patch_embedding")(patches)

        normal = nn.with_logical_partitioning(nn.initializers.normal(0.02), (None, None, "width"))
        class_token = self.param("class_token", normal, (1, 1, self.width))
        table = self.param("positions", normal, (1, 1 + self.table_side**2, self.width))
        s = s.astype(jnp.float32) + self._positions(table[:, 1:], rows, columns)
        before = [class_token + table[:, :1]]
        if self.registers:  # they have no position
            before.append(self.param("register_tokens", normal, (1, self.registers, self.width)))
        before = jnp.concatenate(before, axis=1)
        s = jnp.concatenate([jnp.broadcast_to(before, (s.shape[0], *before.shape[1:])), s], axis=1)
        s = nn.with_logical_constraint(s, ("batch", "tokens", "activation_width"))

        blocks = nn.scan(
            Block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=self.depth,
            unroll=1 if self.scan else self.depth,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        s, _ = blocks(self.heads, self.mlp, self.dtype, self.attention, name="blocks")(s)
        norm = layer_norm("width", jnp.float32, "norm")
        return norm(s[:, 0]) if self.output == "class" else norm(s[:, before.shape[1] :])

    def _positions(self, table_1xMxD: Array, rows: int, columns: int) -> Array:
        """The table at a grid of another size."""
        side = self.table_side
        if (rows, columns) == (side, side):
            return table_1xMxD
        square = table_1xMxD.reshape(1, side, side, self.width)
        scales = None
        if self.position_offset:
            scales = (rows + self.position_offset) / side, (columns + self.position_offset) / side
        grid = resize_bicubic(square, rows, columns, scales, self.position_antialias)
        return grid.reshape(1, rows * columns, self.width)
