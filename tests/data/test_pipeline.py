"""Is the order of the data a function of the seed and the batch number alone, and do broken files leave it whole?"""

import contextlib
import dataclasses
import itertools
import multiprocessing
import os
import pathlib
import pickle
import re
import signal
import subprocess
import sys
import threading
import time

import grain
import numpy as np
import pytest
from PIL import Image

from deco_jax.conditions import ClassLabels
from deco_jax.config import default_config
from deco_jax.data import pipeline
from deco_jax.data.decode import TooSmall
from deco_jax.data.pipeline import BadLimit, BadRecords, LoadShare, Threads, batches, fingerprint
from deco_jax.data.sources import open_source
from deco_jax.errors import TransientError, UsageError


@dataclasses.dataclass
class Numbers:
    """Record i is an image full of i, labelled i: a batch's labels are the indices it holds. Some cannot be read."""

    size: int = 90
    unreadable: frozenset = frozenset()
    small: frozenset = frozenset()
    loads: int = 0
    identity: str = "numbers"
    condition = ClassLabels(10)

    def __len__(self):
        return self.size

    def load(self, index, offset=None):
        self.loads += 1
        if index in self.small:
            raise TooSmall(f"{index} is small")
        if index in self.unreadable:
            raise OSError(f"{index} is broken")
        return {"image": np.full((2, 2, 3), index % 256, np.uint8), "label": np.int32(index)}

    def describe(self, index):
        return f"number {index}"


def data_config(**fields):
    """The `data` part of a configuration; without workers unless they are asked for."""
    config = default_config().data
    config.update(
        {"batch_size": 4, "workers": 0, "image_size": 16, "max_bad_records": 10, "max_bad_share": 1.0} | fields
    )
    return config


def take(count, config, source, seed=0, start=0, **process):
    return list(itertools.islice(batches(config, seed, source, start, **process), count))


def labels(taken):
    return np.concatenate([batch["label"] for batch in taken])


def assert_equal(batch, other, message=""):
    assert batch.keys() == other.keys()
    for key in batch:
        assert batch[key].dtype == other[key].dtype
        np.testing.assert_array_equal(batch[key], other[key], f"{key}: {message}")


# --- order


def test_a_batch_is_what_the_trainer_expects():
    """Shapes and types of the contract with the training step; uint8 keeps the way to the device short."""
    (batch,) = take(1, data_config(), Numbers())
    assert {key: (value.shape, value.dtype.name) for key, value in batch.items()} == {
        "image": ((4, 2, 2, 3), "uint8"),
        "label": ((4,), "int32"),
        "bad": ((4,), "int32"),
    }
    np.testing.assert_array_equal(batch["image"][:, 0, 0, 0], batch["label"], "image and label of different records")
    assert (batch["bad"] == -1).all()


@pytest.mark.parametrize("start", [7, 30])
def test_starting_at_a_batch_equals_skipping_to_it(start):
    """Resuming continues the data exactly: a checkpoint holds no more than the number of batches consumed."""
    skipped = take(start + 6, data_config(), Numbers())[start:]
    started = take(6, data_config(), Numbers(), start=start)
    for k, (batch, other) in enumerate(zip(started, skipped, strict=True), start):
        assert_equal(batch, other, f"batch {k} depends on where the run started")


