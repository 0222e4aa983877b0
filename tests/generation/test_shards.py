"""Very many images: the same whatever kills, processes, parts and buckets are in between, or one line of error."""

import contextlib
import itertools
import json
import pathlib
import random
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from PIL import Image

from deco_jax import cli, storage
from deco_jax.conditions import ClassLabels
from deco_jax.diffusion.flow import to_uint8
from deco_jax.errors import UsageError
from deco_jax.generation import packing, pictures, plan, shards
from deco_jax.generation.requests import Asked, read_requests
from deco_jax.generation.shards import generate_samples
from deco_jax.pretrained.load import Pretrained, load_pretrained
from deco_jax.sampling.sample import sample
from tests.helpers import programs

LIGHTNING = str(pathlib.Path(__file__).parents[1] / "golden" / "lightning_c2i.ckpt")
SMALL = {"image_size": "8", "steps": 2, "batch_size": 8, "dtype": "float32"}


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    """Eight images each, a batch of eight devices."""
    monkeypatch.setattr(plan, "SHARD_IMAGES", 8)


def draw(out, num=20, **changes):
    return generate_samples(LIGHTNING, str(out), num, **SMALL | changes)


def arrays(path):
    with path.open("rb") as file, np.load(file, allow_pickle=False) as found:
        return found["arr_0"], found["arr_1"]


