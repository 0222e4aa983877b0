"""The PyTorch network against the recorded one and against ours: same names, numbers, images."""

import ast
import json
import pathlib
import re
import runpy
import shutil
import sys

import jax
import numpy as np
import pytest
from flax import linen as nn
from PIL import Image

import deco_jax
from deco_jax.pretrained import names
from deco_jax.training.step import make_train_step

torch = pytest.importorskip("torch", reason="needs the extra `torch`")
safetensors_numpy = pytest.importorskip("safetensors.numpy", reason="needs the extra `torch`")
from deco_jax.export import torch_model  # noqa: E402
from deco_jax.export.torch_model import DeCo, infer_architecture, to_uint8  # noqa: E402
from deco_jax.weights import translate  # noqa: E402
from tests.helpers import Golden, relative_error  # noqa: E402

torch.set_num_threads(1)  # the networks are tiny
CASES = ["deco_c2i", "deco_c2i_wide", "deco_t2i"]
FILE = pathlib.Path(torch_model.__file__)
DOCS = pathlib.Path(__file__).parents[2] / "docs/pytorch.md"


def network(g, prefix="param:"):
    return DeCo.from_state_dict({name: torch.tensor(value) for name, value in g.group(prefix).items()})


def inputs(g):
    condition = g["text"] if "text" in g.arrays else g["y"]
    return torch.tensor(g["x"]), torch.tensor(g["t"]), torch.tensor(condition)


def largest_error(ours, theirs):
    assert ours.keys() == theirs.keys()
    return max(relative_error(ours[name], theirs[name]) for name in theirs)


def small(**condition):
    """Makes networks of one block each, with weights that hide nothing behind zeros."""
    torch.manual_seed(0)
    return DeCo(8, width=16, depth=1, heads=2, decoder_width=4, decoder_depth=1, **condition)


@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients_equal_the_recorded_ones(case):
    g = Golden(case)
    model, (x, t, y) = network(g), inputs(g)
    x.requires_grad_()
    tokens = []
    model.blocks[g.config["align_layer"] - 1].register_forward_hook(lambda *call: tokens.append(call[-1]))
    v = model(x, t, y)
    loss = (v - torch.tensor(g["target"])).square().mean()
    loss.backward()
    assert v.dtype == torch.float32
    errors = {
        "out": relative_error(v.detach(), g["out"]),
        "loss": relative_error(loss.detach(), g["loss"]),
        "tokens": relative_error(tokens[0].detach(), g[f"hidden_after_block{g.config['align_layer']}"]),
    }
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert max(errors.values()) < 2e-5, errors
    assert largest_error(gradients, g.group("grad:")) < 1e-4
    if "grad_x" in g.arrays:
        assert relative_error(x.grad, g["grad_x"]) < 1e-4


@pytest.mark.parametrize(("size", "millions"), [("deco_l", 426.938), ("deco_xl", 682.283), ("deco_t2i_xxl", 1133.759)])
def test_published_sizes_have_the_published_names_and_shapes(full_size_shapes, size, millions):
    shapes = full_size_shapes[size]
    published = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    with torch.device("meta"):
        model = DeCo(**infer_architecture(published))
    assert {name: list(value.shape) for name, value in model.state_dict().items()} == shapes
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 3) == millions


def test_every_size_is_inferred():
    """Sizes all differ, so that none can stand in for another."""
    sizes = {"patch_size": 6, "width": 48, "depth": 1, "heads": 4, "decoder_width": 20, "decoder_depth": 3}
    text = {"text_features": 11, "text_tokens": 5, "text_depth": 2}
    for condition in ({"num_classes": 7}, text):
        model = DeCo(**sizes, **condition)
        assert infer_architecture(model.state_dict()) == sizes | condition
        again = DeCo.from_state_dict(model.state_dict())
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_samples_equal_the_recorded_ones():
    g, s = Golden("deco_c2i"), Golden("sample_deco_c2i")
    c = s.config
    images = network(g).sample(
        s["condition"],
        torch.tensor(s["null_condition"]),
        noise=torch.tensor(s["noise"]),
        steps=c["num_steps"],
        guidance=c["guidance"],
        guidance_interval=(c["guidance_interval_min"], c["guidance_interval_max"]),
    )
    assert relative_error(images, s["samples"]) < 2e-5


