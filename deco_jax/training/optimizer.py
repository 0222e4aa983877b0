"""AdamW and its learning rate, every hyper-parameter written out (docs/model.md, section 6)."""

import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from ml_collections import ConfigDict

from deco_jax.errors import UsageError


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


def check_schedule(then: ConfigDict, now: ConfigDict, step: int) -> list[str]:
    """Compares the learning rates that two whole configurations give to the first `step` steps, which are done.

    Returns:
      What is different, for the log, in so far as no changed field says it.

    Raises:
      UsageError: another train.steps changes them, since the rate falls at its end, and nobody asked for that.
    """
    old, new = (np.asarray(learning_rate(c.optimizer, c.train.steps)(np.arange(step))) for c in (then, now))
    wanted = any(then.optimizer[name] != now.optimizer[name] for name in ("lr", "warmup_steps", "decay_steps"))
    if wanted or np.allclose(old, new, rtol=1e-6, atol=0):
        return []
    if not now.train.reschedule:
        raise UsageError(
            f"train.steps={now.train.steps} with optimizer.decay_steps={now.optimizer.decay_steps} changes the "
            f"learning rate of steps done: step {step} had {old[-1]:.3g}, not {new[-1]:.3g}, since train.steps was "
            f"{then.train.steps}. --config.train.reschedule=True goes on with the new rates; or set another "
            "optimizer.decay_steps, 0 for a constant rate."
        )
    return [f"learning rate of step {step}: {old[-1]:.3g} there, {new[-1]:.3g} here"]


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
