"""The teacher: PyTorch's bicubic, the network against recorded and live PyTorch, and its weights from either layout."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from deco_jax.encoders.dinov2.bicubic import resize_bicubic
from deco_jax.encoders.dinov2.model import SIZES, DINOv2, prepare_image
from deco_jax.encoders.dinov2.weights import from_tensors, parameter_shapes, read_dinov2
from deco_jax.errors import UsageError
from deco_jax.parallel import mesh as meshes
from deco_jax.weights.files import open_weights
from tests.helpers import Golden, relative_error

HEADS = 2  # of the recorded network, whose width of 32 does not tell


@pytest.fixture(scope="module")
def recorded():
    return Golden("dinov2")


def features_of(model, params, image):
    model = model.clone(dtype=jnp.float32)
    return np.asarray(jax.jit(model.apply)({"params": params}, image))


def hugging_face(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Official names → those of facebook/dinov2-base's model.safetensors."""
    renamed = {}
    for name, value in tensors.items():
        for old, new in (
            ("cls_token", "embeddings.cls_token"),
            ("mask_token", "embeddings.mask_token"),
            ("pos_embed", "embeddings.position_embeddings"),
            ("patch_embed.proj", "embeddings.patch_embeddings.projection"),
            ("blocks.", "encoder.layer."),
            (".attn.proj.", ".attention.output.dense."),
            (".ls1.gamma", ".layer_scale1.lambda1"),
            (".ls2.gamma", ".layer_scale2.lambda1"),
        ):
            name = name.replace(old, new)
        name = f"layer{name}" if name.startswith("norm.") else name
        if ".attn.qkv." in name:
            for part, rows in zip(("query", "key", "value"), np.split(value, 3), strict=True):
                renamed[name.replace(".attn.qkv.", f".attention.attention.{part}.")] = rows
        else:
            renamed[name] = value
    return renamed