@pytest.mark.parametrize(
    "settings",
    [
        {"steps": 5, "guidance": 2.0, "shift": 3.0},
        {"steps": 10, "guidance": 3.0, "guidance_interval": (0.1, 0.8)},  # both ends are steps: open, closed
        {"steps": 10, "guidance": 3.0, "guidance_interval": (0.1, 0.8), "solver": "adams1"},  # and open, open
        {"steps": 50, "guidance": 3.0, "guidance_interval": (0.1, 0.9)},  # the last bit of fp32 decides
        {"steps": 6, "guidance": 4.0, "shift": 3.0, "solver": "adams2"},
        {"steps": 7, "guidance": 2.0, "shift": 2.0, "solver": "adams3"},
        {"steps": 7, "solver": "adams4"},
        {"steps": 2, "solver": "adams4"},
    ],
)
def test_samples_equal_ours(settings):
    g, s = Golden("deco_c2i"), Golden("sample_deco_c2i")
    ours = deco_jax.sample(g.model(), g.params(), s["condition"].tolist(), noise=s.image("noise"), **settings)
    theirs = network(g).sample(s["condition"].tolist(), noise=torch.tensor(s["noise"]), **settings)
    assert relative_error(theirs.movedim(1, -1), ours) < 2e-5


def test_guidance_by_text_takes_one_null_text_for_all():
    g = Golden("deco_t2i")
    model, (noise, _, text) = network(g), inputs(g)
    null = torch.tensor(g["text"][0, ::-1].copy())
    settings = {"noise": noise, "steps": 3, "guidance": 2.0}
    one, each = model.sample(text, null, **settings), model.sample(text, null.repeat(2, 1, 1), **settings)
    assert torch.equal(one, each)
    assert not torch.allclose(one, model.sample(text, null, **settings | {"guidance": 1.0}))


def test_positions_on_an_oblong(monkeypatch):
    """docs/model.md, 2.6 and 4, which the recorded squares cannot tell apart: by text, x runs to H/p and y to W/p."""
    calls = []

    def noted(rows, columns, head_dim, x_max, y_max, device):
        calls.append((rows, columns, x_max, y_max))
        return rotary_angles(rows, columns, head_dim, x_max, y_max, device)

    rotary_angles = torch_model.rotary_angles
    slots = rotary_angles(2, 3, 4, 6, 9, "cpu")  # heads of 4: slot 0 turns by x, slot 1 by y
    assert slots.tolist() == [[0, 0], [3, 0], [6, 0], [0, 9], [3, 9], [6, 9]]
    monkeypatch.setattr(torch_model, "rotary_angles", noted)
    small(num_classes=4).sample([1], image_size=(16, 24), steps=1)
    small(text_features=5, text_tokens=3, text_depth=1).sample(torch.zeros(1, 3, 5), image_size=(16, 24), steps=1)
    assert calls == [(2, 3, 16, 16), (2, 3, 2, 3), (8, 8, 8, 8)]


def test_weights_we_trained_give_the_same_velocities_in_both(tiny_config, tmp_path):
    """Three of our own training steps, exported as safetensors; online weights and moving average."""
    tiny_config.optimizer.lr, tiny_config.ema.decay = 0.05, 0.5
    train_step = make_train_step(tiny_config)
    draw = np.random.default_rng(0)
    labels = draw.integers(0, 11, 16).astype(np.int32)
    batch = {"image": draw.integers(0, 256, (16, 28, 28, 3), np.uint8), "label": labels % 10}
    state = jax.eval_shape(lambda: nn.meta.unbox(train_step.initial_state()))
    network_params = jax.tree.map(lambda p: draw.normal(0, 0.2, p.shape).astype(np.float32), state.ema)
    state = jax.tree.map(lambda p: np.zeros(p.shape, p.dtype), state)
    state = state.replace(params=state.params | {"network": network_params}, ema=network_params)
    step = jax.jit(train_step)
    for _ in range(3):
        state, _ = step(state, batch)

    x, t = draw.normal(size=(16, 3, 28, 28)).astype(np.float32), draw.uniform(size=16).astype(np.float32)
    ours = jax.jit(lambda params: train_step.network.apply({"params": params}, np.moveaxis(x, 1, -1), t, labels))
    velocities = []
    for params in (state.params["network"], state.ema):
        safetensors_numpy.save_file(translate.to_torch(names.DECO, params), tmp_path / "w.safetensors")
        model = DeCo.from_safetensors(tmp_path / "w.safetensors")
        theirs = model(*map(torch.tensor, (x, t, labels))).detach()
        assert relative_error(theirs.movedim(1, -1), ours(params)) < 2e-5
        velocities.append(theirs)
    assert relative_error(*velocities) > 0.1, "the average is the weights: nothing was trained"


