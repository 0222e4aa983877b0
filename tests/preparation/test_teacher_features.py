"""Are a teacher's stored features those it computes, does a cut-off start go on, and does each image get its own?"""

import io
import itertools
import json
import pathlib
import pickle
import resource
import signal
import socket
import sys

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from deco_jax import cli, storage
from deco_jax.conditions import ClassLabels
from deco_jax.data.features import Contents, StoredFeatures, open_features
from deco_jax.data.pipeline import BadRecords, batches
from deco_jax.data.sources import open_source
from deco_jax.data.stored import about_file, array_file
from deco_jax.diffusion.flow import to_float
from deco_jax.diffusion.objective import alignment_loss
from deco_jax.encoders.teacher import load_teacher
from deco_jax.errors import TransientError, UsageError
from deco_jax.preparation import arrays, teacher
from deco_jax.preparation import folder as folder_rules
from deco_jax.preparation.teacher import prepare_teacher
from tests.helpers import programs, random_dinov2
from tests.preparation.running import end_of, wait_for, write_config

COMPLETE, PARTIAL = "features.json", "features.partial.json"
TOKENS, WIDTH = 4, 64  # of images of 32² and the teacher here
RECORDS, A_FILE = 10, 4


def write_teacher(path, seed=0, **changes):
    """Random weights of a DINOv2 of one block, in the official layout."""
    shapes, rng = {name: value.shape for name, value in random_dinov2(seed, WIDTH).items()}, np.random.default_rng(seed)
    embedding, block = ("cls_token", "pos_embed", "patch_embed"), ("norm1", "ls1", "norm2", "ls2", "attn", "mlp")
    order = [*embedding, *(f"blocks.0.{part}" for part in block), "norm"]
    names = [name for part in order for name in shapes if name.startswith(f"{part}.") or name == part]
    tensors = {name: rng.normal(0, 0.3, shapes[name]).astype(np.float32) for name in names}
    changed = {name: np.full(tensors[name].shape, value, np.float32) for name, value in changes.items()}
    save_file(tensors | changed, path)


def write_images(root, count=RECORDS):
    for i in range(count):
        path = root / f"class{i % 2}" / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (32, 32, 3), np.uint8)).save(path)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The teacher's file and ten images; no test changes them."""
    root = tmp_path_factory.mktemp("made")
    write_teacher(root / "teacher.safetensors")
    write_images(root / "images")
    return root


@pytest.fixture
def config(made, tiny_config):
    c = tiny_config
    c.model.patch_size = 16
    c.data.update(
        source="folder", path=str(made / "images"), image_size=32, batch_size=4, max_bad_records=2, max_bad_share=1.0
    )
    c.loss.update(alignment_weight=0.5, alignment_layer=1, alignment_features=WIDTH)
    c.teacher.weights = str(made / "teacher.safetensors")
    return c


@pytest.fixture(autouse=True)
def small_files(monkeypatch):
    """Ten records are three files."""
    monkeypatch.setattr(arrays, "FILE_BYTES", A_FILE * TOKENS * WIDTH * 2 + 1)


def files_of(folder):
    """Name → (when it was written, its bytes)."""
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.iterdir() if path.is_file()}


def directly(config):
    """The teacher's features, image by image, and no code of `prepare`: (records, N, F) fp32."""
    teacher, source = load_teacher(config), open_source(config.data)
    see = jax.jit(lambda image: teacher.network(teacher.params, {"image": to_float(image)})["features"])
    return np.stack([see(source.load(i)["image"][None])[0] for i in range(len(source))])


# --- preparing


