"""What shapes do not say of a network, in every format: whether it predicts velocities or images; other decoders."""

import json

import jax
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

import deco_jax
from deco_jax.checkpoints import store
from deco_jax.checkpoints.resume import check_resumable
from deco_jax.cli import main
from deco_jax.config import build_model, default_config
from deco_jax.errors import UsageError
from deco_jax.models.build import parameter_shapes
from deco_jax.porting.bundle import Bundle
from deco_jax.porting.convert import convert, read, write_checkpoint
from deco_jax.training.start import find_weights
from deco_jax.weights.files import open_weights
from tests.helpers import Golden, relative_error

TARGETS = {"run": "checkpoint", "x.safetensors": "safetensors", "x.ckpt": "ckpt", "x.pt": "pt", "hf": "huggingface"}


@pytest.fixture
def foreign(tmp_path):
    """Weights of the recorded baseline as others store them: tensors, and nothing said about them."""
    save_file(Golden("baseline_dit").group("param:"), tmp_path / "foreign.safetensors")
    return str(tmp_path / "foreign.safetensors")


def new_run(folder, **model):
    """A workdir of ours with a small network of random weights, and its configuration."""
    config = default_config()
    config.model.update(num_classes=10, patch_size=4, width=16, depth=1, heads=2, decoder_width=8, decoder_depth=1)
    config.model.update(dtype="float32", remat="none", **model)
    rng = np.random.default_rng(0)
    shapes = parameter_shapes(build_model(config.model))
    params = jax.tree.map(lambda a: rng.normal(0, 0.2, a.shape).astype(np.float32), shapes)
    write_checkpoint(Bundle(config, ema=params, online=params, fingerprint="digits"), folder / "ours")
    return str(folder / "ours"), config


def test_a_baseline_that_does_not_say_is_not_opened_until_someone_does(foreign, tmp_path):
    """Its tensors are the same either way, and sampled as the wrong one they make noise."""
    message = "does not say whether its baseline predicts velocities or images"
    with pytest.raises(UsageError, match=message):
        deco_jax.load_pretrained(foreign)
    with pytest.raises(UsageError, match=message):
        convert(foreign, str(tmp_path / "run"))
    for prediction in ("image", "velocity"):
        assert deco_jax.load_pretrained(foreign, prediction=prediction)[0].prediction == prediction
    with pytest.raises(UsageError, match="prediction='noise' is not known; allowed: velocity, image"):
        deco_jax.load_pretrained(foreign, prediction="noise")


def test_only_the_baseline_is_in_doubt(tmp_path):
    for case in ("deco_c2i", "pixnerd"):
        save_file(Golden(case).group("param:"), tmp_path / "x.safetensors")
        assert deco_jax.load_pretrained(str(tmp_path / "x.safetensors"))[0].prediction == "velocity"


@pytest.mark.parametrize("prediction", ["image", "velocity"])
def test_every_format_carries_it(foreign, tmp_path, prediction):
    """From a file that does not say, over a checkpoint of ours, to each format and back from it."""
    g = Golden("baseline_dit")
    x, out, t = g.image("x"), g.image("out").astype(float), g["t"].astype(float)[:, None, None, None]
    expected = out if prediction == "velocity" else (out - x) / np.maximum(1 - t, 0.05)
    main(["convert", foreign, str(tmp_path / "run"), "--prediction", prediction])
    for name, kind in TARGETS.items():
        if kind in ("ckpt", "pt"):
            pytest.importorskip("torch", reason="needs the extra `torch`")
        if kind != "checkpoint":
            convert(str(tmp_path / "run"), str(tmp_path / name), kind=kind)
        model, params = deco_jax.load_pretrained(str(tmp_path / name))
        v = model.clone(dtype=np.float32).apply({"params": params}, x, g["t"], g["y"].astype(np.int32))
        assert model.prediction == prediction and relative_error(v, expected) < 2e-5
        assert deco_jax.load_pretrained(str(tmp_path / name), prediction=prediction)[0] == model
        other = {"image": "velocity", "velocity": "image"}[prediction]
        with pytest.raises(UsageError, match=f"{name} holds a network that predicts {prediction}, not {other}"):
            deco_jax.load_pretrained(str(tmp_path / name), prediction=other)
        with pytest.raises(UsageError, match=f"{name} holds a network that predicts {prediction}, not {other}"):
            read(str(tmp_path / name), ("ema",), False, True, other)
        back = read(str(tmp_path / name), ("ema",), False, True)
        assert back.config.model.prediction == prediction
        if back.fingerprint is None:
            assert "model.prediction" in back.decisive, "a run could go on with the other prediction"


def test_where_it_stands(tmp_path):
    """Plain text that anybody's reader finds; torch's safe loading takes the checkpoint as before."""
    run, _ = new_run(tmp_path, kind="baseline", prediction="image")
    convert(run, str(tmp_path / "hf"), kind="huggingface")
    with safe_open(tmp_path / "hf" / "model.safetensors", framework="numpy") as file:
        metadata = file.metadata()
    assert metadata["prediction"] == "image" == json.loads(metadata["architecture"])["prediction"]
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["prediction"] == "image"
    assert "| predicts | image |" in (tmp_path / "hf" / "README.md").read_text()
    torch = pytest.importorskip("torch", reason="needs the extra `torch`")
    convert(run, str(tmp_path / "x.ckpt"))
    assert torch.load(tmp_path / "x.ckpt", weights_only=True)["prediction"] == "image"
    assert open_weights(tmp_path / "x.ckpt").rest["prediction"] == "image"


