"""One training step as a pure function: draw, predict, differentiate, update."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax import Array
from jax.sharding import Mesh
from ml_collections import ConfigDict

from deco_jax.diffusion.flow import Draws, draw, example_keys, to_float
from deco_jax.diffusion.objective import Objective
from deco_jax.encoders.dinov2 import model as dinov2
from deco_jax.encoders.dinov2.model import DINOv2
from deco_jax.encoders.teacher import teacher_features
from deco_jax.models import Projector, build_model
from deco_jax.models.flops import forward_flops
from deco_jax.parallel.mesh import notes_sharding, replicated
from deco_jax.training.optimizer import learning_rate, make_optimizer
from deco_jax.training.state import TrainState

Metrics = dict[str, Array]


@dataclasses.dataclass(frozen=True)
class Trainer:
    """The fixed parts of a run and the step they make."""

    config: ConfigDict
    network: nn.Module
    projector: nn.Module | None
    teacher: DINOv2 | None  # None if nothing is aligned, or to features that come with the batch
    objective: Objective
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule

    def loss(
        self, params: Any, images_BxHxWx3: Array, labels_B: Array, draws: Draws, features_BxNxF: Array | None
    ) -> tuple[Array, Metrics]:
        """The objective at `params`; see `Objective.__call__`."""

        def network(*args, **kwargs):
            return self.network.apply({"params": params["network"]}, *args, **kwargs)

        def project(tokens):
            return self.projector.apply({"params": params["projector"]}, tokens)

        return self.objective(
            network, project, images_BxHxWx3, labels_B, self.network.null_label, draws, features_BxNxF
        )

    def update(self, state: TrainState, gradients: Any, metrics: Metrics) -> tuple[TrainState, Metrics]:
        """Applies gradients: optimiser, then EMA. A step whose loss or gradient is not finite changes neither."""
        norm = optax.tree.norm(gradients)
        finite = jnp.isfinite(norm) & jnp.isfinite(metrics["loss"])
        updates, opt_state = self.optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)

        done = state.step - state.skipped
        decay = self.config.ema.decay
        if self.config.ema.warmup:
            decay = jnp.minimum(decay, (1 + done) / (10 + done))
        ema = jax.tree.map(lambda e, p: e * decay + p * (1 - decay), state.ema, params["network"])

        def if_finite(new: Any, old: Any) -> Any:
            return jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)

        state = TrainState(
            step=state.step + 1,
            params=if_finite(params, state.params),
            ema=if_finite(ema, state.ema),
            opt_state=if_finite(opt_state, state.opt_state),
            skipped=state.skipped + ~finite,
            skipped_in_a_row=jnp.where(finite, 0, state.skipped_in_a_row + 1),
        )
        metrics |= {
            "gradient_norm": norm,
            "learning_rate": self.schedule(done),
            "skipped": state.skipped,
            "skipped_in_a_row": state.skipped_in_a_row,
        }
        return state, metrics

    def step(
        self, state: TrainState, batch: dict[str, Array], teacher_params: Any = None
    ) -> tuple[TrainState, Metrics]:
        """One optimiser step on one global batch.

        Args:
          state: donated by the caller's jit.
          batch: image (B, H, W, 3) uint8; label (B,) int32; with alignment to stored features, features (B, N, F).
          teacher_params: of the teacher, if there is one; see `encoders.teacher.place`.

        Returns:
          (state, metrics); metrics are fp32 or int32 scalars.
        """
        config, parts = self.config, self.config.optimizer.accumulation
        keys_B = example_keys(jax.random.key(config.seed), state.step, batch["image"].shape[0])

        def split(x: Array) -> Array:
            """(B, …) → (parts, B/parts, …), every device keeping its own examples."""
            return x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1)

        def gradients(part: tuple[Array, dict[str, Array]]) -> tuple[Any, Metrics]:
            keys, batch = part
            images = to_float(batch["image"])
            images = nn.with_logical_constraint(images, ("batch", None, None, None))
            flow = config.flow
            draws = draw(keys, images.shape[1:], flow.time_distribution, flow.time_shift, flow.null_probability)
            features = batch.get("features")
            if self.teacher is not None:
                features = teacher_features(self.teacher, teacher_params, images)
            (_, metrics), grads = jax.value_and_grad(self.loss, has_aux=True)(
                state.params, images, batch["label"], draws, features
            )
            return grads, metrics

        if parts == 1:
            grads, metrics = gradients((keys_B, batch))
        else:
            first = jax.eval_shape(gradients, jax.tree.map(lambda x: split(x)[0], (keys_B, batch)))
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), first)
            total, _ = jax.lax.scan(
                lambda sums, part: (jax.tree.map(jnp.add, sums, gradients(part)), None),
                zeros,
                jax.tree.map(split, (keys_B, batch)),
            )
            grads, metrics = jax.tree.map(lambda x: x / parts, total)
        return self.update(state, grads, metrics)


def jit_step(trainer: Trainer, abstract: TrainState, mesh: Mesh) -> Callable[..., Any]:
    """The step as one program, to be called within `use_mesh(mesh)`.

    It is (state, batch, notes, teacher's parameters or None) → (state, metrics, notes).

    Args:
      trainer: whose step it is.
      abstract: shapes and shardings of its state (see `abstract_state`); the state is donated.
      mesh: what both lie on.

    Notes are what each process tells the others (see `place_notes`): a row a device on the way in, whole on every
    process on the way out. Metrics are whole everywhere as well.
    """
    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    whole = replicated(mesh)

    def step(
        state: TrainState, batch: dict[str, Array], notes: Array, teacher_params: Any
    ) -> tuple[TrainState, Metrics, Array]:
        state, metrics = trainer.step(state, batch, teacher_params)
        # Sent when the step is done, not beside its collectives: simulated devices have too few threads for two at a
        # time and would wait for each other forever. The number is never negative, which the compiler cannot know.
        done = metrics["skipped_in_a_row"] >= 0
        notes = jnp.where(done, notes, 0)
        return state, metrics, jax.lax.with_sharding_constraint(notes, notes_sharding(mesh))

    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, whole, whole))


def step_flops(trainer: Trainer, image_size: int) -> float:
    """Floating-point operations that the mathematics of a step asks for, an image; 2 a multiply-add.

    Three forward passes of the network, one of the teacher; the projector (below 1 % of them) is left out.
    """
    flops = 3 * forward_flops(trainer.network, image_size, image_size)
    return flops + (0.0 if trainer.teacher is None else dinov2.forward_flops(trainer.teacher, image_size, image_size))


def make_trainer(config: ConfigDict, teacher: DINOv2 | None = None) -> Trainer:
    """Puts a run's fixed parts together from its configuration, and its teacher if that works in every step."""
    loss = config.loss
    projector = Projector(loss.alignment_features, jnp.dtype(config.model.dtype)) if loss.alignment_weight else None
    return Trainer(
        config=config,
        network=build_model(config.model),
        projector=projector,
        teacher=teacher,
        objective=Objective(
            frequency_weight=loss.frequency_weight,
            frequency_quality=loss.frequency_quality,
            frequency_mode=loss.frequency_mode,
            frequency_gamma=loss.frequency_gamma,
            alignment_weight=loss.alignment_weight,
            alignment_layer=loss.alignment_layer,
            prediction=config.model.prediction,
        ),
        optimizer=make_optimizer(config.optimizer, config.train.steps),
        schedule=learning_rate(config.optimizer, config.train.steps),
    )