def test_stored_features_are_those_the_teacher_computes(config, tmp_path, capsys):
    """To half of float16's last bit, which a cosine does not feel: it is wrong by about the square of that."""
    prepare_teacher(config, str(tmp_path / "new/features"), batch_size=3)
    folder = tmp_path / "new/features"
    assert sorted(p.name for p in folder.iterdir()) == [
        ".lease",
        *(f"features-0000{k}.npy" for k in range(3)),
        COMPLETE,
    ]
    assert "0.000 GB in 3 files; 3 are to be made" in capsys.readouterr().out
    arrays = [np.load(array_file("features", folder, k), mmap_mode="r", allow_pickle=False) for k in range(3)]
    assert [(x.shape, x.dtype.name) for x in arrays] == [((rows, TOKENS, WIDTH), "float16") for rows in (4, 4, 2)]
    expected = directly(config)
    assert np.ptp(expected) > 1, "constant features would agree with anything"
    np.testing.assert_allclose(np.concatenate(arrays), expected, rtol=2**-11, atol=2e-5)  # float16 has 11 bits
    projected = expected + 2 * np.random.default_rng(0).normal(size=expected.shape).astype(np.float32)
    live, from_disk = (float(alignment_loss(projected, x)) for x in (expected, np.concatenate(arrays)))
    assert 0.1 < live < 0.9 and abs(from_disk - live) < 2e-6

    source = open_source(config.data)
    config.teacher.stored = str(folder)
    features = open_features(config, source)
    assert (features[0].shape, features.bad) == ((TOKENS, WIDTH), frozenset())
    assert features.digest == load_teacher(config).digest
    for record in (0, 3, 4, 9):
        np.testing.assert_array_equal(features[record], np.concatenate(arrays)[record])
    values = json.loads((folder / COMPLETE).read_text())
    assert {"identity": source.identity, "records": RECORDS, "image_size": 32, "patch": 16, "bad": []}.items() <= (
        values.items()
    )


class Cut(Exception):
    """The preparation is killed."""


def cut_short(monkeypatch, after):
    read_ahead = arrays.read_ahead

    def reads_some(dataset, workers):
        yield from itertools.islice(read_ahead(dataset, workers), after)
        raise Cut

    monkeypatch.setattr(arrays, "read_ahead", reads_some)


def test_a_second_start_makes_what_is_missing_and_nothing_else(config, tmp_path, monkeypatch):
    folder, whole = tmp_path / "cut", tmp_path / "whole"
    with monkeypatch.context() as patch:
        cut_short(patch, after=2)
        with pytest.raises(Cut):
            prepare_teacher(config, str(folder), batch_size=8)
    (folder / ".features-00001.npy.draft").write_bytes(b"what a killed process leaves")
    before = files_of(folder)
    assert sorted(before) == [".features-00001.npy.draft", "features-00000.npy", PARTIAL]

    config.teacher.stored = str(folder)
    with pytest.raises(UsageError, match=rf"2 of 3 files are missing.*deco prepare .*--out {folder}$"):
        open_features(config, open_source(config.data))
    prepare_teacher(config, str(folder), batch_size=8)
    prepare_teacher(config, str(whole), batch_size=8)
    after, straight = files_of(folder), files_of(whole)
    assert after["features-00000.npy"] == before["features-00000.npy"], "a finished file was made again"
    assert {name: data for name, (_, data) in after.items()} == {name: data for name, (_, data) in straight.items()}


def test_a_damaged_file_is_kept_and_made_again(config, tmp_path, capsys):
    """A file that was cut off, in a folder that says it is complete. The reader's error names the command."""
    prepare_teacher(config, str(tmp_path), batch_size=8)
    before = files_of(tmp_path)
    path = array_file("features", tmp_path, 1)
    path.write_bytes(before[path.name][1][:-1])
    config.teacher.stored = str(tmp_path)
    with pytest.raises(
        UsageError,
        match=f"{path.name} has .* bytes, not what its header says. This makes it anew: deco prep",
    ):
        open_features(config, open_source(config.data))
    prepare_teacher(config, str(tmp_path), batch_size=8, part="0/3")
    printed = capsys.readouterr().out
    assert "features-00001.npy is damaged; the part that made it" in printed and "shards of others" in printed
    (tmp_path / ".features_mine").mkdir()  # a user's own, not a draft
    for damaged in ("features-00001.npy.damaged", "features-00001.npy.damaged2"):
        prepare_teacher(config, str(tmp_path), batch_size=8)
        assert f"it is kept as {damaged}, for you to remove" in capsys.readouterr().out
        assert (tmp_path / damaged).read_bytes() == before[path.name][1][:-1]
        after = files_of(tmp_path)
        assert {name: after[name][1] for name in before} == {name: data for name, (_, data) in before.items()}
        assert after["features-00000.npy"] == before["features-00000.npy"], "the others stay"
        open_features(config, open_source(config.data))
        path.write_bytes(before[path.name][1][:-1])
    assert (tmp_path / ".features_mine").is_dir()