def test_a_file_that_contradicts_itself_is_not_opened(tmp_path):
    run, _ = new_run(tmp_path, kind="baseline", prediction="image")
    convert(run, str(tmp_path / "hf"), kind="huggingface")
    file = tmp_path / "hf" / "config.json"
    text = file.read_text()
    for value, message in (
        ("velocity", "says in one place that its network predicts image, in another velocity"),
        (["image"], r"prediction=\('image'\) is not known"),
        ("epsilon", "prediction='epsilon' is not known"),
    ):
        file.write_text(json.dumps(json.loads(text) | {"prediction": value}))
        with pytest.raises(UsageError, match=message):
            deco_jax.load_pretrained(str(tmp_path / "hf"))


def test_diffusers_and_pytorch_do_not_get_a_deco_that_predicts_images(tmp_path):
    """They would take its images for velocities."""
    run, _ = new_run(tmp_path, prediction="image")
    convert(run, str(tmp_path / "hf"), kind="huggingface")
    assert {path.name for path in (tmp_path / "hf").iterdir()} == {"config.json", "model.safetensors", "README.md"}
    assert "DiffusionPipeline" not in (tmp_path / "hf" / "README.md").read_text()
    assert deco_jax.load_pretrained(str(tmp_path / "hf"))[0].prediction == "image"
    pytest.importorskip("torch", reason="needs the extra `torch`")
    from deco_jax.export.torch_model import DeCo

    with pytest.raises(TypeError, match="prediction"):
        DeCo.from_safetensors(tmp_path / "hf" / "model.safetensors")


def test_a_deco_of_velocities_is_described_as_pytorchs_takes_it(tmp_path):
    run, config = new_run(tmp_path)
    convert(run, str(tmp_path / "x.safetensors"))
    with safe_open(tmp_path / "x.safetensors", framework="numpy") as file:
        architecture = json.loads(file.metadata()["architecture"])
    sizes = ("kind", "num_classes", "patch_size", "width", "depth", "heads", "decoder_width", "decoder_depth")
    assert architecture == {field: config.model[field] for field in sizes}


def test_a_run_starts_from_and_resumes_only_what_predicts_the_same(tmp_path):
    run, config = new_run(tmp_path, kind="baseline", prediction="image")
    config.train.init_from = run
    folder, step = find_weights(config).checkpoint
    saved = store.read_meta(folder, step) | {"weights_only": False}
    check_resumable(saved, store.make_meta(config, "digits", 1, ""), folder)
    config.model.prediction = "velocity"
    with pytest.raises(UsageError, match="holds another network: model.prediction: image there, velocity here"):
        find_weights(config)
    with pytest.raises(UsageError, match="model.prediction: image there, velocity here"):
        check_resumable(saved, store.make_meta(config, "digits", 1, ""), folder)


def test_a_checkpoint_from_before_there_was_a_choice_predicts_velocities(tmp_path):
    """Its configuration lacks the fields; it is opened, started from and resumed as what it was."""
    run, config = new_run(tmp_path)
    folder, step = store.find_checkpoint(run)
    file = folder / str(step) / "meta" / "metadata"
    meta = json.loads(file.read_text())
    for field in ("prediction", "decoder_patch", "decoder_interaction"):
        del meta["config"]["model"][field]
    file.write_text(json.dumps(meta))
    for checksums in (folder / str(step)).glob("checksums.*"):
        checksums.unlink()  # nor were there any
    assert "prediction" not in store.read_meta(folder, step)["config"]["model"], "the file is another"
    model, _ = deco_jax.load_pretrained(run)
    assert (model.prediction, model.decoder_patch, model.decoder_interaction) == ("velocity", 1, "adaln")
    with pytest.raises(UsageError, match="predicts velocity, not image"):
        deco_jax.load_pretrained(run, prediction="image")
    config.train.init_from = run
    assert find_weights(config).checkpoint == (folder, step)
    config.model.prediction = "image"
    with pytest.raises(UsageError, match="model.prediction: velocity there, image here"):
        find_weights(config)


@pytest.mark.parametrize("model", [{"decoder_patch": 2}, {"decoder_interaction": "add"}])
def test_only_our_checkpoints_hold_the_other_decoders(tmp_path, model):
    pytest.importorskip("torch", reason="needs the extra `torch`")
    run, _ = new_run(tmp_path, **model)
    (field, value), *_ = model.items()
    for name, kind in TARGETS.items():
        if kind != "checkpoint":
            with pytest.raises(UsageError, match=f"model.{field}={value}; only a checkpoint of ours"):
                convert(run, str(tmp_path / name), kind=kind)
    convert(run, str(tmp_path / "copy"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy", "ours"]
    (ours, params), (copy, same) = (deco_jax.load_pretrained(str(tmp_path / name)) for name in ("ours", "copy"))
    assert ours == copy and getattr(copy, field) == value
    jax.tree.map(np.testing.assert_array_equal, params, same)
