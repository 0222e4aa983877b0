"""Does a run say which images it found, and a later one in words what has changed since?"""

import json

from deco_jax.config import default_config
from deco_jax.data.records import compare
from deco_jax.data.sources import open_source


def open_folder(root, files):
    """The source of a folder with these files, which are empty."""
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).touch()
    config = default_config().data
    config.update(source="folder", path=str(root))
    return open_source(config)


def test_the_summary_of_many_classes_is_short(tmp_path):
    assert open_folder(tmp_path, [f"n{k:04}/a.png" for k in range(1200)]).summary()[:-1] == [
        "Images: 1,200 in 1,200 classes: 0 n0000 (1), 1 n0001 (1), 2 n0002 (1), …, 1199 n1199 (1)."
    ]


def contents(root, files):
    """What a checkpoint keeps of such a folder."""
    return json.loads(json.dumps(open_folder(root, files).contents()))


def test_changes_of_the_data_are_told_in_words(tmp_path):
    """A run that is refused, as its data differ from those of its checkpoint, says which files to look for."""
    before = [f"{animal}/{k}.png" for animal in ("cat", "dog") for k in range(8)]
    then = contents(tmp_path / "then", before)
    assert compare(then, contents(tmp_path / "same", reversed(before))) == ""
    relabelled = ["dog/7b.png" if name == "cat/7.png" else name for name in before]
    assert compare(then, contents(tmp_path / "relabelled", relabelled)) == (
        "class 'cat': 8 there, 7 here; class 'dog': 8 there, 9 here; gone: cat/7.png; new: dog/7b.png"
    )
    renamed = [name.replace("cat/", "cat/new") for name in before]
    assert compare(then, contents(tmp_path / "renamed", renamed)) == (
        "class 'cat': 8 there and here, of other names; gone: cat/0.png, cat/1.png, cat/2.png, cat/3.png, cat/4.png "
        "and 3 more; new: cat/new0.png, cat/new1.png, cat/new2.png, cat/new3.png, cat/new4.png and 3 more"
    )
    many = [f"c{c:02}/{k}.png" for c in range(12) for k in range(100)]
    assert compare(then, contents(tmp_path / "many", many)) == (
        "16 records there, 1,200 here; class 'c00': 0 there, 100 here; class 'c01': 0 there, 100 here; "
        "class 'c02': 0 there, 100 here; class 'c03': 0 there, 100 here; class 'c04': 0 there, 100 here; "
        "9 more classes"
    )


def test_what_a_checkpoint_keeps_of_the_data_is_small(tmp_path):
    """It is in the meta of every checkpoint: of ImageNet's thousand classes it must stay below 100 kB."""
    many = contents(tmp_path / "many", [f"n{c:08}/{k}.JPEG" for c in range(1000) for k in range(2)])
    assert len(many["classes"]) == 1000 and len(json.dumps(many)) < 50_000
