"""Which network is a set of PyTorch tensors? Its architecture and every size, from names and shapes alone."""

import math
from collections.abc import Mapping
from typing import Any

from deco_jax.errors import UsageError
from deco_jax.pretrained import names
from deco_jax.weights import translate
from deco_jax.weights.files import AVERAGES, LIGHTNINGS_ONLINE

Shapes = Mapping[str, tuple[int, ...]]

# Building a network takes time and memory that grow with these, before any tensor is looked at.
LIMITS = {
    "num_classes": 10**8,
    "patch_size": 128,
    "width": 10**6,
    "depth": 1000,
    "text_depth": 1000,
    "decoder_depth": 100,
    "decoder_width": 4096,
}

# Architecture: (its table of names, a tensor that only it has).
ARCHITECTURES = {
    "deco": (names.DECO, "dec_net.cond_embed.weight"),
    "deco_text": (names.DECO_TEXT, "y_embedder.proj.weight"),
    "baseline": (names.BASELINE, "final_layer.adaLN_modulation.0.weight"),
    "pixnerd": (names.PIXNERD, "final_layer.norm.weight"),
}
# Which blocks a table's letters count.
BLOCKS = {
    "i": r"blocks\.(\d{1,9})\.norm1\.weight",
    "t": r"text_refine_blocks\.(\d{1,9})\.",
    "j": r"dec_net\.res_blocks\.(\d{1,9})\.",
}
# Of torch.compile, of DistributedDataParallel, and what people call a network or its state dict.
WRAPPERS = ("_orig_mod", "module", "model", "state_dict", "network", "net", "params")
NETWORKS = {"denoiser": "online", "ema_denoiser": "ema", "diffusion_trainer": "projector"}
NETWORKS |= dict.fromkeys(AVERAGES, "ema") | dict.fromkeys((LIGHTNINGS_ONLINE, "online_model"), "online")
COUNTERS = ("n_averaged", "initted", "step")  # of those who average: torch.optim.swa_utils, ema_pytorch


def split_networks(tensors: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Sorts a state dict by network, and takes wrappers and prefixes off the names.

    Returns:
      {"online": …, "ema": …, "projector": …}, those that exist; {"only": …} where nothing tells networks apart.

    Raises:
      UsageError: two tensors have the same name once the wrappers are gone.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, tensor in tensors.items():
        parts = [part for part in name.split(".") if part not in WRAPPERS]
        network = NETWORKS.get(parts[0], "only") if parts else "only"
        short = ".".join(parts if network == "only" else parts[1:])
        if short in COUNTERS and math.prod(tensor.shape) == 1:
            continue
        if short in found.setdefault(network, {}):
            raise UsageError(f"{name} and another tensor are both {short} of the {network} network.")
        found[network][short] = tensor
    if "only" in found and "ema" in found and "online" not in found:
        found["online"] = found.pop("only")
    if len(found) > 1 and "only" in found:
        shown = ", ".join(sorted(found["only"])[:5])
        raise UsageError(f"{shown} belong to none of the networks {', '.join(NETWORKS)} that the other tensors name.")
    return found


def infer(shapes: Shapes) -> dict[str, Any]:
    """The sizes of a network, as fields of `config.model`; "kind" is one of ARCHITECTURES.

    Args:
      shapes: PyTorch name (see `split_networks`) → shape.

    Raises:
      UsageError: the tensors are of no known architecture; or some are missing or left over, all listed. Shapes are
        compared with the network's when they are read (`translate.from_torch`).
    """
    kinds = [kind for kind, (_, sign) in ARCHITECTURES.items() if sign in shapes]
    kind = "deco_text" if "deco_text" in kinds else kinds[0] if kinds else None
    if kind is None:
        shown = ", ".join(sorted(shapes)[:5]) or "none"
        raise UsageError(f"these tensors are of no network known here ({shown}, …); known: {', '.join(ARCHITECTURES)}.")
    table, _ = ARCHITECTURES[kind]
    counts = {letter: translate.count_blocks(pattern, shapes) for letter, pattern in BLOCKS.items()}
    if kind == "pixnerd":
        counts["j"] = translate.count_blocks(r"blocks\.(\d{1,9})\.param_generator1\.", shapes) - counts["i"]
    for letter, count in counts.items():
        if not 0 <= count <= len(shapes):  # a number in a name decides nothing about memory
            raise UsageError(f"these tensors count {count} blocks ({letter}) and are only {len(shapes)}.")
    expected = {theirs for theirs, _, _ in translate.expand(table, counts)}
    problems = [f"missing {name}" for name in sorted(expected - set(shapes))]
    problems += [f"unexpected {name}" for name in sorted(set(shapes) - expected)]
    if problems:
        raise UsageError(f"these tensors do not make a whole {kind} network: {_some(problems)}.")
    try:
        sizes = _sizes(kind, shapes, counts)
    except (IndexError, ValueError, ZeroDivisionError) as error:
        raise UsageError(f"the embeddings of this {kind} network have the wrong number of axes, or none.") from error
    too_large = [f"{field}={sizes[field]}" for field, limit in LIMITS.items() if sizes.get(field, 0) > limit]
    if too_large:
        raise UsageError(f"these tensors would make a network of {', '.join(too_large)}, beyond anything known.")
    return sizes


def _sizes(kind: str, shapes: Shapes, counts: Mapping[str, int]) -> dict[str, Any]:
    patch = shapes["x_embedder.proj.weight" if kind == "baseline" else "s_embedder.proj.weight"]
    head = shapes["blocks.0.attn.q_norm.weight"] if counts["i"] else (1,)
    if len(patch) != 2 or len(head) != 1 or not head[0]:
        raise UsageError(f"the patch embedding {patch} must have two axes, blocks.0.attn.q_norm.weight {head} one.")
    width = patch[0]
    sizes: dict[str, Any] = {
        "kind": kind,
        "patch_size": math.isqrt(patch[1] // 3),
        "width": width,
        "depth": counts["i"],
        "heads": width // head[0],
    }
    if kind == "deco_text":
        _, tokens, _ = shapes["y_pos_embedding"]
        sizes |= {
            "text_tokens": tokens,
            "text_features": shapes["y_embedder.proj.weight"][1],
            "text_depth": counts["t"],
        }
    else:
        sizes["num_classes"] = shapes["y_embedder.embedding_table.weight"][0] - 1
    if kind != "baseline":
        sizes |= {"decoder_width": shapes["x_embedder.embedder.0.weight"][0], "decoder_depth": counts["j"]}
    if kind == "pixnerd" and counts["j"]:
        generated = shapes[f"blocks.{counts['i']}.param_generator1.0.weight"][0]
        sizes["decoder_expansion"] = generated // (2 * sizes["decoder_width"] ** 2)
    return sizes


def _some(problems: list[str]) -> str:
    """Problems for a message; names in a file may be long and many."""
    shown = [problem[:200] for problem in problems[:200]]
    return "; ".join(shown) + (f"; and {len(problems) - 200} more" if len(problems) > 200 else "")
