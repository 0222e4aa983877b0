"""The table of names, in both directions."""

import pathlib

import numpy as np
import pytest

from deco_jax.errors import UsageError
from deco_jax.models.build import parameter_shapes
from deco_jax.pretrained import names
from deco_jax.pretrained.infer import ARCHITECTURES
from deco_jax.weights import translate
from tests.helpers import Golden


@pytest.mark.parametrize("case", ["deco_c2i", "deco_c2i_wide"])
def test_there_and_back_is_bitwise(case):
    g = Golden(case)
    theirs, back = g.group("param:"), translate.to_torch(names.DECO, g.params())
    assert back.keys() == theirs.keys()
    for name, value in theirs.items():
        assert back[name].dtype == value.dtype and back[name].flags["C_CONTIGUOUS"]
        np.testing.assert_array_equal(back[name], value, err_msg=name)


def test_every_misfit_is_listed_at_once():
    g = Golden("deco_c2i")
    tensors = g.group("param:")
    tensors["extra.weight"] = np.zeros(1)
    tensors["blocks.3.norm1.weight"] = np.zeros(32)
    del tensors["s_embedder.proj.bias"]
    tensors["blocks.1.attn.qkv.weight"] = np.zeros((32, 96))
    with pytest.raises(UsageError) as error:
        translate.from_torch(names.DECO, tensors, parameter_shapes(g.model()))
    for part in (
        "missing s_embedder.proj.bias (32,)",
        "blocks.1.attn.qkv.weight has shape (32, 96), not (96, 32)",
        "unexpected blocks.3.norm1.weight",
        "unexpected extra.weight",
    ):
        assert part in str(error.value)


def test_every_name_can_be_searched_for():
    """Whoever looks for a tensor's name finds it, and the whole path of ours beside it."""
    text = pathlib.Path(names.__file__).read_text()
    for table in [*(table for table, _ in ARCHITECTURES.values()), names.PROJECTOR]:
        for theirs, ours in table.items():
            assert f'"{theirs}": "{ours}"' in text
