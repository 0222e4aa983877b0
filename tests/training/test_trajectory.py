"""Ten recorded optimiser steps of the whole objective: losses, gradient norm, final weights, EMA and projector."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deco_jax.config import default_config
from deco_jax.diffusion.flow import Draws, shift_time
from deco_jax.porting import names
from deco_jax.training.state import TrainState
from deco_jax.training.step import make_trainer


@pytest.fixture(scope="module")
def recorded(golden):
    return golden("train_trajectory")


@pytest.fixture(scope="module")
def run(recorded):
    """Our ten steps with the recorded draws: (final state, metrics of each step)."""
    c = recorded.config
    config = default_config()
    config.model.update(
        num_classes=c["num_classes"],
        patch_size=c["patch_size"],
        width=c["hidden_size"],
        depth=c["num_cond_blocks"],
        heads=c["num_groups"],
        decoder_width=c["hidden_size_x"],
        decoder_depth=c["num_blocks"] - c["num_cond_blocks"],
        dtype="float32",
        remat="full",
    )
    config.loss.update(
        frequency_weight=c["freq_loss_weight"],
        frequency_quality=c["freq_quality"],
        alignment_weight=c["feat_loss_weight"],
        alignment_layer=c["align_layer"],
        alignment_features=c["enc_dim"],
    )
    config.optimizer.update(
        lr=c["lr"], beta1=c["betas"][0], beta2=c["betas"][1], eps=c["eps"], weight_decay=c["weight_decay"]
    )
    config.ema.decay = c["ema_decay"]
    config.train.steps = c["steps"]
    trainer = make_trainer(config)

    tokens = jnp.zeros((1, 1, c["hidden_size"]))
    projector_like = jax.eval_shape(trainer.projector.init, jax.random.key(0), tokens)["params"]
    from flax import linen as nn

    params = {
        "network": recorded.params("param:denoiser."),
        "projector": names.from_torch(
            names.PROJECTOR, recorded.group("param:diffusion_trainer."), nn.meta.unbox(projector_like)
        ),
    }
    params = jax.tree.map(jnp.asarray, params)
    zero = jnp.int32(0)
    state = TrainState(zero, params, params["network"], trainer.optimizer.init(params), zero, zero)

    @jax.jit
    def step(state, images, labels, draws, features):
        (_, metrics), gradients = jax.value_and_grad(trainer.loss, has_aux=True)(
            state.params, images, labels, draws, features
        )
        return trainer.update(state, gradients, metrics)

    history = []
    for k in range(c["steps"]):
        draws = Draws(
            shift_time(jax.nn.sigmoid(recorded["time_normal"][k]), c["timeshift"]),
            recorded.image("noise")[k],
            recorded["drop_label"][k],
        )
        state, metrics = step(
            state,
            recorded.image("images")[k],
            recorded["labels"][k].astype(np.int32),
            draws,
            recorded["repa_features"][k],
        )
        history.append(metrics)
    return state, history


def test_losses_of_every_step(recorded, run, error):
    ours = [[m["loss_flow"], m["loss_frequency"], m["loss_alignment"], m["loss"]] for m in run[1]]
    for k, (row, theirs) in enumerate(zip(ours, recorded["losses"], strict=True)):
        for term, a, b in zip(("flow", "frequency", "alignment", "total"), row, theirs, strict=True):
            assert error(a, b) < 2e-5, f"step {k}, {term}"


def test_gradient_norm_of_the_first_step(recorded, run, error):
    assert error(run[1][0]["gradient_norm"], recorded["grad_norm_step0"]) < 2e-5


@pytest.mark.parametrize("group", ["denoiser", "ema_denoiser", "diffusion_trainer"])
def test_final_weights(recorded, run, error, group):
    state = run[0]
    params = {
        "denoiser": state.params["network"],
        "ema_denoiser": state.ema,
        "diffusion_trainer": state.params["projector"],
    }[group]
    ours = names.to_torch(names.PROJECTOR if group == "diffusion_trainer" else names.DECO, params)
    theirs = recorded.group(f"final:{group}.")
    assert ours.keys() == theirs.keys()
    for name in theirs:
        assert error(ours[name], theirs[name]) < 1e-4, name
    start = recorded.group(f"param:{group.removeprefix('ema_')}.")
    assert all(error(ours[name], start[name]) > 1e-4 for name in theirs if "k_norm" not in name), "nothing was trained"


def test_ten_good_steps_skip_nothing(run):
    assert int(run[0].step) == 10 and int(run[0].skipped) == 0
