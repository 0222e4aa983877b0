"""Which DINOv2 is in this file? Its sizes, from names and shapes, and its weights as our parameters.

Read are the official layout (`dinov2_vitb14_pretrain.pth`), the one on Hugging Face (facebook/dinov2-base,
facebook/dinov2-with-registers-base), and the names that transformers 5 gives the latter in memory.
"""

import math
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from deco_jax.encoders.dinov2.model import DINOv2
from deco_jax.errors import UsageError
from deco_jax.weights import translate
from deco_jax.weights.files import open_weights
from deco_jax.weights.tensors import naming

WHERE = (
    "The teacher is Meta's DINOv2 (facebookresearch/dinov2, Apache-2.0): take "
    "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitb14/dinov2_vitb14_pretrain.pth, "
    "or facebook/dinov2-base from Hugging Face; or train without REPA: loss.alignment_weight=0."
)
HEAD_DIM = 64  # of all published sizes

LIMITS = {"width": 10**5, "depth": 1000, "patch_size": 128, "table_side": 1024, "registers": 1024}  # what is built

# A file's name → our path, both in full; of the names of the MLP's two kinds a network has one or the other.
_OFFICIAL = {
    "cls_token": "class_token",
    "pos_embed": "positions",
    "register_tokens": "register_tokens",
    "patch_embed.proj.weight": "patch_embedding/kernel",
    "patch_embed.proj.bias": "patch_embedding/bias",
    "blocks.{i}.norm1.weight": "blocks/attention_norm/scale",
    "blocks.{i}.norm1.bias": "blocks/attention_norm/bias",
    "blocks.{i}.attn.qkv.weight": "blocks/attention/qkv/kernel",
    "blocks.{i}.attn.qkv.bias": "blocks/attention/qkv/bias",
    "blocks.{i}.attn.proj.weight": "blocks/attention/out/kernel",
    "blocks.{i}.attn.proj.bias": "blocks/attention/out/bias",
    "blocks.{i}.ls1.gamma": "blocks/attention_scale",
    "blocks.{i}.norm2.weight": "blocks/mlp_norm/scale",
    "blocks.{i}.norm2.bias": "blocks/mlp_norm/bias",
    "blocks.{i}.ls2.gamma": "blocks/mlp_scale",
    "blocks.{i}.mlp.fc1.weight": "blocks/mlp/in/kernel",
    "blocks.{i}.mlp.fc1.bias": "blocks/mlp/in/bias",
    "blocks.{i}.mlp.fc2.weight": "blocks/mlp/down/kernel",
    "blocks.{i}.mlp.fc2.bias": "blocks/mlp/down/bias",
    "blocks.{i}.mlp.w12.weight": "blocks/mlp/in/kernel",
    "blocks.{i}.mlp.w12.bias": "blocks/mlp/in/bias",
    "blocks.{i}.mlp.w3.weight": "blocks/mlp/down/kernel",
    "blocks.{i}.mlp.w3.bias": "blocks/mlp/down/bias",
    "norm.weight": "norm/scale",
    "norm.bias": "norm/bias",
}
_HUGGING_FACE_COMMON = {
    "embeddings.cls_token": "class_token",
    "embeddings.position_embeddings": "positions",
    "embeddings.register_tokens": "register_tokens",
    "embeddings.patch_embeddings.projection.weight": "patch_embedding/kernel",
    "embeddings.patch_embeddings.projection.bias": "patch_embedding/bias",
    "encoder.layer.{i}.norm1.weight": "blocks/attention_norm/scale",
    "encoder.layer.{i}.norm1.bias": "blocks/attention_norm/bias",
    "encoder.layer.{i}.layer_scale1.lambda1": "blocks/attention_scale",
    "encoder.layer.{i}.norm2.weight": "blocks/mlp_norm/scale",
    "encoder.layer.{i}.norm2.bias": "blocks/mlp_norm/bias",
    "encoder.layer.{i}.layer_scale2.lambda1": "blocks/mlp_scale",
    "encoder.layer.{i}.mlp.fc1.weight": "blocks/mlp/in/kernel",
    "encoder.layer.{i}.mlp.fc1.bias": "blocks/mlp/in/bias",
    "encoder.layer.{i}.mlp.fc2.weight": "blocks/mlp/down/kernel",
    "encoder.layer.{i}.mlp.fc2.bias": "blocks/mlp/down/bias",
    "layernorm.weight": "norm/scale",
    "layernorm.bias": "norm/bias",
}
_HUGGING_FACE = _HUGGING_FACE_COMMON | {
    "encoder.layer.{i}.attention.attention.query.weight": "blocks/attention/qkv/kernel[0]",
    "encoder.layer.{i}.attention.attention.query.bias": "blocks/attention/qkv/bias[0]",
    "encoder.layer.{i}.attention.attention.key.weight": "blocks/attention/qkv/kernel[1]",
    "encoder.layer.{i}.attention.attention.key.bias": "blocks/attention/qkv/bias[1]",
    "encoder.layer.{i}.attention.attention.value.weight": "blocks/attention/qkv/kernel[2]",
    "encoder.layer.{i}.attention.attention.value.bias": "blocks/attention/qkv/bias[2]",
    "encoder.layer.{i}.attention.output.dense.weight": "blocks/attention/out/kernel",
    "encoder.layer.{i}.attention.output.dense.bias": "blocks/attention/out/bias",
    "encoder.layer.{i}.mlp.weights_in.weight": "blocks/mlp/in/kernel",
    "encoder.layer.{i}.mlp.weights_in.bias": "blocks/mlp/in/bias",
    "encoder.layer.{i}.mlp.weights_out.weight": "blocks/mlp/down/kernel",
    "encoder.layer.{i}.mlp.weights_out.bias": "blocks/mlp/down/bias",
}
_TRANSFORMERS_5 = _HUGGING_FACE_COMMON | {
    "encoder.layer.{i}.attention.q_proj.weight": "blocks/attention/qkv/kernel[0]",
    "encoder.layer.{i}.attention.q_proj.bias": "blocks/attention/qkv/bias[0]",
    "encoder.layer.{i}.attention.k_proj.weight": "blocks/attention/qkv/kernel[1]",
    "encoder.layer.{i}.attention.k_proj.bias": "blocks/attention/qkv/bias[1]",
    "encoder.layer.{i}.attention.v_proj.weight": "blocks/attention/qkv/kernel[2]",
    "encoder.layer.{i}.attention.v_proj.bias": "blocks/attention/qkv/bias[2]",
    "encoder.layer.{i}.attention.o_proj.weight": "blocks/attention/out/kernel",
    "encoder.layer.{i}.attention.o_proj.bias": "blocks/attention/out/bias",
    "encoder.layer.{i}.mlp.gate_proj.weight": "blocks/mlp/in/kernel[0]",
    "encoder.layer.{i}.mlp.gate_proj.bias": "blocks/mlp/in/bias[0]",
    "encoder.layer.{i}.mlp.up_proj.weight": "blocks/mlp/in/kernel[1]",
    "encoder.layer.{i}.mlp.up_proj.bias": "blocks/mlp/in/bias[1]",
    "encoder.layer.{i}.mlp.down_proj.weight": "blocks/mlp/down/kernel",
    "encoder.layer.{i}.mlp.down_proj.bias": "blocks/mlp/down/bias",
}
_GELU = ".mlp.fc"  # in the names of an MLP with GELU, and in none of one with SwiGLU
_UNUSED = ("mask_token", "embeddings.mask_token")  # of their training


