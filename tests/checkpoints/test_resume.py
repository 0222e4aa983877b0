"""Which changes of a configuration a run may go on with, and which make it another run."""

import json

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from deco_jax.checkpoints import store
from deco_jax.checkpoints.resume import check_resumable
from deco_jax.config import FIELDS, default_config, save_config
from deco_jax.errors import UsageError
from deco_jax.training.loop import train

SAFE = (
    "optimizer.",
    "ema.",
    "train.",
    "evaluate.",
    "sample.",
    "mesh.",
    "teacher.",
    "text.",
    "data.workers",
    "data.threads",
    "data.path",
    "data.source",
    "data.max_bad_records",
    "data.max_bad_share",
    "model.remat",
    "model.scan",
    "model.attention",
)


def meta(changes=(), **more):
    config = default_config()
    config.update_from_flattened_dict(dict(changes))
    return json.loads(json.dumps(store.make_meta(config, "data", 1, "0", {"teacher": "abc"}) | more))


def another(value):
    """Some other value of the same type."""
    if isinstance(value, bool):
        return not value
    return value + "x" if isinstance(value, str) else (0.5, 0.75) if isinstance(value, tuple) else value + 1


@pytest.mark.parametrize("name", FIELDS)
def test_each_field_is_safe_to_change_or_makes_another_run(name):
    """Both ways round. What is safe is said, with the old value and the new."""
    old, new = FIELDS[name].default, another(FIELDS[name].default)
    for saved, now, text in (
        (meta(), meta({name: new}), f"{name}: {old} there, {new} here"),
        (meta({name: new}), meta(), f"{name}: {new} there, {old} here"),
    ):
        if name.startswith(SAFE) or name == "model.decoder":
            assert check_resumable(saved, now, "runs/x") == [text]
        else:
            with pytest.raises(UsageError) as error:
                check_resumable(saved, now, "runs/x")
            assert str(error.value).startswith(f"runs/x was trained with another configuration: {text}. Restore these")


def test_nothing_changed_says_nothing():
    assert check_resumable(meta(), meta(), "runs/x") == []


def test_all_that_is_refused_is_listed_and_nothing_else():
    now = meta({"model.depth": 3, "data.batch_size": 8, "seed": 1, "optimizer.lr": 1.0})
    with pytest.raises(UsageError) as error:
        check_resumable(meta(), now, "runs/x")
    listed = "data.batch_size: 256 there, 8 here; model.depth: 22 there, 3 here; seed: 0 there, 1 here."
    assert f"configuration: {listed} Restore" in str(error.value)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"fingerprint": "other"}, r"data fingerprint: other there, data here \(.*checkpoint does not say which\)"),
        ({"frozen": {"teacher": "other"}}, r"teacher: weights other there, abc here \(hashes\)"),
        ({"frozen": {"text": "def"}}, r"text: weights def there, none here \(hashes\)"),
        ({"weights_only": True}, "holds converted weights without an optimiser's state"),
    ],
)
def test_other_data_teachers_and_bare_weights_are_refused(changes, message):
    with pytest.raises(UsageError, match=message):
        check_resumable(meta(**changes), meta(), "runs/x")


def test_other_data_are_told_in_words():
    """Which files, how many. With the same names and labels, all that is left to tell is the hash."""
    then = {"source": "folder", "records": 3, "classes": {"a": [2, "x"], "b": [1, "y"]}, "names": ["a/1", "a/2", "b/1"]}
    now = {
        "source": "folder",
        "records": 4,
        "classes": {"a": [2, "x"], "b": [2, "z"]},
        "names": [*then["names"], "b/2"],
    }
    with pytest.raises(UsageError) as error:
        check_resumable(meta(fingerprint="other", data_contents=then), meta(data_contents=now), "runs/x")
    assert "(3 records there, 4 here; class 'b': 1 there, 2 here; new: b/2). Restore" in str(error.value)
    with pytest.raises(UsageError, match="data fingerprint: other there, .*not in names or labels"):
        check_resumable(meta(fingerprint="other", data_contents=now), meta(data_contents=now), "runs/x")


def test_a_checkpoint_without_a_teacher_takes_any():
    assert check_resumable(meta(frozen={}), meta(), "runs/x") == []