def test_a_folder_that_is_mended_says_so_only_at_the_end(config, tmp_path, monkeypatch):
    """Else a kill in between would leave what was known of the old file as the truth about the new one."""
    prepare_teacher(config, str(tmp_path), batch_size=8)
    array_file("features", tmp_path, 1).unlink()

    def killed(*args):
        raise RuntimeError("killed")

    monkeypatch.setattr(arrays, "_write_files", killed)
    with pytest.raises(RuntimeError, match="killed"):
        prepare_teacher(config, str(tmp_path), batch_size=8)
    assert not about_file("features", tmp_path).exists() and about_file("features", tmp_path, False).exists()


def test_an_error_of_the_computation_is_not_one_of_the_disk(config, tmp_path, monkeypatch):
    """A device that is lost may be there at the next start; a disk that is full is the user's to mend."""

    def lost(*args):
        raise OSError("the device is lost")
        yield

    monkeypatch.setattr(arrays, "_compute", lost)
    with pytest.raises(OSError, match="^the device is lost$"):
        prepare_teacher(config, str(tmp_path), batch_size=8)


def test_features_of_the_oldest_format_are_not_mixed_with_others(config, tmp_path):
    """It does not say how its images were decoded; a file that was cut off is left where it is."""
    prepare_teacher(config, str(tmp_path), batch_size=8)
    fields = json.loads(about_file("features", tmp_path).read_text())
    del fields["decoding"]
    about_file("features", tmp_path).write_text(json.dumps(fields))
    path = array_file("features", tmp_path, 1)
    path.write_bytes(path.read_bytes()[:-1])
    before = files_of(tmp_path)
    with pytest.raises(UsageError, match="holds features of something else: decoding"):
        prepare_teacher(config, str(tmp_path), batch_size=8)
    assert files_of(tmp_path) == before


def test_a_folder_among_the_classes_is_refused(config, tmp_path):
    """It would be a class without images, which stops the next start, and every run on these data."""
    config.data.update(source="folder", path=str(tmp_path))
    for name in ("features", "cat/features"):
        with pytest.raises(UsageError, match=f"--out=.*{name} lies in data.path={tmp_path}, as the classes do"):
            prepare_teacher(config, str(tmp_path / name), batch_size=8)


def small_folder(folder, config, **changes):
    """A folder that holds two of three files."""
    contents = teacher._open(config, 8, folder).contents
    folder.mkdir()
    storage.write_json(folder / PARTIAL, contents.__dict__ | changes)
    for k in range(2):
        np.save(array_file("features", folder, k), np.zeros(contents.shape(k), np.float16))


def test_features_of_something_else_are_left_alone(config, made, tmp_path):
    """Another data set, size or teacher under the same --out: named, and nothing in the folder is touched."""
    folder = tmp_path / "features"
    small_folder(folder, config)
    before = files_of(folder)
    write_images(tmp_path / "more", RECORDS + 1)
    write_teacher(tmp_path / "other.safetensors", seed=1)
    for part, fields, message in (
        ("data", {"path": str(tmp_path / "more")}, r"identity: folder .* there.*records: 10 there, 11 here"),
        ("data", {"image_size": 16}, r"tokens: 4 there, 1 here; image_size: 32 there, 16 here"),
        ("teacher", {"weights": str(tmp_path / "other.safetensors")}, r"something else: teacher: \w+ there, \w+ here"),
    ):
        changed = config.copy_and_resolve_references()
        changed[part].update(fields)
        with pytest.raises(UsageError, match=f"{message}.*Choose another folder"):
            prepare_teacher(changed, str(folder), batch_size=8)
    (folder / PARTIAL).unlink()
    del before[PARTIAL]
    with pytest.raises(UsageError, match="nothing that says of what"):
        prepare_teacher(config, str(folder), batch_size=8)
    assert files_of(folder) == before


