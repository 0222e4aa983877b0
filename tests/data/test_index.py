"""Is a folder listed once, and then only when it has changed, whatever becomes of the file that says what is in it?"""

import errno
import json
import os
import pathlib
import pickle
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
import time

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from deco_jax import storage
from deco_jax.data import folder as folder_source
from deco_jax.data import index, reading
from deco_jax.data.index import NAME, Index, Listing, open_index
from deco_jax.data.sources import open_source
from deco_jax.errors import TransientError, UsageError
from tests.data.test_reading import data_config

FILES = ("cat/1.png", "cat/2.png", "cat/deep/er/3.JPEG", "dog/4.webp", "dog/notes.txt", "eel/5.bmp", "README")


@pytest.fixture(autouse=True)
def machine(tmp_path, monkeypatch):
    """The temporary folder of a machine of its own, outside the data."""
    folder = tmp_path / "machine"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.setattr(folder_source, "RECENT", -1.0)  # of files that the tests made just now an index is kept
    return folder


def make(root, names=FILES):
    """A folder of empty files."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


@pytest.fixture
def data(tmp_path):
    return make(tmp_path / "data")


@pytest.fixture
def listings(monkeypatch):
    """Grows at every listing."""
    found, real = [], folder_source.list_files

    def listed(*arguments):
        found.append(arguments[0])
        return real(*arguments)

    monkeypatch.setattr(folder_source, "list_files", listed)
    return found


def opened(root, beside=None):
    return open_source(data_config(root), beside)


def told(source):
    """All that a source says of its records."""
    records = [(source.describe(i), int(source.index.labels_K[i])) for i in range(len(source))]
    return source.identity, source.class_names, source.contents(), source.summary()[:-1], records


def on_disk(root):
    """What must be found, by os.walk: [(path, label)]."""
    images = [
        os.path.relpath(os.path.join(path, name), root).split("/")
        for path, _, names in os.walk(root)
        for name in names
        if name.lower().endswith((".png", ".jpeg", ".webp", ".bmp"))
    ]
    images = sorted(parts for parts in images if len(parts) > 1)
    classes = sorted({parts[0] for parts in images})
    return [(f"{root}/{'/'.join(parts)}", classes.index(parts[0])) for parts in images]


def test_the_second_start_lists_nothing(data, listings):
    """And says the same in every word: a run that resumes compares these."""
    first = opened(data)
    assert told(first)[-1] == on_disk(data)
    assert first.summary()[-1].startswith("Index: 5 images listed in 0.")
    assert first.summary()[-1].endswith(f" s, kept in {data / NAME}.")
    assert stat.S_IMODE((data / NAME).stat().st_mode) & 0o044, "other users of the data may read it"
    for _ in range(2):
        again = opened(data)
        assert told(again) == told(first)
        assert again.summary()[-1].startswith(f"Index: {data / NAME}, checked in 0.")
    assert len(listings) == 1


def remove(path):
    shutil.rmtree(path) if path.is_dir() else path.unlink()


CHANGES = {
    "a new image": lambda root: (root / "cat/9.png").touch(),
    "one less": lambda root: remove(root / "cat/1.png"),
    "another name": lambda root: (root / "cat/1.png").rename(root / "cat/1b.png"),
    "another class": lambda root: (root / "cat/1.png").rename(root / "dog/1.png"),
    "deep inside": lambda root: (root / "cat/deep/er/8.png").touch(),
    "a new folder inside": lambda root: ((root / "dog/new").mkdir(), (root / "dog/new/8.png").touch()),
    "a new class": lambda root: make(root, ["ant/8.png"]),
    "a class less": lambda root: remove(root / "eel"),
    "a class has another name": lambda root: (root / "eel").rename(root / "ape"),
    "a folder inside is gone": lambda root: remove(root / "cat/deep"),
    "a file beside the classes": lambda root: (root / "LICENSE").touch(),
    "a file became a folder": lambda root: (remove(root / "README"), make(root, ["README/8.png"])),
    "a class became a link": lambda root: (
        (root / "eel").rename(root.parent / "eel"),
        (root.parent / "eel/6.png").touch(),
        (root / "eel").symlink_to(root.parent / "eel"),
    ),
    "a new image, and the folder's time set back, as tar does": lambda root: times_kept(
        root / "cat", lambda: (root / "cat/9.png").touch()
    ),
    "another folder with the same time, as cp -a makes it": lambda root: (
        shutil.copytree(root / "cat", root.parent / "cat"),
        (root.parent / "cat/9.png").touch(),
        shutil.copystat(root / "cat", root.parent / "cat"),
        remove(root / "cat"),
        (root.parent / "cat").rename(root / "cat"),
    ),
}


def times_kept(path, change):
    before = path.stat()
    change()
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_is_seen(data, listings, change):
    """An index that is out of date would train on other labels, without a word."""
    before = opened(data).identity
    CHANGES[change](data)
    after = opened(data)
    walked = [(p, n) for p, n in told(after)[-1] if "/eel/" not in p]  # os.walk follows no links
    assert walked == [(p, n) for p, n in on_disk(data) if "/eel/" not in p]
    assert (after.identity != before) == ("beside" not in change) and len(listings) == 2
    assert "(the data have changed)" in after.summary()[-1]
    assert told(opened(data)) == told(after) and len(listings) == 2


def test_what_changed_just_now_is_listed_again(data, listings, monkeypatch):
    """A further change within the same tick of the clock would not show in the folder's time."""
    monkeypatch.setattr(folder_source, "RECENT", 2.0)
    os.utime(data / "cat", (0, 0))  # which anybody may set
    assert opened(data).summary()[-1].endswith("and again at the next start, as its files have just changed.")
    assert not (data / NAME).exists()
    opened(data)
    assert len(listings) == 2
    for module in (folder_source, reading):
        monkeypatch.setattr(module, "times_of", lambda path: [0, 0])
    assert "does not say when its folders have changed" in opened(data).summary()[-1]
    assert "does not say when" in opened(data).summary()[-1] and len(listings) == 4


