"""Which DINOv2 is in this file? Its sizes, from names and shapes, and its weights as our parameters.

Read are the official layout (`dinov2_vitb14_pretrain.pth`), the one on Hugging Face (facebook/dinov2-base,
facebook/dinov2-with-registers-base), and the names that transformers 5 gives the latter in memory.
"""

import math
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from deco_jax.encoders.dinov2.model import DINOv2, mlp_width
from deco_jax.errors import UsageError
from deco_jax.weights import translate
from deco_jax.weights.files import open_weights

WHERE = (
    "The teacher is Meta's DINOv2 (facebookresearch/dinov2, Apache-2.0): take "
    "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitb14/dinov2_vitb14_pretrain.pth, "
    "or facebook/dinov2-base from Hugging Face; or train without REPA: loss.alignment_weight=0."
)
HEAD_DIM = 64  # of all published sizes

LIMITS = {"width": 10**5, "depth": 1000, "patch_size": 128, "table_side": 1024, "registers": 1024}  # what is built

_ENDS = (".weight", ".bias")
# Official name, without .weight and .bias where it has both → our path, likewise.
_OURS = {
    "cls_token": "class_token",
    "pos_embed": "positions",
    "register_tokens": "register_tokens",
    "patch_embed.proj": "patch_embedding",
    "blocks.{i}.norm1": "blocks/attention_norm",
    "blocks.{i}.attn.qkv": "blocks/attention/qkv",
    "blocks.{i}.attn.proj": "blocks/attention/out",
    "blocks.{i}.ls1.gamma": "blocks/attention_scale",
    "blocks.{i}.norm2": "blocks/mlp_norm",
    "blocks.{i}.mlp.fc1": "blocks/mlp/in",
    "blocks.{i}.mlp.fc2": "blocks/mlp/down",
    "blocks.{i}.mlp.w12": "blocks/mlp/in",
    "blocks.{i}.mlp.w3": "blocks/mlp/down",
    "blocks.{i}.ls2.gamma": "blocks/mlp_scale",
    "norm": "norm",
}
# Official name → Hugging Face's; several stand for one tensor cut along its first axis.
_HUGGING_FACE = {
    "cls_token": ("embeddings.cls_token",),
    "pos_embed": ("embeddings.position_embeddings",),
    "register_tokens": ("embeddings.register_tokens",),
    "patch_embed.proj": ("embeddings.patch_embeddings.projection",),
    "blocks.{i}.norm1": ("encoder.layer.{i}.norm1",),
    "blocks.{i}.attn.qkv": tuple(f"encoder.layer.{{i}}.attention.attention.{x}" for x in ("query", "key", "value")),
    "blocks.{i}.attn.proj": ("encoder.layer.{i}.attention.output.dense",),
    "blocks.{i}.ls1.gamma": ("encoder.layer.{i}.layer_scale1.lambda1",),
    "blocks.{i}.norm2": ("encoder.layer.{i}.norm2",),
    "blocks.{i}.mlp.fc1": ("encoder.layer.{i}.mlp.fc1",),
    "blocks.{i}.mlp.fc2": ("encoder.layer.{i}.mlp.fc2",),
    "blocks.{i}.mlp.w12": ("encoder.layer.{i}.mlp.weights_in",),
    "blocks.{i}.mlp.w3": ("encoder.layer.{i}.mlp.weights_out",),
    "blocks.{i}.ls2.gamma": ("encoder.layer.{i}.layer_scale2.lambda1",),
    "norm": ("layernorm",),
}
_TRANSFORMERS_5 = _HUGGING_FACE | {
    "blocks.{i}.attn.qkv": tuple(f"encoder.layer.{{i}}.attention.{x}_proj" for x in "qkv"),
    "blocks.{i}.attn.proj": ("encoder.layer.{i}.attention.o_proj",),
    "blocks.{i}.mlp.w12": ("encoder.layer.{i}.mlp.gate_proj", "encoder.layer.{i}.mlp.up_proj"),
    "blocks.{i}.mlp.w3": ("encoder.layer.{i}.mlp.down_proj",),
}
_LAYOUTS = ({stem: (stem,) for stem in _OURS}, _HUGGING_FACE, _TRANSFORMERS_5)
_UNUSED = ("mask_token", "embeddings.mask_token")  # of their training


