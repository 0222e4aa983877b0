"""Any weight file or folder opens as names and lazy tensors; what leads elsewhere or does not fit is named."""

import json
import pathlib
import pickle
import struct
from unittest.mock import ANY

import ml_dtypes
import numpy as np
import pytest

from deco_jax.errors import UsageError
from deco_jax.weights.files import open_weights

DATA = pathlib.Path(__file__).parent / "data"
GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
TYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "F64": np.float64, "I64": np.int64}
TYPES |= {"U8": np.uint8, "BOOL": np.bool_, "F8_E4M3": ml_dtypes.float8_e4m3fn, "C64": np.complex64}


def safetensors(tensors: dict[str, np.ndarray], metadata=None, change=lambda header: None, data=None) -> bytes:
    """A file as the format's document says, the header changed by `change`."""
    header, content = {"__metadata__": metadata} if metadata else {}, b""
    names = {np.dtype(v): k for k, v in TYPES.items()}
    for name, array in tensors.items():
        place = [len(content), len(content) + array.nbytes]
        header[name] = {"dtype": names[array.dtype], "shape": list(array.shape), "data_offsets": place}
        content += array.tobytes()
    text = change(header) or json.dumps(header)
    return struct.pack("<Q", len(text)) + text.encode() + (content if data is None else data)


ONE = {"a": np.arange(6, dtype=np.float32).reshape(2, 3)}
TWO = ONE | {"b": np.arange(4, dtype=np.float16)}


def str_id(value) -> str:
    """A test's name: what the message says, not the bytes."""
    return value if isinstance(value, str) else ""


# Safetensors


def test_every_type_of_safetensors(tmp_path):
    arrays = {name: np.arange(-2, 4).reshape(2, 3).astype(dtype) for name, dtype in TYPES.items()}
    arrays |= {"scalar": np.array(2.5, np.float32), "empty": np.zeros((0, 3), np.float32)}
    path = tmp_path / "model.safetensors"
    path.write_bytes(safetensors(arrays, {"format": "pt"}))
    weights = open_weights(path)
    assert list(weights.tensors) == list(arrays) and weights.metadata == {"format": "pt"} and weights.rest == {}
    for name, array in arrays.items():
        assert weights.tensors[name].dtype == array.dtype and weights.tensors[name].shape == array.shape
        assert weights.tensors[name].numpy().tobytes() == array.tobytes()


def test_the_content_counts_not_the_ending(tmp_path):
    (tmp_path / "a.bin").write_bytes(safetensors(ONE))
    (tmp_path / "b.weights").write_bytes((DATA / "legacy.pt").read_bytes())
    assert list(open_weights(tmp_path / "a.bin").tensors) == ["a"]
    assert "bfloat16" in open_weights(tmp_path / "b.weights").tensors


