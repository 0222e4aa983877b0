"""The training step: accumulation, skipped steps, EMA, learning rate, clipping."""

import contextlib
import dataclasses
import threading

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from deco_jax.errors import TransientError, UsageError
from deco_jax.jobs import StopRequest
from deco_jax.parallel import mesh as meshes
from deco_jax.parallel.mesh import Flag
from deco_jax.training import feed as feeds
from deco_jax.training.feed import Feed
from deco_jax.training.optimizer import check_schedule, clip, learning_rate, make_optimizer
from deco_jax.training.start import abstract_state
from deco_jax.training.step import jit_step, make_train_step
from tests.helpers import relative_error


def shaken(train_step):
    """A state off the published initialisation, which predicts exactly 0: every parameter has a gradient."""
    state = jax.eval_shape(lambda: nn.meta.unbox(train_step.initial_state()))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda p: rng.normal(0, 0.2, p.shape).astype(np.float32), state.params)
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), state)
    return zeros.replace(params=params, ema=params["network"])


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    return {
        "image": rng.integers(0, 256, (16, 28, 28, 3), np.uint8),
        "label": rng.integers(0, 10, 16).astype(np.int32),
        "features": rng.normal(size=(16, 16, 24)).astype(np.float32),
    }


def test_accumulation_changes_nothing(tiny_config, batch):
    """4 parts against 1, with every loss on: same metrics and same weights, as the draws belong to the example."""
    tiny_config.loss.update(alignment_weight=0.5, alignment_layer=1, alignment_features=24)
    results = []
    for parts in (1, 4):
        tiny_config.optimizer.accumulation = parts
        train_step = make_train_step(tiny_config)
        results.append(jax.jit(train_step)(shaken(train_step), batch))
    (one, metrics_one), (four, metrics_four) = results
    assert {"loss", "loss_flow", "loss_frequency", "loss_alignment"} <= metrics_one.keys()
    for name in metrics_one:
        assert abs(metrics_one[name] - metrics_four[name]) <= 1e-5 * abs(metrics_one[name]), name
    gradients = [s.opt_state[0].mu for s in (one, four)]
    for a, b in zip(*map(jax.tree.leaves, gradients), strict=True):
        assert relative_error(a, b) < 1e-5


def test_a_step_that_is_not_finite_changes_no_weight_and_is_counted(tiny_config, batch):
    train_step = make_train_step(tiny_config)
    # An infinite weight of one loss term makes the loss, and every gradient, not finite.
    bad = dataclasses.replace(
        train_step, objective=dataclasses.replace(train_step.objective, frequency_weight=float("inf"))
    )
    state, _ = jax.jit(train_step)(shaken(train_step), batch)
    once, metrics = jax.jit(bad)(state, batch)
    assert not np.isfinite(metrics["loss"])
    twice, _ = jax.jit(bad)(once, batch)
    for field in ("params", "ema", "opt_state"):
        chex.assert_trees_all_equal(getattr(twice, field), getattr(state, field))
    assert (int(twice.step), int(twice.skipped), int(twice.skipped_in_a_row)) == (3, 2, 2)
    good, _ = jax.jit(train_step)(twice, batch)
    assert (int(good.step), int(good.skipped), int(good.skipped_in_a_row)) == (4, 2, 0)
    assert any(np.any(a != b) for a, b in zip(*map(jax.tree.leaves, (good.params, state.params)), strict=True))


