"""A whole run with its workdir in a bucket that fails and dawdles: killed in two processes, resumed by one; sampled."""

import io
import json

import jax
import numpy as np
import pytest
from PIL import Image

import deco_jax
from deco_jax.checkpoints import store
from deco_jax.errors import UsageError
from deco_jax.storage import to_path
from deco_jax.training.loop import train
from tests.parallel.processes.harness import Processes, assert_close, final_state

OWN_CACHE = {"JAX_COMPILATION_CACHE_DIR": None, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}  # in the workdir
STEPS = "--config.train.steps=7"


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def losses(workdir):
    """{step: loss}, and how many starts the run took."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    starts = [json.loads(line)["attempt"] for line in (workdir / "goodput.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines}, max(starts)


@pytest.mark.slow
def test_a_run_in_a_bucket_is_killed_and_goes_on(bucket, tiny_config, tmp_path):
    """To the state and losses of an undisturbed run on a disk, which has as many devices in one process."""
    (tmp_path / "disk").mkdir()
    with Processes(tmp_path / "disk", tmp_path / "disk" / "run", 1, 2, STEPS) as run:
        assert run.codes(120) == [0], run.output()

    bucket.faults(share=0.1, delay=0.005)  # 429, 503 and connections that break, in turn
    address, env = f"{bucket.url}/killed", bucket.env | OWN_CACHE
    workdir = to_path(address)
    with Processes(tmp_path, address, 2, 1, "--config.train.steps=100000", slow=0.5, env=env) as run:
        run.wait_for(f"Saved: {address}/checkpoints/3 ")
        with pytest.raises(UsageError, match=rf"--workdir={address} is in use by another run: process \d+ on .*\.json"):
            train(tiny_config, address)
        for process in run.running:
            process.kill()
        run.codes(30)
    saved = store.find_checkpoint(address)[1]
    assert saved in (3, 6)
    assert any(name.startswith("jit_step-") for name in names(workdir / "compilation_cache"))

    with Processes(tmp_path, address, 1, 2, STEPS, "--config.train.sample_every=7", env=env) as run:
        assert run.codes(120) == [0], run.output()
        assert f"resumes at step {saved}" in run.output()
    counts = bucket.counts()
    assert counts["429"] and counts["503"] and counts["reset"], "nothing failed"
    bucket.faults()
    assert_close(final_state(address), final_state(tmp_path / "disk" / "run"))
    (here, starts), (there, _) = losses(workdir), losses(tmp_path / "disk" / "run")
    assert starts == 2 and {*range(saved + 1, 8)} <= here.keys()
    assert all(step > 7 or abs(loss - there[step]) < 1e-5 * loss for step, loss in here.items())
    assert names(workdir / "samples") == ["step_00000007.png"]
    assert Image.open(io.BytesIO((workdir / "samples" / "step_00000007.png").read_bytes())).size == (8 * 28 + 7, 28)
    assert names(workdir / "tensorboard")[0].startswith("events.out.tfevents.")
    assert json.loads((workdir / "config.json").read_text())["train"]["steps"] == 7

    model, params = deco_jax.load_pretrained(address)
    images = deco_jax.sample(model, params, [0, "null"], jax.random.key(0), image_size=28, steps=1)
    assert images.shape == (2, 28, 28, 3) and np.isfinite(images).all()
