"""What `load_pretrained` opens: the same weights from every format and place, in which precision; what is refused."""

import os
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import deco_jax
from deco_jax.checkpoints import store
from deco_jax.config import build_model
from deco_jax.errors import UsageError
from deco_jax.models.build import parameter_shapes
from deco_jax.parallel.mesh import make_layout
from deco_jax.porting.bundle import Bundle
from deco_jax.porting.convert import convert, write_checkpoint
from deco_jax.pretrained.load import as_now, open_pretrained
from deco_jax.storage import to_path, upload
from deco_jax.training.start import abstract_state, find_weights, first_state
from deco_jax.training.step import make_train_step
from tests.helpers import Golden, new_tiny_config

BOTH = ("run", "x.ckpt")  # hold two sets of weights; the others one
ONE = ("x.pt", "x.safetensors", "hf")


def random_params(config, seed):
    rng = np.random.default_rng(seed)
    shapes = parameter_shapes(build_model(config.model))
    return jax.tree.map(lambda a: rng.normal(0, 0.2, a.shape).astype(np.float32), shapes)


@pytest.fixture(scope="module")
def config():
    c = new_tiny_config()
    c.model.update(width=64, decoder_width=32)  # large enough to be split over devices
    return c


@pytest.fixture(scope="module")
def folder(tmp_path_factory, config):
    """One float32 network in every format; no test changes it."""
    pytest.importorskip("torch", reason="writes two of the formats")
    folder = tmp_path_factory.mktemp("formats")
    ema, online = random_params(config, 0), random_params(config, 1)
    write_checkpoint(Bundle(config, ema=ema, online=online, fingerprint="digits", step=300), folder / "run")
    for name in ("x.ckpt", "x.pt", "x.safetensors"):
        convert(str(folder / "run"), str(folder / name))
    convert(str(folder / "run"), str(folder / "hf"), kind="huggingface")
    return folder


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("name", [*BOTH, "run/checkpoints/300", *ONE])
def test_a_run_starts_from_everything_that_opens(folder, config, name):
    """Both sets where there are two, placed as the run's layout says: with fsdp=8 no device has a whole matrix."""
    c = config.copy_and_resolve_references()
    c.train.init_from, c.mesh.preset = str(folder / name), "fsdp"
    train_step, layout = make_train_step(c), make_layout(c.mesh)
    abstract = abstract_state(train_step, layout)
    state = first_state(train_step, abstract, layout, find_weights(c))
    assert_equal(state.ema, random_params(c, 0))
    assert_equal(state.params["network"], random_params(c, 0 if name in ONE else 1))
    jax.tree.map(lambda x, like: x.sharding == like.sharding or pytest.fail(str(x.sharding)), state, abstract)
    assert not all(x.is_fully_replicated for x in jax.tree.leaves(state.ema)), "nothing is split"


@pytest.mark.parametrize("name", ["run", "x.ckpt", "x.safetensors", "hf"])
def test_another_network_is_named_by_its_fields(folder, config, name):
    c = config.copy_and_resolve_references()
    c.train.init_from = str(folder / name)
    c.model.update(depth=3, decoder_width=16)
    told = "model.depth: 2 there, 3 here; model.decoder_width: 32 there, 16 here"
    with pytest.raises(UsageError, match=f"train.init_from=.*{name} holds another network: {told}"):
        find_weights(c)


@pytest.mark.parametrize("name", [*BOTH, *ONE])
def test_a_network_opens_in_the_precision_that_it_was_trained_in(folder, caplog, name):
    """Today's bfloat16 would put a float32 network 0.03 off, without a word."""
    source = str(folder / name)
    assert deco_jax.load_pretrained(source)[0].dtype == jnp.float32 and not caplog.records
    model, params = deco_jax.load_pretrained(source, dtype="bfloat16")
    assert model.dtype == jnp.bfloat16 and jax.tree.leaves(params)[0].dtype == jnp.float32
    with pytest.raises(UsageError, match="dtype='float16' is not known; allowed: bfloat16, float32"):
        deco_jax.load_pretrained(source, dtype="float16")


