"""Are the samples of WebDataset's shards those that tarfile finds, and is every other tar refused in one line?"""

import io
import json
import os
import tarfile
import tempfile

import numpy as np
import pytest

from deco_jax import storage
from deco_jax.conditions import Captions
from deco_jax.data import webdataset
from deco_jax.data.pipeline import BadRecords
from deco_jax.data.records import compare
from deco_jax.data.sources import open_source
from deco_jax.errors import UsageError
from tests.data.captioned import (
    BATCH,
    LONG_AGO,
    SIZE,
    age,
    caption,
    encoded,
    order_is_exact,
    same_batches,
    same_records,
    some_batches,
)
from tests.data.test_reading import data_config
from tests.data.test_tars import tar_of


@pytest.fixture(autouse=True)
def kept(monkeypatch):
    """Also of files that the tests made just now an index is kept."""
    monkeypatch.setattr(webdataset, "RECENT", -1.0)


@pytest.fixture(autouse=True)
def machine(tmp_path, monkeypatch):
    """The temporary folder of a machine of its own."""
    (tmp_path / "machine").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "machine"))


def config_of(path, **fields):
    return data_config(path, **({"source": "webdataset", "image_size": SIZE, "batch_size": BATCH} | fields))


def opened(path, **fields):
    return open_source(config_of(path, **fields))


def as_text(number):
    return [(f"{number:09}.jpg", encoded(number, "jpeg")), (f"{number:09}.txt", caption(number).encode())]


def as_json(number):
    content = {"url": "x", "caption": caption(number), "long": f"long {number}"}
    return [(f"{number:09}.json", json.dumps(content).encode()), (f"{number:09}.PNG", encoded(number))]


def as_both(number):
    """As img2dataset writes it."""
    return [*as_text(number), as_json(number)[0]]


def as_prompts(number):
    """As BLIP3o's instruction data have it."""
    image, prompt = encoded(number, "webp"), caption(number).encode()
    return [(f"in/{number}.output_image", image), (f"in/{number}.input_prompt", prompt)]


KINDS = (as_text, as_json, as_both, as_prompts)


def write_shards(root, kinds=KINDS, per_shard=6):
    """One shard of each of these kinds; and records as `expected`."""
    root.mkdir(exist_ok=True)
    for k, kind in enumerate(kinds):
        numbers = range(k * per_shard, (k + 1) * per_shard)
        (root / f"shard-{k:05}.tar").write_bytes(tar_of([file for number in numbers for file in kind(number)]))
    age(root)
    return root


@pytest.fixture
def root(tmp_path):
    return write_shards(tmp_path / "shards")


IMAGES = ("jpg", "png", "webp", "output_image")


def expected(root, field="caption"):
    """By tarfile alone: [(bytes of the image, caption)] in the order of shards and of images in them."""
    found = []
    for path in sorted(root.glob("*.tar")):
        with tarfile.open(path) as tar:
            files = {member.name: tar.extractfile(member).read() for member in tar if member.isfile()}
        for name, content in files.items():
            key, _, ending = name.rpartition(".")
            if ending.lower() not in IMAGES:
                continue
            texts = [files[f"{key}.{end}"].decode() for end in ("txt", "input_prompt") if f"{key}.{end}" in files]
            jsons = [json.loads(files[f"{key}.json"])[field]] if f"{key}.json" in files else []
            both = texts + jsons if field == "caption" else jsons + texts
            found.append((content, both[0].strip()))
    return found


def test_every_layout_of_samples(root):
    source = opened(root)
    assert len(expected(root)) == 24
    same_records(source, expected(root))
    assert (source.class_names, source.condition) == ((), Captions())
    assert source.summary()[0] == (
        "Images: 24 with captions, for instance: “picture 0, é 猫 nice”, “picture 12, é 猫 nice”, "
        "“picture 23, é 猫 very very very nice”."
    )
    assert source.describe(6) == f"{root}/shard-00001.tar: 000000006.PNG"
    contents = json.loads(json.dumps(source.contents()))
    assert (contents["source"], contents["records"], contents["classes"]) == ("webdataset", 24, {})
    assert contents["names"][23] == "shard-00003.tar: in/23.output_image"


def test_another_field(root):
    """Where a sample has text and JSON, the field that was asked for is meant."""
    source = opened(root, caption_field="long")
    same_records(source, expected(root, "long"))
    assert [source.load(k)["caption"] for k in (0, 6, 12)] == [caption(0), "long 6", "long 12"]


