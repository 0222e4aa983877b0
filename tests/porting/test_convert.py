"""Weights there and back: bitwise, whole, beside what is there; and training that goes on where PyTorch stopped."""

import json
import pathlib
import shutil
import stat

import jax
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file, save_file

import deco_jax
from deco_jax.checkpoints import store
from deco_jax.cli import main
from deco_jax.errors import UsageError
from deco_jax.generation.prompts import open_encoder
from deco_jax.parallel.mesh import make_layout
from deco_jax.porting import convert as module
from deco_jax.porting import moments
from deco_jax.porting.bundle import Bundle
from deco_jax.porting.convert import convert, read, write_checkpoint
from deco_jax.pretrained import names, networks
from deco_jax.pretrained.load import open_pretrained
from deco_jax.training.loop import train
from deco_jax.training.start import abstract_on_host, abstract_state, find_weights, first_state
from deco_jax.training.state import TrainState
from deco_jax.training.step import make_train_step
from deco_jax.weights import translate
from deco_jax.weights.files import open_weights
from tests.helpers import Golden, new_tiny_config, relative_error

LIGHTNING = str(pathlib.Path(__file__).parents[1] / "golden" / "lightning_c2i.ckpt")


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """The recorded checkpoint with all it holds, as one of ours; no test changes it."""
    target = tmp_path_factory.mktemp("converted") / "run"
    convert(LIGHTNING, str(target), train_state=True)
    return str(target)


def assert_trees_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("weights, output", [("ema", "ema_denoiser"), ("online", "denoiser")])
def test_upstreams_checkpoint_opens_and_computes_what_upstream_did(workdir, weights, output):
    g = Golden("lightning_c2i_outputs")
    for source in (LIGHTNING, workdir):
        model, params = deco_jax.load_pretrained(source, weights)
        model = model.clone(dtype=np.float32)
        v = model.apply({"params": params}, g.image("x"), g["t"], g["y"].astype(np.int32))
        assert relative_error(v, g.image(output)) < 2e-5


def test_every_number_survives_the_way_to_ours_and_back(workdir, tmp_path):
    """Lightning → checkpoint → Lightning: the same tensors under the same names, optimiser, step and projector."""
    pytest.importorskip("torch", reason="needs the extra `torch`")
    convert(workdir, str(tmp_path / "back.ckpt"), train_state=True)
    theirs, ours = open_weights(LIGHTNING), open_weights(tmp_path / "back.ckpt")
    assert set(ours.tensors) == set(theirs.tensors)
    online = [[name for name in f.tensors if name.startswith("denoiser.")] for f in (theirs, ours)]
    assert online[0] == online[1], "the optimiser numbers parameters in this order"
    for name, tensor in theirs.tensors.items():
        np.testing.assert_array_equal(ours.tensors[name].numpy(), tensor.numpy(), err_msg=name)
    assert ours.rest["global_step"] == theirs.rest["global_step"] == 1234
    (a,), (b,) = theirs.rest["optimizer_states"], ours.rest["optimizer_states"]
    assert [group["params"] for group in a["param_groups"]] == [group["params"] for group in b["param_groups"]]
    for key in ("lr", "betas", "eps", "weight_decay"):
        assert a["param_groups"][0][key] == b["param_groups"][0][key]
    for number, entry in a["state"].items():
        for key in ("step", "exp_avg", "exp_avg_sq"):
            np.testing.assert_array_equal(
                b["state"][number][key].numpy(), entry[key].numpy(), err_msg=f"{number} {key}"
            )


