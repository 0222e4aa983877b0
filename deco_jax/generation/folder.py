"""How does a user get a folder of pictures from a network? `deco sample`."""

import collections
import concurrent.futures
import contextlib
import dataclasses
import io
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from PIL import Image
from tqdm import tqdm

from deco_jax import jobs, storage
from deco_jax.config import build_model
from deco_jax.diffusion.flow import to_uint8
from deco_jax.errors import UsageError
from deco_jax.generation.batches import generate, make_conditions, noise_batches
from deco_jax.generation.prompts import open_encoder, warnings_of
from deco_jax.generation.requests import Asked, read_requests
from deco_jax.parallel import mesh as meshes
from deco_jax.pretrained.load import Pretrained, as_now, open_pretrained
from deco_jax.sampling.pictures import make_grid, save_gif, save_png
from deco_jax.sampling.sample import image_keys, sample
from deco_jax.sampling.settings import Sampling, check_image_size, parse_image_size
from deco_jax.storage import AnyPath

NUM, PER_PROMPT = 64, 4  # images, unless told otherwise
GRID_IMAGES = 256  # a grid shows the first ones only
GIF_IMAGES = 64  # and a film of their ways fewer
TRAJECTORY = "trajectory.gif"
SETTINGS = "sample.json"  # how the pictures in a folder were drawn
WRITERS, WAITING = 8, 256  # threads that write pictures, and pictures that may wait for them
MOST = 2**31 - 1  # images, as their numbers are int32


def check_folder(out: str, num: int, batch_size: int, seed: int) -> AnyPath:
    """The folder of `--out`, into which `num` images are drawn, or files about them.

    Raises:
      UsageError: a number is out of range, or `out` is no folder.
    """
    for name, value in (("num", num), ("batch-size", batch_size)):
        if not 1 <= value <= MOST:
            raise UsageError(f"--{name}={value} must be at least 1, and at most {MOST}.")
    if not 0 <= seed < 2**32:
        raise UsageError(f"--seed={seed} must be from 0 to 2³² − 1.")
    return storage.to_folder("--out", out)