def test_a_file_may_name_its_architecture(tmp_path):
    g, path = Golden("deco_c2i"), tmp_path / "w.safetensors"

    def opened(architecture):
        safetensors_numpy.save_file(g.group("param:"), path, {"architecture": json.dumps(architecture)})
        return DeCo.from_safetensors(path, dtype=torch.bfloat16)

    assert opened({"kind": "deco"} | g.sizes()).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="of a pixnerd network"):
        opened({"kind": "pixnerd"} | g.sizes())
    with pytest.raises(RuntimeError, match="blocks.2.norm1.weight"):
        opened(g.sizes() | {"depth": 2})


def test_other_tensors_are_refused_by_name(full_size_shapes):
    g = Golden("deco_c2i")
    baseline = {name: torch.empty(shape, device="meta") for name, shape in full_size_shapes["baseline_l"].items()}
    with pytest.raises(ValueError, match="not the parameters of a DeCo: s_embedder.proj.weight is missing"):
        DeCo.from_state_dict(baseline)
    tensors = network(g).state_dict()
    del tensors["dec_net.cond_embed.bias"]
    with pytest.raises(RuntimeError, match="dec_net.cond_embed.bias"):
        DeCo.from_state_dict(tensors)


def compiled(model, backend):
    """Compiles `forward`, where a graph break is an error; returns the list to which every graph is added."""
    graphs = []

    def note(graph, args):
        graphs.append(graph)
        return torch._dynamo.lookup_backend(backend)(graph, args)

    torch._dynamo.reset()
    model.compile(backend=note, fullgraph=True)
    return graphs


def test_compiles_without_graph_breaks():
    x, t = torch.randn(2, 3, 16, 24), torch.tensor([0.2, 0.7])
    labels, text = torch.tensor([0, 4]), torch.randn(2, 3, 5)
    for y, condition, backend in (
        (labels, {"num_classes": 4}, "aot_eager"),  # aot_eager traces the backward pass too
        (text, {"text_features": 5, "text_tokens": 3, "text_depth": 1}, "eager"),
    ):
        model = small(**condition)
        plain = model(x, t, y)
        graphs = compiled(model, backend)
        v = model(x, t, y)
        v.square().mean().backward()
        assert relative_error(v.detach(), plain.detach()) < 1e-6
        assert len(graphs) == 1


def test_sampling_uses_the_compiled_network_once_it_is_compiled():
    """And compiles it twice at most, for steps without guidance and with, whatever their number."""
    model, noise = small(num_classes=4), torch.randn(2, 3, 16, 16)
    plain = model.sample([1, 2], noise=noise, steps=5, guidance=2.0)
    graphs = compiled(model, "eager")
    assert relative_error(model.sample([1, 2], noise=noise, steps=5, guidance=2.0), plain) < 1e-6
    assert len(graphs) == 2


@pytest.mark.parametrize("case", ["deco_c2i", "deco_t2i"])
def test_bfloat16_by_autocast_or_by_weights(case):
    g = Golden(case)
    model, args = network(g), inputs(g)
    with torch.autocast("cpu", torch.bfloat16):
        v = model(*args)
    assert v.dtype == torch.float32
    assert 1e-4 < relative_error(v.detach(), g["out"]) < 3e-2, "bf16 has 8 bits: neither exact nor far off"
    v.mean().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())
    v = model.to(torch.bfloat16)(*args)
    assert v.dtype == torch.float32
    assert relative_error(v.detach(), g["out"]) < 3e-2


