"""Many images from a network, their grid, and the classifier that judges the digits."""

import jax
import numpy as np
import pytest

from benchmarks.digits import DigitClassifier
from deco_jax.config import default_config
from deco_jax.data.sources import Digits
from deco_jax.diffusion.flow import to_uint8
from deco_jax.evaluation.generate import _grid_by_label, generate
from deco_jax.sampling.pictures import make_grid, save_png
from deco_jax.sampling.sample import image_noise, sample
from deco_jax.sampling.settings import Sampling
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


@pytest.mark.usefixtures("quick_compile")
def test_images_come_in_order_whatever_the_batch():
    """Eight devices: eleven images in batches of 8, the last one filled up, and in one of 16."""
    g = Golden("deco_c2i")
    labels, settings = [*range(10), "null"], Sampling(steps=2, guidance=2.0)
    model, params = g.model(), g.params()
    small, large = (np.stack(list(generate(model, params, labels, 5, 8, size, settings))) for size in (3, 99))
    assert small.shape == (11, 8, 8, 3) and small.dtype == np.uint8
    assert np.abs(small.astype(int) - large).max() <= 1, "an image depends on its batch"
    noise = image_noise(jax.random.key(5), np.array([7]), (8, 8, 3))
    (alone,) = np.asarray(to_uint8(sample(model, params, [7], noise=noise, settings=settings)))
    assert np.abs(alone.astype(int) - small[7]).max() <= 1, "image 7 shows label 7, from the noise of number 7"
    assert np.abs(alone.astype(int) - small[6]).max() > 1


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