def generate_to_folder(
    source: str,
    out: str,
    *,
    num: int | None,
    seed: int,
    weights: str,
    dtype: str | None,
    batch_size: int,
    image_size: str | int | None,
    overwrite: bool,
    labels: str | None = None,
    prompt: Sequence[str] = (),
    prompts: str | None = None,
    text_encoder: str | None = None,
    negative: str | None = None,
    trajectory: int = 0,
    **changes: Any,
) -> None:
    """Draws `num` images into `out`: 00000.png, …, grid.png with a row for each label, and maybe trajectory.gif.

    Pictures that are there already are kept if they were drawn in the same way, which sample.json says; so the same
    command goes on after it was interrupted, and a larger `num` adds to what is there.

    Args:
      source: anything that `load_pretrained` opens.
      out: a folder, on this machine or in a bucket; must not hold other pictures unless `overwrite`.
      num: images; None = 64, or four of each prompt.
      seed, batch_size: see `generate`.
      weights: "ema" or "online".
      dtype: of matrix products, "bfloat16" or "float32"; None = as trained.
      image_size: of squares, or height and width as in "256x384"; None = as trained.
      overwrite: draw all again, and remove numbered pictures that are there.
      labels: as in "0,5-9,golden retriever,null"; image i shows label i modulo their number. None = all.
      prompt, prompts, text_encoder: of a network that is told text, see `generate_samples`; in turn as labels are.
      negative: the label or text that guidance leads away from; None = from no class, or the empty prompt.
      trajectory: k > 0 writes trajectory.gif, which shows the first 64 images after every k-th step.
      **changes: fields of `Sampling`; None = as the run's configuration says.

    Raises:
      UsageError: an argument is out of range, or `out` holds other pictures or cannot be written.
    """
    found = open_pretrained(source, dtype=dtype)
    found.check_set(weights)
    settings = Sampling.from_config(found.config.sample, **changes)
    model = build_model(found.config.model)
    size = parse_image_size(image_size) or (found.config.data.image_size,) * 2
    check_image_size(size, model.patch_size)
    if trajectory < 0:
        raise UsageError(f"--trajectory={trajectory} must be at least 0; 0 writes no trajectory.gif.")
    asked = Asked(num, negative, labels, prompt=tuple(prompt), prompts=prompts, text_encoder=text_encoder)
    wanted = read_requests(model.condition, found.class_names, asked, NUM, rounds=PER_PROMPT)
    chosen, away, num = list(wanted.labels), wanted.negative, wanted.num
    folder = check_folder(out, num, batch_size, seed)
    encoder = open_encoder(found, text_encoder) if wanted.prompts else None
    how = {"source": str(found), "fingerprint": found.fingerprint, "weights": weights}
    how |= {"dtype": found.config.model.dtype, "seed": seed}
    how |= {"labels": chosen, "negative": away, "image_size": size, **dataclasses.asdict(settings)}
    how |= {} if encoder is None else {"text_encoder_digest": encoder.weights.digest}
    done = _kept(folder, out, how, overwrite)
    done, there = done[done < num], int((done < num).sum())
    print(f"{found}: {weights} weights, computing in {how['dtype']}{_assumed(found, 'dtype')}.")
    told = _assumed(found, "image_size") if image_size is None else ""
    kept = f", of which {there:,} are there already" if there else ""
    most = tqdm.format_sizeof(3 * num * size[0] * size[1], "B")
    print(f"{num:,} images of {size[0]}×{size[1]} pixels{told}, at most {most}{kept}.", flush=True)
    for line in [] if encoder is None else warnings_of(found, encoder, wanted.labels):
        print(line, flush=True)

    params = found.read(weights)
    images = generate(model, params, chosen, seed, size, batch_size, settings, _missing(num, done), away, encoder)
    progress, shown = jobs.Progress(num, "image", there), {}
    waiting: collections.deque[concurrent.futures.Future] = collections.deque()
    try:
        with concurrent.futures.ThreadPoolExecutor(WRITERS) as pool, _dropped_at_errors(pool):
            for i, image in zip(_missing(num, done), images, strict=True):
                waiting.append(pool.submit(_write, image, folder / _name(i)))
                there += 1
                if i < GRID_IMAGES:
                    shown[i] = image
                if len(waiting) > WAITING:
                    waiting.popleft().result()
                if there % batch_size == 0 or there == num:  # the images of a batch come all at once
                    progress.update(there)
            for writing in waiting:
                writing.result()
    except KeyboardInterrupt:
        progress.say(f"Stopped; {there:,} of {num:,} images are in {folder}. The same command goes on.")
        raise
    finally:
        progress.close()
    first = [shown[i] if i in shown else _read(folder / _name(i)) for i in range(min(num, GRID_IMAGES))]
    save_png(_grid_by_label(np.stack(first), len(chosen)), folder / "grid.png")
    more = ""
    if trajectory:
        conditions = make_conditions(model, chosen, away, encoder)
        batches = noise_batches(range(min(num, GIF_IMAGES)), seed, size, batch_size)
        frames = _film(model, params, len(chosen), conditions, batches, seed, settings, trajectory)
        with storage.writing(folder):
            save_gif(frames, folder / TRAJECTORY)
        more = f", {TRAJECTORY}"
    print(f"{num} images{more} and grid.png are in {folder}.")


def _film(
    model: nn.Module,
    params: Any,
    labels: int,
    conditions: Callable[[np.ndarray], tuple[Any, Any]],
    batches: Iterable[tuple[jax.Array, jax.Array, int]],
    seed: int,
    settings: Sampling,
    trajectory: int,
) -> np.ndarray:
    """How the first images come about, laid out as in grid.png: (S, H, W, 3) uint8. They are drawn once more.

    `conditions` and `batches` are those of `make_conditions` and `noise_batches`; `labels`: how many there are.
    """
    params = jax.device_put(params, meshes.replicated(meshes.local_layout().mesh))
    key, ways = jax.random.key(seed), []
    for indices, noise, count in batches:
        asked, away = conditions(np.asarray(indices))
        keys, way = image_keys(key, indices), {"trajectory": trajectory, "settings": settings}
        _, states = sample(model, params, asked, noise=noise, keys=keys, negative=away, **way)
        ways.append(np.asarray(to_uint8(states))[:, :count])
    return np.stack([_grid_by_label(images, labels) for images in np.concatenate(ways, axis=1)])


