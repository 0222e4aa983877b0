"""May a run go on from a checkpoint of another configuration, and what is then different?"""

import os
from typing import Any

from deco_jax.checkpoints.store import frozen_digests
from deco_jax.config import FIELDS, flatten, restore_config
from deco_jax.data.records import compare
from deco_jax.errors import UsageError


def check_resumable(saved: dict[str, Any], now: dict[str, Any], where: str | os.PathLike) -> list[str]:
    """Compares a run with the one that wrote a checkpoint, which it is to continue.

    They must agree in what makes the run: network, data, batch, seed, flow, losses and the weights of frozen networks.
    How fast it learns and averages, when it reports, and where it runs may change: the fields that are "free" in
    config.FIELDS.

    Args:
      saved: the checkpoint's meta, see `store.make_meta`.
      now: that of the run which is to go on.
      where: the checkpoint is, for messages.

    Returns:
      One line for each field that is free and differs, "optimizer.lr: 0.0001 there, 5e-05 here", for the log.

    Raises:
      UsageError: it must not; all fields that differ are listed.
    """
    if saved.get("weights_only"):
        raise UsageError(
            f"{where} holds converted weights without an optimiser's state; start another workdir with "
            f"--config.train.init_from={where}, or convert with --train-state."
        )
    then, today = flatten(restore_config(saved, where)), flatten(restore_config(now))
    differences = {
        field: f"{field}: {then[field]} there, {today[field]} here"
        for field in sorted(FIELDS)
        if then[field] != today[field]
    }
    accepted = [field for field in differences if FIELDS[field].resume == "free"]
    refused = [field for field in differences if FIELDS[field].resume == "fixed"]
    if "decisive" in saved:  # converted: the file said little more than this of what was trained, and how
        accepted = [field for field in accepted if field.startswith("optimizer.")]
        refused = [field for field in refused if field in saved["decisive"]]
    problems = [differences[field] for field in refused]
    if "decisive" in saved and any(field.startswith("loss.alignment") for field in refused):
        problems.append("to train without alignment, convert again with --without-projector")
    if "decisive" not in saved and not problems and saved["fingerprint"] != now["fingerprint"]:
        problems = [_data_change(saved, now)]
    if not problems:
        ours = frozen_digests(now)
        problems = [
            f"{name}: weights {digest} there, {ours.get(name, 'none')} here (hashes)"
            for name, digest in frozen_digests(saved).items()
            if ours.get(name) != digest
        ]
    if problems:
        raise UsageError(
            f"{where} was trained with another configuration: {'; '.join(problems)}. Restore these values, or start a "
            "new workdir (with --config.train.init_from to begin from these weights)."
        )
    return [differences[field] for field in accepted]


def _data_change(saved: dict[str, Any], now: dict[str, Any]) -> str:
    """How the records differ, in words where the checkpoint knows enough: older ones have a hash only."""
    then, today = saved.get("data_contents"), now.get("data_contents")
    if words := then and today and compare(then, today):
        return f"the data changed ({words})"
    which = "; this checkpoint does not say which" if then is None else " in what they hold, not in names or labels"
    return f"data fingerprint: {saved['fingerprint']} there, {now['fingerprint']} here (the records changed{which})"