def files_of(folder):
    """Name → bytes of all files but claims."""
    found = (path for path in folder.rglob("*") if path.is_file() and path.parent.name != ".lease")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """20 images of an undisturbed start; no test changes them."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "SHARD_IMAGES", 8)
        draw(folder, png=True)
    return folder


def test_images_are_those_of_sample_with_labels_beside_them(whole):
    images, labels = arrays(whole / "samples.npz")
    assert (images.shape, images.dtype, labels.dtype) == ((20, 8, 8, 3), np.uint8, np.int64)
    np.testing.assert_array_equal(labels, np.arange(20) % 10)
    model, params = load_pretrained(LIGHTNING, dtype="float32")
    directly = to_uint8(sample(model, params, labels.tolist(), jax.random.key(0), image_size=8, steps=2))
    assert np.abs(np.asarray(directly).astype(int) - images).max() <= 1
    assert sorted(files_of(whole)) == ["generation.json", *(f"png/{i:05d}.png" for i in range(20)), "samples.npz"]
    for i in (0, 19):
        np.testing.assert_array_equal(np.asarray(Image.open(whole / f"png/{i:05d}.png")), images[i])
    how = json.loads((whole / "generation.json").read_text())
    assert {"num": 20, "labels": "0-9", "seed": 0, "image_size": [8, 8], "steps": 2}.items() <= how.items()
    assert len(how["weights_digest"]) == 16


def test_what_is_complete_is_not_made_again(whole, monkeypatch, capsys):
    def read(*_):
        raise AssertionError("the network was loaded")

    monkeypatch.setattr(Pretrained, "read", read)
    before = files_of(whole)
    assert draw(whole) == whole / "samples.npz"
    assert "samples.npz is done: it holds 20 images and their labels." in capsys.readouterr().out
    assert files_of(whole) == before


def test_solvers_that_draw_noise_draw_the_same_in_any_batch_and_start(tmp_path):
    one, other = ({"num": 20, "solver": "euler_sde", "negative": "3", "guidance": 2.0} for _ in range(2))
    draw(tmp_path / "one", **one)
    for part in ("1/2", "0/2"):
        draw(tmp_path / "other", **other, batch_size=16, part=part)
    first, second = (arrays(tmp_path / name / "samples.npz")[0].astype(int) for name in ("one", "other"))
    assert np.abs(first - second).max() <= 1 and np.abs(first[0] - first[10]).max() > 1


class Cut(BaseException):
    """The process is killed."""


@pytest.mark.parametrize("where", ["generate", "save", "read_shards", "remove", "write_npz"])
def test_a_cut_at_any_step_is_made_good(whole, tmp_path, monkeypatch, where):
    """After some calls of each of these; drafts, as kills leave them, are beside."""
    with monkeypatch.context() as patch:
        module = {"generate": shards, "save": pictures}.get(where, packing)
        function = getattr(module, where)

        def cut_call(*arguments, **options):
            if next(calls) == 1:
                raise Cut
            return function(*arguments, **options)

        def cut_iterator(*arguments, **options):
            yield from itertools.islice(function(*arguments, **options), 9 if where == "generate" else 1)
            raise Cut

        calls = itertools.count(int(where == "write_npz"))
        patch.setattr(module, where, cut_iterator if where in ("generate", "read_shards") else cut_call)
        with pytest.raises(Cut):
            draw(tmp_path, png=True)
    for name in (".samples-00001.npy.abc", ".samples.npz.abc", "png/.00003.png.abc"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "draft").write_bytes(b"half")
    draw(tmp_path, png=True)
    assert files_of(tmp_path) == files_of(whole)
    assert not list(tmp_path.rglob(".*.abc"))


def test_pictures_may_be_asked_for_later(whole, tmp_path):
    draw(tmp_path)
    assert not (tmp_path / "png").exists()
    draw(tmp_path, png=True)
    assert files_of(tmp_path) == files_of(whole)


@pytest.mark.parametrize("after", ["_write_shard", "read_shards"])
def test_a_signal_ends_it_in_order(whole, tmp_path, monkeypatch, capsys, after):
    """While images are drawn, and while they are packed."""
    with monkeypatch.context() as patch:
        module = shards if after == "_write_shard" else packing
        function = getattr(module, after)

        def stopping(job, *arguments):
            for k, item in enumerate(function(job, *arguments)):
                job.stop.by = "SIGTERM" if k or after == "_write_shard" else ""
                yield item

        patch.setattr(module, after, stopping)
        assert draw(tmp_path) is None
    said = {"_write_shard": "2 shards are missing", "read_shards": "samples.npz is not made yet, all images are there"}
    out = capsys.readouterr().out
    assert "Stopped by SIGTERM; " in out and said[after] in out and "The same command goes on from there." in out
    assert not (tmp_path / "samples.npz").exists() and not list(tmp_path.glob(".samples*"))
    draw(tmp_path, png=True)
    assert files_of(tmp_path) == files_of(whole)


def test_a_signal_while_a_bucket_is_packed_is_no_error(bucket, monkeypatch, capsys):
    out, read = storage.to_path(f"{bucket.url}/packed"), packing.read_shards

    def stopping(job, plan):
        job.stop.by = "SIGTERM"
        return read(job, plan)

    monkeypatch.setattr(packing, "read_shards", stopping)
    assert draw(out) is None
    assert "samples.npz is not made yet, all images are there" in capsys.readouterr().out


def test_parts_share_the_work_and_the_last_one_packs(whole, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys.modules["deco_jax.storage.writing"], "SHARED_FOLDER_DELAY", 0)
    assert draw(tmp_path, part="1/2") is None
    assert "Part 1 of 2 is done; 2 shards of others are missing." in capsys.readouterr().out
    assert sorted(files_of(tmp_path)) == ["generation.json", "samples-00001.npy"]
    assert draw(tmp_path, part="0/2") == tmp_path / "samples.npz"
    assert draw(tmp_path, part="1/2", png=True) == tmp_path / "samples.npz"
    assert files_of(tmp_path) == files_of(whole)


def test_a_part_that_finds_samples_made_by_another_is_content(whole, tmp_path, monkeypatch):
    """Both saw the last shard; the other was faster, and has removed the shards."""

    def too_late(path, arrays):
        (tmp_path / "samples.npz").write_bytes((whole / "samples.npz").read_bytes())
        raise FileNotFoundError(path)

    monkeypatch.setattr(packing, "write_npz", too_late)
    assert draw(tmp_path, part="0/1", png=True) == tmp_path / "samples.npz"
    assert files_of(tmp_path) == files_of(whole)


def test_other_settings_are_refused_with_the_differences(whole, tmp_path):
    before = files_of(whole)
    for changes, message in (
        ({"seed": 1}, r"in another way \(seed: 0 there, 1 here\); choose another folder"),
        ({"num": 30}, "num: 20 there, 30 here"),
        ({"labels": "1,2"}, "labels: 0-9 there, 1-2 here"),
        ({"steps": 3, "guidance": 2.0}, "steps: 2 there, 3 here; guidance: 1.0 there, 2.0 here"),
    ):
        with pytest.raises(UsageError, match=message):
            draw(whole, **changes)
    how = json.loads(before["generation.json"])
    (tmp_path / "samples-00000.npy").write_bytes(b"")
    storage.write_json(tmp_path / "generation.json", how | {"weights_digest": "another"})
    with pytest.raises(UsageError, match="weights_digest: another there, "):
        draw(tmp_path)
    (tmp_path / "samples-00000.npy").unlink()
    draw(tmp_path)  # nothing had been drawn
    assert files_of(whole) == before


def test_what_cannot_begin_is_said_before_anything_is_written(tmp_path, monkeypatch):
    out = tmp_path / "out"
    for changes, message in (
        ({"num": 0}, "--num=0 must be at least 1"),
        ({"batch_size": 0}, "--batch-size=0 must be at least 1"),
        ({"image_size": "9"}, "--image-size=9.* patch size, 4"),
        ({"labels": "0,77"}, "77"),
        ({"negative": "0,1"}, "--negative=0,1 says 2 labels; write one"),
        ({"weights": "best"}, "weights='best' is not known"),
        ({"solver": "magic"}, "solver='magic' is not known"),
        ({"part": "2/2"}, "--part=2/2 is no part"),
    ):
        with pytest.raises(UsageError, match=message):
            draw(out, **changes)
    with pytest.raises(UsageError, match="nowhere"):
        generate_samples(str(tmp_path / "nowhere"), str(out))
    assert not out.exists()
    for name in ("samples.npz", "00000.png", "sample.json", "png"):
        other = tmp_path / f"other {name}"
        other.mkdir()
        (other / name).write_bytes(b"{}")
        with pytest.raises(UsageError, match=f"holds {name}, and no generation.json that says how it was made"):
            draw(other)
        assert [path.name for path in other.iterdir()] == [name]
    usage = shards.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shards.shutil, "disk_usage", lambda _: usage._replace(free=2 * 20 * 8 * 8 * 3 - 1))
    with pytest.raises(UsageError, match=r"has 0.0 GB free, and 20 images take 0.0 GB until samples.npz is whole"):
        draw(out)
    assert not files_of(out)


def test_an_image_that_is_not_finite_is_named(tmp_path, monkeypatch):
    read = Pretrained.read

    def huge(self, weights):
        return jax.tree.map(lambda x: x * 1e30, read(self, weights))

    monkeypatch.setattr(Pretrained, "read", huge)
    with pytest.raises(UsageError, match=r"Image 0, of label 0, is not finite; try --dtype=float32"):
        draw(tmp_path)
    assert sorted(files_of(tmp_path)) == ["generation.json"]


def test_labels_from_a_file_and_balanced_ones(tmp_path):
    condition, file = ClassLabels(10), tmp_path / "labels.txt"
    file.write_text("3\n3\nnull\n0\n\n")
    wanted = read_requests(condition, (), Asked(label_file=str(file), negative="2"))
    assert (wanted.num, wanted.shown, wanted.negative) == (4, [3, 3, "null", 0], 2)
    assert read_requests(condition, (), Asked(2, label_file=str(file))).shown == [3, 3]
    wanted = read_requests(condition, (), Asked(per_class=3, labels="0-4,7"))
    assert (wanted.num, str(wanted), wanted.balance) == (18, "0-4,7", "3 of each of 6 labels")
    assert read_requests(condition, (), Asked()).num == 50_000
    uneven = read_requests(condition, (), Asked(25))
    assert uneven.balance == "unbalanced: of 10 labels the first 5 have 3 each, the others 2"
    many = read_requests(ClassLabels(1000), (), Asked(1000, labels=",".join(map(str, range(0, 1000, 2)))))
    assert str(many).startswith("500 labels, sha256 ")
    for num, per_class, text, message in (
        (5, None, "1\n2", "has 2 lines; --num=5 images need as many"),
        (None, None, "", "has 0 lines"),
        (None, 2, "1\n2", "--per-class=2 contradicts --label-file"),
        (None, None, "1\n12", "line 2: .*12"),
        (None, None, "1\n1-3", "line 2: label=1-3 says 3 labels; write one"),
    ):
        file.write_text(text)
        with pytest.raises(UsageError, match=message):
            read_requests(condition, (), Asked(num, per_class=per_class, label_file=str(file)))
    with pytest.raises(UsageError, match=r"none\.txt cannot be read"):
        read_requests(condition, (), Asked(label_file=str(tmp_path / "none.txt")))
    with pytest.raises(UsageError, match="--per-class=0 must be at least 1"):
        read_requests(condition, (), Asked(per_class=0))


def test_progress_counts_and_the_summary_says_what_is_drawn(tmp_path, capsys):
    argv = ["generate", LIGHTNING, f"--out={tmp_path}", "--per-class=2", "--labels=1-3", "--image-size=4x8"]
    cli.main([*argv, "--steps=1", "--batch-size=8", "--dtype=float32"])
    out = capsys.readouterr().out
    assert "6 images of 4×8 pixels, 0.000 GB, 2 of each of 3 labels; 1 shards, of which 1 are to be made." in out
    assert "image 6/6" in out
    images, labels = arrays(tmp_path / "samples.npz")
    assert images.shape == (6, 4, 8, 3) and labels.tolist() == [1, 2, 3, 1, 2, 3]


# --- as programs


@pytest.fixture
def start():
    """Starts `deco generate` with small shards, of which every batch takes a while; in one process or two."""
    with programs() as run:

        def start(out, seconds=0.0, processes=1, *arguments, **environment):
            command = [pathlib.Path(__file__).parent / "slow_deco.py", "generate", LIGHTNING, f"--out={out}"]
            command += ["--num=75", "--image-size=8", "--steps=2", "--batch-size=4", "--dtype=float32", *arguments]
            settings = [{"DECO_TEST_SECONDS": str(seconds)} | environment for _ in range(processes)]
            if processes > 1:
                with socket.socket() as free:
                    free.bind(("127.0.0.1", 0))
                    address = f"127.0.0.1:{free.getsockname()[1]}"
                for index, each in enumerate(settings):
                    each |= {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(processes)}
                    each |= {"JAX_PROCESS_ID": str(index)}
            return [run(*command, **each) for each in settings]

        yield start


def end_of(process, seconds=180):
    """(exit code, output)"""
    output, _ = process.communicate(timeout=seconds)
    return process.returncode, output


def assert_done(started):
    for code, output in map(end_of, started):
        assert code == 0, output


def wait_for(path):
    for _ in range(1200):
        if path.exists():
            return
        time.sleep(0.05)
    raise AssertionError(f"{path} did not come")


@pytest.mark.slow
def test_a_kill_costs_the_shard_in_work(start, tmp_path):
    (process,) = start(tmp_path / "cut", 0.2)
    wait_for(tmp_path / "cut/samples-00001.npy")
    process.kill()
    assert end_of(process)[0] == -signal.SIGKILL and not (tmp_path / "cut/samples-00009.npy").exists()
    code, output = end_of(*start(tmp_path / "cut"))
    assert code == 0 and "10 shards, of which 10" not in output, output
    assert_done(start(tmp_path / "whole"))
    assert files_of(tmp_path / "cut") == files_of(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_kills_at_random_moments(start, tmp_path, processes):
    """Until it is done. A kill takes one process; the other one ends by itself, unless it still waits for the first."""
    assert_done(start(tmp_path / "whole"))
    seed = time.time_ns()
    dice, kills, ends = random.Random(seed), 0, []
    while ends != [0] * processes:
        started = start(tmp_path / "cut", 0.3, processes, "--png")
        if kills == 0:  # once while it draws, for certain
            wait_for(tmp_path / "cut/samples-00001.npy")
        else:
            time.sleep(dice.uniform(1, 8) if kills < 6 else 60)
        if any(process.poll() is None for process in started):
            dice.choice(started).kill()
            kills += 1
        for process in started:
            with contextlib.suppress(subprocess.TimeoutExpired):
                end_of(process, 20)
            process.kill()
        ends = [process.wait() for process in started]
    print(f"{kills} kills at moments of the seed {seed}")
    images = files_of(tmp_path / "cut")
    pictures = [images.pop(f"png/{i:05d}.png") for i in range(75)]
    assert len(set(pictures)) == 75 and kills
    assert images == files_of(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("number, code", [(signal.SIGKILL, -9), (signal.SIGTERM, 0)])
def test_a_bucket_gets_the_same_file_after_a_stop(start, bucket, tmp_path, number, code):
    """10 % of the requests fail."""
    out = storage.to_path(f"{bucket.url}/samples-{number}")
    bucket.faults(share=0.1)
    (process,) = start(out, 0.5, **bucket.env)
    wait_for(out / "samples-00001.npy")
    process.send_signal(number)
    ended, output = end_of(process)
    assert ended == code and "Traceback" not in output, output
    assert_done(start(out, 0.0, 2, **bucket.env))
    bucket.faults()
    assert_done(start(tmp_path / "local"))
    assert (out / "samples.npz").read_bytes() == (tmp_path / "local/samples.npz").read_bytes()
    assert not list(out.glob("samples-*.npy"))
    assert bucket.counts()["503"] > 0
