"""How good are a run's images while it trains? A small evaluation of its moving average, every so many steps."""

import concurrent.futures
import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import linen as nn
from jax import Array
from ml_collections import ConfigDict

from deco_jax.diffusion.flow import to_uint8
from deco_jax.encoders.features import FeatureNetwork, load_features
from deco_jax.errors import UsageError
from deco_jax.metrics.references import Reference, read_reference
from deco_jax.metrics.scores import Scores, warnings_for
from deco_jax.parallel import mesh as meshes
from deco_jax.parallel.mesh import Layout
from deco_jax.sampling.sample import compiled_sampler, image_keys, image_noise
from deco_jax.sampling.settings import Sampling


@dataclasses.dataclass(frozen=True)
class Judge:
    """What images are seen by, and compared with."""

    features: FeatureNetwork
    reference: Reference

    @classmethod
    def open(cls, config: ConfigDict) -> "Judge | None":
        """As the part `evaluate` of a configuration says; None where a run evaluates nothing.

        Raises:
          UsageError: weights or reference are not to be had, or do not fit each other or the images.
        """
        if not config.train.evaluate_every:
            return None
        chosen, size = config.evaluate, config.data.image_size
        if config.model.kind == "deco_text":
            raise UsageError("train.evaluate_every must be 0 with model.kind='deco_text': a class draws each image.")
        if not chosen.reference:
            raise UsageError(
                "evaluate.reference='' must name a reference.npz, of `deco stats` or of the ADM suite, where "
                f"train.evaluate_every={config.train.evaluate_every}; 0 evaluates nothing."
            )
        features = load_features(chosen.features, chosen.weights, config.teacher.cache)
        reference = read_reference(chosen.reference, features)
        if reference.image_size not in (None, (size, size)):
            height, width = reference.image_size
            raise UsageError(
                f"evaluate.reference={chosen.reference} is of images of {height}×{width} pixels, and "
                f"data.image_size={size}; they must be equal."
            )
        return cls(features, reference)


@dataclasses.dataclass(frozen=True)
class Evaluated:
    """What one evaluation found."""

    step: int
    metrics: dict[str, float]
    about: dict[str, Any]  # how many images, seen by what, compared with what


class OnlineEvaluation:
    """Draws images from the moving average on all devices, always from the same noise, and sees them in batches.

    The metrics are computed from the features in a thread of process 0, while the run goes on.
    """

    def __init__(self, config: ConfigDict, network: nn.Module, layout: Layout, judge: Judge | None):
        """Without a judge nothing is evaluated."""
        self.thread = concurrent.futures.ThreadPoolExecutor(1, "evaluation")
        self.pending: list[concurrent.futures.Future[Evaluated]] = []
        if judge is None:
            return
        mesh, settings = layout.mesh, Sampling.from_config(config.sample)
        self.judge, self.mesh, self.number = judge, mesh, config.evaluate.num
        self.batch = meshes.round_up(min(config.evaluate.batch_size, self.number), mesh)
        seed, shape = config.seed, (config.data.image_size, config.data.image_size, 3)
        condition, sampler = network.condition, compiled_sampler(network, settings)
        null = jax.tree.map(jnp.asarray, condition.read([condition.nothing]))

        def see(ema: Any, params: Any, numbers_B: Array) -> dict[str, Array]:
            key = jax.random.key(seed)
            noise, keys = image_noise(key, numbers_B, shape), image_keys(key, numbers_B)
            images = sampler(ema, noise, keys, condition.cycle(numbers_B), null)
            finite = jnp.isfinite(images).all(axis=(1, 2, 3))
            return judge.features.apply(params, to_uint8(images)) | {"finite": finite}

        self.see = jax.jit(see, out_shardings=meshes.replicated(mesh))
        self.params = jax.tree.map(lambda x: _place(x, meshes.replicated(mesh)), judge.features.params)
        self.about = {
            "images": self.number,
            "features": {judge.features.name: judge.features.digest},
            "reference": config.evaluate.reference,
            "reference_hash": judge.reference.hash,
            "sampling": dataclasses.asdict(settings),
        }

    def __call__(self, step: int, ema: Any) -> None:
        """Draws and sees the images of `step`, on every process; returns when the devices are done."""
        started, seen, under_way = time.perf_counter(), [], None
        for first in range(0, self.number, self.batch):
            numbers = np.arange(first, first + self.batch, dtype=np.int32)
            following = numbers, self.see(ema, self.params, _place(numbers, meshes.batch_sharding(self.mesh)))
            if under_way is not None:
                seen.append(_read_back(*under_way))
            under_way = following
        seen.append(_read_back(*under_way))
        if jax.process_index() == 0:
            self.pending.append(self.thread.submit(self._compute, step, seen, time.perf_counter() - started))

    def news(self, wait: bool = False) -> list[Evaluated]:
        """What was found since the last call; with `wait`, of all that was drawn. Always nothing but on process 0."""
        done = [future for future in self.pending if wait or future.done()]
        self.pending = [future for future in self.pending if future not in done]
        found = []
        for future in done:
            try:
                found.append(future.result())
            except Exception as error:  # images of a run that diverges, a host without memory
                logging.warning("An evaluation failed, which does not end the run: %s", error)
        return found

    def close(self) -> None:
        """Ends the thread, dropping what it has not begun."""
        self.thread.shutdown(wait=True, cancel_futures=True)

    def _compute(self, step: int, seen: list[tuple[np.ndarray, dict[str, np.ndarray]]], seconds: float) -> Evaluated:
        name, scores = self.judge.features.name, Scores.empty(self.judge.features.name)
        for numbers, features in seen:
            counted, finite = numbers < self.number, features.pop("finite")
            for number in numbers[counted & ~finite][:1]:
                raise UsageError(f"image {number} of step {step} is not finite.")
            scores = scores.merge(Scores.from_model_output(name, numbers, mask=counted, **features))
        metrics = scores.compute(self.judge.reference)
        told = warnings_for(scores, self.judge.reference)
        return Evaluated(step, metrics, self.about | {"warnings": told, "seconds": round(seconds, 3)})


def _read_back(numbers: np.ndarray, features: dict[str, Array]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    return numbers, {name: np.asarray(value) for name, value in features.items()}


def _place(x: np.ndarray, sharding: jax.sharding.Sharding) -> Array:
    """What every process has as one global array."""
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])
