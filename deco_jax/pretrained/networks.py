"""Which networks are in a weight file, and how does one set of its weights become our parameters?"""

import dataclasses
import os
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from ml_collections import ConfigDict

from deco_jax.checkpoints import store
from deco_jax.config import FIELDS, build_model, default_config, restore_config
from deco_jax.diffusion.flow import PREDICTIONS
from deco_jax.encoders.qwen3.model import SIZES
from deco_jax.errors import UsageError
from deco_jax.models import Projector
from deco_jax.models.build import KINDS, parameter_shapes
from deco_jax.pretrained import names
from deco_jax.pretrained.infer import ARCHITECTURES, infer, split_networks
from deco_jax.storage import reading, retried, to_path
from deco_jax.weights import translate
from deco_jax.weights.files import Weights, open_weights
from deco_jax.weights.tensors import naming, short


@dataclasses.dataclass(frozen=True)
class Stored:
    """What a PyTorch or safetensors file holds, unread."""

    path: str
    sizes: dict[str, Any]  # of the network, see `infer`; and its "prediction"
    networks: dict[str, dict[str, Any]]  # those of "ema", "online", "projector" that it has; PyTorch name → tensor
    file: Weights
    dtype: str | None = None  # in which the network was trained, None = it does not say
    image_size: int | None = None  # side of the images it was trained on, None = it does not say

    @property
    def table(self) -> dict[str, str]:
        """Names of the network's parameters."""
        return ARCHITECTURES[self.sizes["kind"]][0]

    @property
    def sets(self) -> tuple[str, ...]:
        """For which of "ema" and "online" there are weights; a file with a single set, and no word, has both."""
        if "only" not in self.networks:
            return tuple(which for which in ("ema", "online") if which in self.networks)
        said = [which for which in _said(self.file, "weights") if which in ("ema", "online")]
        return tuple(said[:1]) or ("ema", "online")

    def weights(self, which: str) -> dict[str, Any]:
        """The "ema" or the "online" tensors.

        Raises:
          UsageError: it has the other only.
        """
        if which not in self.sets:
            raise UsageError(f"{self.path} holds no {which} weights, but: {', '.join(self.sets)}.")
        return self.networks["only" if "only" in self.networks else which]


def is_weight_file(path: str | os.PathLike) -> bool:
    """Whether `path` is a file, or a Hugging Face folder: not a workdir or checkpoint of ours."""
    given = to_path(path)

    def look() -> bool:
        if (given / store.FOLDER).is_dir():  # whatever else lies in a workdir
            return False
        endings = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json")
        return given.is_file() or (given.is_dir() and any(any(given.glob(ending)) for ending in endings))

    with reading(given):
        return retried(f"reading {given}", look)


def within_pipeline(path: str) -> str:
    """`path`, or its transformer/ if it is a folder that diffusers' `save_pretrained` made of a whole pipeline."""
    given = to_path(path)

    def look() -> bool:
        return (given / "model_index.json").is_file() and (given / "transformer" / "config.json").is_file()

    with reading(given):
        whole = not is_weight_file(path) and retried(f"reading {given}", look)
    return str(given / "transformer") if whole else path


def open_networks(path: str | os.PathLike, prediction: str | None = None) -> Stored:
    """Looks into a file or Hugging Face folder: which networks, of which sizes. Reads no numbers.

    Args:
      path: of the file or folder.
      prediction: of the network, velocity or image, for files that do not say; those of a baseline need it.

    Raises:
      UsageError: it cannot be read, or its tensors do not make a network, and they are listed; or it predicts
        something else.
    """
    file = open_weights(to_path(path))
    with naming(path):
        networks = split_networks(file.tensors)
        sets = [networks[which] for which in ("ema", "online", "only") if which in networks]
        if not sets:
            raise UsageError(f"there is no network, only: {', '.join(networks)}.")
        sizes = [infer({name: tuple(tensor.shape) for name, tensor in tensors.items()}) for tensors in sets]
        if sizes[0] != sizes[-1]:
            raise UsageError(f"its EMA and online networks differ: {sizes[0]} and {sizes[-1]}.")
    prediction = settle_prediction(path, _said(file, "prediction"), prediction)
    if prediction is None and sizes[0]["kind"] == "baseline":
        raise UsageError(
            f"{path} does not say whether its baseline predicts velocities or images; both are in use and have the "
            "same tensors. Say which: prediction='velocity' or 'image' (deco convert --prediction velocity, or image)."
        )
    dtypes = [dtype for dtype in _said(file, "dtype") if dtype in FIELDS["model.dtype"].choices]
    sides = [int(side) for side in _said(file, "image_size") if str(side).isdecimal() and 0 < len(str(side)) < 6]
    sizes = sizes[0] | {"prediction": prediction or "velocity"}
    return Stored(str(path), sizes, networks, file, *((said or [None])[0] for said in (dtypes, sides)))