@contextlib.contextmanager
def _dropped_at_errors(pool: concurrent.futures.Executor) -> Iterator[None]:
    """Within it, an error drops what nobody has begun to write: storage that fails would fail each for minutes."""
    try:
        yield
    except Exception:
        pool.shutdown(wait=False, cancel_futures=True)
        raise


def _assumed(found: Pretrained, name: str) -> str:
    return f" (assumed, as nothing says it; or give --{name.replace('_', '-')})" if name in found.assumed else ""


def _kept(folder: AnyPath, out: str, how: dict[str, Any], overwrite: bool) -> np.ndarray:
    """The numbers of the pictures in `folder` that need not be drawn, in order; notes there `how` they are drawn.

    Raises:
      UsageError: they were drawn otherwise, or nobody knows how, and they are not to be replaced.
    """
    file = folder / SETTINGS

    def look() -> tuple[list[str], str]:
        names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
        return [name for name in names if name.endswith(".png")], file.read_text() if SETTINGS in names else "{}"

    with storage.reading(folder):
        pictures, text = storage.retried(f"reading {folder}", look)
    if pictures and not overwrite:
        _check_same(out, text, how)
    numbers = sorted(int(name[:-4]) for name in pictures if name[:-4].isdecimal() and name == _name(int(name[:-4])))
    if overwrite:
        with storage.writing(folder):
            for number in numbers:
                (folder / _name(number)).unlink(missing_ok=True)
        numbers = []
    storage.write_json(file, how)
    return np.array(numbers, np.int64)


def _check_same(out: str, text: str, how: dict[str, Any]) -> None:
    """Raises UsageError unless `text`, a sample.json, says the same as `how`."""
    here = json.loads(json.dumps(how))
    try:
        there = dict(json.loads(text))
    except ValueError:
        there = {}
    if there:  # up to version 0.1.0 all images were square, and none had a negative label
        side = there.get("image_size")
        there = {"negative": None} | there | {"image_size": [side, side] if isinstance(side, int) else side}
        there = as_now(there, here)
    different = [
        f"{name}: {there.get(name)} there, {here[name]} here" for name in here if there.get(name) != here[name]
    ]
    if different:
        told = f" that were drawn in another way ({'; '.join(different)})" if there else ""
        raise UsageError(f"--out={out} already holds pictures{told}; choose another folder or pass --overwrite.")


def _missing(num: int, done: np.ndarray) -> Iterator[int]:
    """The numbers below `num` that are not in `done`, which rises."""
    start = 0
    for stop in itertools.chain(done, [num]):
        yield from range(start, int(stop))
        start = int(stop) + 1


def _name(number: int) -> str:
    return f"{number:05d}.png"


def _write(image: np.ndarray, path: AnyPath) -> None:
    with storage.writing(path):
        storage.retried(f"writing {path}", lambda: save_png(image, path))


def _read(path: AnyPath) -> np.ndarray:
    with storage.reading(path):
        content = storage.retried(f"reading {path}", path.read_bytes)
        return np.asarray(Image.open(io.BytesIO(content)))


def _grid_by_label(images: np.ndarray, labels: int) -> np.ndarray:
    """A row for each label where every label has several images; eight in a row otherwise."""
    if labels == 1 or len(images) < 2 * labels:
        return make_grid(images, min(len(images), 8))
    columns = -(-len(images) // labels)
    missing = np.full((labels * columns - len(images), *images.shape[1:]), 255, np.uint8)
    rounds = np.concatenate([images, missing]).reshape(columns, labels, *images.shape[1:])
    return make_grid(rounds.swapaxes(0, 1).reshape(-1, *images.shape[1:]), columns)
