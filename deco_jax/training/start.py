"""What does a run begin with? Its devices, data and frozen networks; its state's shapes and first values."""

import dataclasses
import hashlib
import json
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh
from ml_collections import ConfigDict

from deco_jax.checkpoints import store
from deco_jax.config import build_model, restore_config
from deco_jax.data.features import StoredFeatures, open_features
from deco_jax.data.pipeline import fingerprint
from deco_jax.data.records import Source
from deco_jax.data.sources import open_source
from deco_jax.data.states import StoredStates, open_states
from deco_jax.data.tokens import Tokenizer
from deco_jax.encoders.frozen import FrozenWeights
from deco_jax.encoders.teacher import load_teacher
from deco_jax.encoders.text import TextEncoder, encode_on, load_run_encoder, stored_weights
from deco_jax.errors import UsageError
from deco_jax.models.build import network_fields
from deco_jax.ops import attention, decoder
from deco_jax.ops.door import platform
from deco_jax.parallel import mesh as meshes
from deco_jax.parallel import processes
from deco_jax.parallel.mesh import Layout
from deco_jax.pretrained.load import Pretrained, open_pretrained
from deco_jax.storage import AnyPath
from deco_jax.training.online import Judge
from deco_jax.training.overview import parameter_table
from deco_jax.training.state import TrainState
from deco_jax.training.step import TrainStep, make_train_step
from deco_jax.version import __version__


@dataclasses.dataclass(frozen=True)
class Parts:
    """What a run is made of, apart from its state."""

    layout: Layout
    source: Source
    train_step: TrainStep
    frozen: tuple[FrozenWeights, ...]  # of the networks in the step
    features: StoredFeatures | None  # a teacher's, in place of the teacher
    encoder: TextEncoder | None  # of captions and the prompts of grids; None if neither needs it
    states: StoredStates | None  # of captions, in place of the encoder
    judge: Judge | None  # of small evaluations
    fingerprint: str  # of the data

    @property
    def tokenizer(self) -> Tokenizer | None:
        """Of captions that are encoded in the step."""
        return None if self.encoder is None or self.states is not None else self.encoder.tokenizer

    @property
    def digests(self) -> dict[str, str]:
        """Hashes of the frozen networks' weights by name, also of the teacher whose features are stored."""
        stored = {} if self.features is None else {"teacher": self.features.digest}
        return stored | {weights.network.name: weights.digest for weights in self.frozen}


def list_data(config: ConfigDict, workdir: AnyPath) -> None:
    """Of several processes, the first lists the tars; the others, on its machine or not, then find its index.

    In a bucket this is to read all of them. Arguments and errors as of `open_parts`.
    """
    if jax.process_count() > 1 and jax.process_index() == 0 and config.data.source in ("tars", "webdataset"):
        open_source(config.data, workdir)


def open_parts(config: ConfigDict, workdir: AnyPath) -> Parts:
    """Opens all that `config` names; `workdir` gets the index of the images if their folder cannot be written.

    Raises:
      UsageError: something is not there, or does not fit the rest.
    """
    layout = meshes.make_layout(config.mesh)
    check_devices(config, layout.mesh)
    source = open_source(config.data, workdir)
    build_model(config.model).condition.check_data(source.condition)
    encoder, states = _open_text(config, source)
    frozen, features = (), None
    if config.loss.alignment_weight and config.teacher.stored:
        features = open_features(config, source)
    elif config.loss.alignment_weight:
        frozen = (load_teacher(config),)
    if states is not None:
        frozen = (*frozen, stored_weights(config, states))
    elif encoder is not None:
        frozen = (*frozen, encoder.weights)
    train_step = make_train_step(config, [weights.network for weights in frozen])
    order = fingerprint(config.data, config.seed, source)
    return Parts(layout, source, train_step, frozen, features, encoder, states, Judge.open(config), order)


