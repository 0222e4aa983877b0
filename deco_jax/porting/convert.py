"""`deco convert`: how do readable weights become a checkpoint, safetensors, `.ckpt`, `.pt` or a Hugging Face folder?"""

import re
from collections.abc import Callable, Collection, Iterable
from typing import Any

import jax
import numpy as np
import optax
from tqdm import tqdm

from deco_jax.checkpoints import store
from deco_jax.errors import UsageError
from deco_jax.export.diffusers_folder import diffusers_files
from deco_jax.models.build import network_fields
from deco_jax.porting import folder, moments
from deco_jax.porting.bundle import Bundle
from deco_jax.pretrained import networks
from deco_jax.pretrained.load import Pretrained, open_pretrained
from deco_jax.storage import AnyPath, is_remote, resolved, write_beside, write_bytes, writing
from deco_jax.training.start import abstract_on_host
from deco_jax.training.state import TrainState
from deco_jax.version import __version__

# What is in the folders that are written here.
CONVERTED = {store.FOLDER, "config.json", "model.safetensors", "README.md", *diffusers_files(0)}
ENDINGS = {".safetensors": "safetensors", ".ckpt": "ckpt", ".pt": "pt", ".pth": "pt"}  # of files, and what is in them


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
      target: a file or folder, on this machine or in a bucket.
      kind: one of WRITERS; as the target's ending says unless given, a checkpoint for a name without one.
      weights: which of the two a safetensors file, a .pt or a Hugging Face folder gets: ema or online.
      train_state: carry the optimiser's moments, the step and the projector as well, so that training goes on.
      projector: of train_state, and of every .ckpt; False leaves it out, to go on without representation alignment.
      image_size: side of the images it was trained on, for sources that do not say (256 otherwise).
      prediction: what the network predicts, velocity or image, for sources that do not say.
      force: replace `target` if it is a file, or a folder that was made by converting.

    Raises:
      UsageError: the source cannot be read, has not what is asked for, or the target is in the way.
    """
    path = resolved(target)
    kind = _kind(target, path.suffix, kind)
    if weights not in ("ema", "online"):
        raise UsageError(f"--weights={weights} is not known; allowed: ema, online.")
    if train_state and kind not in ("checkpoint", "ckpt"):
        raise UsageError(f"--train-state needs a checkpoint or .ckpt as target; {kind} holds one set of weights.")
    if image_size is not None and image_size < 1:
        raise UsageError(f"--image-size={image_size} must be 1 or more.")
    with writing(path):
        _check_target(path, target, resolved(source), force)
    if kind in ("ckpt", "pt"):
        moments.require_torch(f".{kind}")
    wanted = ("ema", "online") if kind in ("checkpoint", "ckpt") else (weights,)
    bundle = read(source, wanted, train_state, projector, prediction)
    if not train_state and kind != "ckpt":  # a run that starts from weights makes its own
        bundle.projector = None
    if kind != "checkpoint":
        folder.check_known_to_pytorch(bundle)
    if image_size is not None:
        bundle.config.data.image_size = image_size
    elif "image_size" in bundle.assumed:
        side = bundle.config.data.image_size
        print(f"{source} does not say how large its images were; {side} is assumed (or give --image-size).")
    if "dtype" in bundle.assumed:
        print(f"{source} does not say in which dtype it was trained; {bundle.config.model.dtype} is assumed.")
    with writing(path):
        if kind == "checkpoint" and is_remote(path):  # Orbax itself makes it appear whole
            write_checkpoint(bundle, path)
        else:
            with write_beside(path) as draft:
                WRITERS[kind](bundle, draft)
    print(f"{target}: {kind}, {bundle}.")


def _kind(target: str, ending: str, given: str | None) -> str:
    """One of WRITERS: what is `given`, or else follows from the target's ending.

    Raises:
      UsageError: it is not known, or the name promises another.
    """
    if given is not None and given not in WRITERS:
        raise UsageError(f"--format={given} is not known; allowed: {', '.join(WRITERS)}.")
    promised = ENDINGS.get(ending)
    if given and promised not in (None, given):
        raise UsageError(
            f"{target} would hold a {given}, but its ending {ending} says {promised}; choose another name."
        )
    if not (given or promised) and re.fullmatch(r"\.[a-zA-Z]\w*", ending):
        raise UsageError(
            f"{target}: nothing is written as {ending}; allowed: {', '.join(ENDINGS)}, or a folder's name without an "
            "ending. --format=checkpoint makes a folder of any name."
        )
    return given or promised or "checkpoint"


def _check_target(path: AnyPath, target: str, source: AnyPath, force: bool) -> None:
    """Raises UsageError unless `path` is free, or may be replaced."""
    if path == source or path in source.parents:
        raise UsageError(f"{target} is, or holds, the source itself.")
    if not path.exists():
        return
    if not force:
        raise UsageError(f"{target} exists; choose another name or pass --force to replace it.")
    if is_remote(path) and path.is_dir():
        raise UsageError(f"{target} is a folder in a bucket, which --force does not replace; remove it first.")
    if source in path.parents or (source.suffix == ".json" and source.parent == path.parent):
        raise UsageError(f"{target} is a part of the source.")
    if strange := _strange(path) if path.is_dir() else None:
        raise UsageError(f"{target} was not made by converting, as it holds {strange}; --force does not replace it.")


def _strange(folder: AnyPath) -> str | None:
    """The first thing in a folder that converting would not have written there."""
    for path in sorted(folder.iterdir()):
        if path.name == store.FOLDER:
            steps = list(path.iterdir())
            converted = [
                p.name.isdigit() and store.is_complete(p) and "converted_from" in store.read_meta(path, int(p.name))
                for p in steps
            ]
            if converted != [True]:
                return f"{store.FOLDER} of a run, or of another tool" if steps else store.FOLDER
        elif path.is_dir():
            names = [f"{path.name}/{p.name}" for p in sorted(path.iterdir())]
            if left := [name for name in names or [path.name] if name not in CONVERTED]:
                return left[0]
        elif path.name not in CONVERTED:
            return path.name
    return None


def read(
    source: str, wanted: Collection[str], train_state: bool, projector: bool, prediction: str | None = None
) -> Bundle:
    """Reads a source of any kind; see `convert`."""
    found = open_pretrained(source, prediction)
    if found.stored is None:
        return _read_checkpoint(found, wanted, train_state, projector)
    stored, config = found.stored, found.config
    decisive = [f"model.{field}" for field in ("kind", *network_fields(config.model.kind))]
    decisive += ["loss.alignment_weight", "loss.alignment_features"]
    bundle = Bundle(config, origin=source, step=_step(stored), decisive=tuple(decisive), assumed=found.assumed)
    if train_state and not stored.file.rest.get("optimizer_states"):
        raise UsageError(f"{source} holds no optimiser state; convert it without --train-state.")
    unnamed = "only" in stored.networks and len(stored.sets) == 2
    if len(wanted) == 1 or (not unnamed and len(stored.sets) == 2):
        if unnamed:
            print(f"{source} does not say whether its weights are an average; they are taken for {wanted[0]}.")
        for which in wanted:
            setattr(bundle, which, networks.read_network(stored, which, _bar(f"{which} weights")))
    else:
        print(f"{source} has one set of weights; it serves as EMA and online weights.")
        bundle.ema = bundle.online = networks.read_network(stored, stored.sets[0], _bar("weights"))
    if projector and "projector" in stored.networks and (train_state or len(wanted) == 2):
        bundle.projector = networks.read_projector(stored)
    if train_state:
        if bundle.projector is not None:
            config.loss.alignment_weight = 0.5
            config.loss.alignment_layer = min(6 if config.model.kind == "deco_text" else 8, config.model.depth)
            config.loss.alignment_features = len(bundle.projector["out"]["bias"])
        moments.read(stored, bundle)
    return bundle


def _step(stored: networks.Stored) -> int:
    """How long the weights were trained, 0 if the file does not say."""
    said = stored.file.rest.get("global_step", stored.file.metadata.get("step", 0))
    return int(said) if str(said).isdecimal() and len(str(said)) < 10 else 0


def _read_checkpoint(found: Pretrained, wanted: Collection[str], train_state: bool, projector: bool) -> Bundle:
    source, config, (where, step) = found.path, found.config, found.checkpoint
    meta = store.read_meta(where, step)
    if train_state and meta.get("weights_only"):
        raise UsageError(f"{source} holds weights only; convert it without --train-state.")
    abstract = abstract_on_host(config)
    asked = {"ema": abstract.ema} if "ema" in wanted else {}
    if train_state:
        asked |= {"params": abstract.params, "opt_state": abstract.opt_state}
    elif "online" in wanted:
        asked["params"] = {"network": abstract.params["network"]}
        if projector and found.has_projector:
            asked["params"] = abstract.params
    part = jax.tree.map(np.asarray, found.restore(asked))
    params = part.get("params", {})
    bundle = Bundle(config, origin=source, step=step, ema=part.get("ema"), online=params.get("network"))
    bundle.fingerprint, bundle.decisive = meta["fingerprint"] or None, tuple(meta.get("decisive", ()))
    bundle.frozen = store.frozen_digests(meta) if projector else {}
    bundle.data = {name: meta[name] for name in ("class_names", "data_contents") if name in meta}
    if train_state:
        adam = optax.tree_utils.tree_get(part["opt_state"], "ScaleByAdamState")
        keep = ("network", "projector") if projector else ("network",)
        mu, nu = ({name: tree[name] for name in keep if name in tree} for tree in (adam.mu, adam.nu))
        bundle.moments = int(adam.count), mu, nu
    if projector:
        bundle.projector = params.get("projector")
    return bundle


def write_checkpoint(bundle: Bundle, path: AnyPath) -> None:
    """A workdir: to start from with train.init_from or, with the optimiser's state, to go on in."""
    config = bundle.config
    params = {"network": bundle.online} | ({"projector": bundle.projector} if bundle.projector is not None else {})
    if bundle.moments is None:
        state: Any = {"params": params, "ema": bundle.ema}
    else:
        if bundle.projector is None:
            config.loss.alignment_weight = 0.0
        count, mu, nu = bundle.moments
        empty = abstract_on_host(config).opt_state  # whose counters all count the updates
        optimizer = optax.tree_utils.tree_set(empty, count=np.int32(count), mu=mu, nu=nu)
        skipped = np.int32(max(bundle.step - count, 0))  # steps that updated nothing
        state = TrainState(np.int32(bundle.step), params, bundle.ema, optimizer, skipped, np.int32(0))
    meta = store.make_meta(config, bundle.fingerprint or "", bundle.parameters, __version__, bundle.frozen)
    meta |= bundle.data | {"converted_from": bundle.origin, "weights_only": bundle.moments is None}
    meta |= {"decisive": bundle.decisive} if bundle.fingerprint is None else {}
    saved = store.Checkpoints(path, keep=1, keep_every=0)
    with tqdm(desc="checkpoint", total=1, disable=None) as bar:
        saved.save(bundle.step, state, meta)
        saved.close()
        bar.update()
    write_bytes(path / "config.json", config.to_json_best_effort(indent=2).encode())


def _bar(what: str) -> Callable[[Iterable], Iterable]:
    """Shows how many tensors are read."""
    return lambda places: tqdm(places, desc=what, unit="tensor", disable=None)


WRITERS = {
    "checkpoint": write_checkpoint,
    "safetensors": folder.write_safetensors,
    "ckpt": moments.write_ckpt,
    "pt": moments.write_pt,
    "huggingface": folder.write_folder,
}
