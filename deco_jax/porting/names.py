"""Which of the PyTorch system's tensors is which of our parameters: one table, read in both directions.

Left stands the PyTorch name, right the path in our parameter tree. `{i}` is a block of the transformer (ours are
stacked along a leading axis), `{j}` a block of the pixel decoder. The only transform is the one every linear layer
needs: PyTorch stores (out, in), we store (in, *features) with `out` split in row-major order.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from deco_jax.errors import UsageError


def _linear(theirs: str, ours: str, bias: bool = True) -> dict[str, str]:
    table = {f"{theirs}.weight": f"{ours}/kernel"}
    return table | {f"{theirs}.bias": f"{ours}/bias"} if bias else table


_BLOCK = "transformer/layers/block"
_TRANSFORMER = {
    **_linear("t_embedder.mlp.0", "time_embedding/in"),
    **_linear("t_embedder.mlp.2", "time_embedding/out"),
    "y_embedder.embedding_table.weight": "label_embedding/table",
    "blocks.{i}.norm1.weight": f"{_BLOCK}/attention_norm/scale",
    **_linear("blocks.{i}.attn.qkv", f"{_BLOCK}/attention/qkv", bias=False),
    "blocks.{i}.attn.q_norm.weight": f"{_BLOCK}/attention/query_norm/scale",
    "blocks.{i}.attn.k_norm.weight": f"{_BLOCK}/attention/key_norm/scale",
    **_linear("blocks.{i}.attn.proj", f"{_BLOCK}/attention/out"),
    "blocks.{i}.norm2.weight": f"{_BLOCK}/mlp_norm/scale",
    **_linear("blocks.{i}.mlp.w1", f"{_BLOCK}/mlp/gate", bias=False),
    **_linear("blocks.{i}.mlp.w3", f"{_BLOCK}/mlp/up", bias=False),
    **_linear("blocks.{i}.mlp.w2", f"{_BLOCK}/mlp/down", bias=False),
    **_linear("blocks.{i}.adaLN_modulation.0", f"{_BLOCK}/modulation"),
}

DECO = {
    **_linear("s_embedder.proj", "patch_embedding"),
    **_TRANSFORMER,
    **_linear("x_embedder.embedder.0", "decoder/query"),
    **_linear("dec_net.cond_embed", "decoder/condition"),
    **_linear("dec_net.input_proj", "decoder/in"),
    "dec_net.res_blocks.{j}.in_ln.weight": "decoder/block_{j}/norm/scale",
    "dec_net.res_blocks.{j}.in_ln.bias": "decoder/block_{j}/norm/bias",
    **_linear("dec_net.res_blocks.{j}.mlp.0", "decoder/block_{j}/in"),
    **_linear("dec_net.res_blocks.{j}.mlp.2", "decoder/block_{j}/out"),
    **_linear("dec_net.res_blocks.{j}.adaLN_modulation.1", "decoder/block_{j}/modulation"),
    **_linear("dec_net.final_layer.linear", "decoder/out"),
}

PROJECTOR = {**_linear("proj.0.0", "in"), **_linear("proj.0.2", "middle"), **_linear("proj.0.4", "out")}


def from_torch(table: Mapping[str, str], tensors: Mapping[str, np.ndarray], like: Any) -> Any:
    """Arranges PyTorch tensors as our parameters.

    Args:
      table: one of the tables above.
      tensors: PyTorch name → array.
      like: the parameter tree to fill; only its shapes are read (`jax.eval_shape` of an init will do).

    Returns:
      Nested dicts of numpy arrays shaped as `like`.

    Raises:
      UsageError: tensors are missing, left over or misshapen; all of them are listed.
    """
    shapes = {"/".join(path): leaf.shape for path, leaf in flatten_dict(like).items()}
    ours, problems, unused = {}, [], set(tensors)
    for theirs, path, layer in _expand(table, shapes):
        shape = shapes[path] if layer is None else shapes[path][1:]
        unused.discard(theirs)
        if theirs not in tensors:
            problems.append(f"missing {theirs} for {path} {shape}")
            continue
        value = np.asarray(tensors[theirs])
        if value.shape != _torch_shape(path, shape):
            problems.append(f"{theirs} has shape {value.shape}; {path} needs {_torch_shape(path, shape)}")
            continue
        value = (value.T if path.endswith("/kernel") else value).reshape(shape)
        if layer is None:
            ours[path] = value
        else:
            ours.setdefault(path, [None] * shapes[path][0])[layer] = value
    problems += [f"unexpected {name}" for name in sorted(unused)]
    if problems:
        raise UsageError("these tensors do not fit the model: " + "; ".join(problems) + ".")
    return unflatten_dict(
        {tuple(path.split("/")): np.stack(v) if isinstance(v, list) else v for path, v in ours.items()}
    )


def to_torch(table: Mapping[str, str], params: Any) -> dict[str, np.ndarray]:
    """Inverse of `from_torch`: our parameters under PyTorch's names and shapes."""
    arrays = {"/".join(path): np.asarray(leaf) for path, leaf in flatten_dict(params).items()}
    tensors = {}
    for theirs, path, layer in _expand(table, {path: array.shape for path, array in arrays.items()}):
        value = arrays[path] if layer is None else arrays[path][layer]
        tensors[theirs] = value.reshape(value.shape[0], -1).T if path.endswith("/kernel") else value
        tensors[theirs] = np.ascontiguousarray(tensors[theirs].reshape(_torch_shape(path, value.shape)))
    return tensors


def _expand(table: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]]):
    """Yields (PyTorch name, our path, index on the stacked axis or None) for every parameter in `shapes`."""
    for theirs, path in table.items():
        if "{i}" in theirs:
            for i in range(shapes[path][0]):
                yield theirs.format(i=i), path, i
        elif "{j}" in theirs:
            j = 0
            while path.format(j=j) in shapes:
                yield theirs.format(j=j), path.format(j=j), None
                j += 1
        else:
            yield theirs, path, None


def _torch_shape(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape PyTorch gives the parameter that we keep at `path` with `shape`."""
    if path.endswith("/kernel"):
        return (int(np.prod(shape[1:])), shape[0])
    if path.endswith("/bias"):
        return (int(np.prod(shape)),)
    return tuple(shape)