def _open_text(config: ConfigDict, source: Source) -> tuple[TextEncoder | None, StoredStates | None]:
    """The text encoder where it is needed, and stored states where there are."""
    if config.model.kind != "deco_text":
        if config.text.stored:
            raise UsageError(
                f"text.stored={config.text.stored} is of captions, and model.kind={config.model.kind!r} learns from "
                "class labels; text.stored='' goes with it."
            )
        return None, None
    if not config.text.stored:
        return load_run_encoder(config), None
    states = open_states(config, source)
    if not config.train.sample_every:
        return None, states
    try:
        encoder = load_run_encoder(config)
    except UsageError as error:
        raise UsageError(f"{error} Grids of samples need it; without them it is not: train.sample_every=0.") from error
    if encoder.weights.digest != states.digest:
        raise UsageError(
            f"text.stored={config.text.stored} holds states of another encoder than text.encoder="
            f"{config.text.encoder} with model.dtype={config.model.dtype}: {states.digest} there, "
            f"{encoder.weights.digest} here (hashes of weights and tokenizer). Name that one, or prepare into another "
            "folder."
        )
    return encoder, states


def encode_prompts(config: ConfigDict, parts: Parts) -> np.ndarray | None:
    """States of the prompts of sample grids, and last of the empty one, (1 + P, L, E) fp32; None if none are needed."""
    if parts.encoder is None:
        return None
    weights, tokens = parts.encoder.weights, parts.encoder.tokenizer([*config.sample.prompts, ""])
    return encode_on(weights.network, weights.place(parts.layout), parts.layout, tokens)


def keep_decoding(config: ConfigDict, workdir: AnyPath) -> tuple[ConfigDict, list[str]]:
    """The configuration, with which a run that has a checkpoint decodes images as it began; and lines on what changed.

    So the same command goes on with the same pixels, also in the workdir of a version with other defaults.
    """

    def look() -> str:
        meta = {} if jax.process_index() else store.newest_meta(workdir)
        if not meta or "decisive" in meta:  # converted: nobody knows
            return ""
        began = restore_config(meta, workdir).data
        return json.dumps([began.orient, began.background])

    said = processes.broadcast(processes.agree(look))
    config, lines = config.copy_and_resolve_references(), []
    for field, value in zip(("orient", "background"), json.loads(said) if said else (), strict=bool(said)):
        if config.data[field] != value:
            lines.append(f"data.{field} stays {value!r}, as this run began; {config.data[field]!r} is for new runs.")
            config.data[field] = value
    return config, lines


def check_processes_agree(config: ConfigDict, parts: Parts) -> None:
    """A run whose processes differ in program, settings or data would hang, or train on what nobody asked for."""
    processes.assert_equal("the version of deco_jax and jax", f"{__version__}, {jax.__version__}")
    settings = hashlib.sha256(config.to_json_best_effort().encode()).hexdigest()[:16]
    processes.assert_equal("the configuration (a hash)", settings)
    processes.assert_equal("the data's fingerprint", parts.fingerprint)
    processes.assert_equal("the frozen networks (hashes)", str(parts.digests))
    if parts.judge is not None:
        judged = f"{parts.judge.features.digest}, {parts.judge.reference.hash}"
        processes.assert_equal("what the evaluation sees and compares with (hashes)", judged)


def check_devices(config: ConfigDict, mesh: Mesh) -> None:
    """Raises UsageError if a run of `config` cannot be laid out over `mesh`."""
    batch, parts, devices = config.data.batch_size, config.optimizer.accumulation, meshes.batch_devices(mesh)
    unit = parts * devices
    if batch % unit:
        raise UsageError(
            f"data.batch_size={batch} is not divisible by {devices} devices × optimizer.accumulation={parts}; "
            f"nearest: {max(batch // unit, 1) * unit} and {(batch // unit + 1) * unit}."
        )
    width, heads, fsdp, tensor = config.model.width, config.model.heads, mesh.shape["fsdp"], mesh.shape["tensor"]
    if width % fsdp:
        fits = max(n for n in range(1, fsdp) if fsdp % n == 0 and width % n == 0)
        raise UsageError(
            f"mesh.fsdp={fsdp} does not divide model.width={width}, so nothing would be split; "
            f"mesh.fsdp={fits} with mesh.data=-1 fits."
        )
    if heads % tensor:
        raise UsageError(f"mesh.tensor={tensor} must divide model.heads={heads}.")
    with jax.set_mesh(mesh):
        here = platform()
    for field, table in (("attention", attention.TABLE), ("decoder", decoder.TABLE)):
        wanted = config.model[field]
        needs = [name for known in table if known.name == wanted for name in known.platforms]
        if needs and here not in needs:
            raise UsageError(f"model.{field}={wanted!r} needs a {' or '.join(needs).upper()}; 'auto' runs everywhere.")


