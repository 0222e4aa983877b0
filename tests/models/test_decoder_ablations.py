"""The pixel decoders of the paper's Table 4: queries of several pixels, and conditions that are added, in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import deco_jax
from deco_jax.config import build_model, check_config, default_config
from deco_jax.errors import UsageError
from deco_jax.models.build import parameter_shapes
from deco_jax.models.flops import forward_flops
from deco_jax.models.pixel_decoder import PixelDecoder, pixel_position_features
from tests.helpers import relative_error

P, D = 4, 6  # a patch's side, and a token's channels
DECODERS = [(1, "adaln"), (1, "add"), (2, "adaln"), (4, "adaln"), (4, "add")]


def new_model(**changes):
    config = default_config().model
    config.update(num_classes=10, patch_size=P, width=16, depth=1, heads=2, decoder_width=8, decoder_depth=1)
    config.update(dtype="float32", remat="none", **changes)
    return build_model(config)


def random_like(shapes, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda a: rng.normal(0, 0.5, a.shape).astype(np.float32), nn.meta.unbox(shapes))


def linear(p, x):
    return x @ p["kernel"].reshape(len(p["kernel"]), -1) + p["bias"].ravel()


def silu(x):
    return x / (1 + np.exp(-x))


def norm(x):
    return (x - x.mean()) / np.sqrt(x.var() + 1e-6)


def written_out(params, patch_PxPx3, token_D, r, interaction):
    """One patch through the decoder, query by query, in float64."""
    side, out = P // r, np.zeros((P, P, 3))
    conditions = linear(params["condition"], token_D).reshape(side, side, -1)
    for i in range(side):
        for j in range(side):
            rows, columns = slice(i * r, (i + 1) * r), slice(j * r, (j + 1) * r)
            a, b = (k / (side - 1) if side > 1 else 0.0 for k in (j, i))
            place = [
                np.cos(np.pi * a * 8 * m / 7) * np.cos(np.pi * b * 8 * n / 7) / (1 + 64 * m * n / 49)
                for m in range(8)
                for n in range(8)
            ]
            q = np.concatenate([patch_PxPx3[rows, columns].ravel(), place])
            q, condition = linear(params["in"], linear(params["query"], q)), conditions[i, j]
            if interaction == "add":
                q = q + condition
            for k in range(2):
                block = params[f"block_{k}"]
                h = norm(q) * block["norm"]["scale"] + block["norm"]["bias"]
                if interaction == "adaln":
                    shift, scale, gate = linear(block["modulation"], silu(condition)).reshape(3, -1)
                    h = h * (1 + scale) + shift
                h = linear(block["out"], silu(linear(block["in"], h)))
                q = q + (gate * h if interaction == "adaln" else h)
            out[rows, columns] = linear(params["out"], norm(q)).reshape(r, r, 3)
    return out


@pytest.mark.parametrize("r, interaction", DECODERS)
def test_the_decoder_is_the_formula(r, interaction):
    rng = np.random.default_rng(1)
    pixels = rng.normal(size=(2, 3, P * P, 3)).astype(np.float32)
    tokens = rng.normal(size=(2, 3, D)).astype(np.float32)
    decoder = PixelDecoder(8, 2, P, r, interaction, jnp.float32, "none")
    params = random_like(jax.eval_shape(decoder.init, jax.random.key(0), pixels, tokens)["params"])
    assert ("modulation" in params["block_0"]) == (interaction == "adaln")
    out = jax.jit(decoder.apply)({"params": params}, pixels, tokens)
    assert out.dtype == jnp.float32
    params = jax.tree.map(lambda a: a.astype(float), params)
    expected = [
        written_out(params, pixels[b, n].reshape(P, P, 3), tokens[b, n], r, interaction).reshape(P * P, 3)
        for b in range(2)
        for n in range(3)
    ]
    assert relative_error(np.asarray(out).reshape(6, P * P, 3), expected) < 1e-5


@pytest.mark.parametrize("r, interaction", DECODERS)
def test_parameters(r, interaction):
    """Shapes as the table of the paper describes them; what comes before the decoder is the same in all."""
    params = parameter_shapes(new_model(decoder_patch=r, decoder_interaction=interaction))
    decoder = jax.tree.map(lambda a: a.shape, params.pop("decoder"))
    assert decoder["query"] == {"kernel": (3 * r * r + 64, 8), "bias": (8,)}
    assert decoder["condition"] == {"kernel": (16, (P // r) ** 2, 8), "bias": ((P // r) ** 2, 8)}
    assert decoder["out"] == {"kernel": (8, 3 * r * r), "bias": (3 * r * r,)}
    assert decoder["block_0"].keys() == {"norm", "in", "out"} | ({"modulation"} if interaction == "adaln" else set())
    usual = parameter_shapes(new_model())
    usual.pop("decoder")
    assert jax.tree.map(lambda a: a.shape, params) == jax.tree.map(lambda a: a.shape, usual)


@pytest.mark.parametrize("r, interaction", DECODERS)
def test_the_initialisation_is_that_of_deco(r, interaction):
    """Zero for the last layer and the modulation, PyTorch's for the query, Xavier's for the rest."""
    decoder = PixelDecoder(32, 1, P, r, interaction, jnp.float32, "none")
    inputs = jnp.zeros((1, 1, P * P, 3)), jnp.zeros((1, 1, D))
    params = nn.meta.unbox(jax.jit(decoder.init)(jax.random.key(0), *inputs)["params"])
    block = params["block_0"]
    assert not any(a.any() for a in jax.tree.leaves((params["out"], block.get("modulation", {}))))
    bounds = [
        (params["query"], 1 / np.sqrt(3 * r * r + 64)),
        (params["condition"], np.sqrt(6 / (D + 32 * (P // r) ** 2))),
        *((part, np.sqrt(6 / (32 + 32))) for part in (params["in"], block["in"], block["out"])),
    ]
    for part, bound in bounds:
        assert 0.9 * bound < np.abs(part["kernel"]).max() <= bound
        assert part is params["query"] or not part["bias"].any()


@pytest.mark.parametrize("r, interaction", DECODERS)
def test_flops_agree_with_the_compiler(r, interaction):
    """In a network that is nearly all decoder. Elementwise work is what XLA counts more."""
    model = new_model(decoder_patch=r, decoder_interaction=interaction, scan=False).clone(
        decoder_width=128, decoder_depth=3
    )
    inputs = jnp.zeros((1, 16, 16, 3)), jnp.zeros(1), jnp.zeros(1, jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), *inputs)
    counted = jax.jit(model.apply).lower(params, *inputs).compile().cost_analysis()["flops"]
    assert 0.9 < forward_flops(model, 16, 16) / counted <= 1.0
    without = forward_flops(model.clone(decoder_depth=0), 16, 16)
    assert forward_flops(model, 16, 16) > 3 * without, "nearly all decoder"


def test_any_image_and_the_sampler():
    """Queries of a whole patch, on an oblong: one place for all, whose features are those of a patch's first pixel."""
    np.testing.assert_array_equal(pixel_position_features(1), pixel_position_features(P)[:1])
    model = new_model(decoder_patch=P, decoder_interaction="add")
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, P, P, 3)), jnp.zeros(1), jnp.zeros(1, int))
    images = deco_jax.sample(model, random_like(shapes["params"]), [1], jax.random.key(0), image_size=(8, 12), steps=2)
    assert images.shape == (1, 8, 12, 3) and np.isfinite(images).all()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"decoder_patch": 3}, "model.decoder_patch=3 does not divide model.patch_size=16; allowed: 1, 2, 4, 8, 16"),
        ({"decoder_patch": 0}, "model.decoder_patch=0 must be at least 1"),
        ({"decoder_interaction": "film"}, "model.decoder_interaction='film' is not known; allowed: adaln, add"),
    ],
)
def test_bad_fields_are_named(changes, message):
    config = default_config()
    config.model.update(changes)
    with pytest.raises(UsageError, match=message):
        check_config(config)


def test_other_kinds_have_no_such_fields():
    config = default_config()
    config.model.update(kind="pixnerd", decoder_patch=3)
    check_config(config)