def test_what_cannot_begin_is_said_before_anything_is_written(config, tmp_path, monkeypatch):
    out = tmp_path / "features"
    for change, arguments, message in (
        ({}, (str(out), 0), "--batch-size=0 must be at least 1"),
        ({}, (str(out), 8, "3/3"), "--part=3/3 is no part; of 16 the first is 0/16 and the last 15/16"),
        ({"image_size": 40}, (str(out), 8), "data.image_size=40 is not divisible by 16"),
    ):
        changed = config.copy_and_resolve_references()
        changed.data.update(change)
        with pytest.raises(UsageError, match=message):
            prepare_teacher(changed, *arguments)
    assert not out.exists()
    usage = folder_rules.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(folder_rules.shutil, "disk_usage", lambda _: usage._replace(free=5119))
    with pytest.raises(UsageError, match="has 0.0 GB free, and the missing features take 0.0 GB; choose another disk"):
        prepare_teacher(config, str(out), 8)
    assert not files_of(out)


def test_two_preparations_at_a_time_do_not_mix(config, tmp_path):
    with (
        storage.hold(tmp_path, f"--out={tmp_path}"),
        pytest.raises(UsageError, match=f"--out={tmp_path} is in use by another run"),
    ):
        prepare_teacher(config, str(tmp_path), 8)


def test_parts_share_the_files_and_the_last_one_completes(config, tmp_path, monkeypatch, capsys):
    """As SLURM's array tasks do, which know nothing of each other; two may be at work at a time."""
    monkeypatch.setattr(sys.modules["deco_jax.storage.writing"], "SHARED_FOLDER_DELAY", 0)
    parts, whole = tmp_path / "parts", tmp_path / "whole"
    draft = parts / ".features-00001.npy.of_part_1"
    draft.mkdir(parents=True)
    with storage.hold(parts, "--out", (1, 2)):
        prepare_teacher(config, str(parts), 8, "0/2")
        assert draft.exists(), "part 1 may be at work on it"
        with pytest.raises(UsageError, match="is in use by another run"):
            prepare_teacher(config, str(parts), 8)  # all of it, of which part 1 is being made
    assert sorted(files_of(parts)) == ["features-00000.npy", "features-00002.npy", PARTIAL]
    assert "Part 0 of 2 is done; 1 shards of others are missing." in capsys.readouterr().out
    for name, value in (("ID", 8), ("MIN", 4), ("STEP", 4), ("COUNT", 2)):
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", str(value))
    prepare_teacher(config, str(parts), 8)
    assert not draft.exists()
    prepare_teacher(config, str(whole), 8, "0/1")
    assert {name: data for name, (_, data) in files_of(parts).items()} == {
        name: data for name, (_, data) in files_of(whole).items()
    }


def test_features_beyond_float16_end_it_with_the_image(config, tmp_path):
    """Infinities would reach the loss as NaN, a million steps later."""
    write_teacher(tmp_path / "large.safetensors", **{"norm.bias": 7e4})
    config.teacher.weights = str(tmp_path / "large.safetensors")
    with pytest.raises(UsageError, match=r"features of record 0, .*class0/00\.png, do not fit float16"):
        prepare_teacher(config, str(tmp_path / "features"), batch_size=8)
    assert list(files_of(tmp_path / "features")) == [PARTIAL]


