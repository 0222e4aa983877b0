"""AdamW and its learning rate, every hyper-parameter written out (docs/model.md, section 6)."""

import jax.numpy as jnp
import optax
from jax import Array
from ml_collections import ConfigDict


def learning_rate(config: ConfigDict, total_steps: int) -> optax.Schedule:
    """The learning rate as a function of the update's number.

    Rises linearly over `warmup_steps`, stays at `lr`, and falls linearly to 0 over the last `decay_steps`
    of `total_steps`; either may be 0.
    """
    warmup, decay = config.warmup_steps, config.decay_steps

    def schedule(count: Array) -> Array:
        rise = jnp.minimum(1.0, (count + 1) / (warmup + 1))
        fall = jnp.clip((total_steps - count) / decay, 0.0, 1.0) if decay else 1.0
        return config.lr * rise * fall

    return schedule


def make_optimizer(config: ConfigDict, total_steps: int) -> optax.GradientTransformation:
    """AdamW with decoupled weight decay on every parameter.

    Its state has the same layout whatever the settings, so that a run may go on with others.

    Args:
      config: the `optimizer` part of a configuration.
      total_steps: of the run, for the learning rate's decay.
    """
    return optax.adamw(
        learning_rate(config, total_steps),
        b1=config.beta1,
        b2=config.beta2,
        eps=config.eps,
        weight_decay=config.weight_decay,
    )


def clip(gradients: optax.Updates, config: ConfigDict) -> optax.Updates:
    """The gradients, shortened to a global norm of `clip_norm` if they are longer; 0 leaves them."""
    if not config.clip_norm:
        return gradients
    gradients, _ = optax.clip_by_global_norm(config.clip_norm).update(gradients, optax.EmptyState())
    return gradients
