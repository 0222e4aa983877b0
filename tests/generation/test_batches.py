"""Batches of images: the next one is on its way before one is read back, and what is not finite is named."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deco_jax.errors import UsageError
from deco_jax.generation import batches
from deco_jax.generation.batches import generate, noise_batches
from deco_jax.sampling.sample import image_noise
from deco_jax.sampling.settings import Sampling


@pytest.fixture
def drawn(monkeypatch):
    """`sample` that gives every image the color of its label and notes its calls; label 7 is not finite."""
    calls = []

    def sample(model, params, labels, *, noise, keys, negative, settings):
        calls.append((list(labels), negative, noise.shape))
        values = jnp.array([np.nan if label == 7 else label / 100 for label in labels])
        return jnp.broadcast_to(values[:, None, None, None], noise.shape)

    monkeypatch.setattr(batches, "sample", sample)
    return calls


def test_the_next_batch_is_dispatched_before_one_is_read_back(drawn):
    """Eight devices: 20 images are batches of 8, the last one filled up to the same shape."""
    images = generate(None, {}, [0, 1, 2], 0, (4, 6), 8, Sampling(), range(20), negative=5)
    assert drawn == []
    first = next(images)
    assert len(drawn) == 2, "the devices wait while a batch is read back"
    rest = list(images)
    assert [len(labels) for labels, *_ in drawn] == [8, 8, 8] and {shape for *_, shape in drawn} == {(8, 4, 6, 3)}
    assert all(negative == [5] * 8 for _, negative, _ in drawn)
    shown = [round((int(image[0, 0, 0]) - 128) / 1.275) for image in [first, *rest]]
    assert shown == [i % 3 for i in range(20)] and first.shape == (4, 6, 3) and first.dtype == np.uint8


def test_an_image_that_is_not_finite_is_named_and_what_fills_a_batch_is_not(drawn):
    with pytest.raises(UsageError, match=r"Image 17, of label 7, is not finite; try --dtype=float32"):
        list(generate(None, {}, [*range(7), 8, 7], 0, 4, 8, Sampling(), range(9, 20)))


def test_noise_is_that_of_the_numbers():
    (indices, noise, count), *more = noise_batches([3, 11], 5, (2, 4), 8)
    assert count == 2 and not more and indices.shape == (8,)
    np.testing.assert_array_equal(noise[:2], image_noise(jax.random.key(5), np.array([3, 11]), (2, 4, 3)))