@pytest.mark.parametrize("process_count", [2, 4])
def test_shares_of_the_processes_make_up_the_whole_batch(process_count):
    """The global batch is the same on any number of hosts, broken records included, so runs can change machines."""
    config, source = data_config(batch_size=8), Numbers(unreadable=frozenset({2, 3, 89}))
    shares = [take(12, config, source, start=2, rows=rows) for rows in np.split(np.arange(8), process_count)]
    for whole, parts in zip(take(12, config, source, start=2), zip(*shares, strict=True), strict=True):
        assert all(len(part["label"]) == 8 // process_count for part in parts)
        assert_equal({key: np.concatenate([part[key] for part in parts]) for key in whole}, whole)


def test_every_epoch_visits_every_record_once_in_its_own_order():
    """No record is lost or doubled where an epoch ends inside a batch (37 = 9·4 + 1), and none keeps its place."""
    epochs = labels(take(37, data_config(), Numbers(37))).reshape(4, 37)
    np.testing.assert_array_equal(np.sort(epochs), np.tile(np.arange(37), (4, 1)), "an epoch must be a permutation")
    orders = {tuple(epoch) for epoch in (*epochs.tolist(), range(37))}
    assert len(orders) == 5, "each epoch must be shuffled anew, and differ from the order on disk"


def test_a_batch_larger_than_the_data_set_is_full():
    """A trial on a handful of images with a production configuration repeats them instead of ending or shrinking."""
    (batch,) = take(1, data_config(batch_size=25), Numbers(10))
    assert sorted(np.bincount(batch["label"], minlength=10)) == [2] * 5 + [3] * 5


def test_the_seed_decides_the_order():
    """Equal seeds repeat a run, others do not; neighbouring seeds, the usual choice, included."""
    orders = [labels(take(9, data_config(), Numbers(36), seed)).tolist() for seed in (0, 0, 1, 2)]
    assert orders[0] == orders[1]
    assert len({tuple(order) for order in orders}) == 3


def test_the_order_is_that_of_runs_which_are_under_way():
    """They once took rows out of whole batches of grain's: a run that was begun so must go on with the same images."""
    recorded = [4, 6, 9, 7, 5, 3, 1, 8, 2, 0, 8, 1, 3, 7, 9, 0, 5, 4, 2, 6, 4, 0, 7, 9]  # three epochs, cut
    assert labels(take(6, data_config(), Numbers(10), seed=3)).tolist() == recorded, "grain shuffles in another way now"
    cases = itertools.product((1, 10, 250), (0, 2**31 - 1), (1, 7, 32), (0, 10**7))
    for records, seed, batch_size, start in cases:
        whole = grain.MapDataset.range(records).seed(seed).shuffle().repeat().batch(batch_size)
        for rows in (np.arange(batch_size), np.arange(batch_size)[batch_size // 2 :]):
            taken = take(3, data_config(batch_size=batch_size), Numbers(records), seed, start, rows=rows)
            expected = np.stack([whole[k][rows] for k in range(start, start + 3)])
            case = f"{records} records, seed {seed}, batch {batch_size}, from {start} on"
            np.testing.assert_array_equal([batch["label"] for batch in taken], expected, case)


def test_a_process_works_out_its_own_rows_alone():
    """Of a batch of 4,096 for 32 hosts, a host's workers would look up 32 times as many places as they need."""
    looked_up = []

    class Order:
        def __getitem__(self, place):
            looked_up.append(place)
            return place % 90

    config, rows = data_config(), np.array([2, 3])
    limit, threads = BadLimit.from_config(config, Numbers()), Threads(2)
    batch = LoadShare(Numbers(), None, Order(), 64, rows, limit, threads).map(7)
    threads.close()
    assert looked_up == [7 * 64 + 2, 7 * 64 + 3]
    assert batch["label"].tolist() == [(7 * 64 + 2) % 90, (7 * 64 + 3) % 90]


# --- threads


def test_threads_change_nothing(tmp_path):
    """Whichever is done first, each row is in its place; broken files too."""
    break_images(write_images(tmp_path)[4:6])
    config, source = open_folder(tmp_path, threads=1, batch_size=8)
    one = take(9, config, source)
    assert sum((batch["bad"] >= 0).sum() for batch in one) == 12
    for threads in (2, 3, 16):
        config.threads = threads
        for k, (batch, expected) in enumerate(zip(take(9, config, source), one, strict=True)):
            assert_equal(batch, expected, f"batch {k} with {threads} threads")


def test_rows_are_read_at_a_time():
    """Each waits for two others, so reading one after the other, or two at a time, would never end."""
    barrier = threading.Barrier(3)

    class Waiting(Numbers):
        def load(self, index, offset=None):
            barrier.wait(timeout=20)
            return super().load(index)

    (batch,) = take(1, data_config(batch_size=6, threads=3), Waiting(), rows=np.arange(3))
    assert sorted(batch["label"]) == sorted(set(batch["label"]))


def wait_until(condition, seconds=10):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def test_the_end_leaves_no_thread_and_waits_for_none():
    """A storage may hang as a run ends; and a notebook that opens data many times must not fill up with threads."""
    with contextlib.closing(batches(data_config(threads=3), 0, Numbers(), 0)) as undisturbed:
        first = set(next(undisturbed)["label"].tolist())
    go_on, reads, hanging, lock = threading.Event(), [], [], threading.Lock()

    class Hanging(Numbers):
        def load(self, index, offset=None):
            with lock:  # those read ahead hang, but leave the first batch a thread
                hangs = index not in first and (len(hanging) < 2 or first <= set(reads))
                (hanging if hangs else reads).append(index)
            if hangs:
                go_on.wait(timeout=60)
            return super().load(index)

    before = set(threading.enumerate())
    iterator = batches(data_config(threads=3), 0, Hanging(), 0)
    next(iterator)
    wait_until(lambda: len(hanging) == 3)
    number = len(reads) + 3
    start = time.monotonic()
    iterator.close()
    assert time.monotonic() - start < 5
    assert sum(thread.name.startswith("rows") for thread in set(threading.enumerate()) - before) == 3, "nothing hung"
    go_on.set()
    wait_until(lambda: not set(threading.enumerate()) - before)
    assert len(reads) + len(hanging) == number, "records were read for nobody"


def test_workers_end_with_their_threads(tmp_path):
    write_images(tmp_path)
    config, source = open_folder(tmp_path, workers=2, threads=3)
    others, iterator = set(multiprocessing.active_children()), batches(config, 0, source, 0)
    next(iterator)
    workers = set(multiprocessing.active_children()) - others
    assert len(workers) == 2
    for worker in workers:
        wait_until(lambda tasks=pathlib.Path(f"/proc/{worker.pid}/task"): len(list(tasks.iterdir())) > 3)  # are at work
    iterator.close()
    wait_until(lambda: not workers & set(multiprocessing.active_children()))


def test_a_worker_that_is_killed_is_no_crash(tmp_path):
    """As the system does when memory runs out: the same command goes on, perhaps with fewer of them."""
    write_images(tmp_path)
    config, source = open_folder(tmp_path, workers=1)
    others, iterator = set(multiprocessing.active_children()), batches(config, 0, source, 0)
    next(iterator)
    (worker,) = set(multiprocessing.active_children()) - others
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(TransientError, match="that reads the data was killed, perhaps as memory ran out; fewer data.w"):
        for _ in iterator:
            pass


def test_a_program_that_just_ends_says_nothing():
    """A notebook or script need not close anything; what is torn down with the interpreter must not complain."""
    program = (
        "from deco_jax.config import default_config\n"
        "from deco_jax.data.pipeline import batches\n"
        "from deco_jax.data.sources import open_source\n"
        "if __name__ == '__main__':\n"
        "    config = default_config().data\n"
        "    config.update(source='digits', image_size=28, batch_size=64, workers=0)\n"
        "    reading = batches(config, 0, open_source(config), 0)\n"
        "    print(next(reading)['image'].shape)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "(64, 28, 28, 3)\n", "")


def test_an_error_of_the_storage_ends_all_threads_with_its_own_words():
    """Whichever thread comes first: exit code and message are those of what happened, not of what followed from it."""

    class Failing(Numbers):
        def load(self, index, offset=None):
            time.sleep(0.001)
            if index == 41:
                raise TransientError("reading 41 still fails")
            return super().load(index)

    for _ in range(10):
        with pytest.raises(TransientError, match="reading 41 still fails"):
            take(3, data_config(batch_size=64, threads=8), Failing())


def test_of_several_errors_the_first_row_s_is_raised():
    """So a run fails in the same words each time."""
    threads, begun = Threads(4), []

    def do(item):
        begun.append(item)
        time.sleep(0.05 if item == 2 else 0)
        if item >= 2:
            raise ValueError(f"row {item}")

    with pytest.raises(ValueError, match="row 2"):
        threads.each(do, 1000)
    assert len(begun) < 10, "after an error nothing more is begun"
    copy = pickle.loads(pickle.dumps(threads))
    threads.close()
    done = []
    copy.each(done.append, 50)
    copy.each(done.append, 0)
    assert sorted(done) == list(range(50)), "a worker's copy has threads of its own"
    copy.close()


# --- files


def write_images(root, count=12, classes=3):
    """`count` JPEGs of noise; returns their paths in the source's order."""
    rng = np.random.default_rng(0)
    paths = [root / f"class{i % classes}" / f"{i:02}.jpg" for i in range(count)]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), np.uint8)).save(path)
    return sorted(paths)


def break_images(paths):
    """Cuts off the first, as an interrupted copy does; overwrites the others with what is no image."""
    paths[0].write_bytes(paths[0].read_bytes()[:400])
    for path in paths[1:]:
        path.write_bytes(b"<html>404 Not Found</html>")


def open_folder(root, **fields):
    config = data_config(source="folder", path=str(root), **fields)
    return config, open_source(config)


def test_workers_change_nothing(tmp_path):
    """Decoding in two processes yields bit by bit what decoding in this one does, from the middle on, bad files too."""
    break_images(write_images(tmp_path)[4:6])
    config, source = open_folder(tmp_path)
    here = take(7, config, source, start=3)
    config.workers = 2
    others, iterator = set(multiprocessing.active_children()), batches(config, 0, source, start=3)
    for k, expected in enumerate(here, 3):
        batch = next(iterator)
        assert_equal(batch, expected, f"batch {k} depends on the number of workers")
        left = [array.shm.name for array in batch.values() if pathlib.Path("/dev/shm", array.shm.name).exists()]
        assert not left, f"a run that ends now leaves this in memory, and Python warns of it: {left}"
    workers = set(multiprocessing.active_children()) - others
    assert len(workers) == 2, "the workers are not at work, so this compared nothing"
    for worker in workers:
        blocked = re.search(r"SigBlk:\s+(\w+)", pathlib.Path(f"/proc/{worker.pid}/status").read_text())[1]
        stop = 1 << signal.SIGINT - 1 | 1 << signal.SIGTERM - 1
        assert int(blocked, 16) & stop == stop, "Ctrl-C in the terminal would end the workers of a run that saves first"


def test_fingerprint_changes_with_what_changes_the_batches(tmp_path):
    """The position in the data means nothing under another order: resuming compares fingerprints to find out."""
    write_images(tmp_path / "a")
    config, source = open_folder(tmp_path / "a")
    prints = {"as it is": fingerprint(config, 0, source), "seed": fingerprint(config, 1, source)}
    for field in ("batch_size", "image_size"):
        prints[field] = fingerprint(*_with(tmp_path / "a", {field: 8}))
    write_images(tmp_path / "more", count=13)
    prints["a file more"] = fingerprint(*_with(tmp_path / "more"))
    paths = write_images(tmp_path / "renamed")
    paths[0].rename(paths[0].with_name("zz.jpg"))
    prints["a file renamed"] = fingerprint(*_with(tmp_path / "renamed"))
    paths = write_images(tmp_path / "moved")
    paths[0].rename(paths[-1].with_name(paths[0].name))
    prints["a file of another class"] = fingerprint(*_with(tmp_path / "moved"))
    prints["another source"] = fingerprint(config, 0, Numbers(12))
    assert len(set(prints.values())) == len(prints), f"equal fingerprints for different batches: {prints}"


def test_fingerprint_keeps_still_for_what_does_not(tmp_path):
    """More workers, more tolerance or a copy elsewhere: the same batches, so the run may go on."""
    write_images(tmp_path / "here")
    write_images(tmp_path / "there")
    before = fingerprint(*_with(tmp_path / "here"))
    assert fingerprint(*_with(tmp_path / "here", {"workers": 8, "max_bad_records": 0})) == before
    assert fingerprint(*_with(tmp_path / "there")) == before


def _with(root, fields=None):
    config, source = open_folder(root, **(fields or {}))
    return config, 0, source


# --- broken records


def test_broken_files_leave_batches_full(tmp_path):
    """One cut-off JPEG among a million must not end a run; its place is filled by the next file that can be read."""
    paths = write_images(tmp_path)
    break_images([paths[3], paths[7], paths[8], paths[11]])
    config, source = open_folder(tmp_path)
    replacement = {3: 4, 7: 9, 8: 9, 11: 0}
    taken = take(9, config, source)  # three epochs
    bad = np.concatenate([batch["bad"] for batch in taken]).reshape(3, 12)
    assert [sorted(epoch[epoch >= 0].tolist()) for epoch in bad] == [sorted(replacement)] * 3
    for batch in taken:
        assert batch["image"].shape == (4, 16, 16, 3)
        for image, label, index in zip(*(batch[key] for key in ("image", "label", "bad")), strict=True):
            if index >= 0:
                expected_image, expected_label = source.load(replacement[index]).values()
                np.testing.assert_array_equal(image, expected_image, f"not the next readable after {index}")
                assert label == expected_label, "the label must be that of the image that stands in"


def test_a_broken_record_moves_no_other():
    """The good records keep their places; else a file that breaks halfway would change the order of the rest."""
    whole = labels(take(45, data_config(), Numbers()))
    broken = labels(take(45, data_config(), Numbers(unreadable=frozenset({4}))))
    assert (whole == 4).any()
    np.testing.assert_array_equal(broken, np.where(whole == 4, 5, whole))


def test_each_broken_file_is_counted_and_named_once(tmp_path, caplog):
    """The log names what to mend, and 800 epochs over one bad file are one bad file, not 800."""
    paths = write_images(tmp_path)
    broken = [paths[3], paths[7]]
    break_images(broken)
    config, source = open_folder(tmp_path)
    records = BadRecords(source, config)
    with caplog.at_level("WARNING", logger="absl"):
        for batch in take(12, config, source):  # four epochs
            records.check(batch["bad"])
    assert records.seen == {3, 7}
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 2, f"one line per file: {warnings}"
    for path in broken:
        assert sum(str(path) in line for line in warnings) == 1, f"{path} is not named exactly once: {warnings}"
    assert all("Error" in line for line in warnings), f"what the decoder said is missing: {warnings}"


def test_more_broken_files_than_allowed_stop_the_run(tmp_path):
    """A data set that rots must not shrink in silence: the first file beyond the limit ends the run."""
    break_images(write_images(tmp_path)[3:6])
    config, source = open_folder(tmp_path)
    bad = [batch["bad"] for batch in take(3, config, source)]  # one epoch
    allowed = BadRecords(source, data_config(max_bad_records=3))
    for bad_B in bad:
        allowed.check(bad_B)
    too_many = BadRecords(source, data_config(max_bad_records=2))
    with pytest.raises(UsageError, match=r"3 records cannot be read.*data\.max_bad_records=2 "):
        for bad_B in bad:
            too_many.check(bad_B)


def test_a_limit_of_zero_accepts_whole_data():
    """0 means "not one": good batches pass, and the first broken record ends the run."""
    records = BadRecords(Numbers(), data_config(max_bad_records=0))
    records.check(np.full(4, -1))
    assert not records.seen
    with pytest.raises(UsageError, match=r"data\.max_bad_records=0"):
        records.check(np.array([-1, 4, -1, -1]))


@pytest.mark.parametrize("limit", [0, 3])
def test_nothing_but_broken_records_ends_the_search(limit):
    """A wrong mount makes every file unreadable: looking for the next readable one ends once the limit is reached."""
    config = data_config(batch_size=90, max_bad_records=limit)  # one epoch
    (batch,) = take(1, config, Numbers(unreadable=frozenset(range(limit))))
    assert sorted(batch["label"]) == [limit] * limit + list(range(limit, 90)), "as many in a row as allowed is no error"
    with pytest.raises(UsageError, match=rf"number 0 .*is broken.*data\.max_bad_records={limit}\."):
        take(1, config, Numbers(unreadable=frozenset(range(limit + 1))))


def test_a_row_of_small_images_is_not_all_shown_as_one():
    """They are of one class or source, one after the other. Others take their places, about equally often."""
    source, config = Numbers(size=240, small=frozenset(range(30, 180))), data_config(min_side=9, threads=1)
    seen = np.bincount(labels(take(60, config, source)), minlength=240)
    assert not seen[30:180].any() and seen.sum() == 240 and seen.max() <= 12
    assert source.loads < 240 * 6, "each place looks for itself, and does not go through the row"
    assert_equal(take(1, config, source, start=7)[0], take(8, config, source)[7])


def test_images_that_stand_in_for_small_ones_differ_within_a_batch():
    small = frozenset(np.flatnonzero(np.random.default_rng(0).random(20_000) < 0.7).tolist())
    source, config = Numbers(size=20_000, small=small), data_config(min_side=9, threads=1, batch_size=64)
    repeated = [64 - len(set(batch["label"].tolist())) for batch in take(40, config, source)]
    assert sum(repeated) <= 10, "as often as chance has it: 2,560 of 6,000 large images, drawn in 40 batches"


def test_nothing_but_small_images_ends_the_search(monkeypatch):
    """A slip in one number: it is said after so many, not after all of a million."""
    source, config = Numbers(9, small=frozenset(range(9))), data_config(min_side=9, threads=1)
    with pytest.raises(UsageError, match="Of 901 records in a row none can be taken, 901 of them being too small"):
        take(1, config, source)
    source.small = source.small - {7}
    assert set(labels(take(1, config, source))) == {7}, "one is enough"
    monkeypatch.setattr(pipeline, "MOST_SMALL", 5)
    source.small = frozenset(range(9))
    with pytest.raises(UsageError, match="Of 6 records in a row.*lower data.min_side"):
        take(1, config, source)


@pytest.mark.parametrize("share, allowed", [(0.1, 1), (0.29, 5), (0.5, 9), (1.0, 10)])
def test_the_limit_is_also_a_share(share, allowed):
    """A hundred broken files are nothing among a million, and all of a data set of a hundred."""
    config, source = data_config(max_bad_share=share), Numbers(18)
    records = BadRecords(source, config)
    records.check(np.arange(allowed))
    setting = "data.max_bad_records=10" if allowed == 10 else f"data.max_bad_share={share} of 18 records"
    with pytest.raises(UsageError, match=f"{allowed + 1} records cannot be read.*; {setting} allows fewer"):
        records.check(np.array([17]))


def test_records_that_were_bad_before_a_restart_still_count(caplog):
    """Else a data set that rots restarts its way past the limit, and the log names the same files every time."""
    config = data_config(max_bad_records=3)
    records = BadRecords(Numbers(), config, seen=[4, 8])
    with caplog.at_level("WARNING", logger="absl"):
        records.check(np.array([8, -1, 4, 5]))
    assert records.seen == {4, 5, 8}
    assert [record.getMessage()[:41] for record in caplog.records] == ["Skipped unreadable record 3: number 5 (it"]
    with pytest.raises(UsageError, match="4 records cannot be read"):
        records.check(np.array([6]))
    with pytest.raises(UsageError, match="4 records cannot be read, the last number 8"):
        BadRecords(Numbers(), config, seen=[4, 8, 6, 5]).check(np.array([-1]))
