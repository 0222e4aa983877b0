"""Files that `deco convert` wrote before the redesign are read as they were, and are what it writes today.

tests/golden/before_redesign/make.py made them, from workdirs of the same commit.
"""

import os
import pathlib
import subprocess
import sys
import tarfile

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from safetensors.numpy import load_file

import deco_jax
from deco_jax.config import flatten
from deco_jax.porting.convert import convert, read
from deco_jax.weights.files import open_weights
from tests.helpers import RECORDED, assert_as_recorded


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The recorded files; no test changes them."""
    folder = tmp_path_factory.mktemp("written")
    with tarfile.open(RECORDED / "written.tar.xz") as tar:
        tar.extractall(folder, filter="data")
    return folder


def assert_trees_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


def test_exported_files_give_the_recorded_velocities(written, tmp_path):
    ours = ("XLA_FLAGS", "JAX_")  # conftest's settings of XLA
    environment = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    environment |= {"PYTHONPATH": str(pathlib.Path(__file__).parents[2]), "JAX_PLATFORMS": "cpu"}
    program, names = pathlib.Path(__file__).with_name("velocities.py"), ("plain.safetensors", "folder")
    command = [sys.executable, program, tmp_path / "v.npz", *(written / name for name in names)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    velocity = np.load(RECORDED / "outputs.npz")["velocity"]
    assert_as_recorded(dict(np.load(tmp_path / "v.npz")), dict.fromkeys(names, velocity))


@pytest.mark.parametrize(
    ("exported", "workdir"), [("plain.safetensors", "plain"), ("folder", "plain"), ("aligned.ckpt", "aligned")]
)
def test_exported_files_open_as_the_workdirs_they_were_made_of(written, exported, workdir):
    (model, params), (same, theirs) = (deco_jax.load_pretrained(str(written / name)) for name in (exported, workdir))
    assert model.clone(dtype=same.dtype, remat=same.remat) == same
    assert_trees_equal(params, theirs)


def test_a_workdir_is_exported_as_it_was(written, tmp_path):
    convert(str(written / "plain"), str(tmp_path / "x.safetensors"))
    convert(str(written / "plain"), str(tmp_path / "hf"), kind="huggingface")
    for ours, theirs in (("x.safetensors", "plain.safetensors"), ("hf/model.safetensors", "folder/model.safetensors")):
        assert_trees_equal(load_file(tmp_path / ours), load_file(written / theirs))
        ours, theirs = open_weights(tmp_path / ours), open_weights(written / theirs)
        assert ours.metadata.items() > theirs.metadata.items(), "only added to: the dtype and the image size"
    ours, theirs = (flatten(open_weights(folder).config) for folder in (tmp_path / "hf", written / "folder"))
    for field in theirs.keys() - {"deco_jax_version", "training.model.attention"}:
        assert ours[field] == theirs[field], field
    assert (ours["training.model.attention"], theirs["training.model.attention"]) == ("auto", "default")


def test_a_training_state_goes_through_a_checkpoint_and_back(written, tmp_path):
    """Of AdamW over network and projector: every tensor, moment and setting as it was."""
    pytest.importorskip("torch", reason="needs the extra `torch`")
    convert(str(written / "aligned.ckpt"), str(tmp_path / "run"), train_state=True)
    convert(str(tmp_path / "run"), str(tmp_path / "back.ckpt"), train_state=True)
    theirs, ours = open_weights(written / "aligned.ckpt"), open_weights(tmp_path / "back.ckpt")
    assert list(ours.tensors) == list(theirs.tensors), "PyTorch numbers parameters in this order"
    read_all = {"is_leaf": lambda x: hasattr(x, "numpy")}
    rest = {name: ours.rest[name] for name in theirs.rest}
    assert ours.rest.keys() - rest.keys() == {"dtype", "image_size", "loops"}, "what was added since"
    trees = ((ours.tensors, rest), (theirs.tensors, theirs.rest))
    assert_trees_equal(*(jax.tree.map(np.asarray, tree, **read_all) for tree in trees))


def test_a_training_state_with_clipping_is_read(written):
    """Clipping was a part of the optimiser, so AdamW's state lay one level deeper."""
    bundle = read(str(written / "clipped"), ("ema", "online"), True, True)
    with ocp.PyTreeCheckpointer() as reader:
        state = reader.restore(written / "clipped" / "checkpoints" / "3" / "state", args=ocp.args.PyTreeRestore())
    adam = state["opt_state"][1][0]
    count, mu, nu = bundle.moments
    assert (count, bundle.step) == (3, 3) and adam["count"] == 3
    assert_trees_equal((bundle.online, mu, nu), (state["params"]["network"], adam["mu"], adam["nu"]))
