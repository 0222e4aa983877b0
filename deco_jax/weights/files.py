"""Which tensors does this file or folder of weights hold? One question, whatever wrote it.

Read are: what `torch.save` wrote (`.pt`, `.pth`, `.ckpt`, `.bin`; the content counts, not the ending), `.safetensors`,
a set of either with its `….index.json`, and a Hugging Face folder with any of them. Nothing in a file is executed, and
only the tensors asked for are read; docs/security.md has the rules. What lies in a bucket is first copied to this host.
"""

import collections
import dataclasses
import json
import os
import pathlib
from typing import Any

from deco_jax.errors import UsageError
from deco_jax.storage import local_copy, to_path
from deco_jax.weights.archives import read_torch
from deco_jax.weights.safetensors import MAX_HEADER, is_safetensors, read_safetensors
from deco_jax.weights.tensors import MappedFile, Tensor, naming, short

# Where training scripts put a state dict inside a checkpoint. Several of them can stand side by side.
AVERAGES = ("ema", "model_ema", "ema_model", "ema_state_dict", "model_ema_state_dict", "state_dict_ema", "params_ema")
CONTAINERS = ("state_dict", "model", "module", "network", "net", "params", *AVERAGES)
LIGHTNINGS_ONLINE = "current_model_state"  # of its WeightAveraging, whose "state_dict" is then the average

# What a Hugging Face folder calls its weights, most wanted first.
_FOLDER_FILES = tuple(
    f"{stem}{ending}"
    for ending in (".safetensors.index.json", ".safetensors", ".bin.index.json", ".bin")
    for stem in ("model", "diffusion_pytorch_model", "pytorch_model")
)
_MAX_NESTING = 3  # containers in containers


@dataclasses.dataclass(frozen=True)
class Weights:
    """What a file or folder of weights holds.

    Attributes:
      tensors: name → tensor, in the file's order. Names are as in the file's state dict, wrappers and all; where a
        file has several state dicts (`model` and `ema`), or one that says that it is an average, each name begins
        with its own ("ema.blocks.0…").
      rest: everything else a PyTorch file holds (`optimizer_states`, `global_step`, …), plain or a `LeftOut`.
      metadata: a safetensors file's own metadata, text to text.
      config: a folder's config.json.
    """

    tensors: dict[str, Tensor]
    rest: dict[str, Any] = dataclasses.field(default_factory=dict)
    metadata: dict[str, str] = dataclasses.field(default_factory=dict)
    config: dict[str, Any] = dataclasses.field(default_factory=dict)


def open_weights(path: str | os.PathLike) -> Weights:
    """Opens weights without reading them; see `Weights`.

    Raises:
      UsageError: there is nothing readable, or it is damaged, or names code; the message names the file.
    """
    path = to_path(path)
    if path.name.endswith(".json"):  # the files that it names lie beside it
        path = local_copy(path.parent) / path.name
    path = local_copy(path)
    if os.path.isdir(path):
        return _open_folder(path)
    if path.name.endswith(".json"):
        return _open_index(path)
    with naming(path):
        file = MappedFile(path)
        if path.suffix == ".safetensors" or is_safetensors(file):
            tensors, metadata = read_safetensors(file)
            return Weights(tensors, metadata=metadata)
        return Weights(*_state_dict(read_torch(file)))


def _open_folder(path: pathlib.Path) -> Weights:
    names = [name for name in _FOLDER_FILES if (path / name).exists()]
    names = names[:1] or [entry.name for entry in path.glob("*.safetensors")]
    if len(names) != 1:
        raise UsageError(
            f"{path}: a folder without model.safetensors, its index, or one .safetensors file; name the file to open."
        )
    weights = open_weights(path / names[0])
    config_path = path / "config.json"
    config = _read_json(config_path, "config.json") if config_path.exists() else {}
    return dataclasses.replace(weights, config=config)