def test_unreadable_images_have_no_features(config, tmp_path, caplog):
    """They are named, counted over all starts, and stay known when their image is mended later."""
    write_images(tmp_path / "images")
    config.data.path = str(tmp_path / "images")
    source = open_source(config.data)
    broken = {record: pathlib.Path(source.describe(record)) for record in (2, 9)}
    good = {record: path.read_bytes() for record, path in broken.items()}
    for path in broken.values():
        path.write_bytes(b"<html>404 Not Found</html>")

    out = tmp_path / "features"
    config.data.max_bad_records = 1
    for _ in ("in one start", "the first counts as well"):
        with pytest.raises(UsageError, match=rf"2 records cannot be read, the last {broken[9]}; .*=1 allows"):
            prepare_teacher(config, str(out), batch_size=8)
        assert not array_file("features", out, 2).exists() and not (out / COMPLETE).exists()
    config.data.max_bad_records = 2
    with caplog.at_level("WARNING", logger="absl"):
        prepare_teacher(config, str(out), batch_size=8)
    assert all(str(path) in caplog.text for path in broken.values())
    assert json.loads((out / COMPLETE).read_text())["bad"] == [2, 9]
    stored = np.concatenate([np.load(array_file("features", out, k)) for k in range(3)])
    assert [bool(np.isnan(row).all()) for row in stored] == [record in broken for record in range(RECORDS)]
    assert np.isfinite(np.delete(stored, [2, 9], axis=0)).all()

    for record, path in broken.items():
        path.write_bytes(good[record])
    config.teacher.stored = str(out)
    features = open_features(config, source)
    with pytest.raises(ValueError, match="no stored features"):
        features[9]
    taken = list(itertools.islice(batches(config.data, 0, source, 0, features=features), 5))  # two epochs
    bad = np.concatenate([batch["bad"] for batch in taken])
    assert sorted(bad[bad >= 0]) == [2, 2, 9, 9]
    for batch in taken:
        for image, feature, record in zip(batch["image"], batch["features"], batch["bad"], strict=True):
            if record >= 0:
                stand_in = {2: 3, 9: 0}[int(record)]
                np.testing.assert_array_equal(image, source.load(stand_in)["image"])
                np.testing.assert_array_equal(feature, stored[stand_in])
    records = BadRecords(source, config.data)
    with caplog.at_level("WARNING", logger="absl"):
        records.check(bad)
    assert "its image is readable now" in caplog.text, "who looks for the cause must not look at the image"


# --- reading


class Numbers:
    """Record i is an image full of i; some cannot be read."""

    identity, decoding, condition = "numbers", "", ClassLabels(10)
    unreadable = (3, 7)

    def __len__(self):
        return RECORDS

    def load(self, index, offset=None):
        if index in self.unreadable:
            raise OSError(f"{index} is broken")
        return {"image": np.full((32, 32, 3), index, np.uint8), "label": np.int32(index)}

    def describe(self, index):
        return f"number {index}"


def numbered(folder, **changes):
    """A whole folder in which record i's features are full of i."""
    folder.mkdir(exist_ok=True)
    contents = Contents("numbers", RECORDS, A_FILE, TOKENS, WIDTH, 32, 16, "digest")
    for k in range(contents.files):
        rows = np.arange(A_FILE * k, A_FILE * k + contents.shape(k)[0])
        np.save(
            array_file("features", folder, k),
            np.broadcast_to(rows[:, None, None], contents.shape(k)).astype(np.float16),
        )
    (folder / COMPLETE).write_text(json.dumps(contents.__dict__ | {"bad": [5]} | changes))
    return folder


@pytest.mark.parametrize("workers", [0, 2])
def test_every_image_comes_with_its_own_features(config, tmp_path, workers):
    """Over two epochs, for a share of the rows, in this process and in workers: also where a record stands in."""
    features = StoredFeatures(numbered(tmp_path))
    config.data.workers = workers
    rows = np.array([0, 1, 3])
    taken = list(itertools.islice(batches(config.data, 0, Numbers(), 1, rows, features), 5))
    seen = set()
    for batch in taken:
        assert batch["features"].shape == (3, TOKENS, WIDTH) and batch["features"].dtype == np.float16
        np.testing.assert_array_equal(batch["features"], np.broadcast_to(batch["label"][:, None, None], (3, 4, 64)))
        np.testing.assert_array_equal(batch["image"][:, 0, 0, 0], batch["label"])
        seen |= set(batch["bad"].tolist())
    assert seen == {-1, 3, 5, 7}, "of 15 records, each of the three without image or features must have come up"
    assert not {3, 5, 7} & set(np.concatenate([batch["label"] for batch in taken]).tolist())


