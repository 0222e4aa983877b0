"""Workdirs that the commit before the redesign wrote go on as they would have then, and sample the same images.

tests/golden/before_redesign/make.py made them, three steps each, and the states after three steps more.
"""

import os
import pathlib
import subprocess
import sys
import tarfile

import numpy as np
import pytest

from tests.helpers import RECORDED, assert_as_recorded

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def gone_on(tmp_path_factory):
    """Folder with what `go_on.py` makes of the recorded workdirs, beside these."""
    out = tmp_path_factory.mktemp("gone_on")
    with tarfile.open(RECORDED / "written.tar.xz") as tar:
        tar.extractall(out / "written", filter="data")
    ours = ("XLA_FLAGS", "JAX_")  # conftest's settings of XLA
    environment = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    program = pathlib.Path(__file__).with_name("go_on.py")
    root = str(pathlib.Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, program, out / "written", out],
        env=environment | {"PYTHONPATH": root, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (out / "log").write_text(done.stdout)
    return out


@pytest.mark.parametrize("name", ["plain", "clipped", "aligned"])
def test_a_workdir_goes_on(gone_on, name):
    """To the state of six steps without a break. With clipping, AdamW's state lay one level deeper then."""
    recorded = {
        key.replace("['opt_state'][1]", "['opt_state']") if name == "clipped" else key: value
        for key, value in np.load(RECORDED / f"{name}_step6.npz").items()
    }
    assert recorded["['step']"] == 6
    assert_as_recorded(dict(np.load(gone_on / f"{name}_step6.npz")), recorded)


def test_the_log_says_what_changed(gone_on):
    lines = (gone_on / "log").read_text().splitlines()
    changes = [line for line in lines if line.startswith("Changed since")]
    assert changes.count("Changed since the checkpoint: train.steps: 3 there, 6 here.") == 3
    assert len(changes) == 5, "the folder of the images and the teacher's file are the others"
    for how in (
        "data.background stays '', as this run began; 'white'",
        "data.orient stays False, as this run began; True",
    ):
        assert lines.count(f"{how} is for new runs.") == 3, "they took pixels as they lay in the file"


def test_a_workdir_samples_the_same_images(gone_on):
    assert_as_recorded(dict(np.load(gone_on / "outputs.npz")), dict(np.load(RECORDED / "outputs.npz")))