def _boxed_state(train_step: TrainStep, layout: Layout) -> TrainState:
    """Shapes and dtypes, still with logical axis names."""
    with meshes.use_mesh(layout):
        return jax.eval_shape(train_step.initial_state)


def abstract_state(train_step: TrainStep, layout: Layout) -> TrainState:
    """Shapes, dtypes and shardings of a run's state, without computing it."""
    boxed = _boxed_state(train_step, layout)
    shardings = meshes.state_shardings(boxed, layout)
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), nn.meta.unbox(boxed), shardings
    )


def abstract_on_host(config: ConfigDict) -> TrainState:
    """`abstract_state` of a run that has one device, a CPU: accelerators may be too small for a whole state."""
    mesh = Mesh(np.array(jax.local_devices(backend="cpu")[:1]).reshape(1, 1, 1), meshes.AXES)
    return abstract_state(make_train_step(config), Layout(mesh))


def find_weights(config: ConfigDict) -> Pretrained | None:
    """What `train.init_from` names, see `load_pretrained`; None if a run starts from random weights.

    Raises:
      UsageError: there is nothing, or it holds another network.
    """
    path = config.train.init_from
    if not path:
        return None
    found = open_pretrained(path)
    theirs, ours = found.config.model, config.model
    different = [
        f"model.{field}: {theirs[field]} there, {ours[field]} here"
        for field in ("kind", *network_fields(ours.kind))
        if theirs[field] != ours[field]
    ]
    if different:
        raise UsageError(f"train.init_from={path} holds another network: {'; '.join(different)}.")
    return found


def first_state(
    train_step: TrainStep, abstract: TrainState, layout: Layout, weights: Pretrained | None = None
) -> TrainState:
    """A run's state before its first step: random, or with the weights that `find_weights` found.

    One set of weights serves as both where there is no other. The projector is taken over as well where both are runs
    of ours that align to features of the same size.

    Raises:
      UsageError: some of the weights are not finite, or cannot be read.
    """
    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    with meshes.use_mesh(layout):
        state = jax.jit(lambda: nn.meta.unbox(train_step.initial_state()), out_shardings=shardings)()
    if weights is None:
        return state

    def read(which: str, like: Any) -> Any:
        which = which if which in weights.sets else weights.sets[0]
        if weights.checkpoint is not None:  # a collective, whose failure on one process must not wait for the others
            return weights.read(which, like)
        return processes.agree(lambda: weights.read(which, like))

    params = {**state.params, "network": read("online", abstract.params["network"])}
    ours, theirs = train_step.config.loss, weights.config.loss
    if weights.has_projector and ours.alignment_weight and theirs.alignment_features == ours.alignment_features:
        wanted = {"params": {"projector": abstract.params["projector"]}}
        params["projector"] = weights.restore(wanted)["params"]["projector"]
    return state.replace(params=params, ema=read("ema", abstract.ema))


def summary(config: ConfigDict, parts: Parts, parameters: int, begin: str) -> str:
    """What stands at the top of a run's output; `begin` says where its state comes from."""
    table = parameter_table(_boxed_state(parts.train_step, parts.layout).params, parts.layout)
    frozen = "" if parts.features is None else f", aligned to the features in {config.teacher.stored}"
    for weights in parts.frozen:
        size = sum(x.size for x in jax.tree.leaves(weights.params))
        frozen += f", {weights.network.purpose} ({size:,} parameters)"
    shape = ", ".join(f"{axis} {size}" for axis, size in parts.layout.mesh.shape.items())
    return (
        f"{table}\nNetwork: {parameters:,} parameters{frozen}. {jax.device_count()} × {jax.devices()[0].device_kind} "
        f"as a mesh of {shape}; {jax.process_count()} process(es). "
        f"Global batch {config.data.batch_size}. The run {begin}."
    )
