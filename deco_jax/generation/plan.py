"""What is to be drawn, and how: all that the images of a job depend on, and how they are parted into shards."""

import dataclasses
import math
from collections.abc import Collection
from typing import Any

from flax import linen as nn

from deco_jax.config import build_model
from deco_jax.encoders.text import TextEncoder
from deco_jax.generation.folder import check_folder
from deco_jax.generation.pictures import BENCHMARKS, USUAL, Layout, benchmark_of, choose_layout, looks_like
from deco_jax.generation.prompts import open_encoder, warnings_of
from deco_jax.generation.requests import Asked, Requests, read_requests
from deco_jax.pretrained.load import Pretrained, open_pretrained
from deco_jax.sampling.settings import Sampling, check_image_size, parse_image_size

SHARD_IMAGES, SHARD_BYTES = 1000, 2**27  # of a shard, at most, unless a batch is more


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is to be drawn, and how."""

    found: Pretrained
    model: nn.Module
    weights: str
    wanted: Requests
    seed: int
    image_size: tuple[int, int]  # (height, width)
    batch_size: int
    settings: Sampling
    layout: Layout | None  # of pictures; None = none
    text_encoder: str | None  # as it was asked for; None = as the run's configuration says
    is_plain: bool  # whether --layout=npz was asked for

    @property
    def num(self) -> int:
        """How many images."""
        return self.wanted.num

    @property
    def shard_images(self) -> int:
        """Images of a shard, S: a multiple of the batch, the same whatever devices there are."""
        most = min(SHARD_IMAGES, SHARD_BYTES // (3 * math.prod(self.image_size)), self.num)
        return max(most // self.batch_size, 1) * self.batch_size

    @property
    def shards(self) -> int:
        """How many there are."""
        return -(-self.num // self.shard_images)

    def numbers(self, shard: int) -> range:
        """Of the images of a shard."""
        return range(shard * self.shard_images, min((shard + 1) * self.shard_images, self.num))

    def shape(self, images: int) -> tuple[int, int, int, int]:
        """Of so many images."""
        return (images, *self.image_size, 3)

    @property
    def how(self) -> dict[str, Any]:
        """All that the images depend on, but for the numbers in the networks: the content of generation.json."""
        wanted = {"num": self.num, "labels": str(self.wanted), "negative": self.wanted.negative}
        how = {"source": str(self.found), "fingerprint": self.found.fingerprint}
        how |= {"weights": self.weights, "dtype": self.found.config.model.dtype}
        sampler = dataclasses.asdict(self.settings) | {"guidance_interval": list(self.settings.guidance_interval)}
        size = {"image_size": list(self.image_size), "batch_size": self.batch_size}
        return how | {"seed": self.seed} | wanted | size | sampler

    @property
    def encoder_name(self) -> str:
        """Of the prompts' encoder."""
        return self.text_encoder or self.found.config.text.encoder

    def open_encoder(self) -> TextEncoder | None:
        """Of the prompts; None if there are none."""
        return open_encoder(self.found, self.text_encoder) if self.wanted.prompts else None

    def warnings(self, encoder: TextEncoder | None) -> list[str]:
        """What a user should know of the prompts and their encoder."""
        if encoder is None:
            return []
        told = warnings_of(self.found, encoder, [prompt.text for prompt in self.wanted.prompts])
        if self.layout is None and not self.is_plain and (name := looks_like(self.wanted.prompts)):
            told.append(f"These look like prompts for --layout={name}, which says why it does not fit; no pictures.")
        return told


def make_plan(
    source: str,
    out: str,
    asked: Asked,
    seed: int,
    weights: str,
    dtype: str | None,
    batch_size: int,
    layout: str | None,
    png: bool,
    image_size: str | None = None,
    **changes: Any,
) -> Plan:
    """Looks at all that can be looked at before a number is read; arguments as of `generate_samples`.

    Raises:
      UsageError: an argument is out of range or does not fit the network, or the network is not to be had.
    """
    found = open_pretrained(source, dtype=dtype)
    found.check_set(weights)
    model = build_model(found.config.model)
    wanted = read_requests(model.condition, found.class_names, asked)
    settings = Sampling.from_config(found.config.sample, **changes)
    size = parse_image_size(image_size) or (found.config.data.image_size,) * 2
    check_image_size(size, model.patch_size)
    kind = layout or ("png" if png else benchmark_of(wanted, size))
    if kind in BENCHMARKS and asked.num is None and asked.per_prompt is None:
        wanted = read_requests(model.condition, (), dataclasses.replace(asked, per_prompt=USUAL))
    check_folder(out, wanted.num, batch_size, seed)
    chosen, batch_size = choose_layout(kind, png, wanted, size), min(batch_size, wanted.num)
    return Plan(
        found, model, weights, wanted, seed, size, batch_size, settings, chosen, asked.text_encoder, layout == "npz"
    )


def summary(plan: Plan, left: Collection[int]) -> str:
    """What a job says before it draws the shards that are `left`."""
    height, width = plan.image_size
    network = f"{plan.found}: {plan.weights} weights, computing in {plan.found.config.model.dtype}"
    gigabytes = math.prod(plan.shape(plan.num)) / 1e9
    return (
        f"{network}.\n{plan.num:,} images of {height}×{width} pixels, {gigabytes:,.3f} GB, {plan.wanted.balance}; "
        f"{plan.shards} shards, of which {len(left)} are to be made."
    )
