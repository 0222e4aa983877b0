"""Are prepared images those of the source, to the bit and in its order, whatever ended the preparation on the way?"""

import hashlib
import itertools
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import tarfile

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordReader
from PIL import Image

from deco_jax import cli, storage
from deco_jax.data.features import Contents as FeatureContents
from deco_jax.data.features import StoredFeatures
from deco_jax.data.pipeline import BadRecords, batches, fingerprint
from deco_jax.data.prepared import MANIFEST, PARTIAL, images_file, info_file
from deco_jax.data.records import compare
from deco_jax.data.sources import open_source
from deco_jax.data.stored import array_file
from deco_jax.data.transforms import square_crop
from deco_jax.errors import TransientError, UsageError
from deco_jax.preparation import folder as folder_rules
from deco_jax.preparation import images as prepare
from deco_jax.preparation.images import prepare_images
from tests.helpers import programs
from tests.preparation.running import end_of, wait_for, write_config

SIZE, RECORDS, A_FILE = 16, 14, 4
BROKEN = ("eel/03.png", "cat/00.png")


def write_images(root, broken=()):
    """Photos of all kinds: sizes, formats, grey, transparency, an orientation; two of them perhaps unreadable."""
    rng = np.random.default_rng(0)
    for i in range(RECORDS):
        label, kind = ("cat", "dog", "eel")[i % 3], ("png", "jpg", "webp")[i // 3 % 3]
        height, width = rng.integers(17, 60, 2)
        image = Image.fromarray(rng.integers(0, 256, (height, width, 4 if kind == "png" else 3), np.uint8))
        image = image.convert("L") if i == 7 else image
        path = root / label / f"{i // 3:02}.{kind}"
        path.parent.mkdir(parents=True, exist_ok=True)
        exif = Image.Exif()
        exif[0x0112] = 6
        image.save(path, **({"exif": exif} if i == 4 else {}))
    for name in broken:
        assert (root / name).exists(), name
        (root / name).write_bytes(b"<html>404 Not Found</html>")
    return root


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """No test changes them."""
    return write_images(tmp_path_factory.mktemp("photos"), BROKEN)


@pytest.fixture
def config(photos, tiny_config):
    tiny_config.model.patch_size = 8
    tiny_config.data.update(
        source="folder",
        path=str(photos),
        image_size=SIZE,
        batch_size=5,
        workers=0,
        threads=2,
        max_bad_records=3,
        max_bad_share=1.0,
    )
    return tiny_config


@pytest.fixture(autouse=True)
def small_files(monkeypatch):
    """Fourteen records are four files."""
    monkeypatch.setattr(prepare, "FILE_BYTES", A_FILE * (4 + 3 * SIZE**2) + 1)


def from_prepared(config, folder):
    changed = config.copy_and_resolve_references()
    changed.data.update(source="prepared", path=str(folder))
    return changed


def contents_of(folder):
    """Name → bytes of every file but the lease."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def hash_of_batches(config, number=9, features=None):
    """Over three epochs."""
    digest, source = hashlib.sha256(), open_source(config.data)
    for batch in itertools.islice(batches(config.data, 3, source, 1, features=features), number):
        for key in sorted(batch):
            digest.update(f"{key} {batch[key].dtype} {batch[key].shape}".encode() + batch[key].tobytes())
    return digest.hexdigest()


# --- the images


def test_a_record_is_the_label_and_the_crop(config, photos, tmp_path, capsys):
    """Read past our code: the ADM crop of what Pillow decodes, each pixel as the difference to its left neighbour."""
    prepare_images(config, str(tmp_path / "new/out"), 3)
    out, printed = tmp_path / "new/out", capsys.readouterr().out
    assert "14 images of 16×16 in 4 file(s)" in printed and "4 file(s) are to be made" in printed
    assert f"To train from it: --config.data.source=prepared --config.data.path={out}" in printed
    assert sorted(p.name for p in out.iterdir()) == [
        ".lease",
        *itertools.chain(*((f"images-0000{k}.array_record", f"images-0000{k}.json") for k in range(4))),
        MANIFEST,
    ]
    names = sorted(p.relative_to(photos).as_posix() for p in photos.rglob("*.*"))
    number = 0
    for k in range(4):
        reader = ArrayRecordReader(str(images_file(out, k)))
        for record in reader.read_all():
            name, number = names[number], number + 1
            if name in BROKEN:
                assert record == b""
                continue
            assert np.frombuffer(record[:4], "<i4")[0] == ["cat", "dog", "eel"].index(name.split("/")[0])
            differences = np.frombuffer(record[4:], np.uint8).reshape(SIZE, SIZE, 3).astype(int)
            with Image.open(photos / name) as image:
                turned = image.transpose(Image.Transpose.ROTATE_270) if name == "dog/01.jpg" else image
                if name.endswith(".png"):
                    white = Image.new("RGBA", image.size, "white")
                    turned = Image.alpha_composite(white, image)
                np.testing.assert_array_equal(
                    np.cumsum(differences, axis=1) % 256, square_crop(turned.convert("RGB"), SIZE), name
                )
    assert number == RECORDS


@pytest.mark.parametrize("workers", [0, 2])
def test_training_sees_what_the_source_gives(config, tmp_path, workers):
    """Hashes over all batches, in which others stand in for two unreadable records; and what checkpoints keep."""
    prepare_images(config, str(tmp_path), 5)
    prepared = from_prepared(config, tmp_path)
    prepared.data.workers = workers
    assert hash_of_batches(prepared) == hash_of_batches(config)
    there, here = open_source(config.data), open_source(prepared.data)
    assert fingerprint(config.data, 0, there) == fingerprint(prepared.data, 0, here)
    assert compare(there.contents(), json.loads(json.dumps(here.contents()))) == ""
    for field in ("identity", "decoding", "class_names", "condition"):
        assert getattr(there, field) == getattr(here, field), field
    assert here.summary()[0].startswith("Images: 14 in 3 classes: 0 cat, 1 dog, 2 eel")


def test_unreadable_records_are_counted_and_named_as_in_the_source(config, photos, tmp_path, caplog):
    prepare_images(config, str(tmp_path), 5)
    source = open_source(from_prepared(config, tmp_path).data)
    records, seen = BadRecords(source, config.data), []
    for batch in itertools.islice(batches(config.data, 0, source, 0), 3):
        seen += batch["bad"][batch["bad"] >= 0].tolist()
        records.check(batch["bad"])
    assert set(seen) == records.seen and len(records.seen) == len(BROKEN)
    for name in BROKEN:
        assert f"images-0000{0 if name.startswith('cat') else 3}.array_record record" in caplog.text
        assert f"{photos / name} (ValueError: its image was unreadable when the images were prepared)" in caplog.text


def test_the_teachers_features_lie_beside_them(config, tmp_path):
    """Features that were stored for the source are those of the prepared images: numbers of records are the same."""
    prepare_images(config, str(tmp_path / "images"), 5)
    folder, source = tmp_path / "features", open_source(config.data)
    folder.mkdir()
    about = FeatureContents(source.identity, RECORDS, RECORDS, 1, 1, SIZE, 16, "digest", decoding=source.decoding)
    np.save(array_file("features", folder, 0), np.arange(RECORDS, dtype=np.float16)[:, None, None])
    (folder / "features.json").write_text(json.dumps(about.__dict__ | {"bad": []}))
    features = StoredFeatures(folder)
    prepared = from_prepared(config, tmp_path / "images")
    assert hash_of_batches(prepared, features=features) == hash_of_batches(config, features=features)
    assert open_source(prepared.data).identity == about.identity


def test_every_source_can_be_prepared(config, photos, tmp_path):
    """Tars give the files of the folder; digits have no files."""
    tar = tmp_path / "photos.tar"
    with tarfile.open(tar, "w") as file:
        for path in sorted(photos.rglob("*.*"), reverse=True):
            file.add(path, path.relative_to(photos).as_posix())
    prepare_images(config, str(tmp_path / "folder"), 5)
    config.data.update(source="tars", path=str(tar))
    prepare_images(config, str(tmp_path / "tars"), 2)
    folder, tars = contents_of(tmp_path / "folder"), contents_of(tmp_path / "tars")
    assert folder.keys() == tars.keys()
    assert all(folder[name] == tars[name] for name in folder if name.endswith(".array_record"))

    config.data.update(source="digits", image_size=28)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "FILE_BYTES", 2**30)
        prepare_images(config, str(tmp_path / "digits"), 500)
    assert hash_of_batches(from_prepared(config, tmp_path / "digits")) == hash_of_batches(config)


@pytest.mark.parametrize("together, workers", [(3, 0), (2, 2)])
def test_files_that_are_written_together_are_the_same(config, tmp_path, monkeypatch, together, workers):
    """Where many workers read, one thread would not keep up with them."""
    prepare_images(config, str(tmp_path / "one by one"), 3)
    config.data.workers, groups = workers, prepare._groups
    monkeypatch.setattr(prepare, "_groups", lambda files, _: groups(files, together * prepare.WORKERS_A_FILE))
    prepare_images(config, str(tmp_path / "together"), 3)
    assert contents_of(tmp_path / "together") == contents_of(tmp_path / "one by one")


# --- going on


class Cut(Exception):
    """The preparation is killed."""


def cut_short(monkeypatch, after):
    read_ahead = prepare.read_ahead

    def reads_some(dataset, workers):
        yield from itertools.islice(read_ahead(dataset, workers), after)
        raise Cut

    monkeypatch.setattr(prepare, "read_ahead", reads_some)


def test_a_second_start_makes_what_is_missing_and_nothing_else(config, tmp_path, monkeypatch, capsys):
    whole, out = tmp_path / "whole", tmp_path / "out"
    prepare_images(config, str(whole), 2)
    with monkeypatch.context() as patch:
        cut_short(patch, after=4)  # of two batches per file
        with pytest.raises(Cut):
            prepare_images(config, str(out), 2)
    (out / ".images-00002.array_record.draft").mkdir()
    assert sorted(contents_of(out)) == [
        *itertools.chain(*((f"images-0000{k}.array_record", f"images-0000{k}.json") for k in range(2))),
        PARTIAL,
    ]
    written = images_file(out, 1).stat().st_mtime_ns
    with pytest.raises(UsageError, match=r"is incomplete: 2 of 4 files are missing. .*deco prepare --images"):
        open_source(from_prepared(config, out).data)
    capsys.readouterr()
    prepare_images(config, str(out), 3)
    assert "2 file(s) are to be made" in capsys.readouterr().out
    assert images_file(out, 1).stat().st_mtime_ns == written
    assert contents_of(out) == contents_of(whole), "bytes differ from those of an undisturbed run"
    prepare_images(config, str(out), 3)
    assert f"{out} is done: 14 images" in capsys.readouterr().out
    assert contents_of(out) == contents_of(whole)


def test_parts_share_the_files_and_the_last_one_completes(config, tmp_path, monkeypatch, capsys):
    """As SLURM's array tasks do, which know nothing of each other."""
    monkeypatch.setattr(sys.modules["deco_jax.storage.writing"], "SHARED_FOLDER_DELAY", 0)
    prepare_images(config, str(tmp_path / "parts"), 5, "0/3")
    prepare_images(config, str(tmp_path / "parts"), 5, "1/3")
    assert "Part 1 of 3 is done; 1 shards of others are missing." in capsys.readouterr().out
    for name, value in (("ID", 2), ("MIN", 0), ("STEP", 1), ("COUNT", 3)):
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", str(value))
    prepare_images(config, str(tmp_path / "parts"), 5)
    prepare_images(config, str(tmp_path / "whole"), 5, "0/1")
    assert contents_of(tmp_path / "parts") == contents_of(tmp_path / "whole")


def test_damaged_files_are_found_and_made_anew(config, tmp_path, capsys):
    """What is altered is kept beside; what is missing or cut off a run finds when it starts."""
    prepare_images(config, str(tmp_path), 5)
    before, file = contents_of(tmp_path), images_file(tmp_path, 1)
    altered = bytearray(file.read_bytes())
    altered[len(altered) // 2] ^= 1
    file.write_bytes(altered)
    prepare_images(config, str(tmp_path), 5)
    assert "is done" in capsys.readouterr().out, "by size alone nothing is wrong"
    prepare_images(config, str(tmp_path), 5, verify=True)
    assert "images-00001.array_record is damaged: it is kept as images-00001.array_record.damaged" in (
        capsys.readouterr().out
    )
    assert contents_of(tmp_path) == before | {"images-00001.array_record.damaged": bytes(altered)}

    (tmp_path / "images-00001.array_record.damaged").unlink()
    prepared = from_prepared(config, tmp_path)
    file.write_bytes(before[file.name][:-100])
    size = len(before[file.name])
    with pytest.raises(UsageError, match=rf"images-00001.array_record \({size - 100:,} bytes of {size:,}\)"):
        open_source(prepared.data)
    prepare_images(config, str(tmp_path), 5)
    assert contents_of(tmp_path)[file.name] == before[file.name], "a file that was cut off is found without --verify"
    file.unlink()
    info_file(tmp_path, 2).write_text("[1]")
    with pytest.raises(UsageError, match="1 of 4 files are missing"):
        open_source(prepared.data)
    prepare_images(config, str(tmp_path), 5)
    after = contents_of(tmp_path)
    assert {name: after[name] for name in before} == before
    assert after.keys() - before == {"images-00001.array_record.damaged"}, "of the other only its .json was damaged"

    file.write_bytes(before[file.name][:-100])
    capsys.readouterr()
    prepare_images(config, str(tmp_path), 5, part="0/2")
    printed = capsys.readouterr().out
    assert "images-00001.array_record is damaged; the part that made it" in printed and "is done: 13" not in printed
    prepare_images(config, str(tmp_path), 5)
    assert "kept as images-00001.array_record.damaged2" in capsys.readouterr().out
    assert {name: data for name, data in contents_of(tmp_path).items() if name in before} == before


def test_a_stop_while_files_are_compared_says_so(config, tmp_path, monkeypatch, capsys):
    """Not that the folder is done: of the other files nobody knows."""
    prepare_images(config, str(tmp_path), 5)
    before, real = contents_of(tmp_path), prepare._sha256

    def stopped(path):
        os.kill(os.getpid(), signal.SIGTERM)
        return real(path)

    monkeypatch.setattr(prepare, "_sha256", stopped)
    capsys.readouterr()
    prepare_images(config, str(tmp_path), 5, verify=True)
    assert capsys.readouterr().out.splitlines()[-1] == "Stopped by SIGTERM; not all files were compared."
    assert contents_of(tmp_path) == before


def test_too_many_unreadable_images_end_it(config, tmp_path):
    """Over all starts; files that are finished stay."""
    config.data.max_bad_records = 1
    for _ in range(2):
        with pytest.raises(UsageError, match=r"2 records cannot be read, the last .*eel/03.png; .*=1 allows fewer"):
            prepare_images(config, str(tmp_path), 5)
        assert images_file(tmp_path, 0).exists() and not (tmp_path / MANIFEST).exists()
    config.data.max_bad_records = 2
    prepare_images(config, str(tmp_path), 5)
    assert (tmp_path / MANIFEST).exists()


# --- what cannot be


def test_a_folder_of_something_else_is_left_alone(config, tmp_path):
    out = tmp_path / "out"
    prepare_images(config, str(out), 5)
    before, other = contents_of(out), write_images(tmp_path / "other", BROKEN)
    (other / "cat/99.png").write_bytes((other / "dog/00.png").read_bytes())
    for fields, message in (
        ({"image_size": 8}, "image_size: 16 there, 8 here"),
        ({"background": "black"}, "background: 'white' there, 'black' here"),
        ({"orient": False}, "orient: True there, False here"),
        ({"path": str(other)}, "class 'cat': 5 there, 6 here; new: cat/99.png"),
    ):
        changed = config.copy_and_resolve_references()
        changed.data.update(fields)
        with pytest.raises(UsageError, match=f"holds images of something else: .*{message}.*Choose another folder"):
            prepare_images(changed, str(out), 5)
    (out / MANIFEST).unlink()
    del before[MANIFEST]
    with pytest.raises(UsageError, match="nothing that says of what"):
        prepare_images(config, str(out), 5)
    assert contents_of(out) == before


def test_what_cannot_begin_is_said_before_anything_is_written(config, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    for change, arguments, message in (
        ({}, (str(out), 0), "--batch-size=0 must be at least 1"),
        ({}, (str(out), 8, "3/3"), "--part=3/3 is no part"),
        ({"source": "prepared"}, (str(out), 8), "are prepared images already"),
        ({"path": str(tmp_path / "nowhere")}, (str(out), 8), "is no folder; it must hold one folder per class"),
        ({}, (config.data.path, 8), "is data.path itself; choose another folder"),
    ):
        changed = config.copy_and_resolve_references()
        changed.data.update(change)
        with pytest.raises(UsageError, match=message):
            prepare_images(changed, *arguments)
    assert not out.exists()
    usage = folder_rules.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(folder_rules.shutil, "disk_usage", lambda _: usage._replace(free=99))
    prepare_images(config, str(out), 8)
    assert f"Attention: {out} has 0.00 GB free, and photos would take 0.00 GB" in capsys.readouterr().out
    assert (out / MANIFEST).exists(), "an estimate of photos refuses nothing: these may be no photos"


def test_data_that_do_not_answer_are_to_be_tried_again(config, tmp_path, monkeypatch):
    """Not an unreadable record, which would stay one for good."""

    def load(self, index):
        raise TransientError("reading it still fails")

    monkeypatch.setattr(type(open_source(config.data)), "load", load)
    with pytest.raises(TransientError):
        prepare_images(config, str(tmp_path), 8)
    assert list(contents_of(tmp_path)) == [PARTIAL]


def test_the_command(config, tmp_path, capsys):
    file, out = write_config(tmp_path / "run.py", config), tmp_path / "out"
    command = ["prepare", f"--config={file}", "--images", f"--out={out}", "--batch-size=8"]
    cli.main(command)
    assert f"{out} is done: 14 images" in capsys.readouterr().out
    for wrong, message in (
        ([*command, "--config.data.image_size=32"], "image_size: 16 there, 32 here"),
        (
            [part for part in command if part != "--images"],
            "arguments --images --teacher --text is required",
        ),
        ([*command, "--teacher"], "not allowed with argument --images"),
        (["--teacher" if part == "--images" else part for part in [*command, "--verify"]], "--verify is for --images"),
    ):
        with pytest.raises(SystemExit) as stop:
            cli.main(wrong)
        assert stop.value.code == 2 and message in capsys.readouterr().err


# --- real ends


@pytest.fixture
def start(config, tmp_path):
    """Starts `deco prepare --images` with small files, every batch of which takes a while."""
    file = write_config(tmp_path / "run.py", config)
    with programs() as run:

        def start(out, seconds=0.0, *arguments, **environment):
            command = [pathlib.Path(__file__).parent / "slow_images.py", "prepare", f"--config={file}", "--images"]
            command += [f"--out={out}", "--batch-size=2", *arguments]
            return run(*command, **{"DECO_TEST_SECONDS": str(seconds)} | environment)

        yield start


@pytest.mark.slow
def test_a_full_disk_keeps_what_is_finished(config, start, tmp_path):
    """On a small disk, of which another file takes most."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=640k", "tmpfs", disk]).returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        prepare_images(config, str(tmp_path / "whole"), 2)
        largest = max(len(data) for data in contents_of(tmp_path / "whole").values())
        process = start(disk / "out", 0.7, "--config.data.workers=1")
        wait_for(images_file(disk / "out", 0))
        free = shutil.disk_usage(disk).free
        (disk / "other").write_bytes(bytes(free - min(largest, free) // 2))
        code, output = end_of(process)
        assert code == 2 and "cannot be written" in output and "Traceback" not in output, output
        assert not (disk / "out" / MANIFEST).exists()
        (disk / "other").unlink()
        kept = images_file(disk / "out", 0).stat().st_mtime_ns
        code, output = end_of(start(disk / "out"))
        assert code == 0, output
        assert images_file(disk / "out", 0).stat().st_mtime_ns == kept
        assert contents_of(disk / "out") == contents_of(tmp_path / "whole")
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("number, code", [(signal.SIGKILL, -9), (signal.SIGTERM, 0)])
def test_a_bucket_gets_the_same_files_after_a_stop(config, start, bucket, tmp_path, monkeypatch, number, code):
    """10 % of the requests fail. Training reads them from there."""
    prepare_images(config, str(tmp_path / "local"), 2)
    out = storage.to_path(f"{bucket.url}/images-{number}")
    bucket.faults(share=0.1)
    process = start(out, 1.0, "--config.data.workers=1", **bucket.env)
    wait_for(images_file(out, 0))
    process.send_signal(number)
    ended, output = end_of(process)
    assert ended == code and "Traceback" not in output, output
    assert not images_file(out, 3).exists()
    code, output = end_of(start(out, **bucket.env))
    assert code == 0, output
    local = contents_of(tmp_path / "local")
    for name, data in local.items():
        assert (out / name).read_bytes() == data, name
    altered = images_file(out, 2)
    altered.write_bytes(bytes(len(local[altered.name])))
    code, output = end_of(start(out, 0.0, "--verify", **bucket.env))
    assert code == 0 and f"{altered.name} is damaged" in output, output
    assert altered.read_bytes() == local[altered.name]
    monkeypatch.setenv("CLOUD_STORAGE_EMULATOR_ENDPOINT", bucket.address)
    bucket.faults(share=0)  # array_record's own reader has its own patience
    assert hash_of_batches(from_prepared(config, out)) == hash_of_batches(config)


def test_a_killed_start_is_gone_on_with(config, start, tmp_path):
    """SIGKILL while a file is written; its draft is removed."""
    prepare_images(config, str(tmp_path / "whole"), 2)
    out = tmp_path / "out"
    process = start(out, 1.0, "--config.data.workers=1")
    wait_for(images_file(out, 0))
    process.kill()
    assert end_of(process)[0] == -signal.SIGKILL
    assert list(out.glob(".images-00001*")) and not images_file(out, 1).exists()
    prepare_images(config, str(out), 2)
    assert contents_of(out) == contents_of(tmp_path / "whole") and not list(out.glob(".images*"))


@pytest.mark.slow
def test_two_processes_of_two_parts(config, start, tmp_path):
    pairs = []
    for part in ("0/2", "1/2"):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            coordinator = f"127.0.0.1:{free.getsockname()[1]}"
        settings = {"JAX_COORDINATOR_ADDRESS": coordinator, "JAX_NUM_PROCESSES": "2"}
        for index in "01":
            pairs.append(start(tmp_path / "out", 0.0, f"--part={part}", **settings, JAX_PROCESS_ID=index))
    ends = [end_of(process) for process in pairs]
    assert [code for code, _ in ends] == [0] * 4, ends
    prepare_images(config, str(tmp_path / "one"), 2)
    assert contents_of(tmp_path / "out") == contents_of(tmp_path / "one")


def test_parts_that_mend_at_the_same_time_complete_the_folder(config, tmp_path, monkeypatch, capsys):
    """What part 1 saw as damaged, part 0 has made anew and the folder complete, while part 1 was still comparing."""
    prepare_images(config, str(tmp_path), 5)
    before, real, inner = contents_of(tmp_path), prepare._set_aside_damaged, []
    for file in (0, 1):
        images_file(tmp_path, file).write_bytes(before[f"images-0000{file}.array_record"][:-10])

    def slow(job, contents, verify):
        if not inner:
            inner.append(job.part)
            prepare_images(config, str(tmp_path), 5, part="0/2")
            assert not (tmp_path / "images.json").exists(), "file 1 is damaged"
        real(job, contents, verify)

    monkeypatch.setattr(prepare, "_set_aside_damaged", slow)
    prepare_images(config, str(tmp_path), 5, part="1/2")
    assert inner == [(1, 2)]
    assert "shards of others" not in capsys.readouterr().out.splitlines()[-1]
    after = contents_of(tmp_path)
    assert {name: after[name] for name in before} == before
