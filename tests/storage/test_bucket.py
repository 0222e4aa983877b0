"""Files in a bucket: what grows is mirrored, what is mapped is copied, what fails is tried again."""

import concurrent.futures
import pathlib
import time

import pytest

from deco_jax import storage
from deco_jax.errors import TransientError, UsageError
from deco_jax.storage import fetch


@pytest.fixture
def folder(bucket, tmp_path):
    return storage.to_path(f"{bucket.url}/{tmp_path.name}")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(fetch, "CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_what_grows_is_copied_without_waiting(folder, bucket):
    mirror = storage.Mirror(folder)
    log = mirror.fetch("metrics.jsonl")
    log.write_text("1\n")
    bucket.faults(delay=0.3)
    start = time.monotonic()
    for _ in range(20):
        mirror.flush()
    assert time.monotonic() - start < 0.2, "a step waited for the bucket"
    bucket.faults()
    with log.open("a") as file:
        file.write("2\n")
    (mirror.folder / "tensorboard").mkdir()
    (mirror.folder / "tensorboard" / "events.1").write_bytes(b"\r\n\0")
    mirror.close()
    assert (folder / "metrics.jsonl").read_text() == "1\n2\n"
    assert (folder / "tensorboard" / "events.1").read_bytes() == b"\r\n\0"
    assert not mirror.folder.exists()

    again = storage.Mirror(folder)
    with again.fetch("metrics.jsonl").open("a") as file:
        file.write("3\n")
    again.close()
    assert (folder / "metrics.jsonl").read_text() == "1\n2\n3\n"


def test_only_what_changed_is_copied(folder, bucket):
    mirror = storage.Mirror(folder)
    (mirror.folder / "a").write_text("1")
    mirror.flush()
    while mirror._thread:
        time.sleep(0.01)
    before = bucket.counts()["requests"]
    mirror.close()
    assert bucket.counts()["requests"] == before


def test_a_mirror_of_a_local_folder_is_that_folder(tmp_path):
    mirror = storage.Mirror(tmp_path / "run")
    assert mirror.folder == tmp_path / "run" and mirror.fetch("log") == tmp_path / "run" / "log"
    mirror.flush()
    mirror.close()
    assert mirror.folder.is_dir()


def test_what_a_mirror_could_not_copy_stays_and_is_named(folder, bucket, monkeypatch, caplog):
    monkeypatch.setenv("DECO_RETRY_SECONDS", "0.1")
    mirror = storage.Mirror(folder)
    (mirror.folder / "a").write_text("1")
    bucket.faults(share=1.0)
    with pytest.raises(TransientError, match=str(mirror.folder)):
        mirror.close()
    assert (mirror.folder / "a").read_text() == "1" and "is behind" in caplog.text
    bucket.faults()
    mirror.close()
    assert (folder / "a").read_text() == "1"


def test_files_and_folders_are_copied_once_and_again_when_they_change(folder, cache, bucket):
    for name, content in (("weights/a", b"a"), ("weights/b/c", b"\r\n" * 1000)):
        (folder / name).write_bytes(content)
    copy = storage.local_copy(folder / "weights")
    assert (copy / "a").read_bytes() == b"a" and (copy / "b" / "c").read_bytes() == b"\r\n" * 1000
    assert copy.name == "weights"
    assert storage.local_copy(folder / "weights" / "a").read_bytes() == b"a"
    before = bucket.counts()["requests"]
    assert storage.local_copy(folder / "weights") == copy
    assert bucket.counts()["requests"] - before <= 2, "listed, and not read again"
    (folder / "weights/a").write_bytes(b"A")
    assert (storage.local_copy(folder / "weights") / "a").read_bytes() == b"A"
    assert storage.local_copy(cache) == cache


def test_what_arrives_damaged_is_read_again(folder, cache, monkeypatch):
    (folder / "weights").write_bytes(b"content")
    found = iter(["a wrong hash", "too short", ""])
    monkeypatch.setattr(fetch, "_damage", lambda *_: next(found))
    assert storage.local_copy(folder / "weights").read_bytes() == b"content"


def test_damage_is_found(folder, tmp_path):
    import fsspec

    (folder / "it").write_bytes(b"content")
    (info,) = fsspec.filesystem("gs").find(str(folder / "it"), detail=True).values()
    file = tmp_path / "it"
    for content, damage in ((b"content", ""), (b"cont", "4 bytes of 7"), (b"cOntent", "another MD5 hash")):
        file.write_bytes(content)
        assert fetch._damage(file, info) == damage


def test_eight_readers_on_a_host_copy_a_file_once(folder, cache, bucket):
    """Threads here: the lock is one of open files, and keeps threads apart as it does processes."""
    (folder / "weights").write_bytes(b"content" * 1000)
    bucket.faults(delay=0.2)
    before = bucket.counts()["requests"]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        copies = list(pool.map(storage.local_copy, [folder / "weights"] * 8))
        assert len(set(copies)) == 1 and copies[0].read_bytes() == b"content" * 1000
        assert bucket.counts()["requests"] - before <= 8 * 2 + 4, "two to look at the file, and it is read once"


@pytest.mark.parametrize(
    "name, reason", [("nowhere", "no bucket|not exist"), ("private", "Credentials"), ("bucket/nothing", "not exist")]
)
def test_what_cannot_be_read_or_written_is_bad_input(bucket, name, reason):
    path = storage.to_path(f"gs://{name}/file")
    start = time.monotonic()
    with pytest.raises(UsageError, match=reason):
        storage.local_copy(path)
    if name != "bucket/nothing":
        with pytest.raises(UsageError, match=reason):
            storage.write_bytes(path, b"")
    assert time.monotonic() - start < 5
    with pytest.raises(UsageError, match="without"):
        storage.to_path("gs://bucket/all*")


def test_a_bucket_that_fails_now_and_then_loses_nothing(folder, bucket):
    before = bucket.counts()
    bucket.faults(share=0.3)
    contents = {f"{n}": bytes([n]) * n for n in range(40)}
    for name, content in contents.items():
        storage.write_bytes(folder / name, content)
    read = {name: storage.retried("reading", (folder / name).read_bytes) for name in contents}
    bucket.faults()
    assert read == contents
    assert all(bucket.counts()[fault] > before[fault] + 3 for fault in ("429", "503", "reset"))


def test_a_folder_is_written_beside(folder):
    for text in ("first", "second"):
        with storage.write_beside(folder / "it") as draft:
            (draft / "inside").mkdir(parents=True)
            (draft / "inside" / "file").write_text(text)
    assert (folder / "it" / "inside" / "file").read_text() == "second"
    with storage.write_beside(folder / "it", first_wins=True) as draft:
        pathlib.Path(draft).write_text("third")
    assert (folder / "it" / "inside" / "file").read_text() == "second"
