"""Analytic cost of a network. XLA's own count sees the body of a scan once, so it cannot be used."""

from deco_jax.models.baseline import BaselineDiT
from deco_jax.models.build import Network
from deco_jax.models.pixnerd import PixNerd


def forward_flops(model: Network, height: int, width: int) -> float:
    """Floating-point operations of one forward pass on one image, 2 per multiply-add, matrix products only.

    A training step costs three times that (paper's Table 1 models at 256²: L 155e9, XL 245e9).
    """
    d, p = model.width, model.patch_size
    tokens, pixels = height * width // p**2, height * width
    mlp = int(2 * 4 * d / 3)
    block = tokens * (3 * d * d + d * d + 3 * d * mlp) + 2 * tokens**2 * d + 6 * d * d
    embeddings = tokens * 3 * p * p * d + 256 * d + d * d
    return 2.0 * (model.depth * block + embeddings + _decoder(model, tokens, pixels))


def _decoder(model: Network, tokens: int, pixels: int) -> int:
    """Multiply-adds of what comes after the transformer."""
    d, p = model.width, model.patch_size
    if isinstance(model, BaselineDiT):
        return 2 * d * d + tokens * d * 3 * p * p
    x, blocks = model.decoder_width, model.decoder_depth
    if isinstance(model, PixNerd):
        generated = 2 * model.decoder_expansion * x * x
        return blocks * (tokens * d * generated + pixels * generated) + pixels * (3 * x + 3 * x)
    colours = 3 * model.decoder_patch**2  # of a query's square
    queries, block = 3 * pixels // colours, (5 if model.decoder_interaction == "adaln" else 2) * x * x
    return queries * (d * x + 2 * colours * x + x * x + blocks * block)
