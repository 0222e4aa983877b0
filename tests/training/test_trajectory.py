"""Ten recorded optimiser steps of the whole objective: losses, gradient norm, final weights, EMA and projector."""

import pytest

from deco_jax.pretrained import names
from deco_jax.weights import translate
from tests.helpers import Golden, relative_error


@pytest.fixture(scope="module")
def recorded():
    return Golden("train_trajectory")


@pytest.fixture(scope="module")
def run(recorded, optimised):
    return recorded.replay()


def test_losses_of_every_step(recorded, run):
    ours = [[m["loss_flow"], m["loss_frequency"], m["loss_alignment"], m["loss"]] for m in run[1]]
    for k, (row, theirs) in enumerate(zip(ours, recorded["losses"], strict=True)):
        for term, a, b in zip(("flow", "frequency", "alignment", "total"), row, theirs, strict=True):
            assert relative_error(a, b) < 2e-5, f"step {k}, {term}"


def test_gradient_norm_of_the_first_step(recorded, run):
    assert relative_error(run[1][0]["gradient_norm"], recorded["grad_norm_step0"]) < 2e-5


@pytest.mark.parametrize("group", ["denoiser", "ema_denoiser", "diffusion_trainer"])
def test_final_weights(recorded, run, group):
    state = run[0]
    params = {
        "denoiser": state.params["network"],
        "ema_denoiser": state.ema,
        "diffusion_trainer": state.params["projector"],
    }[group]
    ours = translate.to_torch(names.PROJECTOR if group == "diffusion_trainer" else names.DECO, params)
    theirs = recorded.group(f"final:{group}.")
    assert ours.keys() == theirs.keys()
    for name in theirs:
        assert relative_error(ours[name], theirs[name]) < 1e-4, name
    start = recorded.group(f"param:{group.removeprefix('ema_')}.")
    assert all(relative_error(ours[name], start[name]) > 1e-4 for name in theirs if "k_norm" not in name), (
        "nothing was trained"
    )


def test_ten_good_steps_skip_nothing(run):
    assert int(run[0].step) == 10 and int(run[0].skipped) == 0
