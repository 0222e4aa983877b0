"""DeCo against the recorded PyTorch network: outputs, hidden tokens, loss, and the gradient of everything."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from deco_jax.config import build_model, default_config
from deco_jax.errors import UsageError
from deco_jax.models.build import parameter_shapes
from deco_jax.models.flops import forward_flops
from deco_jax.pretrained import names
from deco_jax.weights import translate
from tests.helpers import Golden, relative_error

# As users compile them: these are the recordings of the networks that we ship.
pytestmark = pytest.mark.usefixtures("optimised")
CASES = ["deco_c2i", "deco_c2i_wide"]
# The same parameters through every way of compiling the blocks.
VARIANTS = {
    "scanned": {},
    "unrolled": {"scan": False},
    "scanned, full remat": {"remat": "full"},
    "unrolled, dots remat": {"scan": False, "remat": "dots"},
}


@pytest.mark.parametrize("case", CASES)
def test_outputs_equal_the_recorded_ones(case):
    g = Golden(case)
    layer = g.config["align_layer"]
    v, tokens = g.model().apply(
        {"params": g.params()}, g.image("x"), g["t"], g["y"].astype(np.int32), hidden_layer=layer
    )
    assert v.dtype == jnp.float32
    assert relative_error(v, g.image("out")) < 2e-5
    assert relative_error(tokens, g[f"hidden_after_block{layer}"]) < 2e-5


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("case", CASES)
def test_gradients_equal_the_recorded_ones(case, variant):
    g = Golden(case)
    model, target = g.model(**VARIANTS[variant]), g.image("target")

    def loss(params, x):
        return jnp.mean((model.apply({"params": params}, x, g["t"], g["y"].astype(np.int32)) - target) ** 2)

    value, (by_params, by_x) = jax.jit(jax.value_and_grad(loss, (0, 1)))(g.params(), g.image("x"))
    assert relative_error(value, g["loss"]) < 2e-5
    assert relative_error(by_x, g.image("grad_x")) < 1e-4
    ours, theirs = translate.to_torch(names.DECO, by_params), g.group("grad:")
    assert ours.keys() == theirs.keys(), "a parameter without a recorded gradient, or the reverse"
    for name in theirs:
        assert relative_error(ours[name], theirs[name]) < 1e-4, name


def test_hidden_tokens_do_not_depend_on_how_the_blocks_are_compiled():
    g = Golden("deco_c2i")
    args = {"params": g.params()}, g.image("x"), g["t"], g["y"].astype(np.int32)
    for layer in (1, 3):
        _, scanned = g.model().apply(*args, hidden_layer=layer)
        _, unrolled = g.model(scan=False, remat="full").apply(*args, hidden_layer=layer)
        assert relative_error(scanned, unrolled) < 1e-6
    assert relative_error(g.model().apply(*args, hidden_layer=1)[1], g["hidden_after_block2"]) > 0.01, (
        "layers are mixed up"
    )


@pytest.mark.parametrize(
    "width, depth, shapes, parameters",
    [(1024, 22, "deco_l", 426_938_019), (1152, 28, "deco_xl", 682_282_851)],
)
def test_full_size_parameters(full_size_shapes, width, depth, shapes, parameters):
    """Counts of the paper's models, and every tensor of the published ones in its shape, nothing left over."""
    config = default_config().model
    config.update(width=width, depth=depth)
    abstract = parameter_shapes(build_model(config))
    assert sum(x.size for x in jax.tree.leaves(abstract)) == parameters
    published = {
        name: np.lib.stride_tricks.as_strided(np.zeros(1, np.float32), shape, (0,) * len(shape))  # holds no memory
        for name, shape in full_size_shapes[shapes].items()
    }
    filled = translate.from_torch(names.DECO, published, abstract)
    assert jax.tree.structure(filled) == jax.tree.structure(abstract), "a parameter of ours has no published name"


@pytest.mark.slow
def test_any_size_divisible_by_the_patch():
    g = Golden("deco_c2i")
    t, labels = jnp.zeros(1), jnp.zeros(1, jnp.int32)
    v = g.model().apply({"params": g.params()}, jnp.zeros((1, 8, 40, 3)), t, labels)
    assert v.shape == (1, 8, 40, 3)
    with pytest.raises(UsageError, match=r"height=20 is not divisible by model.patch_size=8; nearest: 16 and 24"):
        g.model().apply({"params": g.params()}, jnp.zeros((1, 20, 40, 3)), t, labels)
    with pytest.raises(UsageError, match="hidden_layer=4 does not exist"):
        g.model().apply({"params": g.params()}, jnp.zeros((1, 8, 8, 3)), t, labels, hidden_layer=4)