def transformers_5(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Those that transformers 5 gives its modules."""
    renamed = hugging_face(tensors)
    for old, new in (
        ("attention.attention.query", "attention.q_proj"),
        ("attention.attention.key", "attention.k_proj"),
        ("attention.attention.value", "attention.v_proj"),
        ("attention.output.dense", "attention.o_proj"),
    ):
        renamed = {name.replace(old, new): value for name, value in renamed.items()}
    return renamed


def test_the_image_is_prepared_as_recorded(recorded):
    resized = prepare_image(jnp.asarray(recorded.image("image")))
    assert relative_error(resized, recorded.image("resized")) < 1e-6


@pytest.mark.parametrize("scan", [True, False])
def test_features_are_those_recorded(recorded, scan):
    model, params = from_tensors(recorded.group("param:"), HEADS)
    features = features_of(model.clone(scan=scan), params, recorded.image("image"))
    assert relative_error(features, recorded["features"]) < 2e-6


def test_the_recorded_network_has_the_position_offset(recorded):
    """Guards the 0.1: without it every feature is a little wrong and nothing else notices."""
    model, params = from_tensors(recorded.group("param:"), HEADS)
    features = features_of(model.clone(position_offset=0.0), params, recorded.image("image"))
    assert 1e-3 < relative_error(features, recorded["features"]) < 1e-2


def test_bfloat16_is_near_and_keeps_fp32_features(recorded):
    model, params = from_tensors(recorded.group("param:"), HEADS)
    features = model.clone(dtype=jnp.bfloat16).apply({"params": params}, recorded.image("image"))
    assert features.dtype == jnp.float32
    assert 1e-4 < relative_error(features, recorded["features"]) < 1e-2


@pytest.mark.parametrize(
    ("size", "new"),
    [
        ((256, 256), (224, 224)),
        ((512, 256), (448, 224)),
        ((37, 37), (16, 16)),
        ((7, 5), (19, 4)),
        ((9, 9), (9, 9)),
        ((1, 3), (2, 1)),
    ],
)
@pytest.mark.parametrize("antialias", [False, True])
def test_bicubic_by_size_is_that_of_pytorch(size, new, antialias):
    torch = pytest.importorskip("torch")
    x = np.random.default_rng(0).standard_normal((2, *size, 3)).astype(np.float32)
    theirs = torch.nn.functional.interpolate(
        torch.tensor(x).permute(0, 3, 1, 2), size=new, mode="bicubic", antialias=antialias
    )
    assert relative_error(resize_bicubic(x, *new, antialias=antialias), theirs.permute(0, 2, 3, 1)) < 2e-6


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize(("rows", "columns"), [(16, 16), (32, 32), (16, 24), (37, 64), (1, 2)])
def test_bicubic_by_scale_factor_is_that_of_pytorch(rows, columns, antialias):
    torch = pytest.importorskip("torch")
    scales = (rows + 0.1) / 37, (columns + 0.1) / 37
    table = np.random.default_rng(1).standard_normal((1, 37, 37, 4)).astype(np.float32)
    theirs = torch.nn.functional.interpolate(
        torch.tensor(table).permute(0, 3, 1, 2), scale_factor=scales, mode="bicubic", antialias=antialias
    ).permute(0, 2, 3, 1)
    assert relative_error(resize_bicubic(table, rows, columns, scales, antialias), theirs) < 2e-6


@pytest.mark.parametrize("layout", [hugging_face, transformers_5])
def test_other_layouts_hold_the_same_network(recorded, layout):
    tensors = recorded.group("param:")
    ours, params = from_tensors(tensors, HEADS)
    theirs, same = from_tensors(layout(tensors), HEADS)
    assert theirs == ours
    jax.tree.map(np.testing.assert_array_equal, same, params)


def test_files_of_both_kinds_give_the_recorded_features(recorded, tmp_path):
    torch = pytest.importorskip("torch")
    safetensors = pytest.importorskip("safetensors.numpy")
    tensors = recorded.group("param:")
    official = tmp_path / "dinov2_vitb14_pretrain.pth"
    torch.save({name: torch.tensor(value) for name, value in tensors.items()}, official)
    folder = tmp_path / "dinov2-base"
    folder.mkdir()
    safetensors.save_file(
        {name: np.ascontiguousarray(value) for name, value in hugging_face(tensors).items()},
        folder / "model.safetensors",
    )
    (folder / "config.json").write_text(json.dumps({"num_attention_heads": HEADS, "hidden_act": "gelu"}))
    for model, params in (from_tensors(open_weights(official).tensors, HEADS), read_dinov2(folder)):
        assert model.dtype == jnp.bfloat16
        assert relative_error(features_of(model, params, recorded.image("image")), recorded["features"]) < 2e-6


def randomise(module) -> None:
    """Nothing may hide behind a zero bias or a factor of one."""
    import torch

    torch.manual_seed(0)
    with torch.no_grad():
        for name, p in module.named_parameters():
            p.normal_(0, 0.02 if p.ndim > 1 else 0.2)
            if ("norm" in name and name.endswith("weight")) or "lambda" in name:
                p.add_(1)


def transformers_features(module, image) -> np.ndarray:
    """Patch features of transformers' module for the image as we prepare it."""
    import torch

    pixels = torch.tensor(np.moveaxis(np.asarray(prepare_image(image)), -1, 1))
    with torch.no_grad():
        hidden = module(pixels).last_hidden_state
    return hidden[:, 1 + getattr(module.config, "num_register_tokens", 0) :].numpy()


def test_base_agrees_with_transformers_but_for_the_position_offset():
    """transformers interpolates positions by size, Meta's own code (and the recorded network) by scale factor."""
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    with torch.device("meta"):  # its own initialisation takes long and is not wanted
        module = transformers.Dinov2Model(transformers.Dinov2Config(image_size=518)).eval()
    module.to_empty(device="cpu")
    randomise(module)
    model, params = from_tensors({name: p.detach().numpy() for name, p in module.state_dict().items()})
    assert (model.width, model.depth, model.heads, model.table_side) == (768, 12, 12, 37)

    image = np.random.default_rng(2).random((1, 256, 256, 3), np.float32)
    theirs = transformers_features(module, image)
    by_size = relative_error(features_of(model.clone(position_offset=0.0), params, image), theirs)
    by_scale_factor = relative_error(features_of(model, params, image), theirs)
    print(f"transformers, B, 256²: {by_size:.1e} without the offset, {by_scale_factor:.1e} with it")
    assert by_size < 2e-5
    assert 1e-4 < by_scale_factor < 5e-2, "the offset is expected to be the one difference"


@pytest.mark.parametrize("mlp", ["gelu", "swiglu"])
@pytest.mark.parametrize("kind", ["Dinov2", "Dinov2WithRegisters"])
def test_variants_agree_with_transformers_and_its_files(tmp_path, kind, mlp):
    """On a grid that is not square; with registers positions are antialiased and there is no offset in either code."""
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{kind}Config")(
        hidden_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=98,
        patch_size=14,
        use_swiglu_ffn=mlp == "swiglu",
    )
    module = getattr(transformers, f"{kind}Model")(config).eval()
    randomise(module)
    module.save_pretrained(tmp_path)
    model, params = read_dinov2(tmp_path)
    registers = 4 if "Registers" in kind else 0
    assert (model.heads, model.mlp, model.registers) == (4, mlp, registers)
    assert (model.position_offset, model.position_antialias) == ((0.0, True) if registers else (0.1, False))
    for height, width in ((64, 80), (112, 112)):  # the second is the table's own grid
        image = np.random.default_rng(3).random((2, height, width, 3), np.float32)
        ours = features_of(model.clone(position_offset=0.0), params, image)
        assert relative_error(ours, transformers_features(module, image)) < 2e-6

    from_memory = from_tensors({name: p.detach().numpy() for name, p in module.state_dict().items()}, 4)
    jax.tree.map(np.testing.assert_array_equal, from_memory[1], params)