def test_a_copy_of_the_folder_is_not_taken_for_it(data, listings):
    """Copies keep the times of folders, also those that leave files out."""
    opened(data)
    copy = data.with_name("copy")
    shutil.copytree(data, copy, ignore=lambda path, names: ["2.png"] if path.endswith("cat") else [])
    for path in [data, *data.rglob("*")]:
        shutil.copystat(path, copy / path.relative_to(data), follow_symlinks=False) if path.is_dir() else None
    assert told(opened(copy))[-1] == on_disk(copy) and len(listings) == 2


def test_neither_the_index_nor_its_draft_is_a_file_of_the_data(data):
    """The line about ignored files would change by itself, and with it what the user believes to have."""
    before = told(opened(data))
    (data / f".{NAME}.ab12").mkdir()
    (data / ".set.tar.deco_jax_index.safetensors").touch()
    assert told(opened(data)) == before
    assert opened(data).summary()[1] == "Ignored: 2 files (1 beside the class folders, 1 .txt)."


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.ENOSPC, errno.EDQUOT])
def test_an_index_that_cannot_be_beside_the_data(data, listings, tmp_path, monkeypatch, code):
    """Then it is in the folder of the job, and if there is none, on this machine; never is it a reason to stop."""
    real = storage.write_beside

    def fail(path):
        if path.is_relative_to(data):
            raise OSError(code, os.strerror(code), str(path))
        return real(path)

    monkeypatch.setattr(storage, "write_beside", fail)
    first = opened(data)
    expected = told(first)
    assert f"kept in {tempfile.gettempdir()}/deco_jax_" in first.summary()[-1]
    assert told(opened(data)) == expected and len(listings) == 1, "this machine's copy is as good"
    for file in pathlib.Path(tempfile.gettempdir()).rglob("*.safetensors"):
        file.unlink()
    for _ in range(2):
        assert told(opened(data, tmp_path / "run")) == expected
    assert len(listings) == 2 and [file.suffix for file in (tmp_path / "run").iterdir()] == [".safetensors"]
    assert f"Index: {tmp_path}/run/.deco_jax_index-" in opened(data, tmp_path / "run").summary()[-1]
    assert sorted(path.name for path in data.iterdir()) == ["README", "cat", "dog", "eel"]


def test_a_full_temporary_folder_is_named(data, machine, monkeypatch):
    real = storage.write_beside

    def fail(path):
        if path.is_relative_to(machine):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return real(path)

    monkeypatch.setattr(storage, "write_beside", fail)
    with pytest.raises(UsageError, match=rf"{machine}/.* cannot be written: .*No space left on device"):
        opened(data)


