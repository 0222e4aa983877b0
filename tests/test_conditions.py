"""What a network is told: labels dropped in training, read from users, and spread over grids."""

import numpy as np
import pytest

from deco_jax.conditions import ClassLabels
from deco_jax.errors import UsageError
from deco_jax.pretrained.load import imagenet_classes

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
    np.testing.assert_array_equal(TEN.read(np.array([3, 10])), [3, 10])  # as the network takes them
    for labels in (np.array([11]), np.array([-1]), [10]):
        with pytest.raises(UsageError, match=f"labels {labels[0]} do not exist"):
            TEN.read(labels)
    assert TEN.parse("0,5-7,null") == [0, 5, 6, 7, "null"]
    assert TEN.parse("all") == list(range(10))
    for text in ("", "a", "1-", "1--2", "-1", "5-3", "²", "1.5"):
        with pytest.raises(UsageError, match=f"--labels={text} is not understood"):
            TEN.parse(text)
    with pytest.raises(UsageError, match="labels 10, 11 do not exist; the network has the classes 0 to 9"):
        TEN.parse("8-11")
    with pytest.raises(UsageError, match="labels 10, 11, 12, 13, 14 do not exist"):
        TEN.parse(f"0-{10**15}")


def test_classes_are_asked_for_by_name():
    """Own folders' names, one of them with a comma; the words all and null stay what they are."""
    names = ("cat", "Dog", "cat, tabby", "207", "great  eel", *"56789")
    assert TEN.parse("dog,CAT,3,null,cat, tabby,great eel,0-1", names) == [1, 0, 3, "null", 2, 4, 0, 1]
    assert TEN.parse_one("tabby", names) == 2 and TEN.parse_one("null", names) == "null"
    for text, message in {
        "dgo": r"--labels: no class is called 'dgo'; the nearest are dog \(1\)",
        "cat,xyzzy": "--labels: no class is called 'xyzzy'; write its number",
        "5-3": "--labels=5-3 is not understood",
        "207": "labels 207 do not exist",
        "": "--labels: no class is called ''",
    }.items():
        with pytest.raises(UsageError, match=message):
            TEN.parse(text, names)
    with pytest.raises(UsageError, match="--negative=cat,dog says 2 labels; write one"):
        TEN.parse_one("cat,dog", names)


def test_imagenets_classes_by_name():
    """Labels of some classes, as everybody who sampled from ImageNet knows them."""
    names, imagenet = imagenet_classes(), ClassLabels(1000)
    assert len(names) == len(set(names)) == 1000 and sorted(names) == list(names), "in order of the WordNet ids"
    known = {"tench": 0, "golden retriever": 207, "husky": 248, "red panda": 387, "macaw": 88, "volcano": 980}
    known |= {"N02099601": 207, "toilet tissue": 999, "Tench, Tinca tinca": 0}
    for name, number in known.items():
        assert imagenet.parse_one(name, names) == number, name
    assert imagenet.parse("golden retriever,207,tench, Tinca tinca,great white shark", names) == [207, 207, 0, 2]
    crane = r"--labels: 'crane' is the name of several classes, 134 \(n02012849 crane\); 517 \(n03126707 crane\); write"
    with pytest.raises(UsageError, match=crane):
        imagenet.parse("crane", names)
    with pytest.raises(UsageError, match="'Cardigan' is the name of several classes, 264 .*; 474 "):
        imagenet.parse("Cardigan", names)
    with pytest.raises(UsageError, match=r"the nearest are golden retriever \(207\)"):
        imagenet.parse("goldn retreiver", names)


def test_grids_show_classes_far_apart():
    assert TEN.spread(5) == [0, 2, 4, 6, 8]
    assert ClassLabels(2).spread(5) == [0, 0, 0, 1, 1]


def test_data_with_more_classes_than_the_network_are_refused():
    TEN.check_data(ClassLabels(3))
    with pytest.raises(UsageError, match="model.num_classes=10 is too few; the data has 1000 classes"):
        TEN.check_data(ClassLabels(1000))
