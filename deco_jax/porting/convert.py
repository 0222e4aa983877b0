"""`deco convert`: readable weights to a checkpoint of ours, safetensors, a Lightning `.ckpt`, a Hugging Face folder."""

import contextlib
import dataclasses
import functools
import pathlib
import tempfile
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from deco_jax.checkpoints import store as checkpoint
from deco_jax.config import default_config, flatten
from deco_jax.errors import UsageError
from deco_jax.export.diffusers_folder import diffusers_files
from deco_jax.models import build_model
from deco_jax.models.build import KINDS
from deco_jax.porting import folder, moments
from deco_jax.pretrained import networks
from deco_jax.pretrained.infer import ARCHITECTURES
from deco_jax.training.start import abstract_on_host
from deco_jax.training.state import TrainState
from deco_jax.version import __version__
from deco_jax.weights import translate

# What is in the folders that are written here.
CONVERTED = {checkpoint.FOLDER, "config.json", "model.safetensors", "README.md", *diffusers_files(0)} | {"transformer"}
FORMATS = ("checkpoint", "safetensors", "ckpt", "huggingface")


@dataclasses.dataclass
class Bundle:
    """What is carried from one format to another, as our parameters in numpy. None: not there, or not asked for."""

    config: ConfigDict  # of the run, as far as the source says
    ema: Any = None
    online: Any = None
    projector: Any = None
    moments: tuple[int, Any, Any] | None = None  # updates done, first and second moments of {"network", "projector"}
    step: int = 0
    origin: str = ""  # path of the source
    fingerprint: str | None = None  # of the data, if the source is a run of ours
    teacher: str = ""  # hash of the one it was aligned to, if the source says
    decisive: tuple[str, ...] = ()  # fields that training on must not change, if it is not a run of ours

    @property
    def table(self) -> dict[str, str]:
        """Names of the network's parameters."""
        return ARCHITECTURES[self.config.model.kind][0]

    def tensors(self, which: str) -> dict[str, np.ndarray]:
        """The "ema" or "online" weights under PyTorch's names, in the order of PyTorch's modules."""
        return translate.to_torch(self.table, self.ema if which == "ema" else self.online)


def convert(
    source: str,
    target: str,
    *,
    kind: str | None = None,
    weights: str = "ema",
    train_state: bool = False,
    projector: bool = True,
    image_size: int | None = None,
    prediction: str | None = None,
    force: bool = False,
) -> None:
    """Writes the network in `source` to `target`; beside it first, under its name when complete.

    Args:
      source: see `load_pretrained`.
      target: a file or folder.
      kind: one of FORMATS; as the target's ending says unless given, a checkpoint for a folder.
      weights: which of the two a safetensors file or Hugging Face folder gets: ema or online.
      train_state: carry the optimiser's moments, the step and the projector as well, so that training goes on.
      projector: with train_state; False leaves it out, for training on without representation alignment.
      image_size: side of the images it was trained on, for sources that do not say (256 otherwise).
      prediction: what the network predicts, velocity or image, for sources that do not say.
      force: replace `target` if it is a file, or a folder that was made by converting.

    Raises:
      UsageError: the source cannot be read, has not what is asked for, or the target is in the way.
    """
    if "://" in target:
        raise UsageError(f"{target} is no path; write to a local disk or a mounted bucket.")
    path = pathlib.Path(target).expanduser().resolve()
    kind = kind or {".safetensors": "safetensors", ".ckpt": "ckpt"}.get(path.suffix, "checkpoint")
    if kind not in FORMATS:
        raise UsageError(f"--format={kind} is not known; allowed: {', '.join(FORMATS)}.")
    if weights not in ("ema", "online"):
        raise UsageError(f"--weights={weights} is not known; allowed: ema, online.")
    if train_state and kind not in ("checkpoint", "ckpt"):
        raise UsageError(f"--train-state needs a checkpoint or .ckpt as target; {kind} holds one set of weights.")
    if image_size is not None and image_size < 1:
        raise UsageError(f"--image-size={image_size} must be 1 or more.")
    _check_target(path, target, pathlib.Path(source).expanduser().resolve(), force)
    if kind == "ckpt":
        moments.require_torch()
    wanted = ("ema", "online") if kind in ("checkpoint", "ckpt") else (weights,)
    bundle = read(source, wanted, train_state, projector, prediction)
    if kind != "checkpoint":
        folder.check_known_to_pytorch(bundle)
    if image_size is not None:
        bundle.config.data.image_size = image_size
    write = {
        "checkpoint": _write_checkpoint,
        "safetensors": functools.partial(folder.write_safetensors, weights=weights),
        "ckpt": moments.write_ckpt,
        "huggingface": functools.partial(folder.write_folder, weights=weights),
    }[kind]
    with _beside(path) as draft:
        write(bundle, draft)
    print(f"{target}: {kind}, {_describe(bundle)}.")


