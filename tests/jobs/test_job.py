"""A job goes on after any end, is held by one run, shared by many, and says by its exit code what happened."""

import json
import pathlib
import signal
import socket
import time

import pytest

from deco_jax import storage
from deco_jax.errors import TransientError, UsageError
from deco_jax.jobs import find_part, open_job
from tests.helpers import programs

SQUARES = str(pathlib.Path(__file__).parent / "squares.py")


@pytest.fixture
def start():
    """Starts the job of squares.py; kills what is left of it."""
    with programs() as run:
        yield lambda *arguments, **environment: run(SQUARES, *arguments, **{"DECO_RETRY_SECONDS": "30"} | environment)


def start_two(start, *arguments):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{free.getsockname()[1]}"
    settings = {"JAX_COORDINATOR_ADDRESS": coordinator, "JAX_NUM_PROCESSES": "2"}
    return [start(*arguments, **settings, JAX_PROCESS_ID=str(index)) for index in (0, 1)]


def end_of(process, seconds=90):
    """(exit code, output)"""
    output, _ = process.communicate(timeout=seconds)
    return process.returncode, output


def wait_for(path, seconds=60):
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end, f"{path} did not come"
        time.sleep(0.05)


def values(folder):
    return [json.loads(path.read_text()) for path in sorted(folder.glob("[0-9]*.json"))]


@pytest.mark.parametrize("number, code", [(signal.SIGKILL, -9), (signal.SIGTERM, 0), (signal.SIGINT, 0)])
def test_the_same_command_goes_on(start, tmp_path, number, code):
    """A dead run's claim is taken over at once: its process is known to be gone."""
    process = start(tmp_path, 6, 0.5)
    wait_for(tmp_path / "001.json")
    process.send_signal(number)
    ended, output = end_of(process)
    made = values(tmp_path)
    assert ended == code and 2 <= len(made) < 6, output
    if code == 0:
        left = f"{6 - len(made)} shards are missing in {tmp_path}. The same command goes on from there."
        assert f"Stopped by {number.name}; {left}" in output
    code, output = end_of(start(tmp_path, 6, 0))
    assert code == 0 and f"{6 - len(made)} of 6 are missing." in output and output.endswith("Done.\n"), output
    assert values(tmp_path) == [0, 1, 4, 9, 16, 25] and (tmp_path / "all.json").exists()
    assert not list((tmp_path / ".lease").glob("*.json"))


def test_two_processes_share_the_work_and_stop_together(start, tmp_path):
    pair = start_two(start, tmp_path, 40, 0.3)
    wait_for(tmp_path / "003.json")
    pair[1].send_signal(signal.SIGTERM)
    ends = [end_of(process) for process in pair]
    assert [code for code, _ in ends] == [0, 0], ends
    assert "Stopped by a signal to another process; " in ends[0][1]
    made = sorted(int(path.stem) for path in tmp_path.glob("[0-9]*.json"))
    assert made == list(range(len(made))) and 4 <= len(made) < 40, "both make every second one, in the same turns"
    assert [end_of(process)[0] for process in start_two(start, tmp_path, 40, 0)] == [0, 0]
    assert values(tmp_path) == [k**2 for k in range(40)] and (tmp_path / "all.json").exists()


def test_a_lost_process_ends_the_other_one_with_75(start, tmp_path):
    pair = start_two(start, tmp_path, 1000, 0.3)
    wait_for(tmp_path / "003.json")
    pair[1].kill()
    code, output = end_of(pair[0])
    assert code == 75 and "another process of this run ended" in output, output
    assert "The same command goes on from what is saved." in output


