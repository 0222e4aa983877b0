"""PyTorch's files are read as torch.load reads them, without torch; and nothing in them is run."""

import importlib.util
import io
import os
import pathlib
import pickle
import struct
import subprocess
import sys
import time
import zipfile

import ml_dtypes
import numpy as np
import pytest

from deco_jax.errors import UsageError
from deco_jax.weights import archives
from deco_jax.weights.admitted import ADMITTED, LeftOut
from deco_jax.weights.archives import MAX_DIRECTORY
from deco_jax.weights.budget import MAX_OTHER_KEYS, MAX_STEPS
from deco_jax.weights.files import open_weights
from deco_jax.weights.pickles import MAX_DEPTH, MAX_PICKLE
from deco_jax.weights.tensors import MappedFile, Tensor

HERE = pathlib.Path(__file__).parent
GOLDEN = HERE.parent / "golden" / "lightning_c2i.ckpt"
FORMATS = ("zip", "zip_protocol4", "legacy")

_spec = importlib.util.spec_from_file_location("mutations", HERE / "mutations.py")
mutations = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(mutations)
torch_zip = mutations.torch_zip

# What data/make.py put into the files, besides tensors: what comes out plain, and what nobody reads.
REST = {
    "epoch": 3,
    "milestones": {10: 1, 20: 1},
    "groups": {"a": [1]},
    "dtype": "torch.bfloat16",
    "bytes": b"\x00\xff",
    "none": None,
}
LEFT_OUT = ("args", "folder", "device", "size", "complex", "set")


def expected_tensors() -> dict[str, np.ndarray]:
    ramp, wide, base = np.arange(6), np.arange(6, dtype=np.float32).reshape(2, 3), np.arange(12, dtype=np.float32)
    quarters = (np.arange(6, dtype=np.float32) / 4 - 0.5).reshape(2, 3)
    floats = ("float64", "float32", "float16", "bfloat16", "complex64", "complex128", "float8_e4m3fn", "float8_e5m2")
    found = {name: quarters.astype(getattr(ml_dtypes, name, None) or name) for name in floats}
    for name in ("int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8"):
        found[name] = ramp.astype(name).reshape(2, 3)
    return found | {
        "bool": np.array([True, False, True]),
        "scalar": np.float32(2.5),
        "empty": np.zeros((0, 3), np.float32),
        "parameter": np.arange(4, dtype=np.float32),
        "transposed": wide.T,
        "expanded": np.full((3, 4), 7, np.float32),
        "stepped": base[2:11:3],
        "head": base[:8],
        "tail": base[4:],
        "tied": quarters,
    }


def read_torch(path):
    return archives.read_torch(MappedFile(path))


def assert_same(ours, theirs, where=""):
    assert ours.dtype == theirs.dtype and ours.shape == theirs.shape, f"{where}: {ours.dtype}{ours.shape}"
    assert ours.tobytes() == theirs.tobytes(), f"{where} is not bitwise what was saved"


def str_id(value) -> str:
    """A test's name: what the message says, not the bytes."""
    return value if isinstance(value, str) else ""


@pytest.fixture
def refused(tmp_path):
    """Reads bytes that must be refused; returns the message."""

    def refused(content: bytes, name="weights.pt") -> str:
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(UsageError) as caught:
            open_weights(path)
        message = str(caught.value)
        assert message.startswith(f"{path}: ") and "\n" not in message
        return message

    return refused


# What torch.save wrote


@pytest.mark.parametrize("name", FORMATS)
def test_every_type_and_layout(name):
    content = read_torch(HERE / "data" / f"{name}.pt")
    expected = expected_tensors()
    assert list(content["state_dict"]) == list(expected), "names, in order"
    for key, tensor in content["state_dict"].items():
        assert isinstance(tensor, Tensor) and tensor.shape == expected[key].shape
        assert_same(tensor.numpy(), np.asarray(expected[key]), key)
        assert np.asarray(tensor).tobytes() == expected[key].tobytes()


