"""A folder has one user at a time, on a disk and in a bucket, whatever dies."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest

from deco_jax import storage
from deco_jax.errors import UsageError
from deco_jax.storage import lease

PROGRAM = """
import sys, time
from deco_jax import storage
from deco_jax.storage import lease
lease.RENEW, lease.DEAD, lease.POLL = 0.5, 4.0, 0.2
with storage.hold(storage.to_path(sys.argv[1]), "--it"):
    print("held", flush=True)
    time.sleep(float(sys.argv[2]))
"""


@pytest.fixture(autouse=True)
def shorter(monkeypatch):
    for name, seconds in (("RENEW", 0.5), ("DEAD", 4.0), ("POLL", 0.2)):
        monkeypatch.setattr(lease, name, seconds)


@pytest.fixture(params=["disk", "bucket"])
def folder(request, tmp_path):
    if request.param == "disk":
        return tmp_path / "run"
    return storage.to_path(f"{request.getfixturevalue('bucket').url}/{tmp_path.name}/run")


def other(folder, seconds=0.0):
    command = [sys.executable, "-c", PROGRAM, str(folder), str(seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def as_on_another_machine(folder):
    """The claims that are there, as if of a host of which the processes cannot be seen."""
    for path in (folder / lease.FOLDER).iterdir():
        path.write_text(json.dumps(json.loads(path.read_text()) | {"host": "elsewhere"}))


def claims(folder):
    return [path.name for path in (folder / lease.FOLDER).iterdir()]


def test_the_second_is_refused_while_the_first_is_there(folder):
    with storage.hold(folder, "--it") as held:
        with pytest.raises(UsageError) as error, storage.hold(folder, "--it"):
            pass
        late = other(folder)
        assert "UsageError: --it is in use" in late.communicate(timeout=60)[1]
        assert claims(folder) == [held.path.name], "who was refused leaves nothing"
    message = str(error.value)
    for part in (f"process {os.getpid()} on ", " since 2", str(held.path), "remove this file", "after its death"):
        assert part in message, f"{part!r} is not in {message!r}"
    with storage.hold(folder, "--it"):
        pass
    assert not (folder / lease.FOLDER).exists() or not claims(folder)


def test_what_a_killed_run_left_is_taken_over_at_once(folder, caplog):
    first = other(folder, 60)
    assert first.stdout.readline() == "held\n"
    first.send_signal(signal.SIGKILL)
    first.wait()
    start = time.monotonic()
    with storage.hold(folder, "--it") as held:
        assert claims(folder) == [held.path.name]
    assert time.monotonic() - start < 2 and "taken over from a run that is dead" in caplog.text


def test_a_dead_run_of_another_machine_is_waited_for(folder, caplog):
    with storage.hold(folder, "--it") as dead:
        dead._ended.set()  # no renewal any more
        dead._thread.join()
        as_on_another_machine(folder)
        start = time.monotonic()
        with storage.hold(folder, "--it"):
            assert 3 < time.monotonic() - start < 8
    assert "waiting, at most 4 s" in caplog.text and "on elsewhere since" in caplog.text


def test_a_living_run_of_another_machine_refuses_when_it_renews(folder, monkeypatch):
    facts = lease._about_this_process()
    with storage.hold(folder, "--it"):
        monkeypatch.setattr(lease, "_about_this_process", lambda: facts | {"host": "elsewhere"})
        start = time.monotonic()
        with pytest.raises(UsageError, match="in use by another run"), storage.hold(folder, "--it"):
            pass
        assert time.monotonic() - start < 3


def test_parts_share_a_folder_if_all_have_the_same_count(tmp_path):
    with storage.hold(tmp_path, "--it", (0, 3)), storage.hold(tmp_path, "--it", (2, 3)):
        for part in ((2, 3), (1, 4), (0, 1)):
            with pytest.raises(UsageError, match="in use"), storage.hold(tmp_path, "--it", part):
                pass


def test_a_run_notices_that_it_was_taken_over(folder):
    with storage.hold(folder, "--it") as held:
        held.path.unlink()
        end = time.monotonic() + 5
        while not held.lost and time.monotonic() < end:
            time.sleep(0.1)
        assert "taken" in held.lost and str(held.path) in held.lost
        assert claims_or_none(folder) == [], "who has lost the lease must not claim it again"


def claims_or_none(folder):
    return claims(folder) if (folder / lease.FOLDER).exists() else []


def start_together(folder, barrier, held, kept):
    lease.POLL = 0.05
    barrier.wait()
    try:
        with storage.hold(storage.to_path(folder), "--it"):
            with held.get_lock():
                held.value += 1
                kept.value = max(kept.value, held.value)
            time.sleep(0.3)
            with held.get_lock():
                held.value -= 1
    except UsageError:
        pass


def test_of_eight_that_start_together_one_holds(folder):
    context = multiprocessing.get_context("spawn")
    barrier, held, kept = context.Barrier(8), context.Value("i", 0), context.Value("i", 0)
    eight = [context.Process(target=start_together, args=(str(folder), barrier, held, kept)) for _ in range(8)]
    for process in eight:
        process.start()
    for process in eight:
        process.join(60)
        assert process.exitcode == 0
    assert kept.value == 1


@pytest.mark.parametrize(
    "name, reason", [("nowhere", "no bucket gs://nowhere"), ("readonly", "create access"), ("private", "Credentials")]
)
def test_a_bucket_that_cannot_be_used_is_bad_input(bucket, name, reason):
    start = time.monotonic()
    with pytest.raises(UsageError, match=reason), storage.hold(storage.to_path(f"gs://{name}/run"), "--it"):
        pass
    assert time.monotonic() - start < 5


def test_a_lease_survives_a_storage_that_fails(bucket):
    folder = storage.to_path(f"{bucket.url}/faults/run")
    bucket.faults(share=0.3, delay=0.05)
    with storage.hold(folder, "--it") as held:
        time.sleep(3)
        assert not held.lost
        bucket.faults()
        deadline = time.monotonic() + 10
        while json.loads(held.path.read_text())["renewals"] <= 3:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert not held.lost