def _said(file: Weights, name: str) -> list[Any]:
    """What stands in a file or folder for `name`, a field of `config.model`, in as many places as there are.

    In a folder that an older version wrote, the run's own configuration has it.
    """
    training = file.config.get("training")
    model = training.get("model") if isinstance(training, dict) else None
    places = (file.metadata, file.config, file.rest, model if isinstance(model, dict) else {})
    return [place[name] for place in places if name in place]


def settle_prediction(path: str | os.PathLike, said: list[Any], given: str | None) -> str | None:
    """What a network predicts, velocity or image: tensors do not tell. None if nobody says anything.

    Args:
      path: the file, for messages.
      said: what stands in it, in as many places as there are.
      given: what its reader says, None for nothing.

    Raises:
      UsageError: two say different things, or one something unknown.
    """
    for value in said if given is None else [*said, given]:
        if not isinstance(value, str) or value not in PREDICTIONS:
            raise UsageError(f"{path}: prediction={short(value)} is not known; allowed: {', '.join(PREDICTIONS)}.")
    if other := [value for value in said if value != said[0]]:
        raise UsageError(f"{path} says in one place that its network predicts {said[0]}, in another {other[0]}.")
    if said and given not in (None, said[0]):
        raise UsageError(f"{path} holds a network that predicts {said[0]}, not {given}; leave the prediction out.")
    return said[0] if said else given


def model_config(stored: Stored) -> ConfigDict:
    """The `model` part of a configuration for the network in `stored`, other fields at their defaults.

    Raises:
      UsageError: it is a network that this version cannot run.
    """
    kind = stored.sizes["kind"]
    if kind not in KINDS:
        known = ", ".join(f"{name} {size}" for name, size in stored.sizes.items() if name != "kind")
        raise UsageError(
            f"{stored.path} holds a {kind} network ({known}); this version runs and converts: {', '.join(KINDS)}."
        )
    config = default_config().model
    config.update(stored.sizes | ({"dtype": stored.dtype} if stored.dtype else {}))
    return config


def run_config(stored: Stored) -> ConfigDict:
    """The configuration of the run behind `stored`: the network, and the rest as far as it says, else the defaults."""
    config, said = default_config(), stored.file.config
    if isinstance(said.get("training"), dict):  # a folder of ours
        config = restore_config(said | {"config": said["training"]}, stored.path)
    elif stored.sizes["kind"] == "deco_text":  # as upstream samples, and every configuration of text here
        config.sample.update(solver="adams2", steps=25, guidance=4.0, shift=3.0)
    config.model = model_config(stored)
    if stored.sizes["kind"] == "deco_text":
        told = [name for name in _said(stored.file, "text_encoder") if isinstance(name, str)]
        known = config.text.encoder != FIELDS["text.encoder"].default
        if told or not (known or config.model.text_features == SIZES["1.7B"]["width"]):
            config.text.encoder = told[0] if told else ""  # it is another than the published one, and nobody says which
    config.data.image_size = stored.image_size or config.data.image_size
    return config


def read_network(stored: Stored, which: str, watch: Callable[[Iterable], Iterable] = iter) -> Any:
    """The "ema" or "online" weights as our parameters, fp32 numpy; one tensor at a time is read beside them."""
    like = parameter_shapes(build_model(model_config(stored)))
    with naming(stored.path):
        return translate.from_torch(stored.table, stored.weights(which), like, watch)


def read_projector(stored: Stored) -> Any:
    """The alignment's projector as our parameters."""
    tensors = stored.networks["projector"]
    features = tensors["proj.0.4.weight"].shape[0] if "proj.0.4.weight" in tensors else 0
    tokens = jnp.zeros((1, 1, stored.sizes["width"]))
    like = nn.meta.unbox(jax.eval_shape(lambda: Projector(features).init(jax.random.key(0), tokens)["params"]))
    with naming(stored.path):
        return translate.from_torch(names.PROJECTOR, tensors, like)
