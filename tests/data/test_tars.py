"""Are the images in tars those of the folder that unpacking makes, and is every other tar refused in one line?"""

import io
import itertools
import os
import pathlib
import pickle
import subprocess
import tarfile
import tempfile

import numpy as np
import pytest
from PIL import Image

from deco_jax import storage
from deco_jax.data import tars
from deco_jax.data.pipeline import batches, fingerprint
from deco_jax.data.sources import open_source
from deco_jax.errors import UsageError
from tests.data.test_reading import data_config

CLASSES = ("n02", "n01", "n10")
IMAGES = {f"{c}/{c}_{k * 7}.JPEG": (c, k) for c in CLASSES for k in range(1, 7)}
LONG_AGO = 1_600_000_000


@pytest.fixture(autouse=True)
def machine(tmp_path, monkeypatch):
    """The temporary folder of a machine of its own."""
    (tmp_path / "machine").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "machine"))


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory):
    """A folder of class folders; beside its images lies what is ignored."""
    root = tmp_path_factory.mktemp("unpacked")
    for name, (_, k) in IMAGES.items():
        (root / name).parent.mkdir(exist_ok=True)
        pixels = np.random.default_rng(hash(name) % 1000).integers(0, 256, (8 + k, 9, 3), np.uint8)
        Image.fromarray(pixels).save(root / name, "png")
    for name in ("n01/notes.txt", "n10/notes.txt"):
        (root / name).write_text("no image")
    (root / "n02/._n02_7.JPEG").write_text("what a Mac adds")
    return root


