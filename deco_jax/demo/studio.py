"""How does a wish become images, step by step, and files that say how they were made?"""

import dataclasses
import json
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from PIL import Image

from deco_jax.conditions import Text
from deco_jax.config import build_model
from deco_jax.demo.wishes import Fields, Limits, Wish, read_wish
from deco_jax.diffusion.flow import to_uint8
from deco_jax.encoders.text import TextEncoder
from deco_jax.errors import UsageError
from deco_jax.generation.batches import make_conditions, noise_batches
from deco_jax.generation.prompts import open_encoder, warnings_of
from deco_jax.parallel import mesh as meshes
from deco_jax.pretrained.load import Pretrained, open_pretrained
from deco_jax.sampling.pictures import make_grid, save_gif, save_png
from deco_jax.sampling.sample import image_keys, read_inputs
from deco_jax.sampling.settings import Sampling
from deco_jax.sampling.stepwise import sample_stepwise
from deco_jax.version import __version__

FRAMES = 24  # of a film at most, and the image
SETTINGS = "sample.json"  # name of the text in a PNG that says as JSON how it was drawn
MOST_NAMED = 10_000  # classes that are offered; others are written


@dataclasses.dataclass(frozen=True)
class Drawn:
    """The images of a wish, (N, H, W, 3) uint8; states on their way, (S, N, H, W, 3), or none; how they were drawn."""

    images: np.ndarray
    film: np.ndarray | None
    how: Mapping[str, Any]  # as in sample.json


