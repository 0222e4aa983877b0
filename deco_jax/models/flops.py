"""Analytic cost of a network. XLA's own count sees the body of a scan once, so it cannot be used."""

from deco_jax.models.deco import DeCo


def forward_flops(model: DeCo, height: int, width: int) -> float:
    """Floating-point operations of one forward pass on one image, 2 a multiply-add, matrix products only.

    A training step costs three times that (paper's Table 1 models at 256²: L 155e9, XL 245e9).
    """
    d, p = model.width, model.patch_size
    tokens, pixels = height * width // p**2, height * width
    mlp = int(2 * 4 * d / 3)
    block = tokens * (3 * d * d + d * d + 3 * d * mlp) + 2 * tokens**2 * d + 6 * d * d
    embeddings = tokens * 3 * p * p * d + 256 * d + d * d
    x = model.decoder_width
    decoder = tokens * d * p * p * x + pixels * (3 * x + x * x + model.decoder_depth * 5 * x * x + 3 * x)
    return 2.0 * (model.depth * block + embeddings + decoder)
