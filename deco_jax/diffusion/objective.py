"""What training minimises: flow matching, the frequency-aware loss and representation alignment (docs/model.md, 5)."""

import dataclasses
from collections.abc import Callable
from typing import Any

import chex
import jax.numpy as jnp
from jax import Array

from deco_jax.diffusion.flow import Draws, interpolate, velocity_to
from deco_jax.diffusion.frequency import frequency_loss, frequency_weights


@dataclasses.dataclass(frozen=True)
class Objective:
    """L = L_FM + frequency_weight·L_freq + alignment_weight·L_REPA."""

    frequency_weight: float
    frequency_quality: int  # JPEG quality behind the weights
    frequency_mode: str  # see frequency_weights
    frequency_gamma: float
    alignment_weight: float  # 0 needs neither projector nor features
    alignment_layer: int  # tokens after this block are aligned, 1 is the first
    prediction: str  # what the network's velocity is made of: velocity, or image (see flow.velocity_to)

    def __call__(
        self,
        network: Callable[..., Array | tuple[Array, Array]],
        project: Callable[[Array], Array] | None,
        images_BxHxWx3: Array,
        condition: Any,
        draws: Draws,
        features_BxNxF: Array | None,
    ) -> tuple[Array, dict[str, Array]]:
        """The loss of one batch.

        Args:
          network: (x_t, t, condition, hidden_layer=…) → v̂, or (v̂, tokens) when hidden_layer is not None.
          project: tokens (B, N, D) → (B, N, F); None if alignment_weight is 0.
          images_BxHxWx3: fp32 in [-1, 1].
          condition: of each example, a tree of arrays (B, …), those that are dropped already replaced.
          draws: times and noise.
          features_BxNxF: the frozen teacher's, one per token; None if alignment_weight is 0.

        Returns:
          (total, terms): fp32 scalars; terms holds loss, loss_flow and, where their weight is not 0,
          loss_frequency and loss_alignment, each before its weight.
        """
        x_t, v = interpolate(images_BxHxWx3, draws.noise_BxHxWx3, draws.t_B)
        if self.prediction == "image":
            v = velocity_to(images_BxHxWx3, x_t, draws.t_B)
        if self.alignment_weight:
            v_hat, tokens = network(x_t, draws.t_B, condition, hidden_layer=self.alignment_layer)
        else:
            v_hat = network(x_t, draws.t_B, condition)
        chex.assert_equal_shape([v_hat, v])
        error = v_hat.astype(jnp.float32) - v

        total = flow = jnp.mean(error**2)
        terms = {"loss_flow": flow}
        if self.frequency_weight:
            weights = frequency_weights(self.frequency_quality, self.frequency_mode, self.frequency_gamma)
            terms["loss_frequency"] = frequency_loss(error, weights)
            total += self.frequency_weight * terms["loss_frequency"]
        if self.alignment_weight:
            terms["loss_alignment"] = alignment_loss(project(tokens), features_BxNxF)
            total += self.alignment_weight * terms["loss_alignment"]
        return total, {"loss": total, **terms}


def alignment_loss(projected_BxNxF: Array, features_BxNxF: Array) -> Array:
    """Mean over tokens of 1 − cosine(projected, features), fp32."""
    chex.assert_equal_shape([projected_BxNxF, features_BxNxF])
    a, b = projected_BxNxF.astype(jnp.float32), features_BxNxF.astype(jnp.float32)
    dot = jnp.sum(a * b, axis=-1)
    norms = jnp.linalg.norm(a, axis=-1) * jnp.linalg.norm(b, axis=-1)
    return jnp.mean(1 - dot / jnp.maximum(norms, 1e-8))
