"""Is each image of a folder read with its own caption, and is what has none counted and said?"""

import itertools
import json
import os
import pathlib
import tempfile

import ml_dtypes
import numpy as np
import pytest

from deco_jax.conditions import Captions, Text
from deco_jax.data import captions
from deco_jax.data.pipeline import BadRecords, batches
from deco_jax.data.records import compare
from deco_jax.data.sources import open_source
from deco_jax.data.wording import Wording, clean
from deco_jax.errors import UsageError
from tests.data.captioned import (
    BATCH,
    SIZE,
    States,
    age,
    caption,
    encoded,
    order_is_exact,
    pixels,
    same_records,
    some_batches,
)
from tests.data.test_reading import data_config


@pytest.fixture(autouse=True)
def kept(monkeypatch):
    """Also of files that the tests made just now an index is kept."""
    monkeypatch.setattr(captions, "RECENT", -1.0)


@pytest.fixture(autouse=True)
def machine(tmp_path, monkeypatch):
    """The temporary folder of a machine of its own."""
    (tmp_path / "machine").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "machine"))


def config_of(path, **fields):
    return data_config(path, **({"source": "captions", "image_size": SIZE, "batch_size": BATCH} | fields))


def opened(path, **fields):
    return open_source(config_of(path, **fields))


NAMES = ["a.jpg", "b.PNG", "deep/er/a.webp", "deep/x.y.png", *(f"many/{k}.png" for k in range(16))]


@pytest.fixture
def root(tmp_path):
    """Files beside images, of both endings; and what is ignored."""
    root = tmp_path / "data"
    for number, name in enumerate(NAMES):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(number, {".jpg": "jpeg", ".webp": "webp"}.get(path.suffix, "png")))
        path.with_suffix(".caption" if number % 3 == 1 else ".txt").write_text(f" {caption(number)}\n", "utf-8")
    (root / "alone.jpg").write_bytes(encoded(99, "jpeg"))
    (root / "deep/none.txt").write_text("no image")
    (root / "README.md").write_text("x")
    (root / ".hidden.jpg").write_text("x")
    age(root)
    return root


def expected(root):
    """By os.walk: of each image with a text its bytes and the text, in the order of the parts of their names."""
    found = []
    for folder, _, files in os.walk(root):
        for name in files:
            path = pathlib.Path(folder, name)
            texts = [path.with_suffix(end) for end in (".txt", ".caption") if path.with_suffix(end).exists()]
            if path.suffix.lower() in (".jpg", ".png", ".webp") and texts:
                found.append((path.relative_to(root).parts, path.read_bytes(), texts[0].read_text("utf-8").strip()))
    return [(content, text) for _, content, text in sorted(found)]


def test_a_text_beside_each_image(root):
    source = opened(root)
    assert len(expected(root)) == len(NAMES)
    same_records(source, expected(root))
    assert (source.class_names, source.condition) == ((), Captions())
    Text(4, 8).check_data(source.condition)
    assert source.summary()[:2] == [
        "Images: 20 with captions, for instance: “picture 0, é 猫 nice”, “picture 18, é 猫 very very nice”, "
        "“picture 13, é 猫 very nice”.",
        "Ignored: 4 files (1 hidden, 1 .md, 1 captions without an image, 1 images without a caption).",
    ]
    assert source.describe(0) == f"{root}/a.jpg"
    contents = json.loads(json.dumps(source.contents()))
    assert (contents["source"], contents["records"], contents["classes"]) == ("captions", 20, {})
    assert contents["names"] == sorted(NAMES, key=lambda name: name.split("/"))


def test_order_resume_hosts_and_workers(root):
    order_is_exact(config_of(root), opened(root))


def metadata(root, lines):
    for path in [*root.rglob("*.txt"), *root.rglob("*.caption")]:
        path.unlink()
    (root / "metadata.jsonl").write_text(
        "".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines)
    )
    age(root)