def damage(file, how):
    content = bytearray(file.read_bytes())
    if how == "empty":
        content = b""
    elif how == "foreign":
        content = b"\x89PNG" * 1000
    elif how == "other JSON":
        content = (7).to_bytes(8, "little") + b'"text" ' + bytes(100)
    elif isinstance(how, float):
        content = content[: int(how * len(content))]
    elif how == "other tensors":
        return save_file({"labels": np.zeros(3, np.int32)}, file)
    elif how == "other version":
        from safetensors import safe_open

        with safe_open(file, "np") as opened:
            about = json.loads(opened.metadata()["deco_jax_index"].partition(" ")[2])
        return save_file(load_file(file), file, {"deco_jax_index": f"0 {json.dumps(about | {'version': 2})}"})
    else:
        content[int(how.removeprefix("byte ")) % len(content)] ^= 1
    return file.write_bytes(content)


HOW = ["empty", "foreign", "other JSON", "other tensors", "other version", 0.01, 0.3, 0.6, 0.99]


@pytest.mark.parametrize("where", ["beside the data", "on this machine"])
def test_a_damaged_index_is_made_anew(data, machine, listings, where):
    """Any byte: of a wrong label nobody would ever hear."""
    expected = told(opened(data))
    (local,) = machine.rglob("*.safetensors")
    file = data / NAME if where == "beside the data" else local
    whole = file.read_bytes()
    for how in [*HOW, *(f"byte {k}" for k in (*range(0, 40, 3), *range(40, len(whole), 41)))]:
        damage(file, how)
        local.unlink() if file != local else None
        before = len(listings)
        source = opened(data)
        assert told(source) == expected, how
        assert file.read_bytes() == whole, f"{how}: the index was not mended"
        if file != local:
            assert len(listings) == before + 1 and "damaged or of another version" in source.summary()[-1], how


def test_workers_get_a_path(data, tmp_path):
    """The table of a million names was copied to each; and one that starts late must not take another for it."""
    make(data, [f"cat/{k}.png" for k in range(1000, 2500)])
    source = opened(data)
    copy = pickle.dumps(source)
    assert len(copy) < 2000
    assert told(pickle.loads(copy))[-1] == told(source)[-1]
    assert not source.index.labels_K.flags.writeable
    remove(data / "cat/1.png")
    opened(data)
    assert told(source)[-1] != on_disk(data) and len(source) == 1505, "what is mapped stays"
    with pytest.raises(UsageError, match="the images have changed while this run started; start it again"):
        pickle.loads(copy)


