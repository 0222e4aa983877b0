"""The baseline DiT: sizes, initialisation, cost, mistakes. Its numbers are in test_comparisons."""

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
    config.model.update(kind="baseline", **changes)
    return config


def apply(model, g, x, **options):
    return model.apply({"params": g.params()}, x, g["t"], g["y"].astype(np.int32), **options)


@pytest.mark.parametrize(
    "width, depth, shapes, parameters", [(1024, 24, "baseline_l", 459_171_584), (1152, 28, "baseline_xl", 676_360_128)]
)
def test_full_size_parameters(full_size_shapes, width, depth, shapes, parameters):
    """Counts of the paper's models, and every tensor of the published ones in its shape, nothing left over."""
    abstract = parameter_shapes(build_model(new_config(width=width, depth=depth).model))
    assert sum(x.size for x in jax.tree.leaves(abstract)) == parameters
    published = {
        name: np.lib.stride_tricks.as_strided(np.zeros(1, np.float32), shape, (0,) * len(shape))  # holds no memory
        for name, shape in full_size_shapes[shapes].items()
    }
    filled = translate.from_torch(names.BASELINE, published, abstract)
    assert jax.tree.structure(filled) == jax.tree.structure(abstract), "a parameter of ours has no published name"


def test_initialisation_is_the_published_one():
    """What differs from DeCo, whose test covers the shared transformer, and one spot of that."""
    model = build_model(new_config(width=96, depth=3, heads=4, patch_size=8, num_classes=2000).model)
    inputs = jnp.zeros((1, 16, 16, 3)), jnp.zeros(1), jnp.zeros(1, jnp.int32)
    tensors = translate.to_torch(
        names.BASELINE, nn.meta.unbox(jax.jit(model.init)(jax.random.key(0), *inputs)["params"])
    )
    assert all(value.dtype == np.float32 for value in tensors.values())

    def uniform(name, bound):
        assert 0.9 * bound < np.abs(tensors[name]).max() <= bound, name
        assert abs(tensors[name].std() / (bound / np.sqrt(3)) - 1) < 0.2, name

    last = [name for name in tensors if name.startswith("final_layer")]
    assert len(last) == 4 and not any(tensors[name].any() for name in last)
    assert not tensors["x_embedder.proj.bias"].any()
    uniform("x_embedder.proj.weight", np.sqrt(6 / (96 + 3 * 64)))
    uniform("blocks.1.adaLN_modulation.0.weight", 1 / np.sqrt(96))
    uniform("blocks.1.adaLN_modulation.0.bias", 1 / np.sqrt(96))


def test_flops_agree_with_the_compiler():
    """The analytic count against XLA's on an unrolled network. Elementwise work is what XLA counts more."""
    model = build_model(
        new_config(width=256, depth=2, heads=4, num_classes=10, scan=False, remat="none", dtype="float32").model
    )
    inputs = jnp.zeros((1, 128, 128, 3)), jnp.zeros(1), jnp.zeros(1, jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), *inputs)
    counted = jax.jit(model.apply).lower(params, *inputs).compile().cost_analysis()["flops"]
    assert 0.9 < forward_flops(model, 128, 128) / counted <= 1.0


@pytest.mark.parametrize("width, depth, gflops", [(1024, 24, 162), (1152, 28, 238)])
def test_flops_of_the_full_size_models(width, depth, gflops):
    assert round(forward_flops(build_model(new_config(width=width, depth=depth).model), 256, 256) / 1e9) == gflops


def test_it_has_no_decoder_to_configure():
    """Fields that only other kinds use may hold anything; its own are checked and named."""
    check_config(new_config(decoder_width=0, decoder_depth=0, decoder_expansion=0))
    with pytest.raises(UsageError, match="model.depth=0 must be at least 1"):
        check_config(new_config(depth=0))
    with pytest.raises(UsageError, match="model.width=1024 with model.heads=3"):
        check_config(new_config(heads=3))


def test_bad_inputs_are_named():
    g = Golden("baseline_dit")
    with pytest.raises(UsageError, match="height=20 is not divisible by model.patch_size=8; nearest: 16 and 24"):
        apply(g.model(), g, jnp.zeros((2, 20, 40, 3)))
    with pytest.raises(UsageError, match="hidden_layer=4 does not exist"):
        apply(g.model(), g, g.image("x"), hidden_layer=4)
    assert apply(g.model(), g, jnp.zeros((2, 8, 40, 3))).shape == (2, 8, 40, 3)
    assert g.model().condition.read(["null"]).tolist() == [10]