def test_more_files_than_a_process_may_open(tmp_path):
    """At 512² ImageNet's features are 1,879 files; usually 1,024 may be open. With a mapping each would be."""
    features = StoredFeatures(numbered(tmp_path))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    opened = len(list(pathlib.Path("/proc/self/fd").iterdir()))
    resource.setrlimit(resource.RLIMIT_NOFILE, (opened + 2, hard))  # a file for the listing, and one more
    try:
        again = StoredFeatures(tmp_path)
        taken = [again[i] for i in (0, 4, 8, 1, 6, 9)]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    np.testing.assert_array_equal(taken, [features[i] for i in (0, 4, 8, 1, 6, 9)])


def test_a_copy_for_a_worker_is_small(tmp_path):
    """Guards against pickling what is mapped: half a terabyte to each of eight workers."""
    features = StoredFeatures(numbered(tmp_path))
    assert features[9].all()
    text = pickle.dumps(features)
    assert len(text) < 1000
    np.testing.assert_array_equal(pickle.loads(text)[9], features[9])


def test_features_of_other_data_or_another_run_are_refused(config, tmp_path):
    for change, message in (
        ({"identity": "letters"}, "features of other images, labels or another order: of 10 records of 'letters'"),
        ({"records": 11}, "of 11 records of 'numbers'; the data are 10 of 'numbers'"),
        ({"image_size": 48}, "was made with image_size=48, and the run has data.image_size=32"),
        ({"tokens": 9}, "was made with tokens=9, and the run has 4, with model.patch_size=16"),
        ({"features": 65}, "was made with features=65, and the run has loss.alignment_features=64"),
        ({"version": 2}, "is of version 2, and this deco_jax reads version 1; prepare into another folder"),
        ({"records_a_file": 0}, "features.json is damaged: records_a_file"),
        ({"teacher": None, "tokens": "4"}, "features.json is damaged: tokens, teacher"),
        ({"bad": [True]}, "features.json is damaged: bad"),
        ({"records_a_file": 5}, r"features-00000.npy holds \(4, 4, 64\) float16, not \(5, 4, 64\) float16"),
    ):
        config.teacher.stored = str(numbered(tmp_path, **change))
        if "records_a_file" in change:
            array_file("features", tmp_path, 2).touch()
        with pytest.raises(UsageError, match=message):
            open_features(config, Numbers())


def test_what_is_no_folder_of_features_says_how_to_make_one(config, tmp_path):
    for name, message in (("nowhere", "is no folder"), ("", "holds no features")):
        config.teacher.stored = str(tmp_path / name)
        with pytest.raises(UsageError, match=rf"{message}\. Made by: deco prepare --config FILE --teacher --out /"):
            open_features(config, Numbers())
    (tmp_path / COMPLETE).write_text("{")
    with pytest.raises(UsageError, match="features.json cannot be read"):
        open_features(config, Numbers())
    (tmp_path / COMPLETE).write_text("[]")
    with pytest.raises(UsageError, match="features.json is damaged"):
        open_features(config, Numbers())


def test_pickles_are_not_opened(config, tmp_path):
    """A folder of features may come from a stranger."""
    np.save(array_file("features", numbered(tmp_path), 1), np.full((4, TOKENS, WIDTH), None))
    config.teacher.stored = str(tmp_path)
    with pytest.raises(UsageError, match=r"features-00001.npy holds \(4, 4, 64\) object"):
        open_features(config, Numbers())


# --- the command


