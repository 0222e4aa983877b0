"""Self-attention, from the raw projection of queries, keys and values to the heads' outputs (docs/model.md, 2.5).

Axis letters: B batch, N tokens, L text tokens, h heads, e channels of a head, k pairs of channels.
"""

import functools
import importlib.metadata
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from deco_jax.ops import attention_tpu
from deco_jax.ops.attention_tpu import NORM_EPSILON, Norms
from deco_jax.ops.door import Implementation, choose, over_devices


def attention(
    qkv_BxNx3xHxE: Array,
    norms: Norms | None,
    angles_NxK: Array | None,
    text_kv_BxLx2xHxE: Array | None,
    implementation: str = "auto",
) -> Array:
    """softmax(q·kᵀ/√e)·v of every head, (B, N, h, e).

    Args:
      qkv_BxNx3xHxE: queries, keys and values as the linear layer puts them out.
      norms: RMS-normalise queries and keys over a head's channels, with these weights (e,).
      angles_NxK: then turn each pair of channels of both by the token's angles, (N, e/2).
      text_kv_BxLx2xHxE: keys and values of text to look at as well; the keys are normed, not turned.
      implementation: "auto", or the name of one in TABLE.

    Raises:
      UsageError: the implementation does not exist or cannot run.
    """
    arguments = (qkv_BxNx3xHxE, norms, angles_NxK, text_kv_BxLx2xHxE)
    chosen = choose("model.attention", TABLE, implementation, *arguments)
    out_BxNxHxE = chosen.run(*arguments)
    # Of cuDNN the backward pass needs sums of the forward pass besides, which runs again for them.
    return out_BxNxHxE if chosen.name == "cudnn" else checkpoint_name(out_BxNxHxE, "attention")


def normalise(x_BxNxHxE: Array, scale_E: Array) -> Array:
    """x·scale/√(mean x² + ε) over a head's channels, in fp32; same dtype back."""
    x = x_BxNxHxE.astype(jnp.float32)
    factor = jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + NORM_EPSILON) * scale_E
    return (x * factor).astype(x_BxNxHxE.dtype)


def rotate(x_BxNxHxE: Array, angles_NxK: Array) -> Array:
    """Turns each adjacent pair of channels (2k, 2k+1) by angle k, in fp32; same shape and dtype back."""
    cos, sin = jnp.cos(angles_NxK)[:, None, :], jnp.sin(angles_NxK)[:, None, :]
    pairs = x_BxNxHxE.astype(jnp.float32).reshape(*x_BxNxHxE.shape[:-1], -1, 2)
    real, imaginary = pairs[..., 0], pairs[..., 1]
    turned = jnp.stack([real * cos - imaginary * sin, real * sin + imaginary * cos], axis=-1)
    return turned.reshape(x_BxNxHxE.shape).astype(x_BxNxHxE.dtype)


def _library(
    qkv_BxNx3xHxE: Array,
    norms: Norms | None,
    angles_NxK: Array | None,
    text_kv_BxLx2xHxE: Array | None,
    implementation: str,
) -> Array:
    """By jax.nn.dot_product_attention, on keys and queries that are prepared before it."""
    q, k, v = qkv_BxNx3xHxE[:, :, 0], qkv_BxNx3xHxE[:, :, 1], qkv_BxNx3xHxE[:, :, 2]
    text_k = None
    if text_kv_BxLx2xHxE is not None:
        text_k, v = text_kv_BxLx2xHxE[:, :, 0], jnp.concatenate([v, text_kv_BxLx2xHxE[:, :, 1]], axis=1)
    if norms is not None:
        query_scale, key_scale = norms
        q, k = normalise(q, query_scale), normalise(k, key_scale)
        text_k = None if text_k is None else normalise(text_k, key_scale)
    if angles_NxK is not None:
        q, k = rotate(q, angles_NxK), rotate(k, angles_NxK)
    if text_k is not None:
        k = jnp.concatenate([k, text_k], axis=1)
    with jax.default_matmul_precision("highest" if q.dtype == jnp.float32 else None):
        return jax.nn.dot_product_attention(q, k, v, implementation=implementation)


def _by_device(function: Callable[..., Array]) -> Callable[..., Array]:
    """An implementation, run on every device for its images and heads."""
    projection = ("batch", None, None, "heads", None)

    def run(*arguments: Array | Norms | None) -> Array:
        axes = (projection, None, None, None if arguments[3] is None else projection)
        return over_devices(function, axes, ("batch", None, "heads", None))(*arguments)

    return run


def _refused_by_cudnn(qkv_BxNx3xHxE: Array, *others: object) -> str:
    e, dtype = qkv_BxNx3xHxE.shape[-1], qkv_BxNx3xHxE.dtype
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"cuDNN's flash attention takes bfloat16 and float16, not {dtype}"
    if e % 8 or e > 128:
        return f"cuDNN's flash attention takes heads of a multiple of 8 channels up to 128, not {e}"
    if jax.default_backend() != "gpu":  # compiled ahead, for GPUs that `deco plan` knows: they are all new enough
        missing = "where there is no GPU, cuDNN comes with `pip install nvidia-cudnn-cu13`, which is missing"
        return "" if _has_cudnn() else missing
    capability = jax.local_devices()[0].compute_capability
    if capability.replace(".", "").isdigit() and float(capability) >= 8:
        return ""
    return f"cuDNN's flash attention needs an NVIDIA GPU of compute capability 8.0, not {capability}"


def _has_cudnn() -> bool:
    """Whether the package is installed; a folder that it left behind is none."""
    names = ("nvidia-cudnn-cu12", "nvidia-cudnn-cu13")
    return any(True for name in names for _ in importlib.metadata.distributions(name=name))


_cudnn = functools.partial(_library, implementation="cudnn")
TABLE = (
    Implementation("pallas", _by_device(attention_tpu.fused), ("tpu",), attention_tpu.refuses),
    # By device too: cuDNN's own way of being partitioned does not know of axes that are not the partitioner's.
    Implementation("cudnn", _by_device(_cudnn), ("gpu",), _refused_by_cudnn),
    Implementation("xla", functools.partial(_library, implementation="xla")),
)