def tar_of(files, how=tarfile.GNU_FORMAT):
    """The bytes of a tar: files is [(name, bytes)], or a tuple with a TarInfo in place of the name."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=how) as tar:
        for name, content in files:
            info = tarfile.TarInfo(name) if isinstance(name, str) else name
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return stream.getvalue()


def files_of(root, below, front=""):
    return [(front + p.name, p.read_bytes()) for p in sorted((root / below).iterdir())]


def pack(form, unpacked, to):
    """One of the three forms; returns data.path."""
    if form == "a tar of tars":
        path = to / "ILSVRC2012_img_train.tar"
        path.write_bytes(tar_of([(f"{c}.tar", tar_of(files_of(unpacked, c))) for c in CLASSES]))
        return path
    if form == "a folder of tars":
        path = to / "tars"
        path.mkdir()
        for c in CLASSES:  # as they come of: tar -C unpacked -cf n01.tar n01
            (path / f"{c}.tar").write_bytes(tar_of(files_of(unpacked, c, f"{c}/")))
        return path
    path = to / "set.tar"
    subprocess.run(["tar", "-C", unpacked, "-cf", path, "."], check=True)  # "./n01/…", and folders
    return path


FORMS = ("a tar of tars", "a folder of tars", "a tar of folders")


def opened(path, beside=None, **fields):
    return open_source(data_config(path, source="tars", **fields), beside)


def same_records(source, folder):
    assert len(source) == len(folder) == len(IMAGES)
    for i in range(len(folder)):
        record, expected = source.load(i), folder.load(i)
        assert record["label"] == expected["label"] and record["label"].dtype == np.int32
        np.testing.assert_array_equal(record["image"], expected["image"])


@pytest.mark.parametrize("form", FORMS)
def test_all_is_as_in_the_folder(unpacked, tmp_path, form):
    """A run may go on from the tars where it began with the folder, or the other way round."""
    path = pack(form, unpacked, tmp_path)
    source, folder = opened(path), open_source(data_config(unpacked))
    assert source.identity == folder.identity and source.contents() == folder.contents()
    assert (source.class_names, source.decoding) == (("n01", "n02", "n10"), folder.decoding)
    assert source.condition == folder.condition and source.summary()[:2] == folder.summary()[:2]
    assert fingerprint(data_config(path), 3, source) == fingerprint(data_config(unpacked), 3, folder)
    same_records(pickle.loads(pickle.dumps(source)), folder)
    tar = path / "n01.tar" if form == "a folder of tars" else path
    names = sorted(IMAGES, key=lambda name: name.split("/"))
    assert source.describe(0) == f"{tar}: {names[0]}"
    both = zip(batches(data_config(path), 5, source, 0), batches(data_config(unpacked), 5, folder, 0), strict=True)
    for batch, expected in itertools.islice(both, 3):
        for key in expected:
            np.testing.assert_array_equal(batch[key], expected[key])


@pytest.mark.parametrize("how", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_names_of_any_length(tmp_path, unpacked, how):
    """Beyond 100 characters each dialect of tar says the name in another place."""
    content = (unpacked / "n01/n01_7.JPEG").read_bytes()
    long = f"{'deep/' * 20}{'x' * 90}.png"
    names = ["cat/1.png", f"cat/{long}"] + ([] if how == tarfile.USTAR_FORMAT else ["cat/Ünï/é.png"])
    path = tmp_path / "set.tar"
    path.write_bytes(tar_of([(name, content) for name in names], how))
    source = opened(path)
    assert {source.describe(i) for i in range(len(source))} == {f"{path}: {name}" for name in names}
    for i in range(len(source)):
        np.testing.assert_array_equal(source.load(i)["image"], source.load(0)["image"])


def test_of_the_tar_only_the_image_is_read(unpacked, tmp_path, monkeypatch):
    """138 GB are not unpacked anywhere, and each image is found by its place."""
    path = pack("a tar of tars", unpacked, tmp_path)
    source, reads, real = opened(path), [], tars.read_bytes
    monkeypatch.setattr(tars, "read_bytes", lambda *a: reads.append(a) or real(*a))
    names = sorted(IMAGES, key=lambda name: name.split("/"))
    for i in range(len(source)):
        source.load(i)
    whole, sizes = path.read_bytes(), [(unpacked / name).stat().st_size for name in names]
    assert [count for _, _, count in reads] == sizes
    for (_, start, count), name in zip(reads, names, strict=True):
        assert whole[start : start + count] == (unpacked / name).read_bytes()


@pytest.mark.parametrize("form", FORMS)
def test_the_second_start_looks_at_no_header(unpacked, tmp_path, monkeypatch, form):
    path = pack(form, unpacked, tmp_path)
    monkeypatch.setattr(tars, "RECENT", -1.0)  # of what was made just now an index is kept
    first = opened(path)
    place = f"{path}/.deco_jax_index_tars.safetensors"
    if path.is_file():
        place = f"{tmp_path}/.{path.name}.deco_jax_index.safetensors"
    assert first.summary()[-1].endswith(f"s, kept in {place}.")
    with monkeypatch.context() as patched:
        patched.setattr(tars, "members", None)
        again = opened(path)
    assert again.summary()[-1].startswith(f"Index: {place}, checked in ")
    same_records(again, first)
    changed = path / "n10.tar" if path.is_dir() else path
    os.utime(changed, (LONG_AGO, LONG_AGO))
    assert "(the data have changed)" in opened(path).summary()[-1]
    before = changed.stat()
    changed.write_bytes(changed.read_bytes() + bytes(10240))
    os.utime(changed, ns=(before.st_atime_ns, before.st_mtime_ns))  # as a copy sets it back
    assert "(the data have changed)" in opened(path).summary()[-1]
    if path.is_dir():
        (path / "n10.tar").rename(path / "n11.tar")
        assert opened(path).class_names == ("n01", "n02", "n11")


def test_the_index_of_a_tar_is_no_part_of_a_folder(unpacked, tmp_path, monkeypatch):
    """A tar that lies among the class folders gets its hidden file beside it."""
    monkeypatch.setattr(tars, "RECENT", -1.0)
    path = pack("a tar of folders", unpacked, tmp_path)
    opened(path)
    assert len(list(tmp_path.glob(".*deco_jax_index*"))) == 1


# --- bad input


def png(size=8):
    stream = io.BytesIO()
    Image.new("RGB", (size, size)).save(stream, "png")
    return stream.getvalue()


def link(kind):
    info = tarfile.TarInfo("cat/2.png")
    info.type, info.linkname = kind, "cat/1.png"
    return info


def write(name, content):
    return lambda root: ((root / name).write_bytes(content), root / name)[1]


def folder_of(**content):
    def make(root):
        (root / "tars").mkdir()
        for name, files in content.items():
            (root / "tars" / name.replace("_", ".")).write_bytes(files)
        return root / "tars"

    return make


GOOD = tar_of([("1.png", png())])
EXPECTED = r"expected are a tar of <class>\.tar, a tar of <class>/<image>, or a folder of <class>\.tar"
BAD = {
    "nothing there": (lambda root: root / "nowhere.tar", rf"nowhere\.tar' does not exist; {EXPECTED}"),
    "a folder without tars": (
        folder_of(a_txt=b"", b_png=b""),
        r"tars' holds a\.txt, b\.png; .*data\.source=\"folder\"",
    ),
    "an empty folder": (folder_of(), rf"tars' is empty; {EXPECTED}"),
    "a picture": (write("x.tar", png()), rf"x\.tar is no tar \(.*\); {EXPECTED}"),
    "an empty file": (write("x.tar", b""), r"x\.tar is no tar \(empty file\)"),
    "text": (write("x.tar", b"<html>404 Not Found</html>" * 99), r"x\.tar is no tar \(.*\)"),
    "gzip": (write("x.tar", b"\x1f\x8b\x08" + bytes(999)), r"x\.tar is compressed; unpack it first: gunzip .*x\.tar"),
    "xz": (write("x.tar", b"\xfd7zXZ\x00" + bytes(999)), r"is compressed; unpack it first: unxz "),
    "a tar without members": (write("x.tar", tar_of([])), rf"holds no images of classes, but nothing; {EXPECTED}"),
    "ILSVRC2012_img_val.tar": (
        write("val.tar", tar_of([(f"ILSVRC2012_val_{k:08}.JPEG", png()) for k in range(9)])),
        r"val\.tar' holds no images of classes, but files like ILSVRC2012_val_00000000\.JPEG, .*01\.JPEG, .*02\.JPEG; ",
    ),
    "a devkit": (
        write("kit.tar", tar_of([("kit/readme.txt", b"x"), ("kit/data/meta.mat", b"x")])),
        r"holds no images of classes, but files like kit/readme\.txt, kit/data/meta\.mat; expected",
    ),
    "a class without images": (
        write("x.tar", tar_of([("cat.tar", GOOD), ("dog.tar", tar_of([("notes.txt", b"x")]))])),
        r"x\.tar: dog\.tar holds no images, but files like dog/notes\.txt; expected",
    ),
    "a class folder without images": (
        write("x.tar", tar_of([("cat/1.png", png()), ("dog/notes.txt", b"x")])),
        r"x\.tar' has no images of the class 'dog'; expected",
    ),
    "a class twice": (
        write("x.tar", tar_of([("a/cat.tar", GOOD), ("b/cat.tar", GOOD)])),
        r"x\.tar' holds the class 'cat' twice; expected",
    ),
    "an image twice": (
        write("x.tar", tar_of([("cat/1.png", png()), ("./cat/1.png", png(9))])),
        r"x\.tar holds cat/1\.png twice; make it anew",
    ),
    "tars and folders": (
        write("x.tar", tar_of([("cat.tar", GOOD), ("dog/1.png", png())])),
        r"x\.tar' holds both .*x\.tar: cat\.tar and dog/1\.png; expected",
    ),
    "compressed tars": (
        write("x.tar", tar_of([("cat.tar", b"\x1f\x8b\x08" + bytes(999))])),
        r"x\.tar: cat\.tar is compressed; unpack it first",
    ),
    "a broken tar inside": (write("x.tar", tar_of([("cat.tar", b"x" * 2000)])), r"x\.tar: cat\.tar is no tar \("),
    "a hard link": (
        write("x.tar", tar_of([("cat/1.png", png()), (link(tarfile.LNKTYPE), b"")])),
        r"x\.tar holds cat/2\.png as a link, which is not read",
    ),
    "a symbolic link": (
        write("x.tar", tar_of([("cat/1.png", png()), (link(tarfile.SYMTYPE), b"")])),
        r"x\.tar holds cat/2\.png as a link, which is not read",
    ),
    "WebDataset": (
        folder_of(**{"train-000_tar": tar_of([("1.jpg", png()), ("1.cls", b"3"), ("2.jpg", png()), ("2.cls", b"4")])}),
        r"holds WebDataset's shards, whose labels are in \.cls files; expected",
    ),
    "a folder with the tar of tars": (
        folder_of(train_tar=tar_of([("cat.tar", GOOD)])),
        r"train\.tar holds no images, but files like train/cat\.tar; expected",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_refused(tmp_path, case):
    make, expected = BAD[case]
    path = make(tmp_path)
    with pytest.raises(UsageError, match=expected) as error:
        opened(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    assert not list(tmp_path.rglob("*.safetensors")), "nothing is written of what is refused"


def test_an_empty_path():
    with pytest.raises(UsageError, match=rf"data\.path='' does not exist; {EXPECTED}"):
        opened("")


def test_a_sparse_member(tmp_path):
    """Its bytes are not where they would be looked for."""
    (tmp_path / "cat").mkdir()
    with (tmp_path / "cat/1.png").open("wb") as file:
        file.write(png())
        file.truncate(10_000_000)
        file.seek(9_999_999)
        file.write(b"x")
    path = tmp_path / "x.tar"
    subprocess.run(["tar", "-C", tmp_path, "--sparse", "-cf", path, "cat"], check=True)
    if path.stat().st_size > 1_000_000:
        pytest.skip("this file system or this tar makes no sparse members")
    with pytest.raises(UsageError, match=r"x\.tar holds cat/1\.png as a sparse file, which is not read"):
        opened(path)


@pytest.mark.parametrize("form", ["a tar of tars", "a tar of folders"])
def test_an_unfinished_download(unpacked, tmp_path, form):
    """Wherever it stopped, also between two members; and it says how many bytes are there."""
    path = pack(form, unpacked, tmp_path)
    whole = path.read_bytes()
    with tarfile.open(path) as tar:
        borders = [member.offset for member in tar]
    last = len(whole.rstrip(b"\0")) // 512 * 512  # a block or two before the end mark
    for size in sorted({*range(1, last, 1311), *borders[1:], *(b + 256 for b in borders)}):
        path.write_bytes(whole[:size])
        with pytest.raises(UsageError) as error:
            opened(path)
        text = str(error.value)
        assert "is cut off" in text or "is no tar" in text or "damaged" in text, (size, text)
        if size > 600:
            assert f"{size:,} bytes" in text or "damaged" in text, (size, text)
    path.write_bytes(whole)
    assert len(opened(path)) == len(IMAGES)


def test_bytes_that_were_altered(unpacked, tmp_path):
    """In a header: tar's own checksum. In an image: a bad record, as in a folder."""
    path = pack("a tar of tars", unpacked, tmp_path)
    whole = bytearray(path.read_bytes())
    with tarfile.open(path) as tar:
        second = tar.getmembers()[1].offset
    whole[second + 3] ^= 1
    path.write_bytes(whole)
    with pytest.raises(UsageError, match=rf"is damaged at byte {second:,}; get it anew"):
        opened(path)
    whole[second + 3] ^= 1
    path.write_bytes(whole)
    source = opened(path)
    _, start, size = source.index.place(4)
    whole[start : start + size] = bytes(size)
    path.write_bytes(whole)
    with pytest.raises(Exception, match="cannot identify image"):
        source.load(4)
    path.write_bytes(whole[:start])
    with pytest.raises(ValueError, match="ends within it"):
        source.load(4)
    path.unlink()
    with pytest.raises(UsageError, match="is not there any more"):
        source.load(4)


