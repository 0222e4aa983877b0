"""AdamW and its learning rate, every hyper-parameter written out (SPEC section 6)."""

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
    """AdamW with decoupled weight decay on every parameter, after an optional clip of the global gradient norm.

    Args:
      config: the `optimizer` part of a configuration.
      total_steps: of the run, for the learning rate's decay.
    """
    adamw = optax.adamw(
        learning_rate(config, total_steps),
        b1=config.beta1,
        b2=config.beta2,
        eps=config.eps,
        weight_decay=config.weight_decay,
    )
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw) if config.clip_norm else adamw
