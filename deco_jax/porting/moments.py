"""How does AdamW's state go between PyTorch's numbered parameters and optax's trees? And `.ckpt` and `.pt` files."""

import itertools
import math
import pathlib
from typing import Any

import numpy as np

from deco_jax.errors import UsageError
from deco_jax.porting.bundle import Bundle
from deco_jax.pretrained import names, networks
from deco_jax.training.optimizer import learning_rate
from deco_jax.weights import translate
from deco_jax.weights.tensors import Tensor


def read(stored: networks.Stored, bundle: Bundle) -> None:
    """Puts a Lightning checkpoint's step and AdamW state into `bundle`, and its optimiser's settings into the config.

    PyTorch numbers the parameters: the network's in the order of the file's online tensors, then the projector's.

    Raises:
      UsageError: the state is not that of AdamW over these parameters.
    """
    online, projector = stored.weights("online"), stored.networks.get("projector", {})
    try:
        state, groups = (stored.file.rest["optimizer_states"][0][key] for key in ("state", "param_groups"))
        order = [number for group in groups for number in group["params"]]
        state = {number: state[number] for number in order}
        steps = {int(np.asarray(entry["step"])) for entry in state.values()}
        moments = [[state[number][key] for number in order] for key in ("exp_avg", "exp_avg_sq")]
        if not all(isinstance(moment, Tensor) for moment in itertools.chain(*moments)):
            raise TypeError("moments that are no tensors")
        group, bundle.step = groups[0], int(stored.file.rest["global_step"])
        settings = {key: float(group[key]) for key in ("eps", "weight_decay")}
        settings["lr"] = float(group.get("initial_lr", group["lr"]))  # a schedule changes "lr"
        settings |= {"beta1": float(group["betas"][0]), "beta2": float(group["betas"][1])}
    except (KeyError, IndexError, TypeError, ValueError, OverflowError, AttributeError) as error:
        raise UsageError(f"{stored.path}: its optimizer_states are not those of AdamW ({error!r}).") from error
    if len(order) != len(online) + len(projector) or len(steps) != 1:
        raise UsageError(
            f"{stored.path}: its optimiser has {len(order)} parameters after {sorted(steps)} updates; the network and "
            f"the projector have {len(online)} + {len(projector)}, and all must have seen as many updates."
        )
    trees = []
    for tensors in moments:
        tree = {"network": translate.from_torch(stored.table, dict(zip(online, tensors, strict=False)), bundle.online)}
        if bundle.projector is not None:
            rest = dict(zip(projector, tensors[len(online) :], strict=True))
            tree["projector"] = translate.from_torch(names.PROJECTOR, rest, bundle.projector)
        trees.append(tree)
    bundle.moments = steps.pop(), *trees
    bundle.config.optimizer.update(settings)


def require_torch(ending: str) -> None:
    """Raises UsageError if PyTorch, which writes files with this ending, is not installed."""
    try:
        import torch  # noqa: F401
    except ImportError as error:
        raise UsageError(f"writing a {ending} needs PyTorch: pip install -e '.[torch]' in the repository.") from error


def write_pt(bundle: Bundle, path: pathlib.Path) -> None:
    """The one set of weights under upstream's names, as "state_dict"; beside it, what they are."""
    import torch

    said = {"weights": bundle.weights, "global_step": bundle.step, **_about(bundle)}
    torch.save({"state_dict": _tensors(bundle.table, getattr(bundle, bundle.weights)), **said}, path)


def _about(bundle: Bundle) -> dict[str, Any]:
    """What upstream has in its configuration, and our reader finds in a file."""
    c = bundle.config
    return {"prediction": c.model.prediction, "dtype": c.model.dtype, "image_size": c.data.image_size}


def write_ckpt(bundle: Bundle, path: pathlib.Path) -> None:
    """A checkpoint in the layout of upstream's Lightning module."""
    import torch

    content = {
        "epoch": 0,
        "global_step": bundle.step,
        **({} if bundle.moments is None else {"loops": _loops(bundle.step)}),
        "pytorch-lightning_version": "2.4.0",
        **_about(bundle),
        "state_dict": {
            **_tensors(bundle.table, bundle.online, "denoiser."),
            **_tensors(bundle.table, bundle.ema, "ema_denoiser."),
            **_tensors(names.PROJECTOR, bundle.projector, "diffusion_trainer."),
        },
        "lr_schedulers": [],
        "optimizer_states": [] if bundle.moments is None else [_optimizer(bundle)],
    }
    torch.save(content, path)


def _loops(step: int) -> dict[str, Any]:
    """Where Lightning's trainer takes its step from: "global_step" it only reports."""
    ready = {"ready": step, "completed": step}
    started = ready | {"started": step}
    optimizer = {
        "step": {"total": ready, "current": ready},
        "zero_grad": {"total": started, "current": started},
    }
    others = {f"{name}_loop": {"state_dict": {}} for name in ("validate", "test", "predict")}
    return others | {
        "fit_loop": {
            "state_dict": {},
            "epoch_loop.state_dict": {"_batches_that_stepped": step},
            "epoch_loop.automatic_optimization.state_dict": {},
            "epoch_loop.automatic_optimization.optim_progress": {"optimizer": optimizer},
        }
    }


def _tensors(table: dict[str, str], params: Any, prefix: str = "") -> dict[str, Any]:
    """Our parameters as torch's tensors, by name; none of none."""
    import torch

    arrays = {} if params is None else translate.to_torch(table, params)
    return {prefix + name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}


def _optimizer(bundle: Bundle) -> dict[str, Any]:
    """The state of torch.optim.AdamW over two groups: the network's parameters, then the projector's."""
    import torch

    count, *moments = bundle.moments
    network = [list(_tensors(bundle.table, tree["network"]).values()) for tree in moments]
    projector = [list(_tensors(names.PROJECTOR, tree.get("projector")).values()) for tree in moments]
    first, second = (a + b for a, b in zip(network, projector, strict=True))
    state = {
        number: {"step": torch.tensor(float(count)), "exp_avg": first[number], "exp_avg_sq": second[number]}
        for number in range(len(first))
    }
    c, numbers = bundle.config.optimizer, list(state)
    now = float(learning_rate(c, bundle.config.train.steps)(count))
    rate = {"lr": c.lr} if math.isclose(now, c.lr, rel_tol=1e-6) else {"lr": now, "initial_lr": c.lr}
    told = rate | {"betas": (c.beta1, c.beta2), "eps": c.eps, "weight_decay": c.weight_decay}
    told |= {"amsgrad": False, "maximize": False, "foreach": None, "capturable": False, "differentiable": False}
    told |= {"fused": None, "decoupled_weight_decay": True}
    groups = [{**told, "params": numbers[: len(network[0])]}, {**told, "params": numbers[len(network[0]) :]}]
    return {"state": state, "param_groups": [group for group in groups if group["params"]]}
