"""A sampler that is watched draws what the one in a single program draws, and compiles once for all settings."""

import itertools

import jax
import numpy as np
import pytest

import deco_jax
from deco_jax.sampling.sample import read_inputs
from deco_jax.sampling.settings import Sampling
from deco_jax.sampling.solvers import SOLVERS
from deco_jax.sampling.stepwise import compiled_step, sample_stepwise
from tests.helpers import Golden, relative_error

G = Golden("deco_c2i")
MODEL, PARAMS, KEY = G.model(), G.params(), jax.random.key(3)


def inputs_of(settings, negative=None):
    return read_inputs(MODEL, [3, 1], KEY, None, None, (8, 16), negative, None, settings)


@pytest.mark.parametrize("solver", SOLVERS)
def test_every_state_is_that_of_the_sampler_in_one_program(solver):
    """Guided in some steps only, with a shift: all that a step may depend on."""
    settings = Sampling(5, solver, 3.0, (0.1, 0.6), shift=2.0)
    assert 0 < settings.guided_steps.sum() < 5
    images, states = deco_jax.sample(MODEL, PARAMS, [3, 1], KEY, image_size=(8, 16), trajectory=1, settings=settings)
    ours = list(sample_stepwise(MODEL, PARAMS, inputs_of(settings), settings))
    assert relative_error(np.stack(ours), states) < 5e-6 and relative_error(ours[-1], images) < 5e-6


def test_guidance_leads_away_from_what_the_inputs_say():
    settings = Sampling(3, guidance=4.0)
    *_, images = sample_stepwise(MODEL, PARAMS, inputs_of(settings, [5, 2]), settings)
    expected = deco_jax.sample(MODEL, PARAMS, [3, 1], KEY, image_size=(8, 16), negative=[5, 2], settings=settings)
    assert relative_error(images, expected) < 1e-6


def test_other_settings_compile_nothing():
    """Whoever moves a slider would wait for minutes otherwise."""
    for settings in (Sampling(2, "adams2", 2.0), Sampling(9, "adams2", 3.5, (0.2, 0.9), shift=3.0, last=0.01)):
        inputs = inputs_of(Sampling(2, "adams2", 2.0))
        assert len(list(sample_stepwise(MODEL, PARAMS, inputs, settings))) == settings.steps + 1
        compiled = compiled_step(MODEL, "adams2")._cache_size()
    assert compiled == 2, "one program for guided steps, and one for the others"


def test_nothing_is_computed_that_nobody_waits_for(monkeypatch):
    done = []
    step = compiled_step(MODEL, "euler")

    def counted(*args, **more):
        done.append(1)
        return step(*args, **more)

    monkeypatch.setattr("deco_jax.sampling.stepwise.compiled_step", lambda *_: counted)
    settings = Sampling(50)
    assert len(list(itertools.islice(sample_stepwise(MODEL, PARAMS, inputs_of(settings), settings), 3))) == 3
    assert len(done) == 3
