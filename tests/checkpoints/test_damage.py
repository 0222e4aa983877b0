"""A checkpoint that was damaged is never used and never deleted; on a disk and in a bucket."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deco_jax import storage
from deco_jax.checkpoints import checksums, store
from deco_jax.config import default_config
from deco_jax.errors import TransientError, UsageError
from deco_jax.parallel import processes
from deco_jax.training.state import TrainState


def state(step):
    params = {"network": {"kernel": jnp.arange(90_000.0).reshape(300, 300) * step}}
    return TrainState(jnp.int32(step), params, params["network"], (), jnp.int32(0), jnp.int32(0))


def abstract(tree):
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), tree)


def new_meta():
    return store.make_meta(default_config(), "data", 12, "0", class_names=["cat", "dog"])


@pytest.fixture(params=["disk", "bucket"])
def workdir(request, tmp_path):
    if request.param == "disk":
        return tmp_path / "run"
    return storage.to_path(f"{request.getfixturevalue('bucket').url}/{tmp_path.name}/run")


@pytest.fixture
def written(workdir):
    """A workdir with the steps 2 and 3."""
    checkpoints = store.Checkpoints(workdir, keep=3, keep_every=0)
    for step in (2, 3):
        checkpoints.save(step, state(step), new_meta(), bad=[7, step])
    checkpoints.close()
    return workdir


def largest(workdir, step):
    """The file with most of the arrays."""
    folder = workdir / "checkpoints" / str(step)
    name = max(found := checksums._files(folder), key=lambda name: found[name][0])
    assert name.startswith("state/ocdbt.process_0/d/")
    return folder / name


def truncate(workdir, step):
    file = largest(workdir, step)
    file.write_bytes(file.read_bytes()[:1000])


def flip(workdir, step):
    file = largest(workdir, step)
    content = bytearray(file.read_bytes())
    content[5000] ^= 1
    file.write_bytes(bytes(content))


def remove(workdir, step):
    largest(workdir, step).unlink()


def without_notes(workdir, step):
    """As an older version left it, and truncated."""
    (workdir / "checkpoints" / str(step) / "checksums.0.json").unlink()
    truncate(workdir, step)


def test_what_was_saved_comes_back(written):
    checkpoints = store.Checkpoints(written, keep=3, keep_every=0)
    assert checkpoints.agree_on_latest() == 3
    jax.tree.map(np.testing.assert_array_equal, checkpoints.restore(3, abstract(state(3))), state(3))
    assert checkpoints.bad_records(3) == [7, 3] and checkpoints.position(3) == 3
    assert checkpoints.meta(3)["class_names"] == ["cat", "dog"]
    checkpoints.close()
    folder, step = store.find_checkpoint(str(written))
    assert (folder, step) == (written / "checkpoints", 3)
    assert store.find_checkpoint(str(written / "checkpoints" / "2"))[1] == 2
    part = store.restore_part(folder, step, abstract({"ema": state(3).ema}))
    np.testing.assert_array_equal(part["ema"]["kernel"], state(3).ema["kernel"])
    assert store.read_config(folder, step).seed == default_config().seed


@pytest.mark.parametrize(
    "damage, problem",
    [
        (truncate, "has 1000 bytes of"),
        (flip, "the checksum of state/ocdbt.process_0/d/.* is another"),
        (remove, "is missing"),
        (without_notes, "1000|range|OUT_OF_RANGE"),
    ],
)
def test_the_newest_that_is_whole_is_used(written, damage, problem, caplog):
    damage(written, 3)
    with pytest.raises(UsageError, match=rf"checkpoints/3 is damaged: .*({problem})"):
        store.find_checkpoint(str(written / "checkpoints" / "3"))
    assert store.find_checkpoint(str(written))[1] == 2
    assert "checkpoints/3 is damaged and not used" in caplog.text
    assert (written / "checkpoints" / "3").exists(), "who only reads changes nothing"

    checkpoints = store.Checkpoints(written, keep=2, keep_every=0)
    assert checkpoints.agree_on_latest() == checkpoints.latest() == 2
    jax.tree.map(np.testing.assert_array_equal, checkpoints.restore(2, abstract(state(2))), state(2))
    for step in (3, 4):
        checkpoints.save(step, state(step), new_meta())
    checkpoints.close()
    names = {path.name for path in (written / "checkpoints").iterdir()}
    assert names >= {"3", "4", "3.damaged"} and "2" not in names


def test_if_all_are_damaged_nothing_begins_anew(written):
    for step in (2, 3):
        truncate(written, step)
    for _ in range(2):
        checkpoints = store.Checkpoints(written, keep=3, keep_every=0)
        with pytest.raises(UsageError, match=r"all checkpoints in .* are damaged \(3: .*; 2: .*"):
            checkpoints.agree_on_latest()
        checkpoints.close()
    with pytest.raises(UsageError, match="all checkpoints in"):
        store.find_checkpoint(str(written))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Orbax's coroutines that were given up
def test_what_still_cannot_be_read_is_one_line(written):
    """Damage that came after the check."""
    checkpoints = store.Checkpoints(written, keep=3, keep_every=0)
    assert checkpoints.agree_on_latest() == 3
    folder = written / "checkpoints" / "3"
    for name in checksums._files(folder):
        if "/d/" in name:  # which array lies in which of these is a matter of time
            (folder / name).write_bytes((folder / name).read_bytes()[:1000])
    for read in (
        lambda: checkpoints.restore(3, abstract(state(3))),
        lambda: store.restore_part(written / "checkpoints", 3, abstract({"ema": state(3).ema})),
    ):
        with pytest.raises(UsageError, match=r"checkpoints/3 cannot be read: ") as error:
            read()
        assert "\n" not in str(error.value) and len(str(error.value)) < 600
    checkpoints.close()


def test_a_checkpoint_that_was_copied_is_read(written, tmp_path, bucket):
    """Out of a bucket or into it: digests are then of another kind, or the same."""
    folder, files = written / "checkpoints" / "3", None
    other = tmp_path / "copy" if storage.is_remote(written) else storage.to_path(f"{bucket.url}/copied")
    files = checksums._files(folder)
    for name in files:
        target = other / "checkpoints" / "3" / name
        if not storage.is_remote(target):
            target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((folder / name).read_bytes())
    assert store.find_checkpoint(str(other))[1] == 3
    truncate(other, 3)
    with pytest.raises(UsageError, match="damaged"):
        store.find_checkpoint(str(other))


def test_news_come_when_a_step_is_on_disk(workdir):
    checkpoints = store.Checkpoints(workdir, keep=3, keep_every=0)
    assert checkpoints.news() == []
    checkpoints.save(1, state(1), new_meta())
    checkpoints.wait()
    (line,) = checkpoints.news()
    assert line.startswith(f"Saved: {workdir}/checkpoints/1 (0.") and " MB, " in line
    assert checkpoints.news() == []
    noted = json.loads((workdir / "checkpoints" / "1" / "checksums.0.json").read_text())
    assert noted["processes"] == 1 and {"meta/metadata", "data/metadata", "_CHECKPOINT_METADATA"} <= set(noted["files"])
    checkpoints.close()


def test_each_process_notes_what_it_wrote(tmp_path):
    names = ["state/ocdbt.process_0/d/a", "state/ocdbt.process_1/d/b", "state/d/c", "meta/metadata"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    checksums.note(tmp_path, 0, 2)
    checksums.note(tmp_path, 1, 2)
    noted = [json.loads((tmp_path / f"checksums.{p}.json").read_text())["files"].keys() for p in (0, 1)]
    assert noted[0] == {names[0], *names[2:]} and noted[1] == {names[1]}
    assert [checksums.damage(tmp_path, process, 2) for process in (0, 1)] == ["", ""]
    (tmp_path / names[1]).write_text("x" * len(names[1]))
    found = [checksums.damage(tmp_path, process, 2) for process in (0, 1)]
    assert sorted(found) == ["", f"the checksum of {names[1]} is another"]


def test_a_bucket_that_fails_now_and_then_loses_nothing(bucket):
    workdir = storage.to_path(f"{bucket.url}/faults/run")
    before = bucket.counts()
    bucket.faults(share=0.1, delay=0.01)
    checkpoints = store.Checkpoints(workdir, keep=1, keep_every=0)
    for step in (1, 2):
        checkpoints.save(step, state(step), new_meta())
    checkpoints.close()
    checkpoints = store.Checkpoints(workdir, keep=1, keep_every=0)
    assert checkpoints.agree_on_latest() == 2
    jax.tree.map(np.testing.assert_array_equal, checkpoints.restore(2, abstract(state(2))), state(2))
    checkpoints.close()
    after = bucket.counts()
    assert all(after[fault] > before[fault] for fault in ("429", "503", "reset")), after


def test_a_save_that_fails_is_followed_by_the_next_or_ends_as_transient(tmp_path, monkeypatch, caplog):
    """ESTALE while a step is committed. Nothing is restarted that a later step replaces."""
    checkpoints = store.Checkpoints(tmp_path, keep=3, keep_every=0)
    checkpoints.save(1, state(1), new_meta())
    checkpoints.wait()
    failing = [2, 4]
    finalize = checkpoints.manager._finalize_checkpoint

    def fail(step):
        if step in failing:
            raise OSError(116, "Stale file handle")
        finalize(step)

    monkeypatch.setattr(checkpoints.manager, "_finalize_checkpoint", fail)
    checkpoints.save(2, state(2), new_meta())
    checkpoints.save(3, state(3), new_meta())
    assert "Step 3 is saved instead" in caplog.text
    checkpoints.save(4, state(4), new_meta())
    with pytest.raises(TransientError, match="Stale file handle"):
        checkpoints.wait()
    checkpoints.close()
    assert store.find_checkpoint(str(tmp_path))[1] >= 3


def test_a_disk_that_was_full_takes_the_next_save(tmp_path, monkeypatch, caplog):
    """TensorStore has a bare ValueError for it."""
    checkpoints = store.Checkpoints(tmp_path, keep=3, keep_every=0)
    failing, finalize = [1, 3], checkpoints.manager._finalize_checkpoint

    def fail(step):
        if step in failing:
            raise ValueError("RESOURCE_EXHAUSTED: No space left on device\nand pages more")
        finalize(step)

    monkeypatch.setattr(checkpoints.manager, "_finalize_checkpoint", fail)
    with monkeypatch.context() as patch:
        patch.setattr(store, "is_complete", lambda folder: False)
        checkpoints.save(1, state(1), new_meta())
        checkpoints._noting.join()
    assert "1 could not be saved; the next save says why" in caplog.text
    checkpoints.save(2, state(2), new_meta())
    assert "No space left on device. Step 2 is saved instead" in caplog.text
    checkpoints.save(3, state(3), new_meta())
    with pytest.raises(UsageError, match="saving to .* failed: RESOURCE_EXHAUSTED: No space left on device$"):
        checkpoints.wait()
    checkpoints.close()
    assert store.find_checkpoint(str(tmp_path))[1] >= 2


def test_a_process_that_is_lost_during_a_save_is_no_bad_input(tmp_path, monkeypatch):
    """jax's collectives, which Orbax calls, have a bare ValueError for it."""
    checkpoints = store.Checkpoints(tmp_path, keep=3, keep_every=0)

    def fail(*args, **kwargs):
        raise RuntimeError("saving failed") from ValueError("UNKNOWN: Gloo AllGather failed: Connection closed by peer")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints.manager, "save", fail)
        patch.setattr(jax, "process_count", lambda: 2)
        with pytest.raises(RuntimeError, match="^saving failed") as raised:
            checkpoints.save(1, state(1), new_meta())
    assert processes.broken_run(raised.value).code == 75

    def full(*args, **kwargs):
        raise ValueError("RESOURCE_EXHAUSTED: /runs/nccl/7: No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints.manager, "save", full)
        patch.setattr(jax, "process_count", lambda: 2)
        with pytest.raises(UsageError, match="No space left"):
            checkpoints.save(1, state(1), new_meta())
    checkpoints.close()


@pytest.mark.parametrize("name, reason", [("nowhere", "does not exist"), ("private", "Credentials")])
def test_a_bucket_that_cannot_be_read_is_bad_input(bucket, name, reason):
    with pytest.raises(UsageError, match=reason):
        store.find_checkpoint(f"gs://{name}/run")


def test_what_was_cut_off_is_set_aside(written):
    folder = written / "checkpoints"
    (folder / "3" / "_CHECKPOINT_METADATA").unlink()
    store.set_aside_incomplete(written)
    assert store.find_checkpoint(str(written))[1] == 2
    if isinstance(written, pathlib.Path):
        assert (folder / "3.incomplete").is_dir() and not (folder / "3").exists()
