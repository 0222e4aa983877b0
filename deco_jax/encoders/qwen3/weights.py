"""Which Qwen3 is in this folder? Its sizes, from config.json and shapes, and its weights as our parameters.

Read is what is published on Hugging Face (Qwen/Qwen3-1.7B): config.json, model.safetensors or its parts with their
index. The head that predicts tokens is not used.
"""

import pathlib
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from deco_jax.encoders.qwen3.model import Qwen3
from deco_jax.errors import UsageError
from deco_jax.weights import translate
from deco_jax.weights.files import open_weights
from deco_jax.weights.tensors import naming

NAMES = {
    "embed_tokens.weight": "table",
    "layers.{i}.self_attn.q_proj.weight": "layers/attention/query/kernel",
    "layers.{i}.self_attn.k_proj.weight": "layers/attention/key/kernel",
    "layers.{i}.self_attn.v_proj.weight": "layers/attention/value/kernel",
    "layers.{i}.self_attn.o_proj.weight": "layers/attention/out/kernel",
    "layers.{i}.self_attn.q_norm.weight": "layers/attention/query_norm/scale",
    "layers.{i}.self_attn.k_norm.weight": "layers/attention/key_norm/scale",
    "layers.{i}.mlp.gate_proj.weight": "layers/mlp/gate/kernel",
    "layers.{i}.mlp.up_proj.weight": "layers/mlp/up/kernel",
    "layers.{i}.mlp.down_proj.weight": "layers/mlp/down/kernel",
    "layers.{i}.input_layernorm.weight": "layers/attention_norm/scale",
    "layers.{i}.post_attention_layernorm.weight": "layers/mlp_norm/scale",
    "norm.weight": "norm/scale",
}
_EXPECTED = {"hidden_act": "silu", "attention_bias": False, "rope_scaling": None, "use_sliding_window": False}
LIMITS = {"width": 10**5, "depth": 1000, "hidden": 10**6, "vocabulary": 10**7}  # of what is built


def read_qwen3(path: pathlib.Path, dtype: jnp.dtype = jnp.bfloat16) -> tuple[Qwen3, Any]:
    """The network in a Hugging Face folder, and its weights.

    Args:
      path: of the folder.
      dtype: of its matrix products, in which its matrices are kept.

    Returns:
      (module, its parameters: nested dicts of numpy arrays).

    Raises:
      UsageError: the folder is damaged, or its tensors or config.json do not make a Qwen3.
    """
    file = open_weights(path)
    with naming(path):
        tensors = {name.removeprefix("model."): tensor for name, tensor in file.tensors.items()}
        tensors.pop("lm_head.weight", None)
        model = _model(file.config, {name: tuple(tensor.shape) for name, tensor in tensors.items()})
        model = model.clone(dtype=jnp.dtype(dtype))
        return model, translate.from_torch(NAMES, tensors, parameter_shapes(model), matrices=jnp.dtype(dtype))


def parameter_shapes(model: Qwen3) -> Any:
    """Shapes of the parameters, without computing any."""
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    return nn.meta.unbox(jax.eval_shape(model.init, jax.random.key(0), tokens)["params"])


def _model(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> Qwen3:
    if not config:
        raise UsageError("a Qwen3 needs its config.json beside its weights; there is none.")
    if config.get("model_type", "qwen3") != "qwen3":
        raise UsageError(f"its config.json is of a {config['model_type']!r}, not of a qwen3.")
    for key, value in _EXPECTED.items():
        if config.get(key, value) != value:
            raise UsageError(f"its config.json has {key}={config[key]!r}; the Qwen3 known here have {value!r}.")
    rope = config.get("rope_parameters") or {}
    try:
        vocabulary, width = shapes["embed_tokens.weight"]
        (head_dim,) = shapes["layers.0.self_attn.q_norm.weight"]
        sizes = {
            "width": width,
            "depth": translate.count_blocks(r"layers\.(\d{1,9})\.input_layernorm\.weight", shapes),
            "hidden": shapes["layers.0.mlp.gate_proj.weight"][0],
            "vocabulary": vocabulary,
        }
        heads, kv_heads = (shapes[f"layers.0.self_attn.{x}_proj.weight"][0] // head_dim for x in "qk")
    except (KeyError, ValueError, IndexError, ZeroDivisionError) as error:
        raise UsageError(f"its tensors do not make a Qwen3: {error} is missing or has another shape.") from error
    for field, limit in LIMITS.items():
        if not 0 < sizes[field] <= limit:
            raise UsageError(f"its {field} is {sizes[field]}; from 1 to {limit} are read.")
    if kv_heads < 1 or heads % kv_heads:
        raise UsageError(f"its {heads} query heads do not divide into groups for {kv_heads} key heads.")
    for key, value in (("num_attention_heads", heads), ("num_key_value_heads", kv_heads)):
        if config.get(key, value) != value:
            raise UsageError(f"its config.json has {key}={config[key]!r}, its tensors {value}.")
    return Qwen3(
        **sizes,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        theta=float(config.get("rope_theta") or rope.get("rope_theta") or 1e6),
        epsilon=float(config.get("rms_norm_eps", 1e-6)),
    )
