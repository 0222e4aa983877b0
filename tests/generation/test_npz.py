"""Arrays that come in parts: as NumPy, zipfile and the ADM suite read them, in little memory, always the same bytes."""

import io
import subprocess
import sys
import zipfile

import numpy as np
import pytest

from deco_jax import storage
from deco_jax.errors import UsageError
from deco_jax.generation.npz import Parts, open_array, write_npz

IMAGES = np.random.default_rng(0).integers(0, 256, (11, 4, 6, 3), np.uint8)
LABELS = np.arange(11) % 3


def write(path, images=IMAGES, parts=(4, 8)):
    pieces = np.split(images, parts)
    write_npz(path, {"arr_0": Parts(images.shape, "uint8", iter(pieces)), "arr_1": Parts((11,), "int64", [LABELS])})


def test_numpy_reads_it_and_the_same_arrays_are_the_same_bytes(tmp_path):
    write(tmp_path / "new" / "a.npz")
    with np.load(tmp_path / "new" / "a.npz", allow_pickle=False) as found:
        assert found.files == ["arr_0", "arr_1"]
        np.testing.assert_array_equal(found["arr_0"], IMAGES)
        np.testing.assert_array_equal(found["arr_1"], LABELS)
        assert (found["arr_0"].dtype, found["arr_1"].dtype) == (np.uint8, np.int64)
    assert zipfile.ZipFile(tmp_path / "new" / "a.npz").testzip() is None
    write(tmp_path / "b.npz", parts=(1,))
    assert (tmp_path / "b.npz").read_bytes() == (tmp_path / "new" / "a.npz").read_bytes()


def read_as_adm(path, name, batch):
    """As evaluator.py of guided-diffusion streams a member: NumPy's header, then so many rows at a time."""
    with zipfile.ZipFile(path) as archive, archive.open(f"{name}.npy") as member:
        version = np.lib.format.read_magic(member)
        assert version == (1, 0)
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(member)
        assert not fortran and not dtype.hasobject
        for first in range(0, shape[0], batch):
            rows = min(batch, shape[0] - first)
            content = member.read(rows * int(np.prod(shape[1:])) * dtype.itemsize)
            yield np.frombuffer(content, dtype).reshape(rows, *shape[1:])
        assert member.read() == b"" and len(shape) == 4


def test_the_adm_suite_reads_it(tmp_path):
    write(tmp_path / "a.npz")
    np.testing.assert_array_equal(np.concatenate(list(read_as_adm(tmp_path / "a.npz", "arr_0", 4))), IMAGES)


def test_any_rows_are_read_alone(tmp_path):
    write(tmp_path / "a.npz")
    images, labels = (open_array(tmp_path / "a.npz", name) for name in ("arr_0", "arr_1"))
    np.testing.assert_array_equal(images.rows(3, 7), IMAGES[3:7])
    np.testing.assert_array_equal(images.rows(0, 11), IMAGES)
    np.testing.assert_array_equal(labels.rows(10, 11), LABELS[10:])


@pytest.mark.parametrize("wrong", [IMAGES[:10], IMAGES[:, :3], IMAGES.astype(np.float32)])
def test_parts_that_do_not_fit_leave_nothing(tmp_path, wrong):
    with pytest.raises(ValueError, match="arr_0: "):
        write_npz(tmp_path / "a.npz", {"arr_0": Parts(IMAGES.shape, "uint8", [wrong])})
    assert not list(tmp_path.iterdir())


def test_what_is_no_such_file_is_said(tmp_path):
    path = tmp_path / "a.npz"
    write(path)
    content = path.read_bytes()
    np.savez_compressed(tmp_path / "packed.npz", arr_0=IMAGES)
    np.savez(tmp_path / "pickle.npz", arr_0=np.full(3, None))
    (tmp_path / "cut.npz").write_bytes(content[:-40])
    for name, array in (("cut", "arr_0"), ("packed", "arr_0"), ("pickle", "arr_0"), ("a", "arr_2"), ("none", "arr_0")):
        with pytest.raises(UsageError, match=f"{name}.npz cannot be read"):
            open_array(tmp_path / f"{name}.npz", array)


def test_a_bucket_gets_the_same_file(bucket, tmp_path):
    there = storage.to_path(f"{bucket.url}/npz/a.npz")
    write(there)
    write(tmp_path / "a.npz")
    assert there.read_bytes() == (tmp_path / "a.npz").read_bytes()
    np.testing.assert_array_equal(open_array(there, "arr_0").rows(2, 5), IMAGES[2:5])
    np.testing.assert_array_equal(np.load(io.BytesIO(there.read_bytes()))["arr_0"], IMAGES)


MEMORY = """
import pathlib, re, sys, types
import numpy as np
from deco_jax.generation import packing
from deco_jax.generation.npz import Parts, write_npz

def memory(name):
    return int(re.search(name + r":\\s+(\\d+) kB", pathlib.Path("/proc/self/status").read_text())[1]) * 1024

folder = pathlib.Path(sys.argv[1])
plan = types.SimpleNamespace(shards=20, numbers=lambda k: range(1000), shape=lambda rows: (rows, 64, 64, 3))
for k in range(plan.shards):
    np.save(packing.shard_file(folder, k), np.full(plan.shape(1000), k, np.uint8))
job = types.SimpleNamespace(folder=folder, stop=types.SimpleNamespace(check=lambda: None), check=lambda: None)
pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak is what there is now
before = memory("VmRSS")
write_npz(folder / "a.npz", {"arr_0": Parts((20_000, 64, 64, 3), "uint8", packing.read_shards(job, plan))})
print(memory("VmHWM") - before)
"""


def test_memory_does_not_grow_with_the_images(tmp_path):
    """20,000 images of 64² are 246 MB, in shards of 12 MB."""
    ran = subprocess.run([sys.executable, "-c", MEMORY, str(tmp_path)], capture_output=True, text=True, check=True)
    assert int(ran.stdout) < 40e6, "more than the next shard beside the last one is in memory"
    images = np.load(tmp_path / "a.npz")["arr_0"]
    assert [int(x) for x in images[::1000, 0, 0, 0]] == list(range(20))
