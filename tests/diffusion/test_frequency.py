"""The frequency-aware loss against the recorded numbers, and the transform against SciPy's."""

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.fft

from deco_jax.diffusion.frequency import block_dct, dct_matrix, frequency_loss, frequency_weights, rgb_to_ycbcr
from tests.helpers import Golden, relative_error


def test_every_recorded_weight_table():
    tables = Golden("frequency_loss").group("weights:")
    assert len(tables) == 40
    for key, table in tables.items():
        mode, quality, gamma = key.split(":")
        assert relative_error(frequency_weights(int(quality[1:]), mode, float(gamma[1:])), table) < 1e-6, key


def test_dct_matrix():
    assert relative_error(dct_matrix(), Golden("frequency_loss")["dct_matrix"]) < 1e-6
    np.testing.assert_allclose(dct_matrix() @ dct_matrix().T, np.eye(8), atol=1e-14)


@pytest.mark.parametrize("case", ["a", "pad"])
def test_recorded_transforms_and_losses(case):
    g = Golden("frequency_loss")
    pred, target = g.image(f"{case}:pred"), g.image(f"{case}:target")
    ycbcr = rgb_to_ycbcr(pred)
    assert relative_error(ycbcr, g.image(f"{case}:ycbcr_pred")) < 2e-5
    dct_BxCxhxwx8x8 = jnp.moveaxis(block_dct(ycbcr), -1, 1)
    assert relative_error(dct_BxCxhxwx8x8, g[f"{case}:dct_pred"]) < 2e-5
    for key, loss in g.group(f"{case}:freq_loss:q").items():
        assert relative_error(frequency_loss(pred - target, frequency_weights(int(key), "inv_gamma", 1.0)), loss) < 2e-5


def test_block_dct_is_scipys():
    x = np.random.default_rng(0).normal(size=(2, 16, 24, 3)).astype(np.float32)
    ours = np.asarray(block_dct(x))
    for row in range(2):
        for column in range(3):
            block = x[:, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
            theirs = scipy.fft.dctn(block, axes=(1, 2), norm="ortho")
            np.testing.assert_allclose(ours[:, row, column], theirs, atol=1e-5)


def test_white_error_costs_what_flow_matching_costs_in_luminance():
    """Weights have mean 1 and the DCT is orthonormal, so a white grey error keeps its mean square in Y."""
    grey = np.random.default_rng(0).normal(size=(64, 32, 32, 1)).astype(np.float32).repeat(3, axis=-1)
    loss = float(frequency_loss(grey, frequency_weights(85, "inv_gamma", 1.0)))
    assert abs(3 * loss / (grey**2).mean() - 1) < 0.02  # Cb and Cr are 0
