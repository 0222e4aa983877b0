"""PixNerd: sizes, initialisation, cost, mistakes. Its numbers are in test_comparisons."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from deco_jax.config import build_model, check_config, default_config
from deco_jax.errors import UsageError
from deco_jax.models.build import parameter_shapes
from deco_jax.models.flops import forward_flops
from deco_jax.pretrained import names
from deco_jax.weights import translate
from tests.helpers import Golden


def new_config(**changes):
    config = default_config()
    config.model.update(kind="pixnerd", **changes)
    return config


def apply(model, g, x, params=None, **options):
    return model.apply(
        {"params": g.params() if params is None else params}, x, g["t"], g["y"].astype(np.int32), **options
    )


def test_full_size_parameters(full_size_shapes):
    """The count of the paper's model, and every tensor of the published one in its shape, nothing left over."""
    abstract = parameter_shapes(build_model(new_config(decoder_width=64, decoder_depth=2).model))
    assert sum(x.size for x in jax.tree.leaves(abstract)) == 452_113_795
    published = {
        name: np.lib.stride_tricks.as_strided(np.zeros(1, np.float32), shape, (0,) * len(shape))  # holds no memory
        for name, shape in full_size_shapes["pixnerd_l"].items()
    }
    filled = translate.from_torch(names.PIXNERD, published, abstract)
    assert jax.tree.structure(filled) == jax.tree.structure(abstract), "a parameter of ours has no published name"


def test_initialisation_is_the_published_one():
    """What differs from DeCo, whose test covers the shared transformer, and one spot of that."""
    model = build_model(
        new_config(width=96, depth=3, heads=4, patch_size=8, decoder_width=32, decoder_depth=2, num_classes=2000).model
    )
    inputs = jnp.zeros((1, 16, 16, 3)), jnp.zeros(1), jnp.zeros(1, jnp.int32)
    tensors = translate.to_torch(
        names.PIXNERD, nn.meta.unbox(jax.jit(model.init)(jax.random.key(0), *inputs)["params"])
    )
    assert all(value.dtype == np.float32 for value in tensors.values())

    def uniform(name, bound):
        assert 0.9 * bound < np.abs(tensors[name]).max() <= bound, name
        assert abs(tensors[name].std() / (bound / np.sqrt(3)) - 1) < 0.2, name

    assert not tensors["s_embedder.proj.bias"].any()
    uniform("s_embedder.proj.weight", np.sqrt(6 / (96 + 3 * 64)))
    uniform("x_embedder.embedder.0.weight", 1 / np.sqrt(67))
    uniform("blocks.1.adaLN_modulation.0.weight", 1 / np.sqrt(96))
    for j in (3, 4):
        uniform(f"blocks.{j}.param_generator1.0.weight", 1 / np.sqrt(96))
        uniform(f"blocks.{j}.param_generator1.0.bias", 1 / np.sqrt(96))
        assert (tensors[f"blocks.{j}.norm.weight"] == 1).all()
    assert (tensors["final_layer.norm.weight"] == 1).all()
    uniform("final_layer.linear.weight", 1 / np.sqrt(32))


def test_flops_agree_with_the_compiler():
    """The analytic count against XLA's on an unrolled network. Elementwise work is what XLA counts more."""
    model = build_model(
        new_config(
            width=256,
            depth=2,
            heads=4,
            num_classes=10,
            decoder_width=32,
            decoder_depth=2,
            scan=False,
            remat="none",
            dtype="float32",
        ).model
    )
    inputs = jnp.zeros((1, 128, 128, 3)), jnp.zeros(1), jnp.zeros(1, jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), *inputs)
    counted = jax.jit(model.apply).lower(params, *inputs).compile().cost_analysis()["flops"]
    assert 0.9 < forward_flops(model, 128, 128) / counted <= 1.0


def test_flops_of_the_full_size_model():
    model = build_model(new_config(decoder_width=64, decoder_depth=2).model)
    assert round(forward_flops(model, 256, 256) / 1e9) == 170


def test_a_token_that_generates_zeros_has_a_finite_gradient():
    """Its columns have no direction; dividing by their length must not make the step not finite."""
    g = Golden("pixnerd")
    params = g.params()
    params["decoder"]["block_0"]["generator"] = jax.tree.map(jnp.zeros_like, params["decoder"]["block_0"]["generator"])
    gradients = jax.jit(jax.grad(lambda params: apply(g.model(), g, g.image("x"), params).sum()))(params)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradients))


@pytest.mark.parametrize("field", ["decoder_width", "decoder_depth", "decoder_expansion"])
def test_bad_fields_are_named(field):
    check_config(new_config())
    with pytest.raises(UsageError, match=f"model.{field}=0 must be at least 1"):
        check_config(new_config(**{field: 0}))


def test_bad_inputs_are_named():
    g = Golden("pixnerd")
    with pytest.raises(UsageError, match="height=20 is not divisible by model.patch_size=8; nearest: 16 and 24"):
        apply(g.model(), g, jnp.zeros((2, 20, 40, 3)))
    with pytest.raises(UsageError, match="hidden_layer=3 does not exist"):
        apply(g.model(), g, g.image("x"), hidden_layer=3)
    assert apply(g.model(), g, jnp.zeros((2, 8, 40, 3))).shape == (2, 8, 40, 3)
    assert g.model().condition.read(["null"]).tolist() == [10]