@pytest.mark.parametrize("name", FORMATS)
def test_the_rest_comes_out_plain(name):
    """Dicts, lists, tuples, text, bytes and numbers, NumPy's included; objects are left out."""
    content = read_torch(HERE / "data" / f"{name}.pt")
    del content["state_dict"]
    assert_same(content.pop("random").numpy(), np.arange(4, dtype=np.uint8))
    metrics = content.pop("metrics")
    assert isinstance(metrics.pop("curve"), LeftOut)
    assert metrics == {"fid": 1.5, "seen": 7, "good": True}
    assert [type(v) for v in metrics.values()] == [float, int, bool], "NumPy's numbers become Python's"
    for name in LEFT_OUT:
        assert isinstance(content[name], LeftOut) and repr(content.pop(name)) == "<left out>", name
    assert content == REST
    assert all(type(content[k]) is type(v) for k, v in REST.items())


@pytest.mark.parametrize("protocol", range(2, 6))
def test_an_optimisers_numbers_may_be_numpys(tmp_path, protocol):
    """As a learning rate that a schedule computed is; of either byte order. What is left out is no key either."""
    values = {"lr": np.float64(1e-4), "steps": np.uint16(300), np.int64(5): 1, pathlib.PurePosixPath("a"): 2}
    pickled = pickle.dumps(values, protocol)
    path = tmp_path / "weights.pt"
    path.write_bytes(torch_zip(pickled))
    assert read_torch(path) == {"lr": 1e-4, "steps": 300, 5: 1}
    for order in (b"\x01\0\0\0<", b"\x01<"):  # the text "<" as older and newer protocols have it
        pickled = pickled.replace(order, order.replace(b"<", b">"))
    path.write_bytes(torch_zip(pickled))
    assert read_torch(path)["lr"] == np.float64(1e-4).byteswap()


@pytest.mark.parametrize("name", FORMATS)
def test_shared_storages_stay_shared(name):
    tensors = read_torch(HERE / "data" / f"{name}.pt")["state_dict"]
    tied, whole, head, tail = (tensors[name] for name in ("tied", "float32", "head", "tail"))
    assert tied.storage is whole.storage and (tied.offset, tied.shape) == (whole.offset, whole.shape)
    assert head.storage is tail.storage and head.offset != tail.offset, "two windows on the same bytes"


def test_upstreams_checkpoint_is_what_torch_reads():
    torch = pytest.importorskip("torch", reason="the reference is torch.load")
    theirs = torch.load(GOLDEN, weights_only=True)

    def compare(ours, theirs):
        if isinstance(theirs, torch.Tensor):
            assert_same(ours.numpy(), theirs.numpy())
        elif isinstance(theirs, dict):
            assert list(ours) == list(theirs)
            for key in theirs:
                compare(ours[key], theirs[key])
        elif isinstance(theirs, list | tuple):
            assert type(ours) is type(theirs) and len(ours) == len(theirs)
            for one, other in zip(ours, theirs, strict=True):
                compare(one, other)
        else:
            assert ours == theirs and type(ours) is type(theirs)

    compare(read_torch(GOLDEN), theirs)


@pytest.mark.parametrize("legacy", [False, True])
def test_random_views_are_what_torch_reads(tmp_path, legacy):
    """Slices, steps, permutations and expansions of shared storages, 200 of them."""
    torch = pytest.importorskip("torch", reason="the reference is torch.load")
    rng = np.random.default_rng(0)
    base = torch.from_numpy(rng.standard_normal((7, 8, 9)).astype(np.float32))
    tensors = {}
    for i in range(200):
        starts, steps = rng.integers(0, 7, 3), rng.integers(1, 4, 3)
        view = base[tuple(slice(int(a), None, int(b)) for a, b in zip(starts, steps, strict=True))]
        view = view.permute(*map(int, rng.permutation(3)))
        if i % 5 == 0:
            view = view[:1].expand(3, -1, -1)
        tensors[str(i)] = torch.nn.Parameter(view) if i % 7 == 0 else view
    torch.save(tensors, tmp_path / "views.pt", _use_new_zipfile_serialization=not legacy)
    ours = read_torch(tmp_path / "views.pt")
    for name, theirs in torch.load(tmp_path / "views.pt").items():
        assert_same(ours[name].numpy(), theirs.detach().contiguous().numpy(), name)