def test_a_step_that_lacks_data_changes_nothing_at_all(tiny_config, batch):
    """Whichever device says so. Its position in the data neither, so that the next run trains on the same images."""
    del batch["features"]
    train_step, layout = make_train_step(tiny_config), meshes.make_layout(tiny_config.mesh)
    abstract = abstract_state(train_step, layout)
    program, rows, shardings = (
        jit_step(train_step, abstract, layout),
        np.arange(16),
        jax.tree.map(lambda x: x.sharding, abstract),
    )
    before = shaken(train_step).replace(step=np.int32(7), skipped=np.int32(3), skipped_in_a_row=np.int32(2))
    with meshes.use_mesh(layout):
        for flags, changes in (({0: Flag.STOP, 7: Flag.SAVE}, True), ({5: Flag.ABSENT | Flag.STOP}, False)):
            state = jax.tree.map(jax.device_put, before, shardings)
            placed = meshes.place_batch(batch, layout.mesh, rows, 16)
            messages = np.array(meshes.place_messages(0, np.full(16, -1), layout.mesh, rows, 16))
            messages[list(flags), 0] = list(flags.values())
            messages = jax.device_put(messages, meshes.messages_sharding(layout.mesh))
            after, _, said = program(state, placed, messages, {})
            assert {device: flag for device, flag in enumerate(np.asarray(said)[:, 0]) if flag} == flags
            if changes:
                assert (int(after.step), int(after.skipped), int(after.skipped_in_a_row)) == (8, 3, 0)
                assert any(np.any(a != b) for a, b in zip(*map(jax.tree.leaves, (after.ema, before.ema)), strict=True))
            else:
                chex.assert_trees_all_equal(jax.device_get(after), before)


def test_ema_starts_at_the_parameters_and_decays_as_told(tiny_config):
    """Guards against an average that starts at zero, and one whose warm-up counts skipped steps."""
    tiny_config.ema.decay = 0.75
    train_step = make_train_step(tiny_config)
    start = jax.jit(lambda: nn.meta.unbox(train_step.initial_state()))()
    chex.assert_trees_all_equal(start.ema, start.params["network"])
    gradients = jax.tree.map(jnp.ones_like, start.params)
    for warmup, decay in ((False, 0.75), (True, 0.1)):
        tiny_config.ema.warmup = warmup
        update = jax.jit(make_train_step(tiny_config).update)
        state, _ = update(start, gradients, {"loss": jnp.float32(0)})
        expected = jax.tree.map(lambda e, p, d=decay: d * e + (1 - d) * p, start.ema, state.params["network"])
        chex.assert_trees_all_close(state.ema, expected, atol=1e-7)


def test_each_step_draws_anew_and_repeats_itself(tiny_config, batch):
    train_step = make_train_step(tiny_config)
    step, state = jax.jit(train_step), shaken(train_step)
    loss = [float(step(state.replace(step=jnp.int32(k)), batch)[1]["loss"]) for k in (0, 1, 0)]
    assert loss[0] == loss[2] != loss[1]


def test_learning_rate_rises_stays_and_falls(tiny_config):
    tiny_config.optimizer.update(lr=0.5, warmup_steps=4, decay_steps=5)
    rate = [float(learning_rate(tiny_config.optimizer, 20)(k)) for k in range(20)]
    np.testing.assert_allclose(rate[:5], [0.1, 0.2, 0.3, 0.4, 0.5], rtol=1e-6)
    np.testing.assert_allclose(rate[5:16], 0.5, rtol=1e-6)
    np.testing.assert_allclose(rate[16:], [0.4, 0.3, 0.2, 0.1], rtol=1e-6)
    tiny_config.optimizer.update(warmup_steps=0, decay_steps=0)
    assert {float(learning_rate(tiny_config.optimizer, 20)(k)) for k in (0, 10**6)} == {0.5}


def test_a_longer_run_goes_on_where_it_changes_no_rate_that_was(tiny_config):
    """Beyond, it must be asked for: by other rates, or by name."""
    tiny_config.optimizer.update(lr=0.5, warmup_steps=4, decay_steps=100)
    tiny_config.train.steps = 300
    longer = tiny_config.copy_and_resolve_references()
    longer.train.steps = 400
    assert check_schedule(tiny_config, longer, 0) == check_schedule(tiny_config, longer, 201) == []
    with pytest.raises(
        UsageError, match=r"train.steps=400 .*step 202 had 0.495, not 0.5, since train.steps was 300. --con"
    ):
        check_schedule(tiny_config, longer, 202)
    longer.train.reschedule = True
    assert check_schedule(tiny_config, longer, 300) == ["learning rate of step 300: 0.005 there, 0.5 here"]
    longer.train.reschedule = False
    longer.optimizer.decay_steps = 0
    assert check_schedule(tiny_config, longer, 300) == [], "decay_steps is said to be another"
    tiny_config.optimizer.decay_steps = 0
    assert check_schedule(tiny_config, longer, 300) == []