@pytest.fixture
def start(config, tmp_path):
    """Starts `deco prepare` with small files, every batch of which takes a while."""
    file = write_config(tmp_path / "run.py", config)
    with programs() as run:

        def start(out, seconds=0.0, *arguments, **environment):
            command = [pathlib.Path(__file__).parent / "slow_deco.py", "prepare", f"--config={file}", "--teacher"]
            command += [f"--out={out}", "--batch-size=2", *arguments]
            return run(*command, **{"DECO_TEST_SECONDS": str(seconds)} | environment)

        yield start


def arrays_of(folder):
    return np.concatenate([np.load(io.BytesIO(array_file("features", folder, k).read_bytes())) for k in range(3)])


@pytest.mark.slow
@pytest.mark.parametrize("number, code", [(signal.SIGKILL, -9), (signal.SIGTERM, 0)])
def test_a_bucket_gets_the_same_features_after_a_stop(config, start, bucket, tmp_path, number, code):
    """10 % of the requests fail. Training reads them from there."""
    prepare_teacher(config, str(tmp_path / "local"), batch_size=2)
    out = storage.to_path(f"{bucket.url}/features-{number}")
    bucket.faults(share=0.1)
    process = start(out, 1.0, "--config.data.workers=1", **bucket.env)
    wait_for(array_file("features", out, 0))
    process.send_signal(number)
    ended, output = end_of(process)
    assert ended == code and "Traceback" not in output, output
    if code == 0:
        assert f"2 shards are missing in {out}. The same command goes on from there." in output
    assert not array_file("features", out, 1).exists(), "a file that was cut off has a name"
    code, output = end_of(start(out, **bucket.env))
    assert code == 0 and "2 are to be made" in output, output
    assert bucket.counts()["503"] > 0
    np.testing.assert_array_equal(arrays_of(out), arrays_of(tmp_path / "local"))
    config.teacher.stored = str(out)
    features = open_features(config, open_source(config.data))
    np.testing.assert_array_equal(features[9], arrays_of(tmp_path / "local")[9])


@pytest.mark.slow
def test_two_processes_of_two_parts(config, start, tmp_path):
    """Four workers for three files: one of them has nothing to do, and waits for nobody."""
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
    prepare_teacher(config, str(tmp_path / "one"), batch_size=2)
    np.testing.assert_array_equal(arrays_of(tmp_path / "out"), arrays_of(tmp_path / "one"))
    assert (tmp_path / "out" / COMPLETE).read_text() == (tmp_path / "one" / COMPLETE).read_text()


def test_data_that_do_not_answer_are_to_be_tried_again(config, tmp_path, monkeypatch):
    """Not an unreadable record, which would stay one for good."""
    monkeypatch.setenv("DECO_RETRY_SECONDS", "0")

    def load(self, index):
        raise TransientError("reading it still fails")

    source = open_source(config.data)
    monkeypatch.setattr(type(source), "load", load)
    with pytest.raises(TransientError):
        prepare_teacher(config, str(tmp_path), 8)
    assert list(files_of(tmp_path)) == [PARTIAL]


def test_the_command(config, tmp_path, capsys):
    file, out = write_config(tmp_path / "run.py", config), tmp_path / "features"
    command = ["prepare", f"--config={file}", "--teacher", f"--out={out}", "--batch-size=8", "--config.data.workers=0"]
    cli.main(command)
    printed = capsys.readouterr().out
    assert "Features of 10 records, 4×64 float16 each" in printed
    assert f"{out} is done. To train with it: --config.teacher.stored={out}" in printed
    before = files_of(out)
    cli.main(command)
    assert f"{out} is done: it holds the features of all 10 records." in capsys.readouterr().out
    assert files_of(out) == before
    for wrong, message in (
        (
            [*command, "--config.data.image_size=16"],
            "tokens: 4 there, 1 here; image_size: 32 there, 16 here",
        ),
        (
            [part for part in command if part != "--teacher"],
            "arguments --images --teacher --text is required",
        ),
    ):
        with pytest.raises(SystemExit) as stop:
            cli.main(wrong)
        assert stop.value.code == 2 and message in capsys.readouterr().err
