"""One training step as a pure function: draw, predict, differentiate, update."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax import Array
from ml_collections import ConfigDict

from deco_jax.config import build_model
from deco_jax.diffusion.flow import Draws, draw, example_keys, to_float
from deco_jax.diffusion.objective import Objective
from deco_jax.encoders.frozen import Frozen
from deco_jax.errors import UsageError
from deco_jax.models import Projector
from deco_jax.models.build import plainly
from deco_jax.models.flops import forward_flops
from deco_jax.ops.product import gradients_in
from deco_jax.parallel.gradients import work_apart
from deco_jax.parallel.mesh import Flag, Layout, batch_devices, messages_sharding, replicated
from deco_jax.training.optimizer import clip, learning_rate, make_optimizer
from deco_jax.training.state import TrainState

Batch = Mapping[str, Array]
Metrics = dict[str, Array]


@dataclasses.dataclass(frozen=True, eq=False)
class TrainStep:
    """The fixed parts of a run; called, they make one step."""

    config: ConfigDict
    network: nn.Module
    projector: nn.Module | None  # None if nothing is aligned
    frozen: tuple[Frozen, ...]  # networks that add fields to the batch, in this order
    objective: Objective
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule
    draw: Callable[[Array, tuple[int, int, int]], Draws]  # (one key per example, image shape) → what is random

    def initial_state(self) -> TrainState:
        """A fresh state from the seed, with logical axis names boxed around all that is shaped like a parameter."""
        key = jax.random.fold_in(jax.random.key(self.config.seed), 2**31 - 1)  # no step draws from this key
        network_key, projector_key = jax.random.split(key)
        p, network = self.network.patch_size, self.network
        x, t, condition = jnp.zeros((1, p, p, 3)), jnp.zeros(1), network.condition.example(1)
        params = {"network": plainly(network).init(network_key, x, t, condition)["params"]}
        if self.projector is not None:
            params["projector"] = self.projector.init(projector_key, jnp.zeros((1, 1, network.width)))["params"]
        return TrainState(
            step=jnp.int32(0),
            params=params,
            ema=jax.tree.map(jnp.copy, params["network"]),  # starts at the parameters, in buffers of its own
            opt_state=self.optimizer.init(params),
            skipped=jnp.int32(0),
            skipped_in_a_row=jnp.int32(0),
        )

    def __call__(self, state: TrainState, batch: Batch, frozen_params: Any = None) -> tuple[TrainState, Metrics]:
        """One optimiser step on one global batch.

        Args:
          state: donated by the caller's jit.
          batch: image (B, H, W, 3) uint8; the fields of the network's condition; with alignment to stored features,
            features (B, N, F).
          frozen_params: of the frozen networks, by their names.

        Returns:
          (state, metrics); metrics are fp32 or int32 scalars.
        """
        return self.update(state, *self.gradients(state, batch, frozen_params))

    def gradients(
        self, state: TrainState, batch: Batch, frozen_params: Any = None, kept: tuple[Layout, Any] | None = None
    ) -> tuple[Any, Metrics]:
        """(gradients, losses) of one global batch; see `__call__`.

        `kept`: the layout that the step runs on, and the shardings of its parameters between steps. Parameters are
        gathered, and gradients added up, once per step if `layout.whole` is set, or if `optimizer.accumulate` is
        "step" and there are several parts.
        """
        keys_B = example_keys(jax.random.key(self.config.seed), state.step, batch["image"].shape[0])
        if kept is None or batch_devices(kept[0].mesh) == 1:
            return self._means(state.params, frozen_params, (keys_B, batch))
        (layout, shardings), optimizer = kept, self.config.optimizer
        aside = {frozen.name: frozen.abstract_params(layout) for frozen in self.frozen}
        return work_apart(
            self._means,
            state.params,
            {name: frozen_params[name] for name in aside},
            (keys_B, batch),
            layout,
            (shardings, jax.tree.map(lambda x: x.sharding, aside)),
            whole=layout.whole or (optimizer.accumulate == "step" and optimizer.accumulation > 1),
            is_matrix=is_matrix,
            compute_dtype=self.config.model.dtype,
            gradient_dtype=optimizer.gradient_dtype,
        )

    def _means(self, params: Any, frozen_params: Any, examples: tuple[Array, Batch]) -> tuple[Any, Metrics]:
        """(gradients, losses), means over examples with their keys."""
        return self._mean(lambda part: self._differentiate(params, self._prepare(frozen_params, *part)), examples)

    def _mean(self, differentiate: Callable[[Any], tuple[Any, Metrics]], examples: Any) -> tuple[Any, Metrics]:
        """What `differentiate` gives for all examples, worked through in `optimizer.accumulation` parts; sums fp32."""
        parts = self.config.optimizer.accumulation
        if parts == 1:
            return differentiate(examples)

        def split(x: Array) -> Array:
            """(B, …) → (parts, B/parts, …), every device keeping its own examples."""
            return x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1)

        examples = jax.tree.map(split, examples)
        first = jax.eval_shape(differentiate, jax.tree.map(lambda x: x[0], examples))
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), first)
        total, _ = jax.lax.scan(
            lambda sums, part: (jax.tree.map(jnp.add, sums, differentiate(part)), None), zeros, examples
        )
        return jax.tree.map(lambda x: x / parts, total)

    def _prepare(self, frozen_params: Any, keys_B: Array, batch: Batch) -> tuple[Batch, Draws]:
        """What is differentiated at: images in fp32, conditions that are dropped replaced, frozen networks' fields."""
        images = nn.with_logical_constraint(to_float(batch["image"]), ("batch", None, None, None))
        draws = self.draw(keys_B, images.shape[1:])
        batch = {**self.network.condition.drop(batch, draws.drop_B), "image": images}
        for frozen in self.frozen:
            batch = frozen(frozen_params[frozen.name], batch)
        if "dropped" in batch and not any(frozen.writes == "text" for frozen in self.frozen):
            raise UsageError(
                "a network that is told texts needs its encoder, or `stored_text`, among the frozen networks of its "
                "step: otherwise no prompt is ever dropped."
            )
        return batch, draws

    def _differentiate(self, params: Any, prepared: tuple[Batch, Draws]) -> tuple[Any, Metrics]:
        """(gradients, losses) of examples and their draws."""
        with gradients_in(self.config.optimizer.gradient_dtype):
            (_, metrics), grads = jax.value_and_grad(self.loss, has_aux=True)(params, *prepared)
        return grads, metrics

    def loss(self, params: Any, batch: Batch, draws: Draws) -> tuple[Array, Metrics]:
        """The objective at `params`; see `Objective`. Images are fp32, conditions dropped where they are to be."""
        network = functools.partial(self.network.apply, {"params": params["network"]})
        project = self.projector and functools.partial(self.projector.apply, {"params": params["projector"]})
        condition = self.network.condition.from_batch(batch)
        return self.objective(network, project, batch["image"], condition, draws, batch.get("features"))

    def update(
        self, state: TrainState, gradients: Any, metrics: Metrics, whole: Array | bool = True
    ) -> tuple[TrainState, Metrics]:
        """Applies gradients: optimiser, then EMA. A step whose loss or gradient is not finite changes neither.

        `whole`: whether all of the batch was there; if not, nothing of the state changes, its `step` neither.
        """
        norm, finite = _norm(gradients, metrics)
        whole = jnp.asarray(whole)
        gradients = clip(gradients, self.config.optimizer)
        updates, opt_state = self.optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)

        done = state.step - state.skipped
        decay = self.config.ema.decay
        if self.config.ema.warmup:
            decay = jnp.minimum(decay, (1 + done) / (10 + done))
        ema = jax.tree.map(lambda e, p: e * decay + p * (1 - decay), state.ema, params["network"])

        params, ema, opt_state = jax.tree.map(
            lambda new, old: jnp.where(finite & whole, new, old),
            (params, ema, opt_state),
            (state.params, state.ema, state.opt_state),
        )
        state = TrainState(
            step=state.step + whole,
            params=params,
            ema=ema,
            opt_state=opt_state,
            skipped=state.skipped + (whole & ~finite),
            skipped_in_a_row=jnp.where(whole, jnp.where(finite, 0, state.skipped_in_a_row + 1), state.skipped_in_a_row),
        )
        metrics |= {
            "gradient_norm": norm,
            "learning_rate": self.schedule(done),
            "skipped": state.skipped,
            "skipped_in_a_row": state.skipped_in_a_row,
        }
        return state, metrics