def test_a_tar_that_is_still_written(unpacked, tmp_path, monkeypatch):
    path = pack("a tar of tars", unpacked, tmp_path)
    real = tars._look_into

    def meanwhile(*arguments):
        path.write_bytes(path.read_bytes() + bytes(512))
        return real(*arguments)

    monkeypatch.setattr(tars, "_look_into", meanwhile)
    with pytest.raises(UsageError, match="changed while it was listed; start again when it is complete"):
        opened(path)


def test_a_long_listing_says_how_far_it_is(unpacked, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("deco_jax.data.index.FIRST_PAUSE", 0.0)
    monkeypatch.setattr("deco_jax.data.index.LONGEST_PAUSE", 0.0)
    opened(pack("a tar of tars", unpacked, tmp_path))
    assert "% of 0.0 GB so far." in caplog.text and "2 of 3 tars, 12 images so far." in caplog.text


# --- a bucket


@pytest.mark.parametrize("form", ["a tar of tars", "a folder of tars"])
def test_tars_in_a_bucket(bucket, unpacked, tmp_path, form, monkeypatch):
    """With one request in ten failing; the index lies in the bucket as well."""
    path = pack(form, unpacked, tmp_path)
    address = storage.to_path(f"{bucket.url}/{path.name}")
    storage.upload(path, address)
    bucket.faults(share=0.1)
    source, folder = opened(address), open_source(data_config(unpacked))
    assert source.identity == folder.identity
    same_records(source, folder)
    assert f"kept in {address}" in source.summary()[-1] or f"kept in {address.parent}/." in source.summary()[-1]
    with monkeypatch.context() as patched:
        patched.setattr(tars, "members", None)
        assert ", checked in " in opened(address).summary()[-1]
    changed = address / "n01.tar" if path.is_dir() else address
    changed.write_bytes(changed.read_bytes() + bytes(512))
    assert "(the data have changed)" in opened(address).summary()[-1]


def test_a_bucket_that_may_not_be_read(bucket):
    with pytest.raises(UsageError, match=r"gs://private/x\.tar.*cannot be read: .*gcloud auth"):
        opened("gs://private/x.tar")
    with pytest.raises(UsageError, match=r"data\.path='gs://bucket/nowhere\.tar' does not exist"):
        opened("gs://bucket/nowhere.tar")


def test_helpers_of_this_file(unpacked):
    """GNU tar reads what they pack."""
    path = pathlib.Path(tempfile.gettempdir()) / "x.tar"
    path.write_bytes(tar_of(files_of(unpacked, "n01")))
    listed = subprocess.run(["tar", "-tf", path], check=True, capture_output=True, text=True).stdout.split()
    assert sorted(listed) == sorted(p.name for p in (unpacked / "n01").iterdir())
