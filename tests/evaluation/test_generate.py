"""Grids, labels on the command line, and the classifier that judges the digits."""

import numpy as np
import pytest

from deco_jax.config import default_config
from deco_jax.data.sources import Digits
from deco_jax.errors import UsageError
from deco_jax.evaluation.digits import DigitClassifier
from deco_jax.evaluation.generate import _grid_by_label, parse_labels
from deco_jax.sampling.pictures import make_grid, save_png
from tests.helpers import Golden


def test_a_grid_lays_images_out_row_by_row():
    images = np.arange(5, dtype=np.uint8)[:, None, None, None] * np.ones((5, 2, 3, 3), np.uint8)
    grid = make_grid(images, columns=3)
    assert grid.shape == (5, 11, 3)
    assert [grid[0, 0, 0], grid[0, 4, 0], grid[0, 8, 0], grid[3, 0, 0], grid[3, 4, 0]] == [0, 1, 2, 3, 4]
    assert (grid[2] == 255).all() and (grid[:, 3] == 255).all() and (grid[3:, 8:] == 255).all()


def test_a_picture_appears_whole(tmp_path):
    save_png(np.zeros((4, 4, 3), np.uint8), tmp_path / "new" / "a.png")
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["a.png"]


def test_a_grid_has_a_row_for_each_label():
    """Seven images of three labels, which take turns: labels 0, 1, 2, 0, 1, 2, 0."""
    images = np.arange(7, dtype=np.uint8)[:, None, None, None] * np.ones((7, 1, 1, 3), np.uint8)
    grid = _grid_by_label(images, 3)[::2, ::2, 0]
    np.testing.assert_array_equal(grid, [[0, 3, 6], [1, 4, 255], [2, 5, 255]])
    assert _grid_by_label(images, 7).shape == (1, 13, 3) and _grid_by_label(images, 1).shape == (1, 13, 3)


def test_labels():
    model = Golden("deco_c2i").model()
    assert parse_labels("0,7, 2-4,null", model) == [0, 7, 2, 3, 4, "null"]
    assert parse_labels("all", model) == list(range(10))
    for text in ("", "a", "1-", "1--2", "-1", "5-3", "²", "1.5"):
        with pytest.raises(UsageError, match="is not understood"):
            parse_labels(text, model)
    with pytest.raises(UsageError, match="labels 10, 11, 12 do not exist"):
        parse_labels("9-12", model)


def test_the_judge_knows_digits_and_is_not_fooled_by_noise():
    """A judge that always agreed would make the quickstart's figure worthless."""
    data = default_config().data
    data.update(source="digits", image_size=28)
    digits = Digits(data)
    train, held_out = np.arange(0, 5000, 3), np.arange(1, 5000, 10)
    judge = DigitClassifier(digits.images_KxHxW[train], digits.labels_K[train])
    assert (judge(digits.images_KxHxW[held_out]) == digits.labels_K[held_out]).mean() > 0.93
    noise = np.random.default_rng(0).integers(0, 256, (200, 28, 28), np.uint8)
    labels = np.arange(200) % 10
    assert (judge(noise) == labels).mean() < 0.3
