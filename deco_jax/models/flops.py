"""Analytic cost of a network. XLA's own count sees the body of a scan once, so it cannot be used."""

from deco_jax.models.baseline import BaselineDiT
from deco_jax.models.build import Network
from deco_jax.models.deco import TextDeCo
from deco_jax.models.pixnerd import PixNerd


def forward_flops(model: Network, height: int, width: int) -> float:
    """Floating-point operations of one forward pass on one image, 2 per multiply-add, matrix products only.

    A training step costs three times that (paper's Table 1 models at 256²: L 155e9, XL 245e9).
    """
    d, p = model.width, model.patch_size
    tokens, pixels = height * width // p**2, height * width
    rest = tokens * 3 * p * p * d + 256 * d + d * d + _decoder(model, tokens, pixels)
    if not isinstance(model, TextDeCo):
        return 2.0 * (model.depth * _block(tokens, d, int(2 * 4 * d / 3)) + rest)
    text = model.text_tokens
    block = _block(tokens, d, 4 * d) + text * 2 * d * d + 2 * tokens * text * d
    return 2.0 * (
        model.depth * block + model.text_depth * _block(text, d, 4 * d) + text * model.text_features * d + rest
    )


def _block(tokens: int, d: int, mlp: int) -> int:
    """Multiply-adds of a block in which tokens see each other."""
    return tokens * (4 * d * d + 3 * d * mlp) + 2 * tokens**2 * d + 6 * d * d


def _decoder(model: Network, tokens: int, pixels: int) -> int:
    """Multiply-adds of what comes after the transformer."""
    d, p = model.width, model.patch_size
    if isinstance(model, BaselineDiT):
        return 2 * d * d + tokens * d * 3 * p * p
    x, blocks = model.decoder_width, model.decoder_depth
    if isinstance(model, PixNerd):
        generated = 2 * model.decoder_expansion * x * x
        return blocks * (tokens * d * generated + pixels * generated) + pixels * (3 * x + 3 * x)
    text = isinstance(model, TextDeCo)
    colours = 3 if text else 3 * model.decoder_patch**2  # of a query's square
    adaln = text or model.decoder_interaction == "adaln"
    queries, block = 3 * pixels // colours, (5 if adaln else 2) * x * x
    return queries * (d * x + 2 * colours * x + x * x + blocks * block)