def read_dinov2(path: str | os.PathLike) -> tuple[DINOv2, Any]:
    """The network in a file or Hugging Face folder, and its weights.

    Returns:
      (module, its parameters: nested dicts of fp32 numpy arrays).

    Raises:
      UsageError: there is no such file; or it is damaged; or its tensors do not make a DINOv2, all of them listed.
    """
    path = pathlib.Path(path).expanduser()
    if not path.exists():
        raise UsageError(f"{path} does not exist. {WHERE}")
    file = open_weights(path)
    with naming(path):
        _check_config(file.config)
        return from_tensors(file.tensors, file.config.get("num_attention_heads"))


def from_tensors(tensors: Mapping[str, Any], heads: int | None = None) -> tuple[DINOv2, Any]:
    """As `read_dinov2`, from PyTorch name → array (or `weights.tensors.Tensor`); one head for 64 channels by default.

    Raises:
      UsageError: tensors are missing, left over or misshapen; all of them are listed.
    """
    tensors = {name: tensor for name, tensor in tensors.items() if name not in _UNUSED}
    table = _layout(tensors)
    model = _model(table, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, heads)
    table = {
        name: path
        for name, path in table.items()
        if (path != "register_tokens" or model.registers)
        and (".mlp." not in name or (_GELU in name) == (model.mlp == "gelu"))
    }
    patch = next(name for name, path in table.items() if path == "patch_embedding/kernel")
    convolution = np.moveaxis(np.asarray(tensors[patch]), 1, -1)  # (D, 3, p, p); our patches have channels last
    tensors[patch] = convolution.reshape(len(convolution), -1)
    return model, translate.from_torch(table, tensors, parameter_shapes(model))


