"""How are a teacher's features of every image computed once and stored? `deco prepare --teacher`."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from ml_collections import ConfigDict

from deco_jax.data.decode import check_centred
from deco_jax.data.features import Contents
from deco_jax.data.pipeline import Batch, Threads
from deco_jax.data.records import Source
from deco_jax.data.sources import open_source
from deco_jax.diffusion.flow import to_float
from deco_jax.encoders import teacher as teachers
from deco_jax.encoders.frozen import FrozenWeights
from deco_jax.encoders.teacher import IMAGE_PATCH
from deco_jax.errors import UsageError
from deco_jax.parallel import mesh as meshes
from deco_jax.parallel.mesh import Layout
from deco_jax.preparation.arrays import Begun, Work, prepare, rows_a_file
from deco_jax.preparation.folder import check_no_class
from deco_jax.preparation.reading import LoadRecords
from deco_jax.storage import AnyPath


def prepare_teacher(config: ConfigDict, out: str, batch_size: int, part: str | None = None) -> None:
    """Stores the teacher's features of every record of the configuration's data, as `arrays.prepare` does.

    Args:
      config: the whole configuration.
      out: the folder; with several processes or parts, one they all see.
      batch_size: images at a time on this process's devices, rounded up to a multiple of them.
      part: see `jobs.find_part`.

    Raises:
      BrokenRun, TransientError: see `arrays.prepare`.
      UsageError: data, teacher or folder are not to be had; the folder holds features of something else; or too many
        records cannot be read.
    """
    prepare(out, part, lambda folder: _open(config, batch_size, folder))


def _open(config: ConfigDict, batch_size: int, folder: AnyPath) -> Work:
    if batch_size < 1:
        raise UsageError(f"--batch-size={batch_size} must be at least 1.")
    check_centred(config.data.crop, f"--out={folder}")
    check_no_class(folder, config.data)
    teachers.check_grids(config)
    every_size = ConfigDict(config.data)
    every_size.min_side = 0  # so that the features are right for any
    source, teacher = open_source(every_size, folder), teachers.load_teacher(config)
    tokens, width = (config.data.image_size // IMAGE_PATCH) ** 2, teacher.network.module.width
    contents = Contents(
        identity=source.identity,
        records=len(source),
        records_a_file=rows_a_file(tokens, width),
        tokens=tokens,
        features=width,
        image_size=config.data.image_size,
        patch=IMAGE_PATCH,
        teacher=teacher.digest,
        decoding=source.decoding,
    )
    load = LoadRecords(source, contents.image_size, Threads.from_config(config.data))
    return Work(config, source, contents, "image", load, lambda layout: _begin(teacher, layout, source), batch_size)


def _begin(teacher: FrozenWeights, layout: Layout, source: Source) -> Callable[[Batch], Begun]:
    """From a batch of images to their features, float16."""
    network, params = teacher.network, teacher.place(layout)

    @jax.jit
    def forward(params: Any, image_BxHxWx3: Array) -> tuple[Array, Array]:
        batch = network(params, {"image": to_float(image_BxHxWx3)})
        features = batch[network.writes].astype(jnp.float16)
        return features, jnp.isfinite(features).all(axis=(1, 2))

    def begin(batch: Batch) -> Begun:
        image = jax.device_put(batch["image"], meshes.batch_sharding(layout.mesh))
        with meshes.use_mesh(layout):
            features, finite = forward(params, image)

        def wait() -> np.ndarray:
            readable = (batch["record"] >= 0) & (batch["bad"] < 0)
            for record in batch["record"][readable & ~np.asarray(finite)][:1]:
                raise UsageError(
                    f"The teacher's features of record {record}, {source.describe(record)}, do not fit float16, whose "
                    "largest number is 65504; train with the teacher in every step: teacher.stored=''."
                )
            return np.asarray(features)

        return wait

    return begin
