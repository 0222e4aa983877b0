"""Tensors that others keep apart and we fuse, in both directions; tests/pretrained/test_names.py has the networks."""

import jax
import numpy as np
import pytest

from deco_jax.errors import UsageError
from deco_jax.weights import translate

# Two blocks; queries and keys of 3 heads of 2 channels are fused here, from 5 channels.
TABLE = {
    "layer.{i}.query.weight": "blocks/qk/kernel[0]",
    "layer.{i}.query.bias": "blocks/qk/bias[0]",
    "layer.{i}.key.weight": "blocks/qk/kernel[1]",
    "layer.{i}.key.bias": "blocks/qk/bias[1]",
    "layer.{i}.norm.weight": "blocks/norm/scale",
    "head.weight": "head/kernel",
    "scale.weight": "scale[1]",
    "shift.weight": "scale[0]",
}
LIKE = {
    "blocks": {"qk": {"kernel": (2, 5, 2, 3, 2), "bias": (2, 2, 3, 2)}, "norm": {"scale": (2, 5)}},
    "head": {"kernel": (5, 4)},
    "scale": (2, 7),
}
LIKE = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s, np.float32), LIKE, is_leaf=lambda s: isinstance(s, tuple))


@pytest.fixture
def tensors():
    rng = np.random.default_rng(0)
    shapes = {"query.weight": (6, 5), "query.bias": (6,), "key.weight": (6, 5), "key.bias": (6,), "norm.weight": (5,)}
    shapes = {f"layer.{i}.{name}": shape for i in range(2) for name, shape in shapes.items()}
    shapes |= {"head.weight": (4, 5), "scale.weight": (7,), "shift.weight": (7,)}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def test_parts_go_where_they_belong_and_back(tensors):
    params = translate.from_torch(TABLE, tensors, LIKE)
    key = tensors["layer.1.key.weight"]  # (out, in)
    np.testing.assert_array_equal(params["blocks"]["qk"]["kernel"][1, :, 1, 2, 1], key[2 * 2 + 1])
    np.testing.assert_array_equal(params["blocks"]["qk"]["bias"][0, 0].ravel(), tensors["layer.0.query.bias"])
    np.testing.assert_array_equal(params["scale"], [tensors["shift.weight"], tensors["scale.weight"]])
    back = translate.to_torch(TABLE, params)
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(back[name], tensor, err_msg=name)


def test_misfits_among_parts_are_listed(tensors):
    tensors["layer.1.key.bias"] = np.zeros(5, np.float32)
    tensors["shift.weight"] = np.zeros(7, np.complex64)
    del tensors["layer.0.query.weight"]
    with pytest.raises(UsageError) as problem:
        translate.from_torch(TABLE, tensors, LIKE)
    for part in (
        "missing layer.0.query.weight (6, 5)",
        "layer.1.key.bias has shape (5,), not (6,)",
        "shift.weight has the dtype complex64, not one of floating point",
    ):
        assert part in str(problem.value)