def test_a_file_that_does_not_say_its_precision_is_taken_for_upstreams(folder, tmp_path, caplog):
    path = str(tmp_path / "plain.safetensors")
    save_file(load_file(folder / "x.safetensors"), path)
    assert deco_jax.load_pretrained(path)[0].dtype == jnp.bfloat16
    assert "plain.safetensors does not say in which dtype it was trained; bfloat16 is assumed" in caplog.text
    caplog.clear()
    assert deco_jax.load_pretrained(path, dtype="float32")[0].dtype == jnp.float32 and not caplog.records


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("run", r"(ema|params/network)/decoder/out/kernel \(2 numbers\)"),
        ("x.safetensors", r"dec_net.final_layer.linear.weight \(2 numbers\)"),
    ],
)
def test_weights_that_are_not_finite_are_refused_at_every_door(config, folder, tmp_path, name, told):
    """Opened, sampled, converted or trained on, they would make black images and a run of skipped steps."""
    broken = random_params(config, 0)
    broken["decoder"]["out"]["kernel"][0, :2] = np.nan, np.inf
    write_checkpoint(Bundle(config, ema=broken, online=broken, fingerprint="digits"), tmp_path / "run")
    tensors = load_file(folder / "x.safetensors")
    tensors["dec_net.final_layer.linear.weight"][:2, 0] = np.nan
    save_file(tensors, tmp_path / "x.safetensors")
    source, message = str(tmp_path / name), f"{name}.*: weights that are NaN or infinite are of no use: {told}"
    with pytest.raises(UsageError, match=message):
        deco_jax.load_pretrained(source)
    with pytest.raises(UsageError, match=message):
        convert(source, str(tmp_path / "copy"), kind="huggingface")
    c = config.copy_and_resolve_references()
    c.train.init_from = source
    train_step, layout = make_train_step(c), make_layout(c.mesh)
    with pytest.raises(UsageError, match=message):
        first_state(train_step, abstract_state(train_step, layout), layout, find_weights(c))
    assert not (tmp_path / "copy").exists()


def test_a_plain_pt_is_what_pytorch_reads(folder):
    torch = pytest.importorskip("torch", reason="needs the extra `torch`")
    content = torch.load(folder / "x.pt", weights_only=True)
    about = {name: value for name, value in content.items() if name != "state_dict"}
    assert about == {
        "prediction": "velocity", "dtype": "float32", "image_size": 28, "weights": "ema", "global_step": 300
    }  # fmt: skip
    theirs = load_file(folder / "x.safetensors")
    assert content["state_dict"].keys() == theirs.keys()
    for name, value in theirs.items():
        np.testing.assert_array_equal(content["state_dict"][name].numpy(), value)


def test_without_torch_no_pt_is_written(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UsageError, match=r"writing a .pt needs PyTorch: pip install -e '.\[torch\]' in the repo"):
        convert(str(folder / "run"), str(tmp_path / "x.pt"))
    assert not list(tmp_path.iterdir())


def test_an_image_size_that_is_assumed_is_said(folder, tmp_path, capsys):
    save_file(load_file(folder / "x.safetensors"), tmp_path / "plain.safetensors")
    plain = str(tmp_path / "plain.safetensors")
    convert(plain, str(tmp_path / "a"))
    assert "plain.safetensors does not say how large its images were; 256 is assumed" in capsys.readouterr().out
    convert(plain, str(tmp_path / "b"), image_size=28)
    convert(str(folder / "x.safetensors"), str(tmp_path / "c"))
    assert "images" not in capsys.readouterr().out
    sizes = [store.read_config(*store.find_checkpoint(str(tmp_path / name))).data.image_size for name in "abc"]
    assert sizes == [256, 28, 28]