@pytest.mark.parametrize("recent", [False, True])
def test_processes_of_a_machine_list_once(data, monkeypatch, recent):
    """Eight that start together on a network folder would ask it for everything eight times."""
    if recent:
        monkeypatch.setattr(folder_source, "RECENT", 2.0)
    listings, real, sources = [], folder_source.list_files, []

    def slowly(*arguments):
        listings.append(1)
        time.sleep(0.5)
        return real(*arguments)

    monkeypatch.setattr(folder_source, "list_files", slowly)
    threads = [threading.Thread(target=lambda: sources.append(opened(data))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(listings) == 1 and len({repr(told(source)) for source in sources}) == 1 and len(sources) == 6


def test_a_long_listing_says_what_it_does(data, monkeypatch, caplog):
    make(data, [f"cat/{k}.png" for k in range(1000)])
    opened(data)
    assert "Listing" not in caplog.text
    monkeypatch.setattr(index, "FIRST_PAUSE", 0.0)
    remove(data / NAME)
    remove(data / "cat/7.png")
    opened(data)
    assert f"Listing the images in {data}: 1,000 files so far." in caplog.text


def test_a_name_that_is_no_text(data):
    """It could not be said in a log, nor kept in a checkpoint."""
    (data / "cat" / os.fsdecode(b"caf\xe9.png")).touch()
    with pytest.raises(UsageError, match=r"holds .*cat/caf\\xe9\.png.*, whose name is no UTF-8; rename it"):
        opened(data)
    assert not (data / NAME).exists()


def test_the_job_s_folder_in_a_bucket(bucket, data, machine, listings, monkeypatch):
    """It is where cloud jobs keep all else."""
    real = storage.write_beside

    def fail(path):
        if not storage.is_remote(path) and path.is_relative_to(data):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        return real(path)

    monkeypatch.setattr(storage, "write_beside", fail)
    bucket.faults(share=0.1)
    run = storage.to_path(f"{bucket.url}/run")
    expected = told(opened(data, run))
    for file in machine.rglob("*.safetensors"):
        file.unlink()
    again = opened(data, run)
    assert told(again) == expected and len(listings) == 1
    assert f"Index: {run}/.deco_jax_index-" in again.summary()[-1]


def test_a_folder_in_a_bucket_is_always_listed(bucket, data, listings):
    """A bucket's folders have no time of change; `deco prepare --images` is for those who do not want to wait."""
    storage.upload(data, storage.to_path(f"{bucket.url}/data"))
    config = data_config(f"{bucket.url}/data")
    source = open_source(config)
    assert source.summary()[-1].endswith(
        "and again at the next start, as a bucket does not say whether it has changed."
    )
    assert told(open_source(config)) == told(source) and len(listings) == 2
    storage.to_path(f"{bucket.url}/data/cat/9.png").write_bytes(b"")
    assert len(open_source(config)) == len(source) + 1


START = """
import sys, time
from deco_jax.data import index, pipeline
def memory():
    return sum(int(line.split()[1]) for line in open("/proc/self/smaps_rollup") if line.startswith("Anonymous"))
before, begun = memory(), time.time()
found = index.Index(sys.argv[1], sys.argv[2])
count = sum(len(found.name(k)) > 10 for k in range(0, len(found), 7))
print(count, len(found.contents["classes"]), memory() - before, time.time() - begun)
"""


@pytest.mark.slow
def test_a_million_names(tmp_path):
    """ImageNet: the second start in ten seconds, and next to nothing in every worker."""
    names = [f"n{c:08}/n{c:08}_{k:06}.JPEG" for c in range(1000) for k in range(1300)]
    listing = Listing(names, tuple(f"n{c:08}" for c in range(1000)), {}, "as it was")
    begun = time.monotonic()
    for _ in range(2):
        took, begun = time.monotonic() - begun, time.monotonic()
        found = open_index(str(tmp_path), tmp_path / NAME, None, lambda: listing, lambda state: state == "as it was")
    assert time.monotonic() - begun < 5 and "checked in" in found.line
    command = [sys.executable, "-c", START, str(found.path), found.identity]
    count, classes, kilobytes, seconds = subprocess.run(
        command, check=True, capture_output=True, text=True
    ).stdout.split()
    assert (int(count), int(classes)) == (len(range(0, 1_300_000, 7)), 1000)
    assert int(kilobytes) < 10_000, f"{kilobytes} kB of each worker are for the names"
    assert took < 60 and float(seconds) < 10


def test_another_user_s_temporary_folder_is_refused(data, machine):
    """Whoever made it could change the labels."""
    (machine / f"deco_jax_{os.getuid()}").symlink_to(machine)
    with pytest.raises(UsageError, match=r"belongs to another user; set TMPDIR"):
        opened(data)


def test_a_worker_whose_index_was_cleaned_away(tmp_path):
    """Somebody empties the temporary folder in just that second; the same command makes it anew."""
    with pytest.raises(TransientError, match="nowhere went away while this run started"):
        Index(tmp_path / "nowhere", "")


def test_copies_that_no_run_begins_with_go(data, machine):
    """They have 54 MB each for ImageNet, in memory where /tmp is."""
    opened(data)
    (copy,) = machine.rglob("*.safetensors")
    other = copy.with_name("other.safetensors")
    other.write_bytes(copy.read_bytes())
    for file in (copy, other):
        os.utime(file, (0, 0))
    opened(data)
    assert copy.stat().st_mtime > time.time() - 60, "it is in use"
    assert other.exists()
    (data / "cat/77.png").touch()
    opened(data)
    assert copy.exists() and not other.exists()


def test_a_level_too_high_is_said(tmp_path):
    """train/n01440764/1.JPEG: the one class "train" is not what anybody wants."""
    for name in ("train/n01/1.png", "train/n02/2.png", "val/n01/3.png"):
        (tmp_path / "up" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "up" / name).touch()
    hint = opened(tmp_path / "up").summary()[-2]
    assert hint.startswith("Attention: all images lie deeper, in n01, n02. ") and "one level too high" in hint
    assert not any("Attention" in line for line in opened(tmp_path / "up/train").summary())