def test_one_file_for_all(root):
    """Hugging Face's imagefolder: lines in any order; here with UTF-8 and with escapes, and an empty line."""
    texts = {name: caption(100 + k) for k, name in enumerate(NAMES)}
    lines = [{"file_name": name, "text": text, "n": 1} for name, text in reversed(texts.items())]
    lines += ["", {"file_name": "gone.jpg", "text": "x"}, {"file_name": "alone.jpg", "text": " \n"}, lines[0]]
    lines[3] = json.dumps(lines[3], ensure_ascii=False)
    metadata(root, lines)
    source = opened(root)
    names = sorted(NAMES, key=lambda name: name.split("/"))
    same_records(source, [((root / name).read_bytes(), texts[name]) for name in names])
    ignored = source.summary()[1]
    for kind in ("1 lines without an image", "1 further lines of an image", "1 images without a caption", "1 hidden"):
        assert kind in ignored
    order_is_exact(config_of(root), source)


def test_the_field_of_the_lines(root):
    metadata(root, [{"file_name": name, "text": "short", "long": caption(k)} for k, name in enumerate(NAMES)])
    assert opened(root).load(0)["caption"] == "short"
    assert opened(root, caption_field="long").load(0)["caption"] == caption(0)
    assert opened(root, caption_field="text").load(0)["caption"] == "short"


def test_the_second_start_lists_nothing(root, monkeypatch):
    first = opened(root)
    place = f"{root}/.deco_jax_index_captions.safetensors"
    assert first.summary()[-1].endswith(f" s, kept in {place}.")
    with monkeypatch.context() as patched:
        patched.setattr(captions, "list_files", None)
        again = opened(root)
    assert again.summary()[-1].startswith(f"Index: {place}, checked in ")
    assert (again.identity, again.contents()) == (first.identity, first.contents())


