"""What a network is told: labels dropped in training, read from users, and spread over grids."""

import numpy as np
import pytest

from deco_jax.conditions import ClassLabels
from deco_jax.errors import UsageError

TEN = ClassLabels(10)


def test_dropped_examples_lose_their_class_and_nothing_else():
    batch = {"image": np.zeros((4, 2, 2, 3)), "label": np.array([3, 0, 9, 5])}
    dropped = TEN.drop(batch, np.array([False, True, False, True]))
    np.testing.assert_array_equal(TEN.from_batch(dropped), [3, 10, 9, 10])
    assert dropped["image"] is batch["image"] and batch["label"].tolist() == [3, 0, 9, 5]


def test_a_batch_carries_what_the_fields_say():
    (name, field), *others = TEN.fields.items()
    assert not others and (name, field.shape, field.dtype) == ("label", (), np.int32)
    assert TEN.example(3).shape == (3,) and TEN.read([1, "null", 2]).dtype == field.dtype


def test_what_users_ask_for():
    np.testing.assert_array_equal(TEN.read([3, "null", np.int64(0)]), [3, 10, 0])
    assert TEN.parse("0,5-7,null") == [0, 5, 6, 7, "null"]
    assert TEN.parse("all") == list(range(10))
    for text in ("", "a", "1-", "1--2", "-1", "5-3", "²", "1.5"):
        with pytest.raises(UsageError, match=f"--labels={text} is not understood"):
            TEN.parse(text)
    with pytest.raises(UsageError, match="labels 10, 11 do not exist; the network has the classes 0 to 9"):
        TEN.parse("8-11")


def test_grids_show_classes_far_apart():
    assert TEN.spread(5) == [0, 2, 4, 6, 8]
    assert ClassLabels(2).spread(5) == [0, 0, 0, 1, 1]


def test_data_with_more_classes_than_the_network_are_refused():
    TEN.check_data(ClassLabels(3))
    with pytest.raises(UsageError, match="model.num_classes=10 is too few; the data has 1000 classes"):
        TEN.check_data(ClassLabels(1000))
