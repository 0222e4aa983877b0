"""Metrics of features against plain float64, against others' definitions, and merged in any order."""

import numpy as np
import pytest
import scipy.linalg
from scipy.spatial.distance import cdist

from deco_jax.errors import UsageError
from deco_jax.metrics.inception_score import InceptionScore
from deco_jax.metrics.kernel import kernel_distance, squared_mmd
from deco_jax.metrics.neighbours import precision_recall
from deco_jax.metrics.scores import Scores, warnings_for

SIZES = {"pool": 24, "spatial": 12, "logits": 7}


def features(number, seed, scale=1.0):
    rng = np.random.default_rng(seed)
    return {name: (scale * rng.normal(size=(number, size)) + 0.1).astype(np.float32) for name, size in SIZES.items()}


def scores(number, seed, network="inception", **more):
    return Scores.from_model_output(network, np.arange(number), **features(number, seed, **more))


def fid(a, b):
    """The textbook's formula, in float64."""
    a, b = np.float64(a), np.float64(b)
    c, d = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(c @ d).real
    return ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(c + d - 2 * root)


def inside(x, centres):
    """Which of x lie within the distance of the third nearest other one of a centre; plain float64."""
    own = np.sort(cdist(np.float64(centres), np.float64(centres)), axis=1)[:, 3]  # the first is the vector itself
    return (cdist(np.float64(x), np.float64(centres)) <= own[None]).any(axis=1).mean()


def test_everything_equals_plain_float64():
    real, drawn = features(300, 0), features(200, 1, scale=1.2)
    found = scores(200, 1, scale=1.2).compute(scores(300, 0).as_reference("", (8, 8), ""))
    logits = np.float64(drawn["logits"])
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    divergence = (p * (np.log(p) - np.log(p.mean(axis=0)))).sum(axis=1)
    expected = {
        "fid": fid(drawn["pool"], real["pool"]),
        "sfid": fid(drawn["spatial"], real["spatial"]),
        "inception_score": np.exp(divergence.mean()),
        "precision": inside(drawn["pool"], real["pool"]),
        "recall": inside(real["pool"], drawn["pool"]),
        "kid": kernel_distance(real["pool"], drawn["pool"]),
    }
    assert found.keys() == expected.keys() and 0 < expected["precision"] < 1 and 0 < expected["recall"] < 1
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-6, err_msg=name)


def test_merging_in_any_order_changes_nothing():
    """Random parts, some empty or masked, merged as a random tree."""
    whole, rng = scores(120, 0), np.random.default_rng(1)
    all_features = features(120, 0)
    parts = []
    for numbers in np.split(rng.permutation(120), [5, 5, 40, 41, 100]):
        filled = np.concatenate([numbers, numbers[:3]])  # masked: what fills up a batch
        mask = np.arange(len(filled)) < len(numbers)
        batch = {name: x[filled] for name, x in all_features.items()}
        parts.append(Scores.from_model_output("inception", filled, mask=mask, **batch))
    parts.append(Scores.empty("inception"))
    while len(parts) > 1:
        first = parts.pop(rng.integers(len(parts)))
        parts.append(parts.pop(rng.integers(len(parts))).merge(first))
    reference = scores(60, 2).as_reference("", (8, 8), "")
    ours, theirs = parts[0].compute(reference), whole.compute(reference)
    for name, value in theirs.items():
        np.testing.assert_allclose(ours[name], value, rtol=1e-9, err_msg=name)
    np.testing.assert_array_equal(parts[0].ordered(), whole.ordered())


def test_the_inception_score_is_taken_in_splits_of_5000_by_number():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(7_000, 5))
    logits[5_000:, 0] += 4
    expected = []
    for part in (logits[:5_000], logits[5_000:]):
        p = np.exp(part) / np.exp(part).sum(axis=1, keepdims=True)
        expected.append(np.exp((p * (np.log(p) - np.log(p.mean(axis=0)))).sum(axis=1).mean()))
    order = rng.permutation(7_000)
    found = InceptionScore.from_model_output(logits[order[:900]], order[:900])
    found = found.merge(InceptionScore.from_model_output(logits[order[900:]], order[900:]))
    np.testing.assert_allclose(found.compute(), np.mean(expected), rtol=1e-12)


