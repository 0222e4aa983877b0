"""The networks DeCo is compared with, against recordings of PyTorch's: outputs, hidden tokens, loss, every gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deco_jax.models import BaselineDiT, PixNerd
from deco_jax.pretrained.infer import ARCHITECTURES
from deco_jax.weights import translate
from tests.helpers import Golden, relative_error

MODULES = {"baseline_dit": BaselineDiT, "pixnerd": PixNerd}
# The same parameters through ways of compiling the blocks.
VARIANTS = {"scanned": {}, "unrolled": {"scan": False}, "scanned, full remat": {"remat": "full"}}

pytestmark = pytest.mark.parametrize("case", MODULES)


def apply(model, g, x, params=None, **options):
    return model.apply(
        {"params": g.params() if params is None else params}, x, g["t"], g["y"].astype(np.int32), **options
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_outputs_equal_the_recorded_ones(case, variant):
    g = Golden(case)
    layer = g.config["align_layer"]
    v, tokens = apply(g.model(**VARIANTS[variant]), g, g.image("x"), hidden_layer=layer)
    assert isinstance(g.model(), MODULES[case]) and v.dtype == jnp.float32
    assert relative_error(v, g.image("out")) < 2e-5
    assert relative_error(tokens, g[f"hidden_after_block{layer}"]) < 2e-5
    assert relative_error(apply(g.model(**VARIANTS[variant]), g, g.image("x")), v) < 1e-6


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_equal_the_recorded_ones(case, variant):
    g = Golden(case)
    model, target = g.model(**VARIANTS[variant]), g.image("target")

    def loss(params, x):
        return jnp.mean((apply(model, g, x, params) - target) ** 2)

    value, (by_params, by_x) = jax.jit(jax.value_and_grad(loss, (0, 1)))(g.params(), g.image("x"))
    assert relative_error(value, g["loss"]) < 2e-5
    assert relative_error(by_x, g.image("grad_x")) < 1e-4
    ours, theirs = translate.to_torch(ARCHITECTURES[g.kind][0], by_params), g.group("grad:")
    assert ours.keys() == theirs.keys(), "a parameter without a recorded gradient, or the reverse"
    for name in theirs:
        assert relative_error(ours[name], theirs[name]) < 1e-4, name


def test_bfloat16_computes_in_bfloat16_and_returns_float32(case):
    g = Golden(case)
    v, tokens = apply(g.model(dtype=jnp.bfloat16), g, g.image("x"), hidden_layer=1)
    assert v.dtype == jnp.float32 and tokens.dtype == jnp.bfloat16
    assert 1e-4 < relative_error(v, g.image("out")) < 0.05