def make_train_step(config: ConfigDict, frozen: Sequence[Frozen] = ()) -> TrainStep:
    """Puts a run's fixed parts together from its configuration, and the frozen networks that work in every step."""
    loss, flow = config.loss, config.flow
    projector = Projector(loss.alignment_features, jnp.dtype(config.model.dtype)) if loss.alignment_weight else None
    terms = {field.name: loss[field.name] for field in dataclasses.fields(Objective) if field.name in loss}
    return TrainStep(
        config=config,
        network=build_model(config.model),
        projector=projector,
        frozen=tuple(frozen),
        objective=Objective(**terms, prediction=config.model.prediction),
        optimizer=make_optimizer(config.optimizer, config.train.steps),
        schedule=learning_rate(config.optimizer, config.train.steps),
        draw=lambda keys_B, shape: draw(keys_B, shape, flow.time_distribution, flow.time_shift, flow.null_probability),
    )


def jit_step(train_step: TrainStep, abstract: TrainState, layout: Layout) -> Callable[..., Any]:
    """The step as one program, to be called within `use_mesh(layout)`.

    It is (state, batch, messages, frozen networks' parameters by name) → (state, metrics, messages).

    Args:
      train_step: whose program it is.
      abstract: shapes and shardings of its state (see `abstract_state`); the state is donated.
      layout: what both lie on.

    Messages are what each process tells the others (see `place_messages`): one row per device on the way in, whole on
    every process on the way out. Metrics are whole everywhere as well. If a process says that its data are absent, the
    state stays as it is; whether they are is asked of messages, as copies of a batch's rows may lie in two processes.
    """
    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    whole = replicated(layout.mesh)

    def step(state: TrainState, batch: Batch, messages: Array, frozen: Any) -> tuple[TrainState, Metrics, Array]:
        gradients, metrics = train_step.gradients(state, batch, frozen, (layout, shardings.params))
        # Sent when gradients are there, not beside their collectives: simulated devices have too few threads for two at
        # a time and would wait for each other forever. The sum is never negative, which the compiler cannot know.
        sent = state.skipped_in_a_row + _norm(gradients, metrics)[1] >= 0
        messages = jax.lax.with_sharding_constraint(jnp.where(sent, messages, 0), messages_sharding(layout.mesh))
        messages = jax.lax.with_sharding_constraint(messages, whole)
        absent = jnp.any(messages[:, 0] & Flag.ABSENT)
        state, metrics = train_step.update(state, gradients, metrics, ~absent)
        return state, metrics, messages

    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, whole, whole))


def _norm(gradients: Any, metrics: Metrics) -> tuple[Array, Array]:
    """The global norm of the gradients, and whether it and the loss are finite."""
    norm = optax.tree.norm(gradients)
    return norm, jnp.isfinite(norm) & jnp.isfinite(metrics["loss"])


def is_matrix(path: tuple[Any, ...]) -> bool:
    """Whether a parameter is a matrix of products in `model.dtype`: a kernel, but for that of the pixels' queries.

    The others stay fp32, and so do their gradients: the queries' constant part is made in fp32, and of a table several
    examples may add up one row.
    """
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    return name.endswith("/kernel") and not name.endswith("decoder/query/kernel")


def step_flops(train_step: TrainStep, image_size: int) -> float:
    """Floating-point operations per image that the mathematics of a step asks for; 2 per multiply-add.

    Three forward passes of the network, one of each frozen one; the projector (below 1 % of them) is left out.
    """
    frozen = sum(network.forward_flops(image_size, image_size) for network in train_step.frozen)
    return 3 * forward_flops(train_step.network, image_size, image_size) + frozen