def test_the_teacher_of_an_older_checkpoint_is_compared():
    """Up to 0.1.0 its hash stood by itself."""
    older = meta(teacher="abc")
    del older["frozen"]
    assert check_resumable(older, meta(), "runs/x") == []
    with pytest.raises(UsageError, match="teacher: weights other there, abc here"):
        check_resumable(older | {"teacher": "other"}, meta(), "runs/x")


def test_of_converted_checkpoints_only_what_the_file_said_counts():
    """Others may differ, as nobody knows them. Clipping stood among the decisive fields once."""
    decisive = ["model.depth", "loss.alignment_weight", "optimizer.clip_norm"]
    saved = meta(decisive=decisive, fingerprint="")
    now = meta({"data.batch_size": 8, "seed": 1, "optimizer.clip_norm": 1.0, "train.log_every": 7})
    assert check_resumable(saved, now, "runs/x") == ["optimizer.clip_norm: 0.0 there, 1.0 here"]
    with pytest.raises(UsageError, match="model.depth: 22 there, 3 here. Restore"):
        check_resumable(saved, meta({"model.depth": 3, "seed": 1}), "runs/x")
    with pytest.raises(UsageError, match="alignment, convert again with --without-projector"):
        check_resumable(saved, meta({"loss.alignment_weight": 0.5}), "runs/x")


def test_a_checkpoint_that_cannot_be_read_is_not_resumed():
    saved = meta()
    saved["config"]["model"]["experts"] = 8
    with pytest.raises(UsageError, match=r"runs/x has a configuration with fields .* does not know: model.experts"):
        check_resumable(saved, meta(), "runs/x")


def read_state(workdir, step):
    """Every number in a checkpoint, without our own code."""
    with ocp.PyTreeCheckpointer() as reader:
        return reader.restore(workdir / "checkpoints" / str(step) / "state", args=ocp.args.PyTreeRestore())


@pytest.mark.slow
def test_a_run_that_diverges_goes_on_as_its_message_recommends(tiny_config, tmp_path, capsys):
    """A lower rate, clipping, another second moment; and other parts and averages. All is said, and in force.

    With a rate of 0 no parameter may move; the moments go on from where they were, but for what clipping cuts away.
    """
    tiny_config.train.update(steps=3, log_every=1, save_every=100)
    train(tiny_config, str(tmp_path))
    tiny_config.train.update(steps=20, max_nonfinite=2)
    tiny_config.optimizer.lr = 1e38
    with pytest.raises(UsageError, match="A lower optimizer.lr, optimizer.clip_norm=1 or .*beta2=0.95 may help"):
        train(tiny_config, str(tmp_path))
    tiny_config.train.steps = 4
    tiny_config.optimizer.update(lr=0.0, clip_norm=1e-9, beta2=0.95, accumulation=2, decay_steps=2)
    tiny_config.ema.decay = 1.0
    capsys.readouterr()
    train(tiny_config, str(tmp_path))
    changes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Changed since")]
    assert changes == [
        f"Changed since the checkpoint: {change}."
        for change in (
            "ema.decay: 0.9999 there, 1.0 here",
            "optimizer.accumulation: 1 there, 2 here",
            "optimizer.beta2: 0.999 there, 0.95 here",
            "optimizer.clip_norm: 0.0 there, 1e-09 here",
            "optimizer.decay_steps: 0 there, 2 here",
            "optimizer.lr: 0.001 there, 0.0 here",
            "train.max_nonfinite: 20 there, 2 here",
            "train.steps: 3 there, 4 here",
        )
    ]
    before, after = (read_state(tmp_path, step) for step in (3, 4))
    for part in ("params", "ema"):
        jax.tree.map(np.testing.assert_array_equal, after[part], before[part])
    (old, _, _), (new, _, schedule) = (state["opt_state"] for state in (before, after))
    assert old["count"] == 3 and new["count"] == schedule["count"] == 4
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, 0.9 * b, atol=1e-9), new["mu"], old["mu"])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, 0.95 * b, atol=1e-9), new["nu"], old["nu"])
    assert any(np.abs(moment).max() > 1e-6 for moment in jax.tree.leaves(new["mu"])), "there is nothing to compare"
    saved = store.read_meta(tmp_path / "checkpoints", 4)
    assert saved["config"] == save_config(tiny_config)["config"], "the next run is compared with these values"
