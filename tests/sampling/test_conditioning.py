"""What is computed before a sampler's loop changes no image, whatever the network, the solver and the devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import deco_jax
from deco_jax.config import default_config
from deco_jax.parallel import mesh as meshes
from deco_jax.sampling import sample as module
from deco_jax.sampling.conditioning import in_compute_dtype, look_up, tabulate
from deco_jax.sampling.sample import compiled_sampler, image_noise, read_inputs, round_batch
from deco_jax.sampling.settings import Sampling
from deco_jax.sampling.solvers import SOLVERS
from deco_jax.sampling.stepwise import sample_stepwise
from tests.helpers import Golden, relative_error

NETWORKS = ("deco_c2i", "deco_t2i", "baseline_dit", "pixnerd")
KEY = jax.random.key(3)
GUIDANCE = {"most": (3.0, (0.0, 1.0)), "some": (3.0, (0.1, 0.6)), "none": (1.0, (0.0, 1.0))}


@pytest.fixture
def tables(monkeypatch):
    """What `tabulate` returned, of every program that is traced; none is taken from an earlier test."""
    made = []
    monkeypatch.setattr(module, "tabulate", lambda *arguments: made.append(tabulate(*arguments)) or made[-1])
    compiled_sampler.cache_clear()
    return made


def asked_of(network, number=3):
    """What to show and to lead away from: classes, or texts, of which the negative ones differ too."""
    if network == "deco_t2i":
        shape = Golden(network).model().condition.example(1).shape[1:]
        return np.random.default_rng(0).normal(size=(2, number, *shape)).astype(np.float32)
    return np.array([3, 1, 4, 1, 5, 9, 2, 6])[:number], None


@pytest.mark.parametrize("guidance", GUIDANCE)
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("solver", ["euler", pytest.param("heun_exact", marks=pytest.mark.slow)])
def test_every_state_is_that_of_the_network_called_step_by_step(network, solver, guidance, tables):
    """Exact Heun looks up two times in a step. tests/sampling/test_stepwise.py has the other solvers."""
    model, params, (asked, away) = Golden(network).model(), Golden(network).params(), asked_of(network)
    settings = Sampling(4, solver, *GUIDANCE[guidance], shift=2.0)
    size = (model.patch_size, 2 * model.patch_size)
    images, states = deco_jax.sample(
        model, params, asked, KEY, image_size=size, negative=away, trajectory=1, settings=settings
    )
    assert [len(made) for made in tables] == [1 if guidance == "none" else 2], "nothing was computed before the loop"
    inputs = read_inputs(model, asked, KEY, None, None, size, away, None, settings)
    ours = np.stack(list(sample_stepwise(model, params, inputs, settings)))
    assert relative_error(states, ours) < 1e-5 and relative_error(images, ours[-1]) < 1e-5


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_table_is_read_at_the_time_of_the_slope(solver, tables, monkeypatch):
    """Every slope gets the row that was computed for its time."""
    seen, model = [], Golden("deco_c2i").model()

    class Recorder:
        dtype, condition = model.dtype, model.condition

        def apply(self, variables, *arguments, given=None, method=None, **more):
            if method is not None:
                return model.apply(variables, *arguments, method=method, **more)
            x, t_B, _ = arguments
            fresh = model.apply(variables, t_B[:1], jnp.array([1]), method="conditioning")
            jax.debug.callback(lambda *pair: seen.append(pair), given.tau_BxD, fresh.tau_BxD[0])
            return x * t_B[:, None, None, None]

    settings = Sampling(4, solver, 2.0, (0.3, 1.0), shift=2.0)
    deco_jax.sample(Recorder(), Golden("deco_c2i").params(), [1], KEY, image_size=8, settings=settings)
    jax.effects_barrier()
    assert len(seen) == SOLVERS[solver].evaluations(4).sum()
    for known, fresh in seen:
        np.testing.assert_allclose(known[0], fresh[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("network", ["deco_c2i", "deco_t2i"])
@pytest.mark.parametrize("preset", ["data", "fsdp_tensor"])
def test_devices_change_nothing(network, preset, tables, monkeypatch):
    """The rows of a table are split as the batch; the null's one row is everywhere."""
    monkeypatch.setattr(meshes, "SMALL", 0)
    model, params, (asked, away) = Golden(network).model(), Golden(network).params(), asked_of(network, 8)
    away = away if away is None else away[:1]
    noise = image_noise(KEY, np.arange(8), (model.patch_size, 2 * model.patch_size, 3))
    how = {"steps": 3, "guidance": 2.0, "guidance_interval": (0.3, 1.0), "negative": away}
    expected = np.asarray(deco_jax.sample(model, params, asked, noise=noise, **how))
    config = default_config().mesh
    config.preset = preset
    layout = meshes.make_layout(config)
    boxed = jax.eval_shape(lambda: model.init(KEY, noise[:1], jnp.zeros(1), model.condition.example(1)))["params"]
    shardings = meshes.state_shardings(boxed, layout)
    with meshes.use_mesh(layout):
        split = jax.tree.map(jax.device_put, params, shardings)
        placed = jax.device_put(noise, meshes.batch_sharding(layout.mesh))
        images = deco_jax.sample(model, split, asked, noise=placed, **how)
        assert images.sharding.is_equivalent_to(placed.sharding, 4)
    assert len(tables) == 2 and None not in tables
    assert relative_error(images, expected) < 1e-5