@pytest.mark.parametrize(
    ("size", "registers", "count"),
    [
        ("small", 0, 22_056_576),
        ("base", 0, 86_580_480),
        ("base", 4, 86_583_552),
        ("large", 0, 304_368_640),
        ("giant", 0, 1_136_480_768),
    ],
)
def test_published_sizes_have_the_published_parameters(size, registers, count):
    shapes = parameter_shapes(DINOv2(**SIZES[size], registers=registers))
    mask_token = SIZES[size]["width"]  # which the files hold and the features do not need
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) + mask_token == count


def test_a_mesh_splits_it_and_changes_no_feature():
    """Parameters in their shards, the batch over data and fsdp: a teacher that only fits in parts must be the same."""
    mesh = jax.make_mesh((2, 2, 2), meshes.AXES, axis_types=(jax.sharding.AxisType.Auto,) * 3)
    model = DINOv2(width=128, depth=2, heads=4, mlp="swiglu", registers=4, dtype=jnp.float32)
    image = np.random.default_rng(4).random((4, 64, 32, 3), np.float32)
    boxed = jax.eval_shape(model.init, jax.random.key(0), image)["params"]
    params = jax.tree.map(np.asarray, nn.meta.unbox(jax.jit(model.init)(jax.random.key(0), image)["params"]))

    layout = meshes.Layout(mesh)
    shardings = meshes.state_shardings(boxed, layout)
    for path, leaf in jax.tree_util.tree_leaves_with_path(jax.device_put(params, shardings)):
        where = jax.tree_util.keystr(path)
        assert leaf.size < meshes.SMALL or not leaf.sharding.is_fully_replicated, f"{where} is copied to every device"
    whole = features_of(model, params, image)
    with meshes.use_mesh(layout):
        split = jax.jit(model.apply)(
            {"params": jax.device_put(params, shardings)}, jax.device_put(image, meshes.batch_sharding(mesh))
        )
    assert {shard.data.shape[0] for shard in split.addressable_shards} == {1}, "the features must stay split by image"
    assert relative_error(split, whole) < 2e-6