@pytest.mark.slow
def test_a_damaged_newest_checkpoint_is_passed_over(config, tmp_path, caplog):
    for step, seed in ((100, 0), (200, 1)):
        params = random_params(config, seed)
        write_checkpoint(
            Bundle(config, ema=params, online=params, fingerprint="digits", step=step), tmp_path / f"{step}"
        )
    shutil.move(tmp_path / "200" / "checkpoints" / "200", tmp_path / "100" / "checkpoints" / "200")
    largest = max((tmp_path / "100/checkpoints/200").rglob("d/*"), key=lambda path: path.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)
    assert_equal(deco_jax.load_pretrained(str(tmp_path / "100"))[1], random_params(config, 0))
    assert "/200 is damaged and not used" in caplog.text
    with pytest.raises(UsageError, match="200 is damaged: .* Name another checkpoint"):
        deco_jax.load_pretrained(str(tmp_path / "100" / "checkpoints" / "200"))
    command = [sys.executable, "-m", "deco_jax", "sample", "--workdir", tmp_path / "100", "--out", tmp_path / "out"]
    done = subprocess.run([*command, "--num=1"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "/200 is damaged and not used" in done.stderr, done.stderr
    assert "checkpoints/100: ema weights" in done.stdout and "Traceback" not in done.stderr


@pytest.mark.slow
def test_weights_in_a_bucket(bucket, folder, config, tmp_path, monkeypatch):
    """Files and folders are copied to this host once, then mapped; checkpoints are read where they lie."""
    monkeypatch.setenv("HOME", str(tmp_path))  # of the copies
    there = to_path(f"{bucket.url}/load")
    for name in ("x.safetensors", "hf", "x.ckpt"):
        upload(folder / name, there / name)
        for _ in range(2):
            model, params = deco_jax.load_pretrained(f"{there}/{name}")
            assert_equal(params, random_params(config, 0))
            assert model.dtype == jnp.float32
    convert(str(folder / "run"), f"{there}/run")
    convert(f"{there}/run", f"{there}/back.safetensors")
    with pytest.raises(UsageError, match="gs://bucket/load/run exists; choose another name"):
        convert(str(folder / "run"), f"{there}/run")
    for name in ("run", "run/checkpoints/300", "back.safetensors"):
        assert_equal(deco_jax.load_pretrained(f"{there}/{name}")[1], random_params(config, 0))
    c = config.copy_and_resolve_references()
    train_step, layout = make_train_step(c), make_layout(c.mesh)
    for name in ("run", "x.ckpt"):
        c.train.init_from = f"{there}/{name}"
        state = first_state(train_step, abstract_state(train_step, layout), layout, find_weights(c))
        assert_equal((state.ema, state.params["network"]), (random_params(c, 0), random_params(c, 1)))
    with pytest.raises(UsageError, match="none.ckpt does not exist"):
        deco_jax.load_pretrained(f"{there}/none.ckpt")


def test_a_fingerprint_tells_other_weights_in_the_same_place_apart(tmp_path):
    """Of a file that is replaced, but not of one that is copied."""
    golden = Golden("deco_c2i")
    tensors, path = golden.group("param:"), tmp_path / "a.safetensors"
    save_file(tensors, path)
    first = open_pretrained(str(path)).fingerprint
    (tmp_path / "copy.safetensors").write_bytes(path.read_bytes())
    assert open_pretrained(str(tmp_path / "copy.safetensors")).fingerprint == first
    save_file({name: 0.9 * value for name, value in tensors.items()}, path)
    assert open_pretrained(str(path)).fingerprint != first

    table = "y_embedder.embedding_table.weight"
    tensors[table] = np.random.default_rng(0).normal(size=(6001, tensors[table].shape[1])).astype(np.float32)
    save_file(tensors, path)
    first = open_pretrained(str(path)).fingerprint
    save_file(tensors | {table: -tensors[table]}, path)  # a large tensor alone
    second = open_pretrained(str(path)).fingerprint
    assert first != second and first[:16] == second[:16]
    for there, same in ((first, True), (first[:16], True), (None, True), (second, False), ("0" * 16, False)):
        now = as_now({"fingerprint": there, "num": 1}, {"fingerprint": first})
        assert (now == {"fingerprint": first, "num": 1}) is same
    assert as_now({"num": 1}, {}) == {"num": 1}


def test_a_whole_pipeline_of_diffusers_opens(folder, tmp_path):
    inner = tmp_path / "pipe" / "transformer"
    inner.mkdir(parents=True)
    (tmp_path / "pipe" / "model_index.json").write_text('{"_class_name": "DeCoPipeline"}')
    (inner / "config.json").write_text("{}")
    shutil.copy(f"{folder}/x.safetensors", inner / "diffusion_pytorch_model.safetensors")
    params = deco_jax.load_pretrained(str(tmp_path / "pipe"))[1]
    assert_equal(params, deco_jax.load_pretrained(f"{folder}/x.safetensors")[1])