def parameter_shapes(model: DINOv2) -> Any:
    """Shapes of the parameters, without computing any."""
    image = jax.ShapeDtypeStruct((1, model.image_patch, model.image_patch, 3), np.float32)
    return nn.meta.unbox(jax.eval_shape(model.init, jax.random.key(0), image)["params"])


def _layout(tensors: Mapping[str, Any]) -> dict[str, str]:
    if "cls_token" in tensors:
        return _OFFICIAL
    if "embeddings.cls_token" not in tensors:
        shown = ", ".join(sorted(tensors)[:5]) or "none"
        raise UsageError(f"no DINOv2: neither cls_token nor embeddings.cls_token is among its tensors ({shown}, …).")
    if any(name.endswith(".attention.q_proj.weight") for name in tensors):
        return _TRANSFORMERS_5
    return _HUGGING_FACE


def _model(table: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]], heads: int | None) -> DINOv2:
    """The network of these sizes; whether all tensors fit them is not asked yet."""
    names = {path: name for name, path in table.items()}

    def shape(path: str, axes: int) -> tuple[int, ...]:
        stored = names[path]
        if stored not in shapes:
            raise UsageError(f"{stored} is missing.")
        if len(shapes[stored]) != axes or 0 in shapes[stored]:
            raise UsageError(f"{stored} has shape {shapes[stored]}; it must have {axes} axes, none empty.")
        return shapes[stored]

    _, _, width = shape("class_token", 3)
    _, positions, _ = shape("positions", 3)
    _, _, _, patch_size = shape("patch_embedding/kernel", 4)
    side = math.isqrt(positions - 1)
    if side == 0 or side**2 != positions - 1:
        raise UsageError(f"its table of {positions} positions is not one and a square.")
    registers = shape("register_tokens", 3)[1] if names["register_tokens"] in shapes else 0

    pattern = re.escape(names["blocks/attention_norm/scale"]).replace(r"\{i\}", r"(\d{1,9})")
    depth = translate.count_blocks(pattern, shapes)
    if not 0 < depth <= len(shapes):  # a number in a name decides nothing about memory
        raise UsageError(f"it counts {depth} blocks and has {len(shapes)} tensors.")
    swiglu = [name for name in table if ".mlp." in name and _GELU not in name]

    if heads is None:
        if width % HEAD_DIM:
            raise UsageError(
                f"width {width} is no multiple of {HEAD_DIM}, the width of published heads; say how many heads."
            )
        heads = width // HEAD_DIM
    if not isinstance(heads, int) or heads < 1 or width % heads:
        raise UsageError(f"width {width} does not divide into {heads!r} heads.")
    sizes = {"width": width, "depth": depth, "patch_size": patch_size, "table_side": side, "registers": registers}
    for field, limit in LIMITS.items():
        if sizes[field] > limit:
            raise UsageError(f"its {field} is {sizes[field]}; at most {limit} is read.")
    return DINOv2(
        **sizes,
        heads=heads,
        mlp="swiglu" if any(name.replace("{i}", str(i)) in shapes for name in swiglu for i in range(depth)) else "gelu",
        position_offset=0.0 if registers else 0.1,
        position_antialias=bool(registers),
    )


def _check_config(config: Mapping[str, Any]) -> None:
    """A folder's config.json must not ask for anything that shapes do not show and we do not do."""
    for key, value in (("hidden_act", "gelu"), ("layer_norm_eps", 1e-6)):
        if config.get(key, value) != value:
            raise UsageError(f"its config.json has {key}={config[key]}; DINOv2 has {value}.")