def test_a_modules_state_dict(tmp_path):
    """It carries `_metadata` in the OrderedDict's attributes, and torch's version is a class of its own."""
    torch = pytest.importorskip("torch", reason="the reference is torch.save")
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4)).to(torch.bfloat16)
    torch.save({"state_dict": module.state_dict(), "version": torch.__version__}, tmp_path / "module.pt")
    content = read_torch(tmp_path / "module.pt")
    assert isinstance(content["version"], LeftOut)
    assert content["state_dict"]["0.weight"].dtype == ml_dtypes.bfloat16
    assert content["state_dict"]["1.num_batches_tracked"].numpy() == 0


def test_big_endian_zip(tmp_path):
    """A file from a big-endian machine: the same numbers, their bytes turned."""
    whole = mutations.Zip((HERE / "data" / "zip.pt").read_bytes())
    tensors = read_torch(HERE / "data" / "zip.pt")["state_dict"]
    widths = {
        t.storage.key: t.dtype.itemsize // (2 if t.dtype.kind == "c" else 1)
        for t in tensors.values()
        if t.storage.dtype == t.dtype  # torch swaps untyped storages not at all
    }
    turned = [(k, np.frombuffer(c, f"u{widths.get(k, 1)}").byteswap().tobytes()) for k, c in whole.storages]
    path = tmp_path / "big.pt"
    path.write_bytes(torch_zip(whole.pickled, turned, byteorder=b"big"))
    ours = read_torch(path)["state_dict"]
    for name, expected in expected_tensors().items():
        if ours[name].storage.key in widths:
            assert_same(ours[name].numpy(), np.asarray(expected), name)


# What must not happen


def reducing(call, *arguments):
    class Payload:
        def __reduce__(self):
            return call, arguments

    return Payload()


def test_an_obeying_reader_runs_the_payload_and_ours_does_not(tmp_path, refused):
    """The control: Python's own unpickler does what the file says."""
    canary = tmp_path / "canary"
    payload = pickle.dumps({"state_dict": reducing(os.system, f"touch {canary}")}, 2)
    message = refused(torch_zip(payload))
    assert not canary.exists()
    assert f"{os.system.__module__}.system is not admitted" in message and "docs/security.md" in message
    pickle.loads(payload)
    assert canary.exists()


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("call", [eval, exec, open, getattr, __import__, subprocess.Popen, pathlib.Path.unlink])
def test_callables_are_refused_by_name(refused, call, protocol):
    message = refused(torch_zip(pickle.dumps(reducing(call, "1"), protocol)))
    assert "not admitted" in message
    if protocol >= 2 and call is not pathlib.Path.unlink:  # a method is reached by getattr, which is what is named
        assert call.__name__ in message


def test_importing_nothing(tmp_path, refused):
    """The name of a module that would leave a trace when imported."""
    (tmp_path / "trap.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w')")
    sys.path.insert(0, str(tmp_path))
    try:
        assert "trap.anything is not admitted" in refused(torch_zip(b"\x80\x02ctrap\nanything\n."))
    finally:
        sys.path.remove(str(tmp_path))
    assert not (tmp_path / "canary").exists() and "trap" not in sys.modules


def test_the_table_holds_only_stand_ins():
    """Whoever adds a name: nothing of torch, NumPy or Python may be what a pickle gets to call."""
    for name, found in ADMITTED.items():
        call = getattr(found, "make", None)
        assert isinstance(found, str) or call is None or call.__module__ == "deco_jax.weights.admitted", name