def test_bfloat16_computes_in_bfloat16_and_returns_float32():
    g = Golden("deco_c2i")
    args = {"params": g.params()}, g.image("x"), g["t"], g["y"].astype(np.int32)
    v, tokens = g.model(dtype=jnp.bfloat16).apply(*args, hidden_layer=1)
    assert v.dtype == jnp.float32 and tokens.dtype == jnp.bfloat16
    assert 1e-4 < relative_error(v, g.image("out")) < 0.05


def test_initialisation_is_the_published_one():
    """Every row of the table in docs/model.md, section 2, on a network large enough for its statistics."""
    config = default_config().model
    config.update(width=96, depth=3, heads=4, patch_size=8, decoder_width=32, decoder_depth=2, num_classes=2000)
    model = build_model(config)
    x, t, labels = jnp.zeros((1, 16, 16, 3)), jnp.zeros(1), jnp.zeros(1, jnp.int32)
    params = jax.jit(model.init)(jax.random.key(0), x, t, labels)["params"]
    tensors = translate.to_torch(names.DECO, nn.meta.unbox(params))

    def uniform(name, bound):
        value = tensors[name]
        largest = np.abs(value).max()
        assert largest <= bound and largest > 0.8 * bound, (name, largest, bound)
        if value.size > 1000:
            assert abs(value.std() / (bound / np.sqrt(3)) - 1) < 0.1, name

    rules = collections.Counter()
    for name, value in tensors.items():
        out, fan_in = value.shape if value.ndim == 2 else (0, 0)
        if name.startswith(("y_embedder", "t_embedder")) and name.endswith("weight"):
            rules["normal"] += 1
            assert abs(value.std() / 0.02 - 1) < 0.05 and abs(value.mean()) < 1e-3, name
        elif name.startswith("dec_net") and ("adaLN" in name or "final_layer" in name):
            rules["zero"] += 1
            assert not value.any(), name
        elif "norm" in name or "in_ln" in name:
            rules["norm"] += 1
            assert (value == (0 if name.endswith("bias") else 1)).all(), name
        elif name.startswith(("s_embedder", "dec_net")):
            rules["xavier"] += 1
            if name.endswith("bias"):
                assert not value.any(), name
            else:
                uniform(name, np.sqrt(6 / (fan_in + out)))
        else:
            rules["torch"] += 1
            weight = value if name.endswith("weight") else tensors[name.replace("bias", "weight")]
            uniform(name, 1 / np.sqrt(weight.shape[1]))
    # Blocks: 3 of the transformer with 4 norms and 8 others each, 2 of the decoder with 2 + 2 + 4.
    assert rules == {"normal": 3, "zero": 2 * 2 + 2, "norm": 3 * 4 + 2 * 2, "xavier": 2 + 4 + 2 * 4, "torch": 4 + 3 * 8}
    assert not np.array_equal(tensors["blocks.0.attn.qkv.weight"], tensors["blocks.1.attn.qkv.weight"])


def test_flops_agree_with_the_compiler():
    """The analytic count against XLA's on an unrolled network. Elementwise work is what XLA counts more."""
    config = default_config().model
    config.update(width=256, depth=2, heads=4, num_classes=10, scan=False, remat="none", dtype="float32")
    model = build_model(config)
    x, t, labels = jnp.zeros((1, 128, 128, 3)), jnp.zeros(1), jnp.zeros(1, jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), x, t, labels)
    counted = jax.jit(model.apply).lower(params, x, t, labels).compile().cost_analysis()["flops"]
    assert 0.9 < forward_flops(model, 128, 128) / counted <= 1.0


@pytest.mark.parametrize(
    "width, depth, size, gflops", [(1024, 22, 256, 155), (1152, 28, 256, 245), (1152, 28, 512, 1079)]
)
def test_flops_of_the_full_size_models(width, depth, size, gflops):
    config = default_config().model
    config.update(width=width, depth=depth)
    assert round(forward_flops(build_model(config), size, size) / 1e9) == gflops


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("kind", "unet", "model.kind='unet' is not known; allowed: deco"),
        ("remat", "some", "model.remat='some' is not known; allowed: none, full, dots"),
        ("dtype", "float16", "model.dtype='float16'"),
        ("depth", 0, "model.depth=0 must be at least 1"),
        ("heads", 3, "model.width=1024 with model.heads=3"),
    ],
)
def test_bad_fields_are_named(field, value, message):
    config = default_config().model
    config[field] = value
    with pytest.raises(UsageError, match=message):
        build_model(config)