def _open_index(path: pathlib.Path) -> Weights:
    """Weights spread over several files; the index says which tensor is in which."""
    files = _read_json(path, "the index").get("weight_map")
    with naming(path):
        if not isinstance(files, dict) or not files or not all(isinstance(name, str) for name in files.values()):
            raise UsageError('no index of weights: it has no "weight_map" of tensors to files.')
        for name in set(files.values()):
            if name != pathlib.PurePosixPath(name).name or "\\" in name or "\0" in name or name.endswith(".json"):
                raise UsageError(f"the index names the file {short(name)}; only files beside it are read.")
            if not os.path.isfile(path.parent / name):
                raise UsageError(f"the index names the file {short(name)}, which is not beside it.")
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    for name in sorted(set(files.values())):
        part = open_weights(path.parent / name)
        extra = [tensor for tensor in part.tensors if files.get(tensor) != name]
        if extra:
            raise UsageError(
                f"{path.parent / name}: {path.name} does not list {_some(extra)}; they do not belong together."
            )
        tensors |= part.tensors
        metadata |= part.metadata
    missing = [tensor for tensor in files if tensor not in tensors]
    if missing:
        raise UsageError(f"{path}: {_some(missing)} are not in the files that it names; they do not belong together.")
    return Weights({name: tensors[name] for name in files}, metadata=metadata)


def _read_json(path: pathlib.Path, what: str) -> dict[str, Any]:
    with naming(path):
        file = MappedFile(path)
        if file.size > MAX_HEADER:
            raise UsageError(f"{what} has {file.size} bytes; at most {MAX_HEADER} are read.")
        try:
            content = json.loads(bytes(file.window(0, file.size)))
            repr(content).encode()  # fails on text that is not Unicode, which nobody could print
        except (ValueError, RecursionError) as e:
            raise UsageError(f"{what} is not JSON that can be read ({short(str(e))}): the file is damaged.") from None
        if not isinstance(content, dict):
            raise UsageError(f"{what} is not a JSON object.")
        return content


def _state_dict(content: Any, nesting: int = 0) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors by name, everything else) of a PyTorch file's content."""
    if not isinstance(content, dict):
        raise UsageError(f"it holds a {type(content).__name__}, not tensors by name; save a state_dict().")
    found, rest = {}, dict(content)
    for key in (*CONTAINERS, LIGHTNINGS_ONLINE):
        inner = content.get(key)
        if isinstance(inner, dict) and inner and nesting < _MAX_NESTING:
            tensors, left = _state_dict(inner, nesting + 1)
            if tensors:
                found[key] = tensors
                rest.pop(key)
                rest |= {key: left} if left else {}
    if LIGHTNINGS_ONLINE in found and "state_dict" in found:
        found["ema"] = found.pop("state_dict")
    if len(found) == 1 and not found.keys() & {*AVERAGES}:
        ((key, tensors),) = found.items()
        if second := _second_set(tensors, rest):
            raise UsageError(
                f"it holds weights as {short(key)} and others as {short(second)}, and which of them are averages is "
                f"not known; save those wanted alone, as a state_dict(), or the averages as 'ema'."
            )
        return tensors, rest
    if found:
        return {f"{key}.{name}": t for key, tensors in found.items() for name, t in tensors.items()}, rest
    tensors = {name: value for name, value in content.items() if isinstance(value, Tensor) and isinstance(name, str)}
    if not tensors and nesting == 0:
        raise UsageError(f"it holds no tensors by name, only {_some(content)}; save a state_dict().")
    return tensors, {name: value for name, value in content.items() if name not in tensors}


def _second_set(tensors: dict[str, Tensor], rest: dict[str, Any]) -> str | None:
    """What in `rest`, an optimiser aside, holds tensors of the shapes of at least half of `tensors`."""
    shapes = collections.Counter(tensor.shape for tensor in tensors.values())
    for key, value in rest.items():
        if isinstance(key, str) and "optim" not in key and not isinstance(value, Tensor):
            common = shapes & collections.Counter(_shapes(value))
            if 2 * common.total() >= shapes.total():
                return key
    return None


def _shapes(value: Any, nesting: int = 0) -> list[tuple[int, ...]]:
    """Of all tensors in a list, or in a dictionary by name."""
    if isinstance(value, Tensor):
        return [value.shape]
    inner = list(value) if isinstance(value, list | tuple) else []
    if isinstance(value, dict):
        inner = [v for key, v in value.items() if isinstance(key, str) and "optim" not in key]
    return [shape for v in inner for shape in _shapes(v, nesting + 1)] if nesting <= _MAX_NESTING else []


def _some(names: Any) -> str:
    """The first names of many."""
    names = list(names)
    return ", ".join(short(name, 60) for name in names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