def entry(header, **fields):
    header["b"] |= fields


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"\xff" * 7, "cut short"),
        (struct.pack("<Q", 2**63) + b"{}", "cut short"),
        (safetensors(ONE, change=lambda h: "{" + " " * 2**23 + "}"), "at most"),
        (safetensors(TWO, change=lambda h: entry(h, dtype="F8_E8M0", shape=[8])), "'F8_E8M0'; those read are"),
        (
            safetensors(TWO, change=lambda h: entry(h, shape=[0, 2**62], data_offsets=[24, 24]), data=bytes(24)),
            "elements",
        ),
        (safetensors(TWO, change=lambda h: entry(h, shape=[1] * 40 + [4])), "at most 32 axes"),
    ],
    ids=str_id,
)
def test_a_damaged_safetensors_file_is_one_clear_message(tmp_path, content, says):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(UsageError) as caught:
        open_weights(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and says in message and len(message) < 500 and "\n" not in message


@pytest.mark.parametrize(
    "content",
    [
        safetensors(TWO)[:-1],
        safetensors(TWO) + b"x",
        safetensors(TWO, data=bytes(40)),
        safetensors(ONE, metadata={"a": 1}),
        *(
            safetensors(ONE, change=lambda h, text=text: text)
            for text in (
                "[" * 100_000,
                '{"a": NaN}',
                '{"a": 1e999}',
                '{"a": ' + "9" * 5000 + "}",
                '{"\\ud800": 1}',
                '{"a": {}, "a": {}}',
                "[]",
                '{"a": 1}',
            )
        ),
        *(
            safetensors(TWO, change=lambda h, fields=fields: entry(h, **fields))
            for fields in (
                {"dtype": "F5"},
                {"shape": [3]},
                {"shape": [5]},
                {"shape": [-4]},
                {"shape": [True, 4]},
                {"shape": [2**62, 2**62]},
                {"data_offsets": [20, 28]},
                {"data_offsets": [32, 24]},
                {"data_offsets": [24, 2**70]},
                {"data_offsets": [24.0, 32]},
            )
        ),
    ],
)
def test_what_the_safetensors_package_must_refuse(tmp_path, content):
    """Its reading of the header is relied on: no gap, no overlap, nothing outside the file, sizes as shapes say."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(UsageError, match="a safetensors file that is damaged") as caught:
        open_weights(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and len(message) < 500 and "\n" not in message


# Sets of files, and folders


def write_shards(folder: pathlib.Path, changes=()) -> pathlib.Path:
    (folder / "model-1.safetensors").write_bytes(safetensors({"a": TWO["a"]}))
    (folder / "model-2.safetensors").write_bytes(safetensors({"b": TWO["b"]}, {"format": "pt"}))
    files = {"b": "model-2.safetensors", "a": "model-1.safetensors"} | dict(changes)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 32}, "weight_map": files}))
    return index


def test_shards_and_their_index(tmp_path):
    for path in (write_shards(tmp_path), tmp_path):
        weights = open_weights(path)
        assert list(weights.tensors) == ["b", "a"], "the index's order"
        assert all(np.array_equal(weights.tensors[n].numpy(), TWO[n]) for n in TWO)
        assert weights.metadata == {"format": "pt"}


@pytest.mark.parametrize("name", ["../x/model-1.safetensors", "/etc/passwd", "a/b", "..\\b", "x\0", "a.index.json"])
def test_an_index_leads_nowhere_else(tmp_path, name):
    with pytest.raises(UsageError, match="only files beside it"):
        open_weights(write_shards(tmp_path, {"a": name}))


@pytest.mark.parametrize("name", ["", ".", "..", "loop", "none.safetensors", "a" * 5000, "\ud800"])
def test_an_index_names_files(tmp_path, name):
    (tmp_path / "loop").symlink_to(".")
    with pytest.raises(UsageError, match="not beside it|only files beside it|not JSON"):
        open_weights(write_shards(tmp_path, {"a": name}))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"c": "model-1.safetensors"}, "'c' are not in the files"),
        ({"a": "model-2.safetensors"}, "'a' are not in the files"),
        ({"a": None}, "no index"),
    ],
)
def test_an_index_that_does_not_fit(tmp_path, changes, says):
    with pytest.raises(UsageError, match=says):
        open_weights(write_shards(tmp_path, changes))


def test_a_shard_with_unlisted_tensors(tmp_path):
    index = write_shards(tmp_path)
    (tmp_path / "model-1.safetensors").write_bytes(safetensors({"a": TWO["a"], "stray": TWO["b"]}))
    with pytest.raises(UsageError, match="does not list 'stray'"):
        open_weights(index)


def test_hugging_face_folder(tmp_path):
    (tmp_path / "config.json").write_text('{"width": 16}')
    (tmp_path / "model.safetensors").write_bytes(safetensors(ONE, {"format": "pt"}))
    (tmp_path / "pytorch_model.bin").write_bytes(b"safetensors go first")
    weights = open_weights(str(tmp_path))
    assert list(weights.tensors) == ["a"] and weights.config == {"width": 16} and weights.metadata == {"format": "pt"}


def test_a_folder_with_one_file_or_unclear(tmp_path):
    with pytest.raises(UsageError, match="a folder without"):
        open_weights(tmp_path)
    (tmp_path / "one.safetensors").write_bytes(safetensors(ONE))
    assert list(open_weights(tmp_path).tensors) == ["a"]
    (tmp_path / "two.safetensors").write_bytes(safetensors(ONE))
    with pytest.raises(UsageError, match="name the file"):
        open_weights(tmp_path)


# State dicts inside checkpoints


def test_upstreams_checkpoint():
    weights = open_weights(GOLDEN / "lightning_c2i.ckpt")
    prefixes = {name.split(".")[0] for name in weights.tensors}
    assert prefixes == {"denoiser", "ema_denoiser", "diffusion_trainer"}
    assert weights.rest["global_step"] == 1234 and "state_dict" not in weights.rest
    assert len(weights.rest["optimizer_states"]) == 1


def arrange(tmp_path, *, layout):
    """Saves a checkpoint of two tensors, "x" and "y", in the structure that `layout` makes of a state dict."""
    torch = pytest.importorskip("torch", reason="writes the file")
    path = tmp_path / "weights.pt"
    torch.save(layout({"x": torch.arange(3.0), "y": torch.zeros(2, 2)}), path)
    return path


@pytest.mark.parametrize(
    ("layout", "names", "rest"),
    [
        (lambda s: s, ["x", "y"], {}),
        (lambda s: {"state_dict": s, "epoch": 1}, ["x", "y"], {"epoch": 1}),
        (lambda s: {"model": s, "opt": {}, "step": 2}, ["x", "y"], {"opt": {}, "step": 2}),
        (lambda s: {"ema": s, "step": 3}, ["ema.x", "ema.y"], {"step": 3}),
        (
            lambda s: {"state_dict": s, "state_dict_ema": s},
            [f"state_dict{e}.{k}" for e in ("", "_ema") for k in "xy"],
            {},
        ),
        (lambda s: {"model": s, "optimizer": {"exp_avg": s}}, ["x", "y"], {"optimizer": {"exp_avg": ANY}}),
        (
            lambda s: {"state_dict": s, "current_model_state": s},
            ["current_model_state.x", "current_model_state.y", "ema.x", "ema.y"],
            {},
        ),
        (lambda s: {"state_dict": {"module": s}}, ["x", "y"], {}),
        (lambda s: {"model": s, "ema": s}, ["model.x", "model.y", "ema.x", "ema.y"], {}),
        (lambda s: {"state_dict": s | {"_extra_state": None}}, ["x", "y"], {"state_dict": {"_extra_state": None}}),
        (lambda s: s | {"version": 3}, ["x", "y"], {"version": 3}),
        (lambda s: {"model": {}, **s}, ["x", "y"], {"model": {}}),
    ],
)
def test_where_state_dicts_stand(tmp_path, layout, names, rest):
    weights = open_weights(arrange(tmp_path, layout=layout))
    assert list(weights.tensors) == names and weights.rest == rest


@pytest.mark.parametrize(
    ("layout", "second"),
    [
        (lambda s: {"model": s, "best_model": s}, "best_model"),
        (lambda s: {"model": s, "ema": {"decay": 0.9, "shadow_params": [*s.values()]}}, "ema"),
        (lambda s: {"state_dict": s, "callbacks": {"EMA": {"weights": s}}}, "callbacks"),
    ],
)
def test_a_second_set_in_an_unknown_place_is_not_passed_over(tmp_path, layout, second):
    """The first may be the average, or may not: it must not pass for it."""
    with pytest.raises(UsageError, match=f"holds weights as '.*' and others as '{second}'"):
        open_weights(arrange(tmp_path, layout=layout))
    other = arrange(tmp_path, layout=lambda s: {"model": s, "discriminator": {"z": 2 * s["x"][:2]}})
    assert list(open_weights(other).tensors) == ["x", "y"]


@pytest.mark.parametrize(
    ("content", "says"),
    [([1], "holds a list"), ({"epoch": 1}, "no tensors by name, only 'epoch'"), ({}, "no tensors by name")],
)
def test_a_file_without_tensors(tmp_path, content, says):
    path = tmp_path / "weights.pt"
    legacy = (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}, content, [])
    path.write_bytes(b"".join(pickle.dumps(part, 2) for part in legacy))
    with pytest.raises(UsageError, match=says):
        open_weights(path)