def test_a_folder_that_is_not_shared_is_said(start, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{free.getsockname()[1]}"
    settings = {"JAX_COORDINATOR_ADDRESS": coordinator, "JAX_NUM_PROCESSES": "2", "SHARED_FOLDER_DELAY": "2"}
    pair = [start(tmp_path / str(i), 4, 0, **settings, JAX_PROCESS_ID=str(i)) for i in (0, 1)]
    for code, output in map(end_of, pair):
        assert code == 2 and "is not the folder that process 0 writes to; it must be shared." in output, output


@pytest.mark.slow
def test_parts_share_a_bucket_that_fails_now_and_then(start, bucket):
    """Three runs that know nothing of each other, 10 % of the requests failing; one more for a part is refused."""
    folder = storage.to_path(f"{bucket.url}/parts")
    bucket.faults(share=0.1)
    parts = [start(folder, 9, 1, f"{index}/3", **bucket.env) for index in range(3)]
    claims = folder / ".lease"
    end = time.monotonic() + 60
    while sum(json.loads(path.read_text())["holds"] for path in claims.glob("*.json")) < 3:
        assert time.monotonic() < end
        time.sleep(0.1)
    code, output = end_of(start(folder, 9, 1, "1/3", **bucket.env))
    assert code == 2 and f"--out={folder} is in use by another run: process {parts[1].pid} on " in output, output
    for code, output in map(end_of, parts):
        assert code == 0, output
    bucket.faults()
    assert [json.loads((folder / f"{k:03d}.json").read_text()) for k in range(9)] == [k**2 for k in range(9)]
    assert (folder / "all.json").exists(), "nobody has seen the last shard"
    assert not list(claims.glob("*.json"))


@pytest.mark.parametrize("what, code, message", [("nowhere", 2, "cannot be written: "), ("bucket", 75, "still fails")])
def test_exit_codes_tell_bad_input_from_what_passes(start, bucket, what, code, message):
    """A bucket that does not exist, and one that does not answer."""
    bucket.faults(share=1.0 if code == 75 else 0.0)
    environment = bucket.env | {"DECO_RETRY_SECONDS": "1"}
    ended, output = end_of(start(f"gs://{what}/run", 4, 0, **environment))
    last = output.strip().splitlines()[-1]
    assert ended == code and last.startswith("deco: error: ") and message in last, output
    assert ("The same command goes on from what is saved." in last) == (code == 75)
    assert "Traceback" not in output


def test_a_lease_that_was_lost_ends_the_job(tmp_path, monkeypatch):
    with open_job("--out", str(tmp_path)) as job:
        job.claim()
        turns = job.shards(range(5))
        assert next(turns) == 0
        job.held.lost = "another run has taken it over"
        with pytest.raises(TransientError, match=f"--out={tmp_path}: another run has taken it over"):
            next(turns)


def test_a_stop_after_the_last_shard_leaves_nothing_undone(tmp_path):
    with open_job("--out", str(tmp_path)) as job:
        for _ in job.shards(range(1)):
            job.stop.by = "SIGTERM"
        done = []
        assert job.stopped and job.finish(lambda: [], lambda: done.append(True)) and done


@pytest.mark.parametrize(
    "given, array, part",
    [
        (None, None, (0, 1)),
        ("0/4", None, (0, 4)),
        ("3/4", (5, 4, 1, 2), (3, 4)),
        (None, (4, 4, 1, 3), (0, 3)),
        (None, (10, 4, 3, 3), (2, 3)),
        ("4/4", None, "--part=4/4 is no part; of 16 the first is 0/16 and the last 15/16"),
        ("1 of 2", None, "--part=1 of 2 is no part"),
        (None, (7, 3, 1, 2), "the array of 2 tasks has gaps, and does not say which part task 7 is"),
    ],
)
def test_parts(given, array, part):
    names = [f"SLURM_ARRAY_TASK_{name}" for name in ("ID", "MIN", "STEP", "COUNT")]
    environment = dict(zip(names, map(str, array), strict=True)) if array else {}
    if isinstance(part, tuple):
        assert find_part(given, environment) == part
        return
    with pytest.raises(UsageError) as error:
        find_part(given, environment)
    assert part in str(error.value)


def test_an_array_of_which_not_all_is_known():
    """Containers may pass on only some of SLURM's variables."""
    environment = {"SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_TASK_MIN": "0", "SLURM_ARRAY_TASK_COUNT": "2"}
    with pytest.raises(UsageError, match="SLURM_ARRAY_TASK_ID is set, and SLURM_ARRAY_TASK_STEP is not; .*--part=I/N"):
        find_part(None, environment)
    assert find_part("1/2", environment) == (1, 2)