def _check_target(path: pathlib.Path, target: str, source: pathlib.Path, force: bool) -> None:
    """Raises UsageError unless `path` is free, or may be replaced."""
    if path == source or path in source.parents:
        raise UsageError(f"{target} is, or holds, the source itself.")
    if not path.exists():
        return
    if not force:
        raise UsageError(f"{target} exists; choose another name or pass --force to replace it.")
    if source in path.parents or (source.suffix == ".json" and source.parent == path.parent):
        raise UsageError(f"{target} is a part of the source.")
    strange = sorted({p.name for p in path.iterdir()} - CONVERTED) if path.is_dir() else []
    if strange:
        raise UsageError(f"{target} was not made by converting, as it holds {strange[0]}; --force does not replace it.")


def read(
    source: str, wanted: Iterable[str], train_state: bool, projector: bool, prediction: str | None = None
) -> Bundle:
    """Reads a source of any kind; see `convert`."""
    reader = _read_weight_file if networks.is_weight_file(source) else _read_checkpoint
    return reader(source, wanted, train_state, projector, prediction)


def _read_weight_file(
    source: str, wanted: Iterable[str], train_state: bool, projector: bool, prediction: str | None
) -> Bundle:
    stored = networks.open_networks(source, prediction)
    config = default_config()
    if isinstance(stored.file.config.get("training"), dict):  # a folder of ours
        _apply(config, stored.file.config["training"])
    config.model = networks.model_config(stored)
    network = (f"model.{field}" for field in ("kind", *KINDS[config.model.kind][1]))
    decisive = (*network, "loss.alignment_weight", "loss.alignment_features", "optimizer.clip_norm")
    bundle = Bundle(config, origin=source, step=_step(stored), decisive=decisive)
    if train_state and not stored.file.rest.get("optimizer_states"):
        raise UsageError(f"{source} holds no optimiser state; convert it without --train-state.")
    there = [which for which in ("ema", "online") if stored.has(which)]
    if len(wanted) == 1 or (len(there) == 2 and "only" not in stored.networks):
        for which in wanted:
            setattr(bundle, which, networks.read_network(stored, which, _bar(f"{which} weights")))
    else:
        print(f"{source} has one set of weights; it serves as EMA and online weights.")
        bundle.ema = bundle.online = networks.read_network(stored, there[0], _bar("weights"))
    if train_state:
        tensors = stored.networks.get("projector") if projector else None
        if tensors:
            bundle.projector = networks.read_projector(stored, tensors)
            config.loss.alignment_weight = 0.5
            config.loss.alignment_features = int(tensors["proj.0.4.weight"].shape[0])
        moments.read(stored, bundle)
    return bundle


def _step(stored: networks.Stored) -> int:
    """How long the weights were trained, 0 if the file does not say."""
    said = stored.file.rest.get("global_step", stored.file.metadata.get("step", 0))
    return int(said) if str(said).isdecimal() and len(str(said)) < 10 else 0