LAUGHS = b"]q\0" + b"0](h\0h\0h\0h\0h\0h\0h\0h\0h\0h\0eq\0" * 60
TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\n((X\x07\0\0\0storagectorch\n%s\nX\x01\0\0\x000X\x03\0\0\0cpuK\x04tQ%stR."


@pytest.mark.parametrize(
    ("pickled", "says"),
    [
        (LAUGHS + b".", "unfold"),
        (b")q\0" + b"0h\0h\0\x86q\0" * 60 + b"0}h\0Ns.", "only text and numbers can be keys"),
        (b"]" * 5000 + b"a" * 4999 + b".", "nested more than 100"),
        (b"]q\0h\0a.", "hold themselves"),
        (b"N" + b"N0" * 300_000 + b".", "steps"),
        (b"X\x00\0\x10\0" + b"a" * 2**20 + b"q\0" + b"c_codecs\nencode\nh\0\x85R0" * 1000 + b"N.", "steps"),
        (
            b"}(" + b"".join(pickle.dumps(k * (2**61 - 1), 2)[2:-1] + b"N" for k in range(5001)) + b"u.",
            "keys are not text",
        ),
        (b"}X\x88\x13\0\0" + b"a" * 5000 + b"Ns.", "4096"),
        (b"Nr\xff\xff\xff\xff0j\xff\xff\xff\xffj\xfe\xff\xff\xff.", "never stored"),
        (b"\x8b\0\1\0\0" + b"\x7f" * 256 + b".", "2047 bits"),
        (b"X\x03\0\0\0\xed\xa0\x80.", "not Unicode"),
        (b"\x8d" + struct.pack("<Q", 2**62) + b"a", "damaged or truncated"),
        (b"N", "damaged or truncated"),
        (b"\x85.", "nothing on the stack"),
        (b"\x82\x01.", "EXT1"),
        (b"Pwhatever\n.", "PERSID"),
        (b"N2.", "opcode DUP"),
        (b"(l.", "opcode LIST"),
        (b"X\x01\0\0\x00aQ.", "only storages are admitted"),
        (b"(cos\nsystem\no.", "os.system"),
        (b"(ios\nsystem\n.", "INST"),
        (b"ccollections\nOrderedDict\n.", "collections.OrderedDict where a value is expected"),
        (b"ctorch\nFloatStorage\n)R.", "calls torch.FloatStorage"),
        (b"ctorch._utils\n_rebuild_qtensor\n.", "torch._utils._rebuild_qtensor is not admitted"),
        (TENSOR % (b"FloatStorage", b"K\x00(K\x02K\x03t(K\x03K\x01t\x89}"), "has 16"),  # 6 elements of 4
        (TENSOR % (b"FloatStorage", b"J\xff\xff\xff\xff(K\x01t(K\x01t\x89}"), "negative"),
        (TENSOR % (b"FloatStorage", b"K\x00(J\xff\xff\xff\xfft(K\x01t\x89}"), "none negative"),
        (TENSOR % (b"FloatStorage", b"K\x00(K\x02t(J\xff\xff\xff\xfft\x89}"), "negative"),
        (TENSOR % (b"FloatStorage", b"K\x00(J\0\0\0\x40t(K\x00t\x89}"), ".contiguous()"),  # 4 GB of one number
        (TENSOR % (b"FloatStorage", b"K\x00(\x8a\x08" + b"\x7f" * 8 + b"t(K\x00t\x89}"), "elements"),
        (TENSOR % (b"DoubleStorage", b"K\x00(K\x02t(K\x01t\x89}"), "16 bytes in the file and 32"),
        (TENSOR % (b"FloatStorage", b"K\x00(K\x02t(K\x01t\x89}}X\x04\0\0\0conj\x88s"), "resolve_conj"),
    ],
    ids=str_id,
)
def test_a_hostile_pickle_is_one_clear_message(refused, pickled, says):
    start = time.process_time()
    assert says in refused(torch_zip(b"\x80\x02" + pickled, [("0", bytes(16))]))
    assert time.process_time() - start < 4


def zip_with(change) -> bytes:
    """data/zip.pt after `change(its bytes)`."""
    content = bytearray((HERE / "data" / "zip.pt").read_bytes())
    return bytes(change(content) or content)


def compressed() -> bytes:
    whole = mutations.Zip((HERE / "data" / "zip.pt").read_bytes())
    return torch_zip(whole.pickled, [("0", bytes(2**24))], zipfile.ZIP_DEFLATED)


def overlapping() -> bytes:
    """Two directory entries with the same bytes, as zip bombs without nesting have."""
    content = bytearray(torch_zip(pickle.dumps({}, 2), [("0", bytes(8)), ("1", bytes(8))]))
    first = content.index(b"PK\x01\x02", content.index(b"PK\x01\x02") + 4)
    second, third = (content.index(b"PK\x01\x02", first + 4 * n) for n in (1, 30))
    content[third + 42 : third + 46] = content[second + 42 : second + 46]
    return bytes(content)


def endless_directory() -> bytes:
    """A list of entries that would take gigabytes once it is parsed."""
    listed = 17 * 2**20
    return b"PK\x03\x04" + bytes(listed) + struct.pack("<4sHHHHIIH", b"PK\x05\x06", 0, 0, 1, 1, listed, 4, 0)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "empty"),
        (b"hello, this is no weight file", "not a weight file"),
        (zip_with(lambda c: c[: len(c) // 2]), "truncated"),
        (zip_with(lambda c: c[:-1]), "truncated"),
        (zip_with(lambda c: c + b"x"), "after its end"),
        (compressed(), "compressed"),
        (overlapping(), "overlaps another"),
        (endless_directory(), "at most 16777216 are read"),
        (torch_zip(b"N.", [("0", b""), ("0", b"")]), "twice"),
        (torch_zip(b"N.", folder="a/b"), "0 entries NAME/data.pkl"),
        (torch_zip(b"N.", byteorder=b"middle"), "byte order"),
        (b"\0" * 257 + b"ustar" + b"\0" * 300, "tar file"),
        (pickle.dumps({"a": 1}, 2), "not one that torch.save wrote"),
        (pickle.dumps(reducing(os.system, "true"), 2), "system is not admitted"),
        ((HERE / "data" / "legacy.pt").read_bytes()[:-1], "truncated"),
        (
            (HERE / "data" / "legacy.pt").read_bytes().replace(b"little_endianq\x02\x88", b"little_endianq\x02\x89"),
            "big-endian",
        ),
    ],
    ids=str_id,
)
def test_a_damaged_file_is_one_clear_message(refused, content, says):
    assert says in refused(content)


def test_torchscript_is_named(refused):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("m/data.pkl", b"N.")
        archive.writestr("m/constants.pkl", b"N.")
    assert "TorchScript" in refused(out.getvalue())


def test_a_pipe_or_folder_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path, says in ((tmp_path / "pipe", "regular"), (tmp_path, "regular"), (tmp_path / "none", "No such file")):
        with pytest.raises(UsageError, match=says):
            read_torch(path)


def test_a_file_replaced_after_opening_keeps_its_bytes(tmp_path):
    path = tmp_path / "weights.pt"
    path.write_bytes((HERE / "data" / "zip.pt").read_bytes())
    tensor = read_torch(path)["state_dict"]["int64"]
    (tmp_path / "new").write_bytes(b"short")
    os.replace(tmp_path / "new", path)
    assert_same(tensor.numpy(), np.arange(6).reshape(2, 3))


def test_memory_of_reading_a_part():
    """160 MB of file, a 32 MB part of it read tensor by tensor: at most 1.3 × the part, in a process of its own."""
    done = subprocess.run([sys.executable, HERE / "memory.py", "160", "32"], capture_output=True, text=True, check=True)
    part, grown = map(float, done.stdout.split())
    assert part == 32 and grown <= 1.3 * part, f"{grown} MB for {part} MB of tensors: pages of the file stay resident?"


def test_360_mutated_files():
    """tests/weights/fuzz.py with 12,000 or more is docs/security.md's figure; a few of them here."""
    done = subprocess.run(
        [sys.executable, HERE / "fuzz.py", "--files", "360", "--seed", "1"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_document_lists_what_is_admitted_and_the_limits():
    """docs/security.md is what people decide by; a name or limit that changes has to change there."""
    text = (HERE.parents[1] / "docs" / "security.md").read_text()
    missing = {name.split()[1] for name in ADMITTED if f"{name.split()[1]}`" not in text}
    assert not missing, f"docs/security.md does not list {missing}"
    for limit in (
        f"{MAX_PICKLE >> 20} MiB, {MAX_STEPS:,} opcodes",
        f"nested {MAX_DEPTH} deep",
        f"{MAX_OTHER_KEYS:,} that",
        f"list of {MAX_DIRECTORY >> 20} MiB",
    ):
        assert limit in text, f"docs/security.md does not say {limit}"