CHANGES = {
    "a new pair": lambda root: [(root / f"many/z.{end}").write_bytes(encoded(3)) for end in ("png", "txt")],
    "at the top": lambda root: [(root / f"z.{end}").write_bytes(encoded(3)) for end in ("png", "txt")],
    "a caption less": lambda root: (root / "deep/er/a.txt").unlink(),
    "a metadata.jsonl": lambda root: (root / "metadata.jsonl").write_text('{"file_name": "a.jpg", "text": "x"}'),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_has_changed_is_seen(root, change):
    before = opened(root)
    CHANGES[change](root)
    after = opened(root)
    assert "(the data have changed)" in after.summary()[-1]
    assert after.identity != before.identity and compare(before.contents(), after.contents())
    same = opened(root)
    assert same.identity == after.identity


def test_other_captions_of_the_same_images_are_told(root):
    """A run that resumes would not notice that it learns other texts."""
    lines = [{"file_name": name, "text": caption(k)} for k, name in enumerate(NAMES)]
    metadata(root, lines)
    before = opened(root)
    metadata(root, [{**line, "text": f"{line['text']}!"} for line in lines])
    after = opened(root)
    assert before.identity != after.identity
    assert compare(before.contents(), after.contents()) == "other captions"


def test_unreadable_records_are_counted(root, caplog):
    """Broken image, empty caption, no UTF-8: each is replaced by the next, and counted. Small ones are no fault."""
    (root / "a.jpg").write_bytes(b"no image")
    (root / "b.caption").write_text(" \x01\n ")
    (root / "deep/x.y.txt").write_bytes(b"\xff\xfe\xff")
    config = config_of(root, min_side=9, max_bad_share=1.0)
    source = open_source(config)
    with pytest.raises(ValueError, match=r"12×13 pixels; data\.min_side=13 asks for more"):
        opened(root, min_side=13).load(4)
    small = [number for number, name in enumerate(NAMES) if min(pixels(number).shape[:2]) < 9]
    bad = BadRecords(source, config)
    for batch in some_batches(config, source, count=4):
        bad.check(batch["bad"])
    named = {source.describe(k).removeprefix(f"{root}/") for k in bad.seen}
    assert named == {"a.jpg", "b.PNG", "deep/x.y.png"}
    assert "its caption is empty" in caplog.text
    assert len(small) > 1 and bad.small >= len(small)
    assert "Images smaller than data.min_side=9 skipped so far: 1." in caplog.text
    config = config_of(root, min_side=99, max_bad_share=1.0)
    with pytest.raises(UsageError, match=r"Of \d+ records in a row none can be taken, \d+ of them being too small"):
        some_batches(config, open_source(config), count=1)


def test_stored_states_stand_in_place_of_tokens(root):
    """Each record with its own, from threads and workers alike; a record without them is replaced as a whole."""
    config = config_of(root)
    source = open_source(config)
    for config.workers in (0, 2):
        taken = list(itertools.islice(batches(config, 5, source, 0, states=States()), 4))
        tokens = some_batches(config, source, count=4)
        for batch, other in zip(taken, tokens, strict=True):
            assert batch.keys() == {"image", "text", "bad"} and batch["text"].dtype == ml_dtypes.bfloat16
            for row, text in enumerate(batch["text"].astype(int)):
                (record,) = np.unique(text)
                assert record != 3
                np.testing.assert_array_equal(batch["image"][row], source.load(record)["image"])
                if batch["bad"][row] < 0:
                    assert batch["image"][row].tolist() == other["image"][row].tolist()
        bad = np.concatenate([batch["bad"] for batch in taken])
        assert set(bad.tolist()) == {-1, 3}, "the record without states must count as unreadable"


@pytest.mark.parametrize(
    "text, expected",
    [
        ("  a red circle \n", "a red circle"),
        ("a\x00 b\x1b[31m\x7f c", "a b[31m c"),
        ("line\r\nline\tx", "line\r\nline\tx"),
        ("lone \ud800 surrogate", "lone  surrogate"),
        ("x" * 10_007, "x" * 10_000),
        ("👩‍🚀 猫 é", "👩‍🚀 猫 é"),
        ("\x00 \x07", ""),
    ],
)
def test_cleaning(text, expected):
    assert clean(text) == expected


def test_the_prefix_of_short_captions():
    wording = Wording("caption", "A photo of ", 4)
    assert wording("a red circle") == "A photo of a red circle"
    assert wording("a big red circle") == "a big red circle"
    assert len(wording("x" * 10_000)) == 10_000
    assert Wording("caption", "A photo of ", 0)("a") == "a"
    for wrong in ("", " ", None, 7, ["a"]):
        with pytest.raises(ValueError, match="its caption is"):
            wording(wrong)


def test_prefixes_come_with_the_records(root):
    (root / "a.txt").write_text("a cat")
    source = opened(root, caption_prefix="A photo of ", short_caption=3)
    assert [source.load(k)["caption"] for k in (0, 1)] == ["A photo of a cat", caption(1)]


# --- bad input


BAD = {
    "no folder": (lambda root: root / "nowhere", r"nowhere' is no folder; expected are images at any depth"),
    "a file": (lambda root: root / "a.jpg", r"a\.jpg' is no folder; expected"),
    "no captions": (
        lambda root: ([path.unlink() for end in ("txt", "caption") for path in root.rglob(f"*.{end}")], root)[1],
        r"data' holds 21 images, and no caption of any; expected .* beside each NAME\.jpg a NAME\.txt",
    ),
    "no images": (lambda root: ((root / "x").mkdir(), root / "x")[1], r"x' holds no images; expected"),
    "a broken line": (
        lambda root: (metadata(root, [{"file_name": "a.jpg", "text": "x"}, "{"]), root)[1],
        r"metadata\.jsonl: line 2 is not understood \(Expecting",
    ),
    "a line without a name": (
        lambda root: (metadata(root, [{"image": "a.jpg", "text": "x"}]), root)[1],
        r"line 1 is not understood \(its name and its caption must be text, .\"file_name\": …, ",
    ),
    "a line without a caption": (
        lambda root: (metadata(root, [{"file_name": "a.jpg", "prompt": "x"}]), root)[1],
        r"line 1 .*it has the fields file_name, prompt; data\.caption_field='caption' is none of them",
    ),
    "a number for a caption": (
        lambda root: (metadata(root, [{"file_name": "a.jpg", "text": 3}]), root)[1],
        r"line 1 is not understood \(its name and its caption must be text",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_refused(root, case):
    make, message = BAD[case]
    path = make(root)
    with pytest.raises(UsageError, match=message) as error:
        opened(path)
    assert "\n" not in str(error.value)


def test_an_empty_path():
    with pytest.raises(UsageError, match=r"data\.path='' is no folder"):
        opened("")


def test_a_folder_in_a_bucket(root, bucket):
    from deco_jax import storage

    storage.upload(root, storage.to_path(f"{bucket.url}/captions"))
    bucket.faults(share=0.1)
    source = opened(f"{bucket.url}/captions")
    local = opened(root)
    assert (source.identity, source.summary()[:-1]) == (local.identity, local.summary()[:-1])
    for k in range(0, len(local), 5):
        assert source.load(k)["caption"] == local.load(k)["caption"]
        np.testing.assert_array_equal(source.load(k)["image"], local.load(k)["image"])