def test_neighbours_among_near_ties_equal_float64():
    """Clusters far from the origin, where products in fp32 lose most; more rows than a block has."""
    rng = np.random.default_rng(0)
    centres = 30 + 3 * rng.normal(size=(40, 16))
    real = (centres[rng.integers(40, size=1_300)] + 0.2 * rng.normal(size=(1_300, 16))).astype(np.float32)
    drawn = (centres[rng.integers(30, size=1_100)] + 0.25 * rng.normal(size=(1_100, 16))).astype(np.float32)
    precision, recall = precision_recall(real, drawn)
    assert (precision, recall) == (inside(drawn, real), inside(real, drawn))
    assert precision_recall(real, real) == (1, 1)
    assert precision_recall(real, real + 1_000) == (0, 0)


def test_vectors_on_a_boundary_are_inside():
    """On a lattice many distances equal a radius; and four copies of a vector make a ball of radius 0."""
    rng = np.random.default_rng(0)
    real, drawn = (rng.integers(0, 4, (number, 8)).astype(np.float32) for number in (700, 600))
    assert precision_recall(real, drawn) == (inside(drawn, real), inside(real, drawn))
    copies = np.repeat(rng.normal(size=(50, 8)), 4, axis=0).astype(np.float32)
    drawn = np.concatenate([copies[:100], 9 + rng.normal(size=(100, 8)).astype(np.float32)])
    assert precision_recall(copies, drawn) == (0.5, 0.5)


def test_the_kernel_distance_equals_its_definition_pair_by_pair():
    real, drawn = (np.float64(features(30, seed)["pool"]) for seed in (0, 1))

    def k(x, y):
        return (sum(a * b for a, b in zip(x, y, strict=True)) / len(x) + 1) ** 3

    def among(vectors):
        return [k(x, y) for i, x in enumerate(vectors) for j, y in enumerate(vectors) if i != j]

    expected = np.mean(among(real)) + np.mean(among(drawn)) - 2 * np.mean([k(x, y) for x in real for y in drawn])
    np.testing.assert_allclose(squared_mmd(real, drawn), expected, rtol=1e-9, atol=1e-12)
    assert kernel_distance(real, drawn) == pytest.approx(expected)  # as many as there are: one subset
    same, other = (kernel_distance(features(400, 3)["pool"], features(300, 4, x)["pool"]) for x in (1, 1.5))
    assert abs(same) < 0.01 < other


def test_other_networks_metrics_are_not_called_fid():
    found = scores(20, 0, "efficientnet").compute(scores(20, 1, "efficientnet").as_reference("", (8, 8), ""))
    assert "fd_efficientnet" in found and "precision_efficientnet" in found and "fid" not in found


def test_what_is_unreliable_is_said():
    few, reference = scores(20, 0), scores(3, 1).as_reference("", (8, 8), "")
    told = "\n".join(warnings_for(few, reference))
    for part in (
        "20 images: distances are larger",
        "fewer than the 24 features",
        "the last has 20",
        "more than 3 images",
        "The reference is of 3 images",
        "subsets of 1,000 images; here they have 3",
    ):
        assert part in told
    found = few.compute(reference)
    assert "precision" not in found and "fid" in found


def test_broken_features_are_named():
    with pytest.raises(UsageError, match="image 3 was counted twice"):
        batch = {name: x[:2] for name, x in features(2, 0).items()}
        Scores.from_model_output("inception", np.array([3, 3]), **batch).ordered()
    broken = features(4, 0)
    broken["pool"][2] = np.nan
    with pytest.raises(UsageError, match="not finite"):
        Scores.from_model_output("inception", np.arange(4), **broken)
    with pytest.raises(UsageError, match="at least 2 images"):
        scores(1, 0).compute(scores(5, 0).as_reference("", (8, 8), ""))
    with pytest.raises(UsageError, match="do not go together"):
        scores(5, 0).merge(scores(5, 0, "efficientnet"))