def test_lightning_goes_on_where_the_run_was(workdir, tiny_config, tmp_path):
    """Its trainer takes its step from "loops", AdamW its rate from "lr", and a strict load needs the projector."""
    pytest.importorskip("torch", reason="needs the extra `torch`")
    convert(workdir, str(tmp_path / "all.ckpt"), train_state=True)
    content = open_weights(tmp_path / "all.ckpt").rest
    loop = content["loops"]["fit_loop"]
    assert loop["epoch_loop.state_dict"]["_batches_that_stepped"] == 1234
    progress = loop["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]["step"]
    assert progress["total"]["completed"] == progress["current"]["completed"] == 1234
    convert(workdir, str(tmp_path / "weights.ckpt"))
    assert open_weights(tmp_path / "weights.ckpt").tensors.keys() == open_weights(LIGHTNING).tensors.keys()
    convert(workdir, str(tmp_path / "network.ckpt"), projector=False)
    assert not any("proj." in name for name in open_weights(tmp_path / "network.ckpt").tensors if "diffusion" in name)

    bundle = read(workdir, ("ema", "online"), True, True)
    rate = bundle.config.optimizer.lr
    bundle.config.optimizer.decay_steps, bundle.config.train.steps = 2000, bundle.moments[0] + 500
    moments.write_ckpt(bundle, tmp_path / "falling.ckpt")
    (group, *_) = open_weights(tmp_path / "falling.ckpt").rest["optimizer_states"][0]["param_groups"]
    assert group["lr"] == pytest.approx(rate / 4) and group["initial_lr"] == rate
    assert read(str(tmp_path / "falling.ckpt"), ("ema", "online"), True, True).config.optimizer.lr == rate


@pytest.mark.parametrize("weights", ["ema", "online"])
def test_safetensors_there_and_back(workdir, tmp_path, weights):
    file = str(tmp_path / "x.safetensors")
    convert(workdir, file, weights=weights)
    assert stat.S_IMODE(pathlib.Path(file).stat().st_mode) & 0o044, "others may read it"
    assert_trees_equal(deco_jax.load_pretrained(file, weights)[1], deco_jax.load_pretrained(workdir, weights)[1])
    other = {"ema": "online", "online": "ema"}[weights]
    with pytest.raises(UsageError, match=f"holds no {other} weights, but: {weights}"):
        deco_jax.load_pretrained(file, other)
    theirs = {k: v.numpy() for k, v in networks.open_networks(LIGHTNING).weights(weights).items()}
    ours = load_file(file)
    assert set(ours) == set(theirs)
    for name, value in theirs.items():
        np.testing.assert_array_equal(ours[name], value)


def test_a_folder_for_hugging_face(workdir, tmp_path):
    folder = tmp_path / "hf"
    convert(workdir, str(folder), kind="huggingface")
    assert {"config.json", "model.safetensors", "README.md", "pipeline.py", "model_index.json"} <= {
        p.name for p in folder.iterdir()
    }
    assert_trees_equal(deco_jax.load_pretrained(str(folder))[1], deco_jax.load_pretrained(workdir)[1])
    config = json.loads((folder / "config.json").read_text())
    assert (config["kind"], config["width"], config["depth"], config["weights"]) == ("deco", 32, 2, "ema")
    assert "53,883" in (folder / "README.md").read_text()


@pytest.mark.slow
def test_the_card_of_a_run_says_how_it_was_trained(tiny_config, tmp_path):
    tiny_config.seed = 3
    train(tiny_config, str(tmp_path / "run"))
    convert(str(tmp_path / "run"), str(tmp_path / "hf"), kind="huggingface")
    card = (tmp_path / "hf" / "README.md").read_text()
    for text in ("| data | digits |", "| batch | 16 |", "lr 0.001", "| step | 6 |", "| loss | "):
        assert text in card
    convert(str(tmp_path / "run"), str(tmp_path / "again"), train_state=True)
    (where, step), (there, _) = (store.find_checkpoint(str(tmp_path / name)) for name in ("run", "again"))
    assert step == 6 and store.read_meta(there, 6)["converted_from"] == str(tmp_path / "run")
    ours, theirs = (read(str(tmp_path / name), ("ema", "online"), True, True) for name in ("again", "run"))
    assert_trees_equal((ours.ema, ours.online, ours.moments), (theirs.ema, theirs.online, theirs.moments))
    assert where != there
    tiny_config.train.steps = 7
    train(tiny_config, str(tmp_path / "again"))  # nothing of the run's configuration was lost


def test_one_more_step_is_the_step_that_torch_takes(workdir):
    """The same gradients, given to torch's AdamW after loading its state, and to ours."""
    torch = pytest.importorskip("torch", reason="needs the extra `torch`")
    content = torch.load(LIGHTNING, weights_only=True)
    named = {k: v for k, v in content["state_dict"].items() if not k.startswith("ema_denoiser.")}
    parameters = {k: torch.nn.Parameter(v.clone()) for k, v in named.items()}
    denoiser, projector = ([v for k, v in parameters.items() if k.startswith(p)] for p in ("denoiser", "diffusion"))
    optimizer = torch.optim.AdamW([{"params": denoiser}, {"params": projector}], lr=1.0)
    optimizer.load_state_dict(content["optimizer_states"][0])
    rng = np.random.default_rng(0)
    gradients = {k: rng.normal(0, 1e-2, v.shape).astype(np.float32) for k, v in parameters.items()}
    for name, parameter in parameters.items():
        parameter.grad = torch.from_numpy(gradients[name])
    optimizer.step()

    bundle = read(workdir, ("ema", "online"), True, True)
    train_step = make_train_step(bundle.config)
    params = {"network": bundle.online, "projector": bundle.projector}
    zero = np.int32(0)
    count, mu, nu = bundle.moments
    opt_state = abstract_on_host(bundle.config).opt_state
    opt_state = optax.tree_utils.tree_set(opt_state, count=np.int32(count), mu=mu, nu=nu)
    state = TrainState(np.int32(bundle.step), params, bundle.ema, opt_state, zero, zero)

    def cut(prefix):
        return {k.removeprefix(prefix): v for k, v in gradients.items() if k.startswith(prefix)}

    tree = {
        "network": translate.from_torch(names.DECO, cut("denoiser."), bundle.online),
        "projector": translate.from_torch(names.PROJECTOR, cut("diffusion_trainer."), bundle.projector),
    }
    state, _ = jax.jit(train_step.update)(state, tree, {"loss": np.float32(1)})
    ours = {f"denoiser.{k}": v for k, v in translate.to_torch(names.DECO, state.params["network"]).items()}
    ours |= {
        f"diffusion_trainer.{k}": v for k, v in translate.to_torch(names.PROJECTOR, state.params["projector"]).items()
    }
    for name, before in named.items():
        moved = parameters[name].detach().numpy() - before.numpy()
        assert relative_error(ours[name] - before.numpy(), moved) < 1e-3, (
            name
        )  # fp32 keeps four digits of 1e-4 beside 1
        assert relative_error(ours[name], parameters[name].detach().numpy()) < 1e-6, name


@pytest.mark.slow
def test_training_goes_on_in_a_converted_workdir(tmp_path):
    """Step, optimiser and place in the data are taken over; settings the file knows nothing of are free."""
    config = new_tiny_config()
    target = tmp_path / "run"
    convert(LIGHTNING, str(target), train_state=True, projector=False)
    sizes = networks.open_networks(LIGHTNING).sizes
    config.model.update(sizes)
    config.train.update(steps=1236, log_every=1)
    before = read(str(target), ("ema", "online"), True, False)
    train(config, str(target))
    assert store.find_checkpoint(str(target))[1] == 1236
    assert [json.loads(line)["step"] for line in (target / "metrics.jsonl").open()] == [1235, 1236]
    after = read(str(target), ("ema", "online"), True, False)
    assert (before.moments[0], after.moments[0]) == (1, 3)
    first = [bundle.moments[1]["network"]["decoder"]["out"]["kernel"] for bundle in (before, after)]
    assert np.abs(first[0]).max() > 0 and np.abs(first[1] - 0.9**2 * first[0]).max() < np.abs(first[1]).max()
    config.model.depth = 3
    with pytest.raises(UsageError, match="model.depth: 2 there, 3 here"):
        train(config, str(target))
    convert(LIGHTNING, str(tmp_path / "weights"))
    config.model.depth = 2
    with pytest.raises(UsageError, match="without an optimiser's state; start another workdir with"):
        train(config, str(tmp_path / "weights"))
    config.train.update(init_from=str(tmp_path / "weights"), steps=1)
    train(config, str(tmp_path / "fine_tuned"))


def test_nothing_is_lost_when_writing_fails(workdir, tmp_path, monkeypatch):
    file = tmp_path / "x.safetensors"
    convert(workdir, str(file))
    before = file.read_bytes()
    with pytest.raises(UsageError, match="exists; choose another name or pass --force"):
        convert(workdir, str(file))

    def full_disk(*_, **__):
        raise OSError("No space left on device")

    monkeypatch.setattr(module.folder, "save_file", full_disk)
    for name, kind in (("x.safetensors", None), ("hf", "huggingface")):
        with pytest.raises(UsageError, match=f"{name} cannot be written: No space left on device"):
            convert(workdir, str(tmp_path / name), kind=kind, force=True)
    assert file.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


def test_force_replaces_a_folder_whole(workdir, tmp_path):
    target = tmp_path / "hf"
    convert(workdir, str(target), kind="huggingface", weights="online")
    convert(workdir, str(target), kind="huggingface", force=True)
    assert json.loads((target / "config.json").read_text())["weights"] == "ema"
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]
    assert stat.S_IMODE((target / "model.safetensors").stat().st_mode) & 0o044, "others may read it"