def _read_checkpoint(
    source: str, wanted: Iterable[str], train_state: bool, projector: bool, prediction: str | None
) -> Bundle:
    where, step = checkpoint.find_checkpoint(source)
    meta = checkpoint.read_meta(where, step)
    config = default_config()
    _apply(config, meta["config"])
    networks.settle_prediction(source, [config.model.prediction], prediction)
    config.model.attention = "default"  # the run's choice may not exist on this machine
    if train_state and meta.get("weights_only"):
        raise UsageError(f"{source} holds weights only; convert it without --train-state.")
    abstract = abstract_on_host(config)
    asked: dict[str, Any] = {}
    if "ema" in wanted:
        asked["ema"] = abstract.ema
    if "online" in wanted or train_state:
        asked["params"] = abstract.params if train_state else {"network": abstract.params["network"]}
    if train_state:
        asked["opt_state"] = abstract.opt_state
    part = jax.tree.map(np.asarray, checkpoint.restore_part(where, step, asked))
    bundle = Bundle(config, origin=source, step=step, ema=part.get("ema"))
    bundle.fingerprint, bundle.decisive = meta["fingerprint"] or None, tuple(meta.get("decisive", ()))
    bundle.teacher = meta.get("teacher", "") if projector else ""
    bundle.online = part["params"]["network"] if "params" in part else None
    if train_state:
        adam = moments.adam_state(part["opt_state"])
        keep = ("network", "projector") if projector else ("network",)
        mu, nu = ({name: tree[name] for name in keep if name in tree} for tree in (adam.mu, adam.nu))
        bundle.moments = int(adam.count), mu, nu
        bundle.projector = part["params"].get("projector") if projector else None
    return bundle


def _apply(config: ConfigDict, values: dict[str, Any]) -> None:
    """Takes over the fields of another configuration that exist here; where devices were is of no concern."""
    known = flatten(config)
    for field, value in flatten(values).items():
        part, _, name = field.rpartition(".")
        if part != "mesh" and field in known:
            try:
                (config[part] if part else config).update({name: value})
            except (TypeError, ValueError) as error:
                raise UsageError(f"the source's configuration has {field}={value!r}: {error}") from error


def _write_checkpoint(bundle: Bundle, path: pathlib.Path) -> None:
    """A workdir: to start from with train.init_from or, with the optimiser's state, to go on in."""
    config = bundle.config
    params = {"network": bundle.online} | ({"projector": bundle.projector} if bundle.projector is not None else {})
    if bundle.moments is None:
        state: Any = {"params": params, "ema": bundle.ema}
    else:
        if bundle.projector is None:
            config.loss.alignment_weight = 0.0
        count, mu, nu = bundle.moments
        optimizer = moments.fill(abstract_on_host(config).opt_state, count, mu, nu)
        skipped = np.int32(max(bundle.step - count, 0))  # steps that updated nothing
        state = TrainState(np.int32(bundle.step), params, bundle.ema, optimizer, skipped, np.int32(0))
    model = build_model(config.model)
    parameters = sum(x.size for x in jax.tree.leaves(networks.parameter_shapes(model)))
    meta = checkpoint.make_meta(config, bundle.fingerprint or "", parameters, __version__, bundle.teacher)
    meta |= {"converted_from": bundle.origin, "weights_only": bundle.moments is None}
    meta |= {"decisive": bundle.decisive} if bundle.fingerprint is None else {}
    saved = checkpoint.Checkpoints(path, keep=1, keep_every=0)
    with tqdm(desc="checkpoint", total=1, disable=None) as bar:
        saved.save(bundle.step, state, meta)
        saved.close()
        bar.update()
    (path / "config.json").write_text(config.to_json_best_effort(indent=2))


@contextlib.contextmanager
def _beside(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A name beside `path` to write to; what lies there takes its place in the end, or goes if writing fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        draft, old = pathlib.Path(folder) / path.name, pathlib.Path(folder) / "replaced"
        yield draft
        if path.is_dir():
            path.rename(old)  # a folder cannot be renamed over another
        try:
            draft.replace(path)
        except OSError:
            if old.exists():
                old.rename(path)
            raise


def _bar(what: str):
    """Shows how many tensors are read."""
    return lambda places: tqdm(places, desc=what, unit="tensor", disable=None)


def _describe(bundle: Bundle) -> str:
    model = bundle.config.model
    tree = bundle.ema if bundle.ema is not None else bundle.online
    count = sum(x.size for x in jax.tree.leaves(tree))
    more = "" if bundle.moments is None else f", optimiser state after {bundle.moments[0]} updates"
    more += "" if bundle.projector is None else ", projector"
    return f"{model.kind} {model.width}×{model.depth}, {count:,} parameters, step {bundle.step}{more}"