def test_a_table_is_no_larger_than_the_parameters():
    """With text, what its own blocks make of it goes first; what depends on the time alone is always small."""
    g = Golden("deco_c2i")
    model, params, times = g.model(), g.params(), np.linspace(0, 1, 10, dtype=np.float32)
    size = sum(x.nbytes for x in jax.tree.leaves(params))
    rows = size // (10 * 4 * (model.depth * 6 + 1) * model.width)

    def of(number, model=model, params=params, times=times):
        return jax.eval_shape(lambda: tabulate(model, params, times, [model.condition.example(number)]))

    (table,) = of(rows - 1)
    assert table.c_BxD.shape == (10, rows - 1, model.width) and table.tau_BxD.shape == (10, 1, model.width)
    assert table.modulation_BxLx6D.shape == (10, rows - 1, model.depth, 6 * model.width)
    assert of(rows + 1) is None
    g = Golden("deco_t2i")
    few, many = (of(number, g.model(), g.params(), times[:3])[0] for number in (2, 4000))
    assert few.text_BxTxD.shape[:2] == (3, 2) and few.text_modulation_BxLx6D is None
    assert many.text_BxTxD.shape[:2] == (1, 4000) and many.modulation_BxLx6D.shape[:2] == (3, 1)


@pytest.mark.parametrize("network", NETWORKS)
def test_a_call_that_is_given_what_is_known_needs_no_other_parameters(network):
    """So the loop reads none of them; text that has not passed its blocks needs those."""
    model, params, (asked, _) = Golden(network).model(), Golden(network).params(), asked_of(network)
    times, t_B = np.array([0.25, 0.5], np.float32), jnp.full(3, 0.5)
    x = image_noise(KEY, np.arange(3), (2 * model.patch_size, model.patch_size, 3))
    expected = model.apply({"params": params}, x, t_B, jnp.asarray(asked))
    whole, parted = (
        model.apply({"params": params}, times, jnp.asarray(asked), refined, method="conditioning")
        for refined in (True, False)
    )
    rest = {name: value for name, value in params.items() if "embedding" not in name or name == "patch_embedding"}
    block = rest["transformer"]["layers"]["block"]
    block = {name: value for name, value in block.items() if name != "modulation"}
    rest["transformer"] = {"layers": {"block": block}}
    for given in (whole, parted):
        v = model.apply({"params": rest}, x, t_B, None, given=look_up(given, 1))
        assert relative_error(v, expected) < 2e-6
        rest.pop("text", None) if given is parted else None


@pytest.mark.parametrize("network", NETWORKS)
def test_parameters_are_cast_as_they_are_multiplied(network):
    """Bit for bit what the network computes in bfloat16, of parameters half as large."""
    g, (asked, _) = Golden(network), asked_of(network)
    model, params = g.model(dtype=jnp.bfloat16), jax.tree.map(jnp.asarray, g.params())
    cast = in_compute_dtype(params, model.dtype)
    assert cast["transformer"]["layers"]["block"]["mlp"]["down"]["kernel"].dtype == jnp.bfloat16
    x = image_noise(KEY, np.arange(3), (model.patch_size, model.patch_size, 3))
    call = jax.jit(lambda params: model.apply({"params": params}, x, jnp.full(3, 0.5), jnp.asarray(asked)))
    np.testing.assert_array_equal(call(cast), call(params))


def test_a_noise_that_is_handed_over_stays_whole_and_its_copy_becomes_the_images():
    g = Golden("deco_c2i")
    noise = image_noise(KEY, np.arange(2), (8, 8, 3))
    before = np.array(noise)
    for given in (noise, before, noise.astype(jnp.bfloat16)):
        deco_jax.sample(g.model(), g.params(), [1, 2], noise=given, steps=1)
    np.testing.assert_array_equal(noise, before)
    null = jnp.array([10])
    program = compiled_sampler(g.model(), Sampling(1)).lower(g.params(), noise, None, jnp.array([1, 2]), null).compile()
    assert program.memory_analysis().alias_size_in_bytes == noise.nbytes


def test_odd_batches_share_a_program_and_change_no_image():
    """Five images are drawn as six; with a noise of their own as five."""
    assert [round_batch(n) for n in (1, 2, 3, 4, 5, 7, 9, 13, 17, 25, 100)] == [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 128]
    g, settings = Golden("deco_c2i"), Sampling(2, "euler_sde", 2.0)
    model, params, asked = g.model(), g.params(), [3, 1, 4, 1, 5, 9]
    compiled_sampler.cache_clear()
    draw = {"image_size": 8, "settings": settings, "trajectory": 1}
    six, six_states = deco_jax.sample(model, params, asked, KEY, **draw)
    five, five_states = deco_jax.sample(model, params, asked[:5], KEY, **draw)
    assert compiled_sampler(model, settings, 1)._cache_size() == 1
    np.testing.assert_array_equal(five, six[:5])
    np.testing.assert_array_equal(five_states, six_states[:, :5])
    noise, keys = image_noise(KEY, np.arange(5), (8, 8, 3)), module.image_keys(KEY, np.arange(5))
    exact, _ = deco_jax.sample(model, params, asked[:5], noise=noise, keys=keys, settings=settings, trajectory=1)
    assert exact.shape == five.shape and relative_error(exact, five) < 1e-6
    assert compiled_sampler(model, settings, 1)._cache_size() == 2


@pytest.mark.slow
def test_a_negative_may_be_one_for_all():
    g = Golden("deco_c2i")
    draw = {"image_size": 8, "steps": 2, "guidance": 3.0}
    several = deco_jax.sample(g.model(), g.params(), [3, 1, 4], KEY, negative=jnp.array([5, 5, 5]), **draw)
    for negative in ([5], [5, 5, 5], np.array([5])):
        one = deco_jax.sample(g.model(), g.params(), [3, 1, 4], KEY, negative=negative, **draw)
        assert relative_error(one, several) < 1e-6
