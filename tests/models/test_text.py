"""Text-conditional DeCo against the recorded PyTorch network: output, hidden tokens, loss, gradients of everything."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from deco_jax.models.build import KINDS, parameter_shapes
from deco_jax.models.flops import forward_flops
from deco_jax.pretrained import names
from deco_jax.weights import translate
from tests.helpers import Golden, relative_error

# As users compile them: these are the recordings of the networks that we ship.
pytestmark = pytest.mark.usefixtures("optimised")

XXL = {
    "patch_size": 16,
    "width": 1536,
    "depth": 16,
    "heads": 24,
    "text_tokens": 128,
    "text_features": 2048,
    "text_depth": 4,
    "decoder_width": 32,
    "decoder_depth": 3,
}
VARIANTS = {"scanned": {}, "unrolled": {"scan": False}, "full remat": {"remat": "full"}}


@pytest.fixture(scope="module")
def recorded():
    return Golden("deco_t2i")


@pytest.mark.parametrize("variant", VARIANTS)
def test_outputs_and_gradients_equal_the_recorded_ones(recorded, variant):
    g, layer = recorded, recorded.config["align_layer"]
    model, target = g.model(**VARIANTS[variant]), g.image("target")

    def loss(params):
        v, tokens = model.apply({"params": params}, g.image("x"), g["t"], g["text"], hidden_layer=layer)
        return jnp.mean((v - target) ** 2), (v, tokens)

    (value, (v, tokens)), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(g.params())
    assert v.dtype == jnp.float32
    assert relative_error(v, g.image("out")) < 2e-5
    assert relative_error(tokens, g[f"hidden_after_block{layer}"]) < 2e-5
    assert relative_error(value, g["loss"]) < 2e-5
    ours, theirs = translate.to_torch(names.DECO_TEXT, gradients), g.group("grad:")
    assert ours.keys() == theirs.keys(), "a parameter without a recorded gradient, or the reverse"
    for name in theirs:
        assert relative_error(ours[name], theirs[name]) < 1e-4, name


def test_padding_and_every_token_reach_the_image(recorded):
    """Nothing of the text is masked: the published network sees the states of padding as well."""
    g = recorded
    model, args = g.model(), ({"params": g.params()}, g.image("x"), g["t"])
    v = model.apply(*args, g["text"])
    for place in (0, g["text"].shape[1] - 1):
        changed = g["text"].copy()
        changed[:, place] += 1
        assert relative_error(model.apply(*args, changed), v) > 1e-4, place


def test_an_oblong_image_has_the_published_positions(recorded):
    """x ends with the number of rows and y with that of columns: on oblong images other than one would write it."""
    angles = recorded.model().angles(2, 4).reshape(2, 4, 4, 2)  # rows, columns, frequencies, x and y
    assert recorded.model().width // recorded.model().heads == 16
    np.testing.assert_allclose(angles[0, :, 0, 0], np.linspace(0, 2, 4), rtol=1e-6)
    np.testing.assert_allclose(angles[:, 0, 0, 1], np.linspace(0, 4, 2), rtol=1e-6)


@pytest.mark.slow
def test_full_size_parameters(full_size_shapes):
    """The published count, and every published tensor in its shape, nothing left over."""
    abstract = parameter_shapes(KINDS["deco_text"](**XXL))
    assert sum(x.size for x in jax.tree.leaves(abstract)) == 1_133_759_395
    published = {
        name: np.lib.stride_tricks.as_strided(np.zeros(1, np.float32), shape, (0,) * len(shape))  # holds no memory
        for name, shape in full_size_shapes["deco_t2i_xxl"].items()
    }
    filled = translate.from_torch(names.DECO_TEXT, published, abstract)
    assert jax.tree.structure(filled) == jax.tree.structure(abstract), "a parameter of ours has no published name"


@pytest.mark.slow
def test_initialisation(recorded):
    """Positions N(0, 1), and PyTorch's default for what only this network has; the rest is tested with DeCo."""
    model = KINDS["deco_text"](**recorded.sizes() | {"width": 128, "heads": 4})
    x, t = jnp.zeros((1, 16, 16, 3)), jnp.zeros(1)
    params = nn.meta.unbox(jax.jit(model.init)(jax.random.key(0), x, t, model.condition.example(1))["params"])
    tensors = translate.to_torch(names.DECO_TEXT, params)
    assert abs(tensors["y_pos_embedding"].std() - 1) < 0.05
    assert (tensors["y_embedder.norm.weight"] == 1).all()
    for name, fan_in in (("y_embedder.proj.weight", 48), ("blocks.1.attn.kv_y.weight", 128)):
        bound = fan_in**-0.5
        assert 0.95 * bound < np.abs(tensors[name]).max() <= bound, name


def test_flops_count_every_matrix():
    """Against XLA's own count of the unrolled program, which counts what is not a matrix product as well."""
    model = KINDS["deco_text"](**XXL | {"depth": 2, "text_depth": 1, "width": 384, "heads": 6}, scan=False)
    x, t, text = jnp.zeros((1, 128, 128, 3)), jnp.zeros(1), model.condition.example(1)
    params = parameter_shapes(model)
    cost = jax.jit(model.apply).lower({"params": params}, x, t, text).cost_analysis()
    assert 1 < cost["flops"] / forward_flops(model, 128, 128) < 1.1