def test_order_resume_hosts_and_workers(root):
    order_is_exact(config_of(root), opened(root))


def test_one_shard(root):
    path = root / "shard-00001.tar"
    source = opened(path)
    same_records(source, expected(root)[6:12])
    assert source.summary()[-1].endswith(f"kept in {root}/.shard-00001.tar.deco_jax_index_webdataset.safetensors.")
    assert len(opened(root)) == 24, "the index of one shard is no shard"


def test_samples_that_lack_something_are_counted(tmp_path):
    files = [*as_text(0), ("1.jpg", encoded(1)), ("2.txt", b"x"), ("3.jpg", encoded(3)), ("3.txt", b"")]
    files += [("0.cls", b"3"), ("__index__", b""), (".4.jpg", b""), ("README.md", b""), *as_text(5)]
    (tmp_path / "x.tar").write_bytes(tar_of(files))
    source = opened(tmp_path / "x.tar")
    assert len(source) == 2 and source.load(1)["caption"] == caption(5)
    ignored = source.summary()[1]
    assert ignored.startswith("Ignored: 7 files (")
    assert dict(source.index.ignored) == {
        "images without a caption": 1,
        "captions without an image": 1,
        "images with an empty caption": 1,
        ".cls": 1,
        ".md": 1,
        "without an ending": 1,
        "hidden": 1,
    }


def test_one_read_for_image_and_caption(root, monkeypatch):
    """They lie beside each other; of a bucket, each read costs a request."""
    source, reads, real = opened(root), [], webdataset.read_bytes
    monkeypatch.setattr(webdataset, "read_bytes", lambda *a: reads.append(a) or real(*a))
    for k in range(len(source)):
        source.load(k)
    assert len(reads) == len(source)
    assert sum(count for _, _, count in reads) < sum(path.stat().st_size for path in root.glob("*.tar"))


def test_a_caption_far_from_its_image(tmp_path):
    """All images, then all captions: what lies between is not read."""
    samples = [as_text(k) for k in range(6)]
    far = [("between.bin", bytes(200_000))]
    (tmp_path / "x.tar").write_bytes(tar_of([a for a, _ in samples] + far + [b for _, b in reversed(samples)]))
    same_records(opened(tmp_path / "x.tar"), [(a[1], b[1].decode()) for a, b in samples])


def test_the_second_start_looks_at_no_header(root, monkeypatch):
    first = opened(root)
    assert first.summary()[-1].endswith(f"s, kept in {root}/.deco_jax_index_webdataset.safetensors.")
    with monkeypatch.context() as patched:
        patched.setattr(webdataset, "members", None)
        again = opened(root)
    assert again.summary()[-1].startswith(f"Index: {root}/.deco_jax_index_webdataset.safetensors, checked in ")
    assert (again.identity, again.contents()) == (first.identity, first.contents())


def test_the_index_of_another_shard_set(root, tmp_path):
    """An index that was copied with other shards, or is of shards that have changed, is made anew."""
    before = opened(root)
    (root / "shard-00003.tar").unlink()
    fewer = opened(root)
    assert "(the data have changed)" in fewer.summary()[-1] and len(fewer) == 18
    assert compare(before.contents(), fewer.contents()).startswith("24 records there, 18 here")
    other = write_shards(tmp_path / "other", (as_json, as_json))
    index = ".deco_jax_index_webdataset.safetensors"
    (other / index).write_bytes((root / index).read_bytes())
    found = opened(other)
    assert "(the data have changed)" in found.summary()[-1]
    same_records(found, expected(other))
    assert "(the data have changed)" in opened(other, caption_field="long").summary()[-1]


def test_other_captions_of_the_same_images_are_told(tmp_path):
    path, sources = tmp_path / "x.tar", []
    for end in (b"", b"!"):
        path.write_bytes(tar_of([file for k in range(3) for file in (as_text(k)[0], (f"{k:09}.txt", b"x" + end))]))
        sources.append(opened(path))
    assert sources[0].identity != sources[1].identity
    assert compare(sources[0].contents(), sources[1].contents()) == "other captions"