@dataclasses.dataclass(frozen=True, eq=False)
class Studio:
    """A trained network, ready to draw; see `open_studio`."""

    found: Pretrained
    fingerprint: str  # of `found` as it was opened; what lies there may be replaced while the page is open
    weights: str
    model: nn.Module
    params: Any
    encoder: TextEncoder | None  # of a network that is told text
    limits: Limits
    class_names: tuple[str, ...]

    @property
    def is_text(self) -> bool:
        """Whether the network is told text, not classes."""
        return isinstance(self.model.condition, Text)

    @property
    def trained(self) -> Sampling:
        """The settings of the run's own pictures."""
        return Sampling.from_config(self.found.config.sample)

    @property
    def side(self) -> int:
        """Of images that it learned from, or the largest that is allowed."""
        patch = self.model.patch_size
        return min(self.found.config.data.image_size, self.limits.side // patch * patch)

    @property
    def name(self) -> str:
        """Where the network is, without the folders above the run or file."""
        parts = pathlib.PurePath(str(self.found)).parts
        return "/".join(parts[-1:] if self.found.checkpoint is None else parts[-3:])

    def classes(self) -> list[tuple[str, str]]:
        """(what people read, what `read` takes) of every class: ("207 golden retriever", "207")."""
        number = min(self.model.condition.num_classes, MOST_NAMED)
        names = [re.sub(r"^n[0-9]{8} ", "", name) for name in self.class_names[:number]]
        names += [""] * (number - len(names))
        return [(f"{k} {name}" if name not in ("", f"{k}") else f"{k}", f"{k}") for k, name in enumerate(names)]

    def read(self, fields: Fields) -> Wish:
        """What is asked for; UsageError if it is not allowed."""
        model = self.model
        return read_wish(fields, model.condition, self.class_names, model.patch_size, self.trained, self.limits)

    def warnings(self, wish: Wish) -> list[str]:
        """What people should know about their prompts."""
        texts = [text for text in (wish.request, wish.negative) if text is not None]
        return [] if self.encoder is None else warnings_of(self.found, self.encoder, texts)

    def draw(self, wish: Wish) -> Iterator[int | Drawn]:
        """Yields the number of steps that are done after each, and at last what is drawn.

        Image i is that of `deco sample` with the same seed and settings.

        Raises:
          UsageError: the device's memory is too small, or an image is not finite.
        """
        try:
            yield from self._draw(wish)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            asked = f"images={wish.images} of {wish.size[0]}×{wish.size[1]} pixels"
            raise UsageError(f"{asked} need more memory than the device has; ask for fewer or smaller ones.") from error

    def _draw(self, wish: Wish) -> Iterator[int | Drawn]:
        conditions = make_conditions(self.model, [wish.request], wish.negative, self.encoder)
        ((numbers, noise, count),) = noise_batches(range(wish.images), wish.seed, wish.size, wish.images)
        asked, away = conditions(np.asarray(numbers))
        keys = image_keys(jax.random.key(wish.seed), numbers)
        inputs = read_inputs(self.model, asked, None, noise, keys, None, away, None, wish.settings)
        steps, every = wish.settings.steps, -(-wish.settings.steps // FRAMES)
        film = []
        for k, state in enumerate(sample_stepwise(self.model, self.params, inputs, wish.settings)):
            if k < steps:
                yield k + 1
            if wish.film and (k % every == 0 or k == steps):
                film.append(np.asarray(to_uint8(state))[:count])
        if not np.isfinite(np.asarray(state)[:count]).all():
            raise UsageError("An image is not finite; try less guidance, or start the page with --dtype=float32.")
        images = np.asarray(to_uint8(state))[:count]
        yield Drawn(images, np.stack(film) if film else None, self.describe(wish))

    def describe(self, wish: Wish) -> dict[str, Any]:
        """How the images of a wish are drawn, under the names of `deco sample`'s sample.json."""
        how = {"source": self.name, "fingerprint": self.fingerprint, "weights": self.weights}
        how |= {"dtype": self.found.config.model.dtype, "seed": wish.seed}
        how |= {"labels": [wish.request], "negative": wish.negative, "image_size": list(wish.size)}
        how |= dataclasses.asdict(wish.settings) | {"guidance_interval": list(wish.settings.guidance_interval)}
        return how | ({} if self.encoder is None else {"text_encoder_digest": self.encoder.weights.digest})


def open_studio(
    source: str,
    weights: str = "ema",
    dtype: str | None = None,
    text_encoder: str | None = None,
    limits: Limits = Limits(),  # noqa: B008 (it is frozen)
) -> Studio:
    """Opens a trained network of any kind and format, on all devices of this process.

    Args:
      source, weights, dtype: as of `load_pretrained`.
      text_encoder: of a network that is told text; None = the one of its run.
      limits: of what may be asked for.

    Raises:
      UsageError: it cannot be opened, or its patches are larger than the limit.
    """
    found = open_pretrained(source, dtype=dtype)
    found.check_set(weights)
    model = build_model(found.config.model)
    if limits.side < model.patch_size:
        raise UsageError(f"--max-side={limits.side} must be at least the network's patch size, {model.patch_size}.")
    is_text = isinstance(model.condition, Text)
    if text_encoder is not None and not is_text:
        raise UsageError(f"--text-encoder={text_encoder} is for networks that are told text; this one knows classes.")
    encoder = open_encoder(found, text_encoder) if is_text else None
    fingerprint = found.fingerprint
    params = jax.device_put(found.read(weights), meshes.replicated(meshes.local_layout().mesh))
    class_names = () if is_text else found.class_names
    return Studio(found, fingerprint, weights, model, params, encoder, limits, class_names)


def save_drawn(drawn: Drawn, folder: pathlib.Path) -> tuple[list[pathlib.Path], pathlib.Path | None]:
    """Writes one PNG per image, which says in its metadata how it was drawn, and the film as a GIF, if there is one."""
    paths, seed = [], drawn.how["seed"]
    for number, image in enumerate(drawn.images):
        texts = {"Title": str(drawn.how["labels"][0]), "Software": f"deco_jax {__version__}"}
        texts[SETTINGS] = json.dumps({**drawn.how, "number": number}, ensure_ascii=False)
        paths.append(folder / f"seed{seed}-{number}.png")
        save_png(image, paths[-1], texts)
    if drawn.film is None:
        return paths, None
    frames = np.stack([make_grid(images, min(len(images), 2)) for images in drawn.film])
    save_gif(frames, folder / f"seed{seed}.gif")
    return paths, folder / f"seed{seed}.gif"


def read_settings(path: pathlib.Path) -> dict[str, Any]:
    """How a downloaded PNG was drawn: the names of sample.json, and the image's number.

    Raises:
      UsageError: it does not say.
    """
    with Image.open(path) as image:
        text = getattr(image, "text", {}).get(SETTINGS)
    if text is None:
        raise UsageError(f"{path} does not say how it was drawn; it is no PNG of `deco demo`.")
    return json.loads(text)
