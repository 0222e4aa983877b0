"""How are a text encoder's states of every caption computed once and stored? `deco prepare --text`."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from ml_collections import ConfigDict

from deco_jax.conditions import Captions
from deco_jax.data.pipeline import Batch, Threads
from deco_jax.data.sources import open_source
from deco_jax.data.states import Contents, captions_of, wording_of
from deco_jax.encoders.frozen import FrozenWeights
from deco_jax.encoders.text import load_run_encoder
from deco_jax.errors import UsageError
from deco_jax.parallel import mesh as meshes
from deco_jax.parallel.mesh import Layout
from deco_jax.preparation.arrays import Begun, Work, prepare, rows_a_file
from deco_jax.preparation.reading import LoadCaptions
from deco_jax.storage import AnyPath


def prepare_text(config: ConfigDict, out: str, batch_size: int, part: str | None = None) -> None:
    """Stores the text encoder's states of every caption of the configuration's data, as `arrays.prepare` does.

    Captions are read, images are not.

    Args:
      config: the whole configuration.
      out: the folder; with several processes or parts, one they all see.
      batch_size: captions at a time on this process's devices, rounded up to a multiple of them.
      part: see `jobs.find_part`.

    Raises:
      BrokenRun, TransientError: see `arrays.prepare`.
      UsageError: data, encoder or folder are not to be had; the network or the data have no captions; the folder holds
        states of something else; or too many captions cannot be read.
    """
    prepare(out, part, lambda folder: _open(config, batch_size, folder))


def _open(config: ConfigDict, batch_size: int, folder: AnyPath) -> Work:
    if batch_size < 1:
        raise UsageError(f"--batch-size={batch_size} must be at least 1.")
    if config.model.kind != "deco_text":
        raise UsageError(f"model.kind={config.model.kind!r} learns from class labels; --text is for 'deco_text'.")
    source = open_source(config.data, folder)
    if not isinstance(source.condition, Captions):
        raise UsageError(f"data.source={config.data.source!r} has no captions of which states could be prepared.")
    encoder = load_run_encoder(config)
    tokens, width = config.model.text_tokens, config.model.text_features
    contents = Contents(
        identity=source.identity,
        records=len(source),
        records_a_file=rows_a_file(tokens, width),
        tokens=tokens,
        features=width,
        encoder=encoder.weights.digest,
        computed=config.model.dtype,
        wording=wording_of(config.data),
        captions=captions_of(source),
    )
    load = LoadCaptions(source, encoder.tokenizer, Threads.from_config(config.data))
    return Work(config, source, contents, "caption", load, lambda layout: _begin(encoder.weights, layout), batch_size)


def _begin(encoder: FrozenWeights, layout: Layout) -> Callable[[Batch], Begun]:
    """From a batch of tokens to their states, bfloat16, whatever the encoder computes in."""
    network, params = encoder.network, encoder.place(layout)

    @jax.jit
    def forward(params: Any, tokens_BxL: Array) -> Array:
        none_is_dropped = jnp.zeros(len(tokens_BxL), bool)
        return network(params, {"tokens": tokens_BxL, "dropped": none_is_dropped})[network.writes].astype(jnp.bfloat16)

    def begin(batch: Batch) -> Begun:
        tokens = jax.device_put(batch["tokens"], meshes.batch_sharding(layout.mesh))
        with meshes.use_mesh(layout):
            states = forward(params, tokens)
        return lambda: np.asarray(states)

    return begin
