"""A teacher's features of every image, stored in a folder (`stored`): are they those that a run would compute?"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import numpy as np
from absl import logging
from ml_collections import ConfigDict

from deco_jax.data import stored
from deco_jax.data.decode import check_centred
from deco_jax.data.records import Source
from deco_jax.data.stored import Stored
from deco_jax.errors import UsageError

UNKNOWN = "unknown"
OLD_DECODING = "not turned, transparency dropped (data.orient=False data.background='')"


@dataclasses.dataclass(frozen=True)
class Contents(stored.Contents):
    """What the features in a folder are of. NaN stands where an image was unreadable."""

    image_size: int  # pixels along a side
    patch: int  # pixels along the side that a token stands for
    teacher: str  # hash of its weights
    version: int = 1  # of the format
    decoding: str = ""  # of the source: how its files became images; UNKNOWN in the oldest folders

    kind: ClassVar = "features"
    option: ClassVar = "--teacher"
    setting: ClassVar = "teacher.stored"
    made_of: ClassVar = "images, labels"
    dtype: ClassVar = np.dtype("<f2")
    older: ClassVar[Mapping[str, Any]] = {"decoding": UNKNOWN}

    def differences(self, there: Self, whole: bool) -> list[str]:
        """See `stored.Contents`."""
        if there.decoding == UNKNOWN:  # a version that knew one way; what is complete stays, and training warns
            there = dataclasses.replace(there, decoding=self.decoding if whole else "")
        found = super().differences(there, whole)
        if there.decoding != self.decoding:
            found[-1] += " (data.orient and data.background say it)"
        return found


class StoredFeatures(Stored[Contents]):
    """See `Stored`; (N, F) float16 of each image."""

    kind = Contents

    @property
    def digest(self) -> str:
        """A hash of the teacher's weights."""
        return self.contents.teacher


def open_features(config: ConfigDict, source: Source) -> StoredFeatures:
    """The features in `config.teacher.stored`, which must be of `source` as the whole configuration `config` says.

    Raises:
      UsageError: they are not, or not all there, or damaged.
    """
    name = f"teacher.stored={config.teacher.stored}"
    check_centred(config.data.crop, name)
    folder, contents, complete = stored.open_contents(Contents, config.teacher.stored, source)
    if contents.decoding == UNKNOWN and source.decoding:
        logging.warning(
            "%s does not say how its images were decoded. Of those with an EXIF orientation or transparency, if there "
            "are any, the features are of other pixels; data.orient=False data.background='' trains as they are.",
            name,
        )
    elif contents.decoding not in (source.decoding, UNKNOWN):
        raise UsageError(
            f"{name} was made of images decoded otherwise: {contents.decoding or OLD_DECODING} there, "
            f"{source.decoding or OLD_DECODING} here. Set data.orient and data.background as they were, or prepare "
            "into another folder."
        )
    size, p, width = config.data.image_size, config.model.patch_size, config.loss.alignment_features
    tokens = (size // p) ** 2
    wanted = {
        "image_size": (size, f"data.image_size={size}"),
        "tokens": (tokens, f"{tokens}, with model.patch_size={p}"),
        "features": (width, f"loss.alignment_features={width}"),
    }
    stored.check_sizes(name, contents, wanted)
    stored.check_complete(name, folder, contents, complete)
    return StoredFeatures(folder)