def test_force_replaces_nothing_that_was_not_made_by_converting(workdir, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("years")
    (tmp_path / "link").symlink_to(workdir)
    for target, message in (
        (tmp_path / "thesis", "holds thesis.tex; --force does not replace it"),
        (tmp_path / "link", "is, or holds, the source itself"),
        (pathlib.Path(workdir) / "checkpoints", "is a part of the source"),
        (pathlib.Path(workdir) / ".." / pathlib.Path(workdir).name, "is, or holds, the source itself"),
    ):
        with pytest.raises(UsageError, match=message):
            convert(workdir, str(target), force=True)
    assert (tmp_path / "thesis" / "thesis.tex").read_text() == "years"
    others = {"theirs/checkpoints/last.ckpt", "trained/transformer/diffusion_pytorch_model.safetensors"}
    for place in others:
        file = tmp_path / place
        file.parent.mkdir(parents=True)
        file.write_text("weeks")
        with pytest.raises(UsageError, match="was not made by converting"):
            convert(workdir, str(file.parents[1]), kind="huggingface", force=True)
        assert file.read_text() == "weeks"
    run = tmp_path / "run"
    shutil.copytree(workdir, run)
    (step,) = (run / "checkpoints").iterdir()
    shutil.copytree(step, run / "checkpoints" / "1300")
    with pytest.raises(UsageError, match="holds checkpoints of a run"):
        convert(LIGHTNING, str(run), force=True)
    shutil.rmtree(step)
    convert(LIGHTNING, str(run), force=True)
    deco_jax.load_pretrained(workdir)


def test_a_workdir_is_its_checkpoints_whatever_lies_beside_them(workdir, tmp_path):
    target = str(tmp_path / "run")
    convert(LIGHTNING, target)
    convert(LIGHTNING, target + "/x.safetensors", weights="online")
    assert_trees_equal(deco_jax.load_pretrained(target)[1], deco_jax.load_pretrained(workdir)[1])


@pytest.mark.parametrize("prefix, has", [("denoiser.", "online"), ("ema_denoiser.", "ema")])
def test_a_file_with_one_set_serves_as_both(tmp_path, prefix, has):
    tensors = {k: v.numpy() for k, v in open_weights(LIGHTNING).tensors.items() if k.startswith(prefix)}
    save_file(tensors, tmp_path / "slim.safetensors")
    convert(str(tmp_path / "slim.safetensors"), str(tmp_path / "run"))
    expected = deco_jax.load_pretrained(LIGHTNING, has)[1]
    for weights in ("ema", "online"):
        assert_trees_equal(deco_jax.load_pretrained(str(tmp_path / "run"), weights)[1], expected)


def test_converted_weights_start_an_aligned_run_and_remember_their_teacher(tiny_config, tmp_path):
    """A run with alignment, converted as weights: no projector is there, so the new run makes its own."""
    tiny_config.loss.update(alignment_weight=0.5, alignment_layer=1, alignment_features=24)
    train_step, layout = make_train_step(tiny_config), make_layout(tiny_config.mesh)
    abstract = abstract_state(train_step, layout)
    network = jax.tree.map(lambda x: np.full(x.shape, 0.5, np.float32), abstract.ema)
    write_checkpoint(
        Bundle(tiny_config, network, network, fingerprint="digits", frozen={"teacher": "abc"}), tmp_path / "run"
    )
    convert(str(tmp_path / "run"), str(tmp_path / "copy"))
    meta = store.read_meta(*store.find_checkpoint(str(tmp_path / "copy")))
    assert store.frozen_digests(meta) == {"teacher": "abc"}
    tiny_config.train.init_from = str(tmp_path / "copy")
    state = first_state(train_step, abstract, layout, find_weights(tiny_config))
    assert_trees_equal(state.params["network"], network)
    projector = jax.tree.leaves(state.params["projector"])
    assert all(isinstance(x, jax.Array) for x in projector) and any(np.any(x != 0.5) for x in projector)


def test_a_name_that_cannot_be_is_one_line(workdir, tmp_path):
    with pytest.raises(UsageError, match="cannot be written: .*File name too long"):
        convert(workdir, str(tmp_path / ("x" * 300)))


@pytest.mark.parametrize("case", ["baseline_dit", "pixnerd"])
def test_the_comparison_networks_open_compute_and_convert(tmp_path, case):
    """From a file of PyTorch's, from a checkpoint made of it, and from a folder made of that."""
    g = Golden(case)
    save_file(g.group("param:"), tmp_path / "x.safetensors", {"prediction": "velocity"})
    convert(str(tmp_path / "x.safetensors"), str(tmp_path / "run"))
    convert(str(tmp_path / "run"), str(tmp_path / "hf"), kind="huggingface")
    for name in ("x.safetensors", "run", "hf"):
        model, params = deco_jax.load_pretrained(str(tmp_path / name))
        assert {field: getattr(model, field) for field in g.sizes()} == g.sizes()
        v = model.clone(dtype=np.float32).apply({"params": params}, g.image("x"), g["t"], g["y"].astype(np.int32))
        assert relative_error(v, g.image("out")) < 2e-5
    for name, value in load_file(tmp_path / "hf" / "model.safetensors").items():
        np.testing.assert_array_equal(value, g[f"param:{name}"])
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["kind"] == g.kind
    files = {path.name for path in (tmp_path / "hf").iterdir()}
    assert files == {"config.json", "model.safetensors", "README.md"}, "diffusers and PyTorch know only DeCo"
    assert "DeCo.from_safetensors" not in (tmp_path / "hf" / "README.md").read_text()


def test_the_text_conditional_network_opens_computes_and_converts(tmp_path):
    """From a file of PyTorch's, through a checkpoint, a folder and a .ckpt; PyTorch computes the same from there."""
    torch = pytest.importorskip("torch")
    from deco_jax.export import torch_model

    g = Golden("deco_t2i")
    save_file(g.group("param:"), tmp_path / "x.safetensors", {"dtype": "float32"})
    convert(str(tmp_path / "x.safetensors"), str(tmp_path / "run"))
    convert(str(tmp_path / "run"), str(tmp_path / "hf"), kind="huggingface")
    convert(str(tmp_path / "hf"), str(tmp_path / "x.ckpt"))
    for name in ("x.safetensors", "run", "hf", "x.ckpt"):
        model, params = deco_jax.load_pretrained(str(tmp_path / name), dtype="float32")
        assert {field: getattr(model, field) for field in g.sizes()} == g.sizes()
        v = model.apply({"params": params}, g.image("x"), g["t"], g["text"])
        assert relative_error(v, g.image("out")) < 2e-5
    for name, value in load_file(tmp_path / "hf" / "model.safetensors").items():
        np.testing.assert_array_equal(value, g[f"param:{name}"])
    theirs = torch_model.DeCo.from_pretrained(tmp_path / "hf")
    with torch.no_grad():
        out = theirs(*(torch.tensor(g[name]) for name in ("x", "t", "text")))
    assert relative_error(out.numpy(), g["out"]) < 2e-5
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "text-to-image" in card and "| text | 12 tokens of 48 channels; 2 blocks of their own |" in card
    call = "prompt='a photo of a cat', num_inference_steps=25, guidance_scale=4.0"
    index = json.loads((tmp_path / "hf" / "model_index.json").read_text())
    assert call in card
    assert "text_encoder_name" not in index and "text encoder |" not in card, "nobody says what has 48 channels"
    with pytest.raises(UsageError, match=r"does not say which text encoder .* 48 channels; name it: --text-encoder"):
        open_encoder(open_pretrained(str(tmp_path / "hf")), None)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["nothing.ckpt", "x"], "nothing.ckpt does not exist"),
        ([LIGHTNING, "x", "--format=onnx"], "--format=onnx is not known; allowed: checkpoint, safetensors"),
        ([LIGHTNING, "ftp://host/x"], "ftp://host/x is no address that can be read; allowed: gs://, s3://"),
        (
            [LIGHTNING, "x.onnx"],
            "x.onnx: nothing is written as .onnx; allowed: .safetensors, .ckpt, .pt, .pth, or a fold",
        ),
        ([LIGHTNING, "x.pt", "--format=huggingface"], "x.pt would hold a huggingface, but its ending .pt says pt"),
        ([LIGHTNING, "x", "--weights=both"], "--weights=both is not known"),
        ([LIGHTNING, "x.safetensors", "--train-state"], "--train-state needs a checkpoint or .ckpt as target"),
    ],
)
def test_mistakes_are_one_line(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        main(["convert", *arguments])
    assert end.value.code == 2 and message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_missing_and_left_over_tensors_are_listed(tmp_path, workdir):
    convert(workdir, str(tmp_path / "x.safetensors"))
    tensors = load_file(tmp_path / "x.safetensors")
    del tensors["blocks.1.norm2.weight"]
    tensors["extra.weight"] = np.zeros(3, np.float32)
    save_file(tensors, tmp_path / "y.safetensors")
    with pytest.raises(
        UsageError, match=r"y\.safetensors: .*missing blocks\.1\.norm2\.weight; unexpected extra\.weight"
    ):
        deco_jax.load_pretrained(str(tmp_path / "y.safetensors"))
