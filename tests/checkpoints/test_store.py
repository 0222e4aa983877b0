"""Reading and writing checkpoints, also of an older layout."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from deco_jax.checkpoints import store
from deco_jax.config import default_config, flatten
from deco_jax.errors import UsageError
from deco_jax.training.optimizer import make_optimizer
from deco_jax.training.state import TrainState


def write(tmp_path, clip_norm, version, chained):
    """Saves a small state under step 3; returns (its folder of checkpoints, the state as it should be read)."""
    config = default_config()
    config.optimizer.clip_norm = clip_norm
    rng = np.random.default_rng(0)
    params = {"network": {"kernel": jnp.asarray(rng.normal(size=(4, 3)), jnp.float32)}}
    opt_state = jax.tree.map(
        lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32) if x.ndim else x + 3,
        make_optimizer(config.optimizer, 10).init(params),
    )
    state = TrainState(jnp.int32(3), params, params["network"], opt_state, jnp.int32(0), jnp.int32(0))
    meta = store.make_meta(config, "data", 12, "0")
    if version == 1:
        del meta["config_version"], meta["config"]["sample"]["last"]
    checkpoints = store.Checkpoints(tmp_path, keep=1, keep_every=0)
    checkpoints.save(3, state.replace(opt_state=(optax.EmptyState(), opt_state)) if chained else state, meta)
    checkpoints.close()
    return tmp_path / "checkpoints", state


def abstract(tree):
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), tree)


@pytest.mark.parametrize(
    "clip_norm, version, chained",
    [
        pytest.param(0.0, 1, False, id="version 1, without clipping"),
        pytest.param(1.0, 1, True, id="version 1, clipping: AdamW's state lies one level deeper"),
        pytest.param(1.0, 2, False, id="version 2, clipping"),
    ],
)
def test_a_state_comes_back_whatever_its_layout(tmp_path, clip_norm, version, chained):
    """Whole, and in part, as `deco convert --train-state` reads it."""
    folder, state = write(tmp_path, clip_norm, version, chained)
    checkpoints = store.Checkpoints(folder.parent, keep=1, keep_every=0)
    whole = checkpoints.restore(checkpoints.latest(), abstract(state))
    assert jax.tree.structure(whole) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, whole, state)
    wanted = {"ema": state.ema, "opt_state": state.opt_state}
    part = store.restore_part(folder, 3, abstract(wanted))
    assert jax.tree.structure(part) == jax.tree.structure(wanted)
    jax.tree.map(np.testing.assert_array_equal, part, wanted)
    assert checkpoints.position(3) == 3


def test_a_configuration_is_read_whole_whichever_version_wrote_it(tmp_path):
    folder, _ = write(tmp_path, 1.0, 1, True)
    config = store.read_config(folder, 3)
    assert (config.optimizer.clip_norm, config.sample.last) == (1.0, 0.0)
    assert flatten(config).keys() == flatten(default_config()).keys()


def test_a_configuration_with_a_field_that_is_unknown_is_not_read(tmp_path):
    folder, _ = write(tmp_path, 0.0, 2, False)
    file = folder / "3" / "meta" / "metadata"
    meta = json.loads(file.read_text())
    meta["config"]["model"]["experts"] = 8
    file.write_text(json.dumps(meta))
    with pytest.raises(UsageError, match=r"checkpoints/3 has .* does not know: model.experts"):
        store.read_config(folder, 3)
