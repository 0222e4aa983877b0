"""Are the records of parquet files those that pyarrow reads in one go, and is every other file refused in one line?"""

import builtins
import concurrent.futures
import itertools
import json
import pickle
import time

import pytest

from deco_jax import storage
from deco_jax.conditions import Captions
from deco_jax.data import parquet
from deco_jax.data.pipeline import BadRecords, batches
from deco_jax.data.records import compare
from deco_jax.data.sources import open_source
from deco_jax.errors import TransientError, UsageError
from tests.data.captioned import (
    BATCH,
    SIZE,
    Lengths,
    caption,
    encoded,
    order_is_exact,
    same_batches,
    same_records,
    some_batches,
)
from tests.data.test_reading import data_config

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


def config_of(path, **fields):
    return data_config(path, **({"source": "parquet", "image_size": SIZE, "batch_size": BATCH} | fields))


def opened(path, **fields):
    return open_source(config_of(path, **fields))


def as_bytes(number):
    return encoded(number)


def as_struct(number):
    """As Hugging Face's `datasets` keeps images."""
    return {"bytes": encoded(number, "jpeg"), "path": f"{number}.jpg"}


def write(path, numbers, image=as_bytes, group=4, **columns):
    """A file of these images in groups of so many rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "id": list(numbers),
        "image": [image(k) for k in numbers],
        "caption": [f" {caption(k)}\n" for k in numbers],
    }
    pq.write_table(pa.table(content | columns), path, row_group_size=group)


@pytest.fixture
def root(tmp_path):
    root = tmp_path / "set"
    write(root / "train-00000.parquet", range(10))
    write(root / "train-00001.parquet", range(10, 17), as_struct, group=3)
    write(root / "train-00002.parquet", range(0))
    write(root / "deep/more.parquet", range(17, 24), as_struct, group=100, long=[f"long {k}" for k in range(17, 24)])
    (root / "README.md").write_text("x")
    (root / ".cache").mkdir()
    (root / ".cache/x.parquet").write_text("x")
    return root


def expected(root):
    """By pyarrow, each file as a whole, in the order of their names."""
    found = []
    for name in ("deep/more", "train-00000", "train-00001"):
        for row in pq.read_table(root / f"{name}.parquet").to_pylist():
            image = row["image"]
            found.append((image["bytes"] if isinstance(image, dict) else image, row["caption"].strip()))
    return found


def test_all_rows_in_order(root):
    source = opened(root)
    assert len(source) == 24
    same_records(source, expected(root))
    assert (source.class_names, source.condition) == ((), Captions())
    summary = source.summary()
    assert summary[0].startswith("Images: 24 with captions, for instance: “picture 17, é 猫 very nice”, “picture ")
    assert summary[1] == "Ignored: 2 files (no .parquet)."
    assert summary[2].startswith("Parquet: 4 files, 7 groups of about 3 rows and 0.0 MB, each read as a whole.")
    assert source.describe(8) == f"{root}/train-00000.parquet: row 1"
    contents = json.loads(json.dumps(source.contents()))
    assert contents["names"][7] == "train-00000.parquet: row 0" and contents["records"] == 24


def test_order_resume_hosts_and_workers(root):
    order_is_exact(config_of(root), opened(root))


def test_one_file_and_another_column(root):
    source = opened(root / "deep/more.parquet", caption_field="long")
    assert [source.load(k)["caption"] for k in range(7)] == [f"long {k}" for k in range(17, 24)]
    assert source.identity != opened(root / "deep/more.parquet").identity


def test_a_group_is_read_once_while_it_is_kept(root, monkeypatch):
    source, reads, real = opened(root), [], parquet.Parquet._read
    monkeypatch.setattr(
        parquet.Parquet, "_read", lambda self, group, *columns: reads.append(group) or real(self, group, *columns)
    )
    for k in range(24):
        source.load(k)
    assert len(reads) == len(source.groups)
    assert len(source._groups) == parquet.GROUPS
    monkeypatch.setattr(parquet, "MOST_BYTES", 1)
    source.load(0)
    assert len(source._groups) == 1, "large groups are not kept"
    worker = pickle.loads(pickle.dumps(source))
    assert not len(worker._groups), "a worker reads for itself"
    assert len(pickle.dumps(source)) < 5000


def test_other_files_are_another_set(root):
    before = opened(root)
    write(root / "train-00003.parquet", range(3))
    after = opened(root)
    assert before.identity != after.identity
    assert compare(before.contents(), after.contents()).startswith("24 records there, 27 here")


def test_unreadable_records_are_counted(tmp_path, caplog):
    """No image, no caption, an empty caption, a broken image."""
    texts = [caption(k) for k in range(12)]
    texts[3], texts[5] = None, "  "
    write(tmp_path / "x.parquet", range(12), lambda k: {1: None, 7: b"x"}.get(k, encoded(k)), caption=texts)
    write(tmp_path / "y.parquet", range(2), lambda k: {"bytes": None if k else encoded(k), "path": "x.jpg"})
    config = config_of(tmp_path, max_bad_share=1.0)
    source = open_source(config)
    bad = BadRecords(source, config)
    for batch in some_batches(config, source, count=4):
        bad.check(batch["bad"])
    assert bad.seen == {1, 3, 5, 7, 13}
    for reason in ("it has no image", "its caption is no text, but 'None'", "its caption is empty"):
        assert reason in caplog.text
    with pytest.raises(UsageError, match=r"All 1 records from .*x\.parquet: row 1 on cannot be read"):
        config.max_bad_share = 0.0
        list(itertools.islice(batches(config, 0, source, 0, tokenizer=Lengths()), 4))


def test_a_damaged_group_is_no_crash(tmp_path):
    write(tmp_path / "x.parquet", range(8))
    content = bytearray((tmp_path / "x.parquet").read_bytes())
    source = opened(tmp_path)
    content[4:400] = b"\xff" * 396
    (tmp_path / "x.parquet").write_bytes(content)
    with pytest.raises(Exception) as error:
        source.load(0)
    assert not isinstance(error.value, UsageError | TransientError)
    assert source.load(5)["caption"] == caption(5), "other groups are whole"


def test_storage_that_fails_is_no_bad_record(root, monkeypatch):
    """What reading raises comes through pyarrow as it is."""
    source = opened(root)

    def fail(*arguments):
        raise TransientError("the disk dawdles")

    monkeypatch.setattr(parquet, "read_bytes", fail)
    with pytest.raises(TransientError, match="the disk dawdles"):
        source.load(0)
    monkeypatch.undo()
    (root / "deep/more.parquet").unlink()
    with pytest.raises(UsageError, match=r"more\.parquet is not there any more"):
        source.load(0)


# --- bad input


def bad_file(content):
    return lambda path: ((path / "x.parquet").write_bytes(content), path / "x.parquet")[1]


def table(**columns):
    return lambda path: (pq.write_table(pa.table(columns), path / "x.parquet"), path)[1]


BAD = {
    "nothing there": (
        lambda path: path / "nowhere",
        r"nowhere' does not exist; expected is a folder of \.parquet files",
    ),
    "an empty folder": (lambda path: path, r"' is empty; expected"),
    "other files": (lambda path: ((path / "a.csv").touch(), path)[1], r" holds files like a\.csv; expected"),
    "no parquet": (bad_file(b"<html>404</html>"), r"x\.parquet is no whole parquet file \(Parquet magic bytes"),
    "an empty file": (bad_file(b""), r"x\.parquet is no whole parquet file"),
    "no images": (
        table(img=[b"x"], caption=["x"]),
        r"has the columns img, caption, and none is called 'image'; expected",
    ),
    "no captions": (
        table(image=[b"x"], text=["x"]),
        r"x\.parquet has the columns image, text; data\.caption_field='caption' is none of them",
    ),
    "names for images": (table(image=["a.jpg"], caption=["x"]), r"the column 'image' holds string, where bytes"),
    "numbers for captions": (
        table(image=[b"x"], caption=[3]),
        r"data\.caption_field='caption' holds int64, where text",
    ),
    "no rows": (
        table(image=pa.array([], pa.binary()), caption=pa.array([], pa.string())),
        r"holds 1 files without a row; expected",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_refused(tmp_path, case):
    make, message = BAD[case]
    path = make(tmp_path)
    with pytest.raises(UsageError, match=message) as error:
        opened(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_file_that_is_cut_off(root):
    """At the start; a later one, of which another run removed the end, is no crash either."""
    path = root / "train-00001.parquet"
    whole = path.read_bytes()
    for size in (len(whole) // 2, len(whole) - 3, 6):
        path.write_bytes(whole[:size])
        with pytest.raises(UsageError, match=r"train-00001\.parquet is no whole parquet file \(.*\); get it anew"):
            opened(root)


def test_without_pyarrow(root, monkeypatch):
    real = builtins.__import__

    def without(name, *arguments):
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return real(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UsageError, match=r"needs the package pyarrow: pip install -e '.\[t2i\]' in the repo"):
        opened(root)


def test_files_in_a_bucket(root, bucket):
    storage.upload(root, storage.to_path(f"{bucket.url}/parquet"))
    bucket.faults(share=0.1)
    here, there = config_of(root), config_of(f"{bucket.url}/parquet")
    local, remote = open_source(here), open_source(there)
    assert (remote.identity, remote.contents()) == (local.identity, local.contents())
    same_batches(some_batches(there, remote), some_batches(here, local))


def test_what_several_threads_want_is_read_once():
    """A row group may have a gigabyte."""
    kept, reads = parquet.Kept(2), []

    def read():
        reads.append(1)
        time.sleep(0.05)
        return "group"

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: kept.get(7, read), range(4)))
    assert found == ["group"] * 4 and len(reads) == 1
