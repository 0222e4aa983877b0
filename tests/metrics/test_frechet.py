"""The Fréchet distance against closed forms and SciPy's matrix root, and moments in batches against NumPy."""

import numpy as np
import pytest
import scipy.linalg
from clu import metrics

from deco_jax.errors import UsageError
from deco_jax.metrics.frechet import Moments, frechet_distance


def gaussian(seed, d=6):
    """A mean and a well-conditioned covariance."""
    rng = np.random.default_rng(seed)
    factor = rng.normal(size=(d, d))
    return rng.normal(size=d), factor @ factor.T + 0.1 * np.eye(d)


def test_equal_gaussians_are_at_distance_zero():
    mean, covariance = gaussian(0)
    assert frechet_distance(mean, covariance, mean, covariance) == pytest.approx(0, abs=1e-12)


def test_a_shift_counts_squared():
    mean, covariance = gaussian(0)
    shift = np.arange(6.0)
    assert frechet_distance(mean, covariance, mean + shift, covariance) == pytest.approx(55, rel=1e-12)


def test_covariances_that_commute_differ_by_their_standard_deviations():
    """With common axes the distance is Σ (σ_a − σ_b)²."""
    axes, _ = np.linalg.qr(np.random.default_rng(1).normal(size=(5, 5)))
    a, b = np.array([4.0, 1, 9, 0, 2]), np.array([1.0, 1, 16, 3, 0])
    distance = frechet_distance(np.zeros(5), (axes * a) @ axes.T, np.zeros(5), (axes * b) @ axes.T)
    assert distance == pytest.approx(((np.sqrt(a) - np.sqrt(b)) ** 2).sum(), rel=1e-10)


@pytest.mark.parametrize("seed", range(3))
def test_it_is_scipys_formula(seed):
    (mean_a, a), (mean_b, b) = gaussian(seed), gaussian(seed + 100)
    expected = ((mean_a - mean_b) ** 2).sum() + np.trace(a + b - 2 * scipy.linalg.sqrtm(a @ b).real)
    assert expected > 1
    assert frechet_distance(mean_a, a, mean_b, b) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(mean_b, b, mean_a, a) == pytest.approx(expected, rel=1e-9)


def test_singular_covariances_are_no_problem():
    """Fewer images than features: a root of the product loses half of the digits. Rank one: |a|² + |b|² − 2|a·b|."""
    a, b = np.random.default_rng(2).normal(size=(2, 50))
    expected = a @ a + b @ b - 2 * abs(a @ b)
    zero = np.zeros(50)
    assert frechet_distance(zero, np.outer(a, a), zero, np.outer(b, b)) == pytest.approx(expected, rel=1e-10)
    assert frechet_distance(zero, np.zeros((50, 50)), zero, np.outer(b, b)) == pytest.approx(b @ b, rel=1e-10)


def test_moments_in_batches_are_those_of_all():
    """Far from zero, where sums of squares in place of deviations would leave few digits."""
    x = np.random.default_rng(3).normal(size=(101, 4)) * [1, 2, 3, 4] + 1e6
    moments = Moments.empty()
    for part in np.split(x, [1, 2, 40, 40]):
        moments = moments.merge(Moments.from_model_output(part))
    assert moments.count == 101
    mean_D, covariance_DxD = moments.compute()
    np.testing.assert_allclose(mean_D, x.mean(axis=0), rtol=1e-14)
    np.testing.assert_allclose(covariance_DxD, np.cov(x.T), rtol=1e-9)


def test_moments_merge_in_any_order():
    """Processes hand in their parts as they finish, some of them empty."""
    a, b, c = (Moments.from_model_output(x) for x in np.random.default_rng(4).normal(size=(3, 5, 2)))
    none = Moments.empty()
    left, right = a.merge(b).merge(c), none.merge(c).merge(none.merge(b.merge(a))).merge(none)
    assert left.count == right.count == 15
    for ours, theirs in zip(left.compute(), right.compute(), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-13)


def test_moments_are_a_metric_of_clu():
    """In a collection they take what they need from all outputs, and leave out what only fills up the last batch."""
    x = np.random.default_rng(5).normal(size=(6, 3))
    features = dict(enumerate(np.split(np.concatenate([x, np.full((2, 3), 1e9)]), 2)))
    masks = {0: np.ones(4), 1: np.array([1, 1, 0, 0])}
    moments = Moments.empty()
    for k in range(2):
        outputs = {"features_KxD": features[k], "mask": masks[k], "images": None}
        moments = moments.merge(Moments.from_model_output(**outputs))
    assert isinstance(moments, metrics.Metric) and moments.count == 6
    np.testing.assert_allclose(moments.compute()[1], np.cov(x.T), rtol=1e-12)


def test_bad_features_are_named():
    one = Moments.from_model_output(np.zeros((1, 3)))
    with pytest.raises(UsageError, match="at least 2 images; there are 1"):
        one.compute()
    with pytest.raises(UsageError, match="features of 3 and of 4 numbers do not go together"):
        one.merge(Moments.from_model_output(np.zeros((2, 4))))
    with pytest.raises(UsageError, match=r"shape \(4,\); expected \(K, D\)"):
        Moments.from_model_output(np.zeros(4))
    with pytest.raises(UsageError, match="not finite"):
        Moments.from_model_output(np.full((1, 3), np.nan))


def test_gaussians_that_do_not_fit_are_named():
    mean, covariance = gaussian(0)
    with pytest.raises(UsageError, match=r"expected \(D,\), \(D, D\)"):
        frechet_distance(mean, covariance, mean[:5], covariance[:5, :5])
    with pytest.raises(UsageError, match="not finite"):
        frechet_distance(mean, covariance, mean, covariance * np.inf)
