"""The pixel decoder's kernel: what it computes, on odd sizes and on several devices; and that it compiles for TPUs."""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import NamedSharding, PartitionSpec

from deco_jax.config import default_config
from deco_jax.errors import UsageError
from deco_jax.models.pixel_decoder import POSITION_FEATURES, PixelDecoder
from deco_jax.ops.decoder import TABLE, Form, decode
from deco_jax.ops.decoder_tpu import LANES, fused
from deco_jax.parallel import mesh as meshes
from deco_jax.planning.topology import make_devices, parse_topology
from tests.helpers import relative_error

PLAIN = TABLE[-1].run
INTERPRETED = functools.partial(fused, interpret=True)
P, D = 4, 24  # a patch's side, and a token's channels


def form(depth=2, dtype=jnp.float32, interaction="adaln"):
    return Form(depth, interaction, dtype, lambda block: block)


def draw(batch, tokens, width=32, depth=2, positions="waves"):
    """Arguments of the decoder, without its form, and what its output is multiplied with for a loss."""
    rng = np.random.default_rng(0)
    pixels, weights = rng.normal(size=(2, batch, tokens, P * P, 3)).astype(np.float32)
    tokens = rng.normal(size=(batch, tokens, D)).astype(np.float32)
    decoder = PixelDecoder(width, depth, P, 1, "adaln", jnp.float32, "none")
    shapes = nn.meta.unbox(jax.eval_shape(decoder.init, jax.random.key(0), pixels, tokens)["params"])
    parameters = jax.tree.map(lambda a: rng.normal(0, 0.3, a.shape).astype(np.float32), shapes)
    return parameters, pixels, tokens, POSITION_FEATURES[positions](P), weights


def value_and_gradients(run, form, parameters, pixels, tokens, places, weights):
    """{name: output, or the gradient by parameters, pixels or tokens}."""

    def loss(parameters, pixels, tokens):
        out = run(parameters, pixels, tokens, places, form)
        return jnp.sum(out * weights), out

    (_, out), found = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(parameters, pixels, tokens)
    assert out.dtype == jnp.float32
    found = dict(zip(("parameters", "pixels", "tokens"), found, strict=True)) | {"output": out}
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(found)}


@pytest.mark.parametrize(
    "batch, tokens, width, depth, positions",
    [(3, 5, 32, 2, "waves"), (1, 1, 16, 1, "rotary"), (2, LANES, 64, 1, "waves")],
    ids=["odd", "one token", "whole lanes"],
)
def test_the_kernel_equals_the_plain_decoder(batch, tokens, width, depth, positions):
    """Output and all gradients, in fp32: also where norms and modulations, which the kernel folds, are far from 0."""
    drawn = draw(batch, tokens, width, depth, positions)
    ours, plain = (value_and_gradients(run, form(depth), *drawn) for run in (INTERPRETED, PLAIN))
    assert ours.keys() == plain.keys()
    for name in plain:
        assert relative_error(ours[name], plain[name]) < 2e-5, name


@pytest.mark.slow
def test_in_bfloat16_it_is_as_exact_as_the_plain_decoder():
    """Both stay within 3 % of fp32 with these weights, which are larger than a network's; the kernel rounds less."""
    drawn = draw(3, 40)
    exact = value_and_gradients(PLAIN, form(), *drawn)
    ours, plain = (value_and_gradients(run, form(dtype=jnp.bfloat16), *drawn) for run in (INTERPRETED, PLAIN))
    errors = {name: [relative_error(a[name], exact[name]) for a in (ours, plain)] for name in exact}
    assert max(error for error, _ in errors.values()) < 0.03, errors
    assert sum(error for error, _ in errors.values()) < sum(error for _, error in errors.values())


def test_on_several_devices_nothing_changes():
    """Examples over data and fsdp, pixels of a patch over tensor, gradients of the parameters summed over all."""
    *drawn, places, weights = draw(4, 3)
    expected = value_and_gradients(INTERPRETED, form(), *drawn, places, weights)
    config = default_config().mesh
    config.update(data=2, fsdp=2, tensor=2)
    layout = meshes.make_layout(config, jax.devices()[:8])
    rules = (*layout.rules, ("pixels", "tensor"))
    with jax.set_mesh(layout.mesh), nn.logical_axis_rules(rules):
        parameters = jax.device_put(drawn[0], NamedSharding(layout.mesh, PartitionSpec()))
        batch = jax.device_put(drawn[1:], meshes.batch_sharding(layout.mesh))
        found = value_and_gradients(INTERPRETED, form(), parameters, *batch, places, weights)
    for name in expected:
        assert relative_error(found[name], expected[name]) < 1e-5, name


def test_what_the_kernel_cannot_do_is_refused():
    parameters, pixels, tokens, places, _ = draw(1, 1, width=24)
    refusals = [
        ((parameters, pixels, tokens, places, form()), "model.decoder_width=24"),
        ((parameters, np.tile(pixels, 4), tokens, places, form()), "model.decoder_patch above 1"),
        ((parameters, pixels, tokens, places, form(interaction="add")), "model.decoder_interaction='add'"),
    ]
    for arguments, message in refusals:
        assert message in TABLE[0].refuses(*arguments)
    with pytest.raises(UsageError, match="model.decoder='pallas' cannot run here: it needs a TPU"):
        decode(parameters, pixels, tokens, places, form(), "pallas")


@pytest.mark.tpu_compiler
@pytest.mark.parametrize("topology", ["v5e:2x2", "v6e:2x2"])
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
def test_tpus_compile_it(topology):
    """Chosen by itself for their mesh, on one of four devices' parts, and without an array as wide as the decoder."""
    config = default_config().mesh
    config.update(data=4)
    layout = meshes.make_layout(config, make_devices(parse_topology(topology)))
    parameters, pixels, tokens, *_ = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), draw(8, 64))
    replicated, split = meshes.replicated(layout.mesh), meshes.batch_sharding(layout.mesh)
    parameters = jax.tree.map(lambda a: a.update(sharding=replicated), parameters)
    pixels, tokens = (a.update(sharding=split) for a in (pixels, tokens))
    decoder = PixelDecoder(32, 2, P, 1, "adaln", jnp.bfloat16, "none")

    def loss(parameters, pixels, tokens):
        return jnp.sum(decoder.apply({"params": parameters}, pixels, tokens) ** 2)

    with meshes.use_mesh(layout):
        text = jax.jit(jax.grad(loss, (0, 2))).lower(parameters, pixels, tokens).compile().as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == 2, "forward and backward"