def test_corrupt_members_are_counted(root, caplog):
    """An image, a text that is no UTF-8, and JSON that is cut off: replaced by the next, named and counted."""
    source = opened(root)
    shards = {name: bytearray((root / name).read_bytes()) for name in ("shard-00000.tar", "shard-00001.tar")}
    for number, place in (
        (2, source.index.place(2)[1:]),
        (4, source.index.caption(4)[1:]),
        (6, source.index.caption(6)[1:]),
    ):
        start, size = place
        shards[source.index.place(number)[0]][start : start + size] = b"\xff" * size
    for name, content in shards.items():
        (root / name).write_bytes(content)
        os.utime(root / name, (LONG_AGO, LONG_AGO + 1))
    config = config_of(root, max_bad_share=1.0)
    source = open_source(config)
    bad = BadRecords(source, config)
    for batch in some_batches(config, source, count=4):
        assert (batch["bad"][batch["bad"] >= 0][:, None] == [2, 4, 6]).any(1).all()
        bad.check(batch["bad"])
    assert bad.seen == {2, 4, 6} and f"{root}/shard-00000.tar: 000000002.jpg" in caplog.text
    (root / "shard-00000.tar").write_bytes(shards["shard-00000.tar"][:1000])
    with pytest.raises(ValueError, match="ends within it"):
        source.load(5)
    (root / "shard-00000.tar").unlink()
    for read in (source.load, source.caption):
        with pytest.raises(UsageError, match=r"shard-00000\.tar is not there any more"):
            read(0)


# --- bad input


def folder_of(**shards):
    def make(tmp_path):
        (tmp_path / "set").mkdir()
        for name, files in shards.items():
            content = files if isinstance(files, bytes) else tar_of(files)
            (tmp_path / "set" / name.replace("_", ".")).write_bytes(content)
        return tmp_path / "set"

    return make


def numbered(*numbers, width=5):
    return folder_of(**{f"shard-{k:0{width}}_tar": as_text(k) for k in numbers})


def test_an_empty_text_does_not_hide_the_caption_in_json(tmp_path):
    (tmp_path / "a.tar").write_bytes(tar_of([*as_json(3), ("000000003.txt", b"")]))
    assert opened(tmp_path).load(0)["caption"] == caption(3)