def test_every_misfit_is_listed_under_its_name_in_the_file(recorded):
    tensors = hugging_face(recorded.group("param:"))
    tensors["classifier.weight"] = np.zeros((10, 64), np.float32)
    tensors["encoder.layer.1.attention.attention.key.weight"] = np.zeros((32, 31), np.float32)
    del tensors["layernorm.bias"], tensors["encoder.layer.0.attention.attention.value.bias"]
    with pytest.raises(UsageError) as problem:
        from_tensors(tensors, HEADS)
    for part in (
        "missing layernorm.bias (32,)",
        "missing encoder.layer.0.attention.attention.value.bias (32,)",
        "unexpected classifier.weight",
        "encoder.layer.1.attention.attention.key.weight has shape (32, 31), not (32, 32)",
    ):
        assert part in str(problem.value)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("cls_token", None, "neither cls_token nor embeddings.cls_token"),
        ("cls_token", (32,), "must have 3 axes"),
        ("pos_embed", None, "pos_embed is missing"),
        ("pos_embed", (1, 49, 32), "not one and a square"),
        ("pos_embed", (1, 1, 32), "not one and a square"),
        ("pos_embed", (1, 50, 16), "has shape (1, 50, 16), not (1, 50, 32)"),
        ("patch_embed.proj.weight", (32, 588), "must have 4 axes"),
        ("patch_embed.proj.weight", (32, 3, 14, 200), "patch_size is 200; at most 128"),
        ("blocks.999999999.norm1.weight", (32,), "counts 1000000000 blocks"),
        ("blocks.2.norm1.weight", (32,), "missing blocks.2.attn.qkv.weight (96, 32)"),
        ("blocks.0.mlp.w3.weight", (32, 88), "missing blocks.0.mlp.w12.weight (176, 32)"),
    ],
)
def test_what_is_no_dinov2_is_refused(recorded, name, shape, message):
    tensors = recorded.group("param:")
    tensors.pop(name, None)
    if shape:
        tensors[name] = np.zeros(shape, np.float32)
    with pytest.raises(UsageError) as problem:
        from_tensors(tensors, HEADS)
    assert message in str(problem.value)


@pytest.mark.parametrize("heads", [None, 0, 5, "2"])
def test_heads_must_divide_the_width(recorded, heads):
    with pytest.raises(UsageError, match="say how many heads" if heads is None else f"into {heads!r} heads"):
        from_tensors(recorded.group("param:"), heads)


def test_a_missing_file_says_where_to_get_it_and_how_to_do_without(tmp_path):
    with pytest.raises(UsageError) as problem:
        read_dinov2(tmp_path / "dinov2_vitb14_pretrain.pth")
    for part in (
        f"{tmp_path}/dinov2_vitb14_pretrain.pth does not exist",
        "facebookresearch/dinov2",
        "Apache-2.0",
        "facebook/dinov2-base",
        "loss.alignment_weight=0",
    ):
        assert part in str(problem.value)


def test_a_config_that_asks_for_something_else_is_refused(recorded, tmp_path):
    safetensors = pytest.importorskip("safetensors.numpy")
    tensors = {name: np.ascontiguousarray(v) for name, v in hugging_face(recorded.group("param:")).items()}
    safetensors.save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"num_attention_heads": HEADS, "hidden_act": "gelu_new"}))
    with pytest.raises(UsageError, match=f"{tmp_path}: its config.json has hidden_act=gelu_new"):
        read_dinov2(tmp_path)


def test_an_image_must_be_whole_patches():
    with pytest.raises(UsageError, match=r"images of 64×72 do not divide into the teacher's patches of 16×16"):
        prepare_image(jnp.zeros((1, 64, 72, 3)))


def test_weights_are_fp32_whatever_the_file_has(recorded):
    half = {name: value.astype(np.float16) for name, value in recorded.group("param:").items()}
    _, params = from_tensors(half, HEADS)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(np.float32)}