def test_data_that_no_longer_come_are_zeros_which_say_so():
    def batches():
        yield {"image": np.ones((2, 3), np.uint8), "bad": np.array([-1, 5], np.int32)}
        raise ConnectionResetError("the server is gone")

    feed = Feed(batches(), StopRequest())
    assert feed.next()["image"].all() and not feed.absent
    feed.check()
    for _ in range(2):
        zeros = feed.next()
        assert not zeros.pop("image").any() and zeros.pop("bad").tolist() == [-1, -1] and feed.absent
    with pytest.raises(TransientError, match="the data do not come: the server is gone"):
        feed.check()


@pytest.mark.parametrize("first, error", [(True, ConnectionResetError), (False, UsageError)])
def test_bad_data_and_a_start_without_any_end_at_once(first, error):
    def batches():
        if not first:
            yield {"bad": np.zeros(1, np.int32)}
        raise error("no")

    feed = Feed(batches(), StopRequest())
    with pytest.raises(error):
        while True:
            feed.next()


def test_a_process_that_is_to_stop_does_not_wait_for_data_for_long(monkeypatch):
    """Its machine may be about to be taken away, and what was trained must be saved before."""
    monkeypatch.setattr(feeds, "LISTEN", 0.05)
    monkeypatch.setattr(feeds, "PATIENCE", 0.2)
    answers, stop = threading.Event(), StopRequest()

    def batches():
        yield {"bad": np.full(1, -1, np.int32)}
        answers.wait()
        yield {"bad": np.full(1, -1, np.int32)}

    with contextlib.closing(Feed(batches(), stop)) as feed:
        feed.next()
        stop.by = "SIGTERM"
        feed.next()
        with pytest.raises(TransientError, match="told to stop by SIGTERM while waiting"):
            feed.check()
    answers.set()


def test_adamw_written_out(tiny_config):
    """Two updates against the formula, with weight decay and clipping of the global norm."""
    o = tiny_config.optimizer
    o.update(lr=0.1, beta1=0.8, beta2=0.9, eps=1e-3, weight_decay=0.01, clip_norm=1.0)
    optimizer = make_optimizer(o, 10)
    w, m, v = np.array([1.0, -2.0]), np.zeros(2), np.zeros(2)
    params, state = jnp.array(w), optimizer.init(jnp.array(w))
    for k, raw in enumerate(([3.0, 4.0], [0.3, -0.4]), 1):
        g = np.array(raw) / max(1.0, np.linalg.norm(raw))
        m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g**2
        w = w - 0.1 * (m / (1 - 0.8**k) / (np.sqrt(v / (1 - 0.9**k)) + 1e-3) + 0.01 * w)
        updates, state = optimizer.update(clip(jnp.array(raw), o), state, params)
        params = optax.apply_updates(params, updates)
        np.testing.assert_allclose(params, w, rtol=1e-5)


def test_the_reported_gradient_norm_is_a_norm(tiny_config, batch):
    """Guards against a norm that was never square-rooted, and one taken after the clip."""
    tiny_config.optimizer.clip_norm = 1e-3
    train_step = make_train_step(tiny_config)
    state = shaken(train_step)
    gradients = jax.tree.map(jnp.ones_like, state.params)
    _, metrics = jax.jit(train_step.update)(state, gradients, {"loss": jnp.float32(0)})
    count = sum(p.size for p in jax.tree.leaves(state.params))
    assert abs(float(metrics["gradient_norm"]) - np.sqrt(count)) < 1e-3 * np.sqrt(count)


def test_a_step_of_texts_needs_what_drops_them(tiny_config):
    """Else a step that was made by hand would train on every prompt without a word."""
    tiny_config.model.update(kind="deco_text", text_tokens=3, text_features=8, text_depth=1)
    train_step = make_train_step(tiny_config)
    batch = {"image": np.zeros((2, 16, 16, 3), np.uint8), "text": np.zeros((2, 3, 8), np.float32)}
    with pytest.raises(UsageError, match="needs its encoder, or `stored_text`"):
        jax.eval_shape(train_step._prepare, {}, jax.random.split(jax.random.key(0), 2), batch)