@pytest.mark.parametrize("autocast", [True, False])
def test_norms_compute_in_fp32_and_round_once(autocast):
    """Computed in bf16, with a rounding at every operation, a third of the numbers would be others."""
    torch.manual_seed(0)
    x, norm = torch.randn(8, 256, dtype=torch.bfloat16), torch_model.RMSNorm(256)
    torch.nn.init.normal_(norm.weight)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        normed = norm(x)
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight
    assert normed.dtype == torch.bfloat16
    assert (normed != exact.to(torch.bfloat16)).float().mean() < 0.002


def test_noise_is_a_function_of_the_generator():
    model = network(Golden("deco_c2i_wide"))

    def draw(seed):
        return model.sample([1], image_size=(8, 12), steps=1, generator=torch.Generator().manual_seed(seed))

    assert draw(0).shape == (1, 3, 8, 12)
    assert torch.equal(draw(0), draw(0)) and not torch.equal(draw(0), draw(1))


def test_bad_arguments_are_named():
    model, text_model = network(Golden("deco_c2i")), network(Golden("deco_t2i"))
    text = torch.zeros(1, 12, 48)
    with pytest.raises(ValueError, match="30×32 pixels do not divide into patches of 8×8"):
        model(torch.zeros(1, 3, 30, 32), torch.zeros(1), torch.zeros(1, dtype=torch.int64))
    for labels in ([11], [-1], [0.5], [[1]]):
        with pytest.raises(ValueError, match=r"\(B,\) integers up to 10"):
            model.sample(labels, image_size=32)
    with pytest.raises(ValueError, match="image_size=… or noise=…"):
        model.sample([1])
    with pytest.raises(ValueError, match="steps=0 must be at least 1"):
        model.sample([1], image_size=32, steps=0)
    with pytest.raises(ValueError, match="solver='heun' is not known; allowed: euler, adams1, adams2, adams3, adams4"):
        model.sample([1], image_size=32, solver="heun")
    with pytest.raises(ValueError, match="either num_classes or text_features"):
        DeCo(8, 16, 1, 2, 4, 1)
    with pytest.raises(ValueError, match="needs null=…"):
        text_model.sample(text, image_size=32, guidance=2.0)
    with pytest.raises(ValueError, match=r"\(B, \*\(12, 48\)\); got \(1, 11, 48\)"):
        text_model.sample(text[:, 1:], image_size=32)


def test_bytes_are_those_of_our_images():
    """The published rounding (docs/model.md, 6): both ends reachable, ½ rounds up."""
    x = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0])[None, None, None].expand(1, 3, 1, 5)
    assert to_uint8(x)[0, 0, :, 0].tolist() == [0, 0, 128, 255, 255]


def test_the_file_can_be_copied_into_any_project():
    """It imports torch, safetensors and Python's own modules, nothing else and nothing of ours."""
    imported = set()
    for node in ast.walk(ast.parse(FILE.read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0
            imported.add(node.module.split(".")[0])
    assert imported - set(sys.stdlib_module_names) == {"torch", "safetensors"}


def test_without_torch_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ImportError, match=re.escape("pip install torch")):
        runpy.run_path(str(FILE))


def test_the_ten_lines_of_the_docs_run(tmp_path, monkeypatch):
    """docs/pytorch.md's first Python block in a folder with the copied file and a small xl.safetensors."""
    code = re.search(r"```python\n(.*?)```", DOCS.read_text(), re.S)[1]
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    assert "steps=100" in code
    shutil.copy(FILE, tmp_path)
    small = DeCo(16, width=16, depth=1, heads=2, decoder_width=4, decoder_depth=1, num_classes=1000)
    weights = {name: value.numpy() for name, value in small.state_dict().items()}
    safetensors_numpy.save_file(weights, tmp_path / "xl.safetensors")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    exec(code.replace("steps=100", "steps=3"), {})
    del sys.modules["torch_model"]
    for name in ("0.png", "1.png"):
        assert Image.open(name).size == (256, 256)