def read_dinov2(
    path: str | os.PathLike,
    dtype: jnp.dtype = jnp.bfloat16,
    heads: int | None = None,
    watch: Callable[[Iterable], Iterable] = iter,
) -> tuple[DINOv2, Any]:
    """The network in a file or Hugging Face folder, and its weights.

    Args:
      path: of either.
      dtype: of the matrix products.
      heads: of attention; by default what the folder's config.json says, or else one for 64 channels.
      watch: wraps the iteration over tensors, for a progress bar.

    Returns:
      (module, its parameters: nested dicts of fp32 numpy arrays).

    Raises:
      UsageError: there is no such file; or it is damaged; or its tensors do not make a DINOv2, all of them listed.
    """
    path = pathlib.Path(path).expanduser()
    if not path.exists():
        raise UsageError(f"{path} does not exist. {WHERE}")
    file = open_weights(path)
    try:
        _check_config(file.config)
        heads = file.config.get("num_attention_heads") if heads is None else heads
        model, params = from_tensors(file.tensors, heads, watch)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from error
    return model.clone(dtype=dtype), params


def from_tensors(
    tensors: Mapping[str, Any], heads: int | None = None, watch: Callable[[Iterable], Iterable] = iter
) -> tuple[DINOv2, Any]:
    """As `read_dinov2`, from PyTorch name → array (or `porting.files.Tensor`).

    Raises:
      UsageError: tensors are missing, left over or misshapen; all of them are listed.
    """
    tensors = {name: tensor for name, tensor in tensors.items() if name not in _UNUSED}
    layout = _layout(tensors)
    model = _model(layout, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, heads)

    official, places = {}, {}  # official name → the tensors it is made of; file's name → shape it must have
    for name, shape in _official_shapes(model).items():
        parts = _in_file(layout, name)
        official[name] = parts
        places |= {part: (shape[0] // len(parts), *shape[1:]) for part in parts}
    problems = [f"missing {name} {shape}" for name, shape in places.items() if name not in tensors]
    problems += [f"unexpected {name}" for name in sorted(set(tensors) - set(places))]
    for name, shape in places.items():
        if name in tensors and tuple(tensors[name].shape) != shape:
            problems.append(f"{name} has shape {tuple(tensors[name].shape)}, not {shape}")
    if problems:
        raise UsageError(f"these tensors do not make a whole DINOv2 of width {model.width}: {'; '.join(problems)}.")

    whole = {name: _Joined([tensors[part] for part in parts]) for name, parts in official.items()}
    patch = np.asarray(whole["patch_embed.proj.weight"])  # a convolution's (D, 3, p, p); our patches have channels last
    whole["patch_embed.proj.weight"] = np.moveaxis(patch, 1, -1).reshape(model.width, -1)
    return model, translate.from_torch(_table(model), whole, parameter_shapes(model), watch)


def parameter_shapes(model: DINOv2) -> Any:
    """Shapes of the parameters, without computing any."""
    image = jax.ShapeDtypeStruct((1, model.image_patch, model.image_patch, 3), np.float32)
    return nn.meta.unbox(jax.eval_shape(model.init, jax.random.key(0), image)["params"])


class _Joined:
    """Tensors of a file as one, joined along the first axis when it is read, not before."""

    def __init__(self, parts: list[Any]):
        self.parts = parts
        self.shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
        self.dtype = np.result_type(*(part.dtype for part in parts))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        whole = np.concatenate([np.asarray(part) for part in self.parts])
        return whole if dtype is None else whole.astype(dtype)


def _layout(tensors: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    official, hugging_face, transformers_5 = _LAYOUTS
    if "cls_token" in tensors:
        return official
    if "embeddings.cls_token" not in tensors:
        shown = ", ".join(sorted(tensors)[:5]) or "none"
        raise UsageError(f"no DINOv2: neither cls_token nor embeddings.cls_token is among its tensors ({shown}, …).")
    return transformers_5 if any(name.endswith(".attention.q_proj.weight") for name in tensors) else hugging_face


def _model(layout: Mapping[str, tuple[str, ...]], shapes: Mapping[str, tuple[int, ...]], heads: int | None) -> DINOv2:
    """The network of these sizes; whether all tensors fit them is not asked yet."""

    def shape(name: str, axes: int) -> tuple[int, ...]:
        (stored,) = _in_file(layout, name)
        if stored not in shapes:
            raise UsageError(f"{stored} is missing.")
        if len(shapes[stored]) != axes or 0 in shapes[stored]:
            raise UsageError(f"{stored} has shape {shapes[stored]}; it must have {axes} axes, none empty.")
        return shapes[stored]

    _, _, width = shape("cls_token", 3)
    _, positions, _ = shape("pos_embed", 3)
    _, _, _, patch_size = shape("patch_embed.proj.weight", 4)
    side = math.isqrt(positions - 1)
    if side == 0 or side**2 != positions - 1:
        raise UsageError(f"its table of {positions} positions is not one and a square.")
    register = layout["register_tokens"][0]
    registers = shape("register_tokens", 3)[1] if register in shapes else 0

    pattern = re.escape(layout["blocks.{i}.norm1"][0]).replace(r"\{i\}", r"(\d+)") + r"\.weight"
    depth = max((int(found[1]) + 1 for name in shapes if (found := re.fullmatch(pattern, name))), default=0)
    if not 0 < depth <= len(shapes):  # a number in a name decides nothing about memory
        raise UsageError(f"it counts {depth} blocks and has {len(shapes)} tensors.")
    swiglu = any(layout["blocks.{i}.mlp.w3"][0].replace("{i}", str(i)) + ".weight" in shapes for i in range(depth))

    if heads is None and width % HEAD_DIM:
        raise UsageError(
            f"width {width} is no multiple of {HEAD_DIM}, the width of published heads; say how many heads."
        )
    heads = width // HEAD_DIM if heads is None else heads
    if not isinstance(heads, int) or heads < 1 or width % heads:
        raise UsageError(f"width {width} does not divide into {heads!r} heads.")
    sizes = {"width": width, "depth": depth, "patch_size": patch_size, "table_side": side, "registers": registers}
    for field, limit in LIMITS.items():
        if sizes[field] > limit:
            raise UsageError(f"its {field} is {sizes[field]}; at most {limit} is read.")
    return DINOv2(
        **sizes,
        heads=heads,
        mlp="swiglu" if swiglu else "gelu",
        position_offset=0.0 if registers else 0.1,
        position_antialias=bool(registers),
    )


def _official_shapes(model: DINOv2) -> dict[str, tuple[int, ...]]:
    """Every tensor of the official layout and its shape."""
    d, p, hidden = model.width, model.patch_size, mlp_width(model.width, model.mlp)
    shapes = {"cls_token": (1, 1, d), "pos_embed": (1, 1 + model.table_side**2, d)}
    if model.registers:
        shapes["register_tokens"] = (1, model.registers, d)
    shapes |= {"patch_embed.proj.weight": (d, 3, p, p), "patch_embed.proj.bias": (d,)}
    into, out = ("fc1", "fc2") if model.mlp == "gelu" else ("w12", "w3")
    doubled = hidden if model.mlp == "gelu" else 2 * hidden
    linear = {"attn.qkv": (3 * d, d), "attn.proj": (d, d), f"mlp.{into}": (doubled, d), f"mlp.{out}": (d, hidden)}
    for i in range(model.depth):
        for name in ("norm1.weight", "norm1.bias", "ls1.gamma", "norm2.weight", "norm2.bias", "ls2.gamma"):
            shapes[f"blocks.{i}.{name}"] = (d,)
        for name, shape in linear.items():
            shapes |= {f"blocks.{i}.{name}.weight": shape, f"blocks.{i}.{name}.bias": shape[:1]}
    return shapes | {"norm.weight": (d,), "norm.bias": (d,)}


def _table(model: DINOv2) -> dict[str, str]:
    """Official name → our path, as `porting.names` has it."""
    table = {}
    for name in _official_shapes(model.clone(depth=1)):
        name = name.replace("blocks.0.", "blocks.{i}.")
        stem, end = _split(name)
        path = _OURS[stem]
        if end == ".weight":
            path += "/scale" if "norm" in stem else "/kernel"
        table[name] = path + ("/bias" if end == ".bias" else "")
    return table


def _split(name: str) -> tuple[str, str]:
    """(name without its end, ".weight" or ".bias" or nothing)."""
    end = next((end for end in _ENDS if name.endswith(end)), "")
    return name.removesuffix(end), end


def _in_file(layout: Mapping[str, tuple[str, ...]], name: str) -> list[str]:
    """What a file of this layout calls the tensor of this official name."""
    stem, end = _split(name)
    block = re.match(r"blocks\.(\d+)\.", stem)
    stem = re.sub(r"^blocks\.\d+\.", "blocks.{i}.", stem)
    return [part.replace("{i}", block[1] if block else "") + end for part in layout[stem]]


def _check_config(config: Mapping[str, Any]) -> None:
    """A folder's config.json must not ask for anything that shapes do not show and we do not do."""
    for key, value in (("hidden_act", "gelu"), ("layer_norm_eps", 1e-6)):
        if config.get(key, value) != value:
            raise UsageError(f"its config.json has {key}={config[key]}; DINOv2 has {value}.")
