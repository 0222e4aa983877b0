"""What a network is, from names and shapes alone."""

import numpy as np
import pytest

from deco_jax.config import build_model
from deco_jax.errors import UsageError
from deco_jax.models.build import parameter_shapes
from deco_jax.pretrained.infer import ARCHITECTURES, infer, split_networks
from deco_jax.pretrained.networks import Stored, model_config
from deco_jax.weights import translate
from tests.helpers import Golden

SIZES = {
    "deco_xl": {"kind": "deco", "patch_size": 16, "width": 1152, "depth": 28, "heads": 16, "num_classes": 1000}
    | {"decoder_width": 32, "decoder_depth": 3},
    "deco_l": {"kind": "deco", "patch_size": 16, "width": 1024, "depth": 22, "heads": 16, "num_classes": 1000}
    | {"decoder_width": 32, "decoder_depth": 3},
    "baseline_xl": {"kind": "baseline", "patch_size": 16, "width": 1152, "depth": 28, "heads": 16}
    | {"num_classes": 1000},
    "baseline_l": {"kind": "baseline", "patch_size": 16, "width": 1024, "depth": 24, "heads": 16, "num_classes": 1000},
    "pixnerd_l": {"kind": "pixnerd", "patch_size": 16, "width": 1024, "depth": 22, "heads": 16, "num_classes": 1000}
    | {"decoder_width": 64, "decoder_depth": 2, "decoder_expansion": 2},
    "deco_t2i_xxl": {"kind": "deco_text", "patch_size": 16, "width": 1536, "depth": 16, "heads": 24}
    | {"text_tokens": 128, "text_features": 2048, "text_depth": 4, "decoder_width": 32, "decoder_depth": 3},
}


@pytest.mark.parametrize("network", SIZES)
def test_published_networks_are_recognised_and_every_name_has_a_place(full_size_shapes, network):
    """Nothing left over on either side, and the order of the table is that of PyTorch's modules."""
    shapes = {name: tuple(shape) for name, shape in full_size_shapes[network].items()}
    sizes = infer(shapes)
    assert sizes == SIZES[network]
    counts = {"i": sizes["depth"], "t": sizes.get("text_depth", 0), "j": sizes.get("decoder_depth", 0)}
    places = list(translate.expand(ARCHITECTURES[sizes["kind"]][0], counts))
    assert [theirs for theirs, _, _ in places] == list(shapes)
    assert len({(path, layer) for _, path, layer in places}) == len(shapes)


def test_every_problem_is_listed_at_once(full_size_shapes):
    shapes = {name: tuple(shape) for name, shape in full_size_shapes["deco_l"].items()}
    del shapes["blocks.7.norm1.weight"]
    shapes["blocks.0.attn.bias"] = (3,)
    with pytest.raises(UsageError, match=r"missing blocks\.7\.norm1\.weight; unexpected blocks\.0\.attn\.bias"):
        infer(shapes)
    with pytest.raises(UsageError, match=r"of no network known here \(fc\.weight, …\); known: deco, deco_text, base"):
        infer({"fc.weight": (10, 10)})


def test_a_number_in_a_name_is_not_believed(full_size_shapes):
    """A billion blocks would fill the memory before anything is missing."""
    shapes = {name: tuple(shape) for name, shape in full_size_shapes["deco_l"].items()}
    with pytest.raises(UsageError, match="count 1000000000 blocks"):
        infer(shapes | {"blocks.999999999.norm1.weight": (1024,)})


@pytest.mark.parametrize(
    "fixes",
    [
        {"blocks.0.norm1.weight": ()},
        {"s_embedder.proj.weight": (0, 0)},
        {"blocks.0.attn.q_norm.weight": (0,)},
        {"blocks.1.attn.q_norm.weight": (8,)},
        {"x_embedder.embedder.0.weight": (32,)},
        {"y_embedder.embedding_table.weight": ()},
        {"s_embedder.proj.weight": (32, 7)},
        {"s_embedder.proj.weight": (32, 3 * 2000**2)},
        {"dec_net.cond_embed.bias": (1,)},
        {f"blocks.{'9' * 5000}.norm1.weight": (32,)},
    ],
)
def test_absurd_shapes_are_an_error_of_ours(tmp_path, fixes):
    """Before anything is built that grows with them."""
    tensors = Golden("deco_c2i").group("param:")
    tensors |= {name: np.broadcast_to(np.float32(0), shape) for name, shape in fixes.items()}
    with pytest.raises(UsageError):
        stored = Stored("x", infer({k: v.shape for k, v in tensors.items()}), {"only": tensors}, None)
        translate.from_torch(stored.table, tensors, parameter_shapes(build_model(model_config(stored))))


def tensors(*prefixes):
    return {prefix + name: np.full(1, i) for i, prefix in enumerate(prefixes) for name in ("a.weight", "b.weight")}


@pytest.mark.parametrize(
    "prefixes, found",
    [
        (("",), ["only"]),
        (("_orig_mod.",), ["only"]),
        (("module.model.",), ["only"]),
        (("denoiser.", "ema_denoiser.", "diffusion_trainer."), ["online", "ema", "projector"]),
        (("module.denoiser._orig_mod.", "ema_denoiser._orig_mod."), ["online", "ema"]),
        (("model.", "ema."), ["online", "ema"]),
        (("state_dict.", "state_dict_ema."), ["online", "ema"]),
        (("current_model_state.", "ema."), ["online", "ema"]),
        (("online_model.", "ema_model."), ["online", "ema"]),
        (("state_dict.denoiser.", "state_dict.ema_denoiser."), ["online", "ema"]),
    ],
)
def test_wrappers_come_off_and_networks_are_told_apart(prefixes, found):
    networks = split_networks(tensors(*prefixes))
    assert set(networks) == set(found)
    for index, name in enumerate(found):
        assert list(networks[name]) == ["a.weight", "b.weight"] and networks[name]["a.weight"] == index


def test_counters_of_averaging_are_no_weights():
    averaged = tensors("model.", "ema.module.") | {"ema.n_averaged": np.array(3)}
    assert list(split_networks(averaged)["ema"]) == ["a.weight", "b.weight"]
    assert "only" not in split_networks(tensors("online_model.", "ema_model.") | {"initted": np.array([True])})


def test_what_cannot_be_told_apart_is_an_error():
    with pytest.raises(UsageError, match="module.a.weight and another tensor are both a.weight"):
        split_networks(tensors("", "module."))
    with pytest.raises(UsageError, match="belong to none of the networks"):
        split_networks(tensors("", "denoiser.", "ema_denoiser."))