WHOLE = tar_of([file for k in range(4) for file in as_text(k)])
EXPECTED = r"expected are tar shards, or a folder of them, in which every KEY\.jpg"
BAD = {
    "nothing there": (lambda root: root / "nowhere", rf"nowhere' does not exist; {EXPECTED}"),
    "an empty folder": (folder_of(), rf"set' is empty; {EXPECTED}"),
    "no shards": (folder_of(a_txt=b"x"), rf"set' holds a\.txt; {EXPECTED}"),
    "a missing shard": (
        numbered(0, 1, 3, 4),
        r"set' holds shard-00004\.tar but not shard-00002\.tar; finish the download, or link the shards",
    ),
    "a missing shard of so many": (
        folder_of(**{f"train-{k:05}-of-00064_tar": as_text(k) for k in (0, 2)}),
        r"holds train-00002-of-00064\.tar but not train-00001-of-00064\.tar; finish the download",
    ),
    "many missing shards": (
        numbered(0, 12),
        r"not shard-00001\.tar, shard-00002\.tar, .* shard-00005\.tar and 6 more; finish the download",
    ),
    "a shard without captions": (
        folder_of(a_tar=as_text(0), b_tar=[("1.jpg", encoded(1)), ("1.cls", b"3")]),
        rf"set/b\.tar holds no captions, but files like 1\.jpg, 1\.cls; {EXPECTED}",
    ),
    "a shard of captions": (
        folder_of(a_tar=[("1.txt", b"x")]),
        r"a\.tar holds no captioned images, but files like 1\.txt",
    ),
    "an empty shard": (folder_of(a_tar=[]), r"a\.tar holds no captioned images, but nothing; expected"),
    "a cut shard": (folder_of(a_tar=WHOLE[: len(WHOLE.rstrip(b"\0")) // 2]), r"set/a\.tar is cut off "),
    "a shard without its end": (
        folder_of(a_tar=WHOLE[: -(-len(WHOLE.rstrip(b"\0")) // 512) * 512]),
        r"set/a\.tar is cut off: .* no end mark; finish the download",
    ),
    "no tar": (folder_of(a_tar=b"<html>404</html>" * 99), rf"set/a\.tar is no tar \(.*\); {EXPECTED}"),
    "a compressed shard": (
        folder_of(a_tar=b"\x1f\x8b\x08" + bytes(999)),
        r"a\.tar is compressed; unpack it first: gunzip",
    ),
    "a sample twice": (
        folder_of(a_tar=[*as_text(0), *as_text(0)]),
        r"a\.tar holds 000000000\.jpg and 000000000\.jpg; a sample has one; make it anew",
    ),
    "two images of a sample": (
        folder_of(a_tar=[*as_text(0), ("000000000.png", encoded(0))]),
        r"a\.tar holds 000000000\.jpg and 000000000\.png; a sample has one",
    ),
    "no such field": (
        folder_of(a_tar=[("1.jpg", encoded(1)), ("1.json", b'{"url": "x", "text": "y"}')]),
        r"a\.tar: of 1\.json: it has the fields url, text; data\.caption_field='caption' is none of them",
    ),
    "a list for JSON": (
        folder_of(a_tar=[("1.jpg", encoded(1)), ("1.json", b'["x"]')]),
        r"a\.tar: of 1\.json: it holds list, where an object with the field 'caption' is expected",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_refused(tmp_path, case):
    make, message = BAD[case]
    path = make(tmp_path)
    with pytest.raises(UsageError, match=message) as error:
        opened(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    assert not list(tmp_path.rglob("*.safetensors")), "nothing is written of what is refused"


def test_a_link(tmp_path):
    info = tarfile.TarInfo("1.jpg")
    info.type, info.linkname = tarfile.SYMTYPE, "0.jpg"
    (tmp_path / "x.tar").write_bytes(tar_of([*as_text(0), (info, b"")]))
    with pytest.raises(UsageError, match=r"x\.tar holds 1\.jpg as a link, which is not read"):
        opened(tmp_path / "x.tar")


@pytest.mark.parametrize("numbers, width", [((9, 10, 11), 5), ((3,), 5), ((1, 9), 1), ((2021, 2024), 4)])
def test_numbers_without_a_gap(tmp_path, numbers, width):
    """A part of a data set need not begin at 0; and numbers without zeros in front may be anything."""
    assert len(opened(numbered(*numbers, width=width)(tmp_path))) == len(numbers)


def test_a_shard_that_is_still_written(root, monkeypatch):
    """Whoever starts too early is told so."""
    real = webdataset._look_into

    def look(part, wording):
        os.utime(part.path, (LONG_AGO, LONG_AGO + 9))
        return real(part, wording)

    monkeypatch.setattr(webdataset, "_look_into", look)
    with pytest.raises(UsageError, match="changed while it was listed; start again when it is complete"):
        opened(root)


@pytest.mark.parametrize("form", ["a folder", "one shard"])
def test_shards_in_a_bucket(root, bucket, monkeypatch, form):
    """The same to the bit, with one request in ten failing; in workers, too; and the index is kept there."""
    monkeypatch.setenv("PYTHONPATH", bucket.env["PYTHONPATH"])
    name = f"webdataset {form}"
    storage.upload(root, storage.to_path(f"{bucket.url}/{name}"))
    end = "" if form == "a folder" else "/shard-00001.tar"
    here, there = config_of(f"{root}{end}"), config_of(f"{bucket.url}/{name}{end}")
    bucket.faults(share=0.1)
    local, remote = open_source(here), open_source(there)
    assert (remote.identity, remote.summary()[0]) == (local.identity, local.summary()[0])
    assert compare(local.contents(), remote.contents()) == ""
    there.workers = 2
    same_batches(some_batches(there, remote), some_batches(here, local))
    monkeypatch.setattr(webdataset, "members", None)
    again = open_source(there)
    assert "checked in" in again.summary()[-1] and again.identity == remote.identity
    np.testing.assert_array_equal(again.load(1)["image"], local.load(1)["image"])


def test_a_bucket_that_leads_nowhere(bucket):
    with pytest.raises(UsageError, match="gs://bucket/nowhere' does not exist; expected"):
        opened("gs://bucket/nowhere")
    with pytest.raises(UsageError, match="gs://private/shards cannot be read: .*gcloud auth"):
        opened("gs://private/shards")


def test_tar_of_is_what_tarfile_reads():
    with tarfile.open(fileobj=io.BytesIO(WHOLE)) as tar:
        assert tar.getnames()[:2] == ["000000000.jpg", "000000000.txt"]
