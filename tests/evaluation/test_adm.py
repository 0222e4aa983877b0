"""`deco evaluate` with Inception against an independent way from pixels to numbers: torch-fidelity's network, float64.

The weights are random, as the real ones cannot be had everywhere; a file in the ADM suite's layout is the reference.
"""

import json

import numpy as np
import pytest
from scipy.spatial.distance import cdist

from deco_jax.evaluation.evaluate import evaluate
from tests.encoders.inception_reference import random_tensors, recorded, their_network

REAL, DRAWN = 40, 30


def images(number, seed):
    """Smooth random pictures, as a network sees little in noise."""
    rng = np.random.default_rng(seed)
    x, y = np.meshgrid(np.linspace(0, 3, 32), np.linspace(0, 3, 32))
    waves = [np.sin(a * x + b * y + c) for a, b, c in rng.normal(size=(3 * number, 3)) * 2]
    return (127.5 + 120 * np.stack(waves).reshape(number, 3, 32, 32).transpose(0, 2, 3, 1)).astype(np.uint8)


def frechet(a, b):
    """tr (C_a·C_b)^½ as a nuclear norm of the centred vectors, so no root of a matrix is needed."""
    a, b = np.float64(a), np.float64(b)
    x, y = (z - z.mean(axis=0) for z in (a, b))
    n, m = len(a) - 1, len(b) - 1
    overlap = np.linalg.svd(x @ y.T, compute_uv=False).sum() / np.sqrt(n * m)
    return ((a.mean(axis=0) - b.mean(axis=0)) ** 2).sum() + (x**2).sum() / n + (y**2).sum() / m - 2 * overlap


def share_inside(x, centres):
    x, centres = np.float64(x), np.float64(centres)
    radii = np.sort(cdist(centres, centres), axis=1)[:, 3]
    return (cdist(x, centres) <= radii).any(axis=1).mean()


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["adm", "ours"])
def test_every_metric_is_that_of_another_network_and_float64(layout, tmp_path):
    torch = pytest.importorskip("torch")
    weights = tmp_path / "inception.pth"
    torch.save({name: torch.from_numpy(value.copy()) for name, value in random_tensors().items()}, weights)
    theirs = their_network(weights)

    def see(pictures):
        with torch.no_grad(), recorded(theirs) as outputs:
            found = theirs(torch.from_numpy(pictures.transpose(0, 3, 1, 2).copy()))
        spatial = outputs["Mixed_6d.branch1x1"][..., :7].reshape(len(pictures), -1)
        return found[3].numpy(), spatial, found[4].numpy()  # pool_3, mixed_6/conv, logits without bias

    real, drawn = images(REAL, 0), images(DRAWN, 1)
    (pool, spatial, _), (drawn_pool, drawn_spatial, logits) = see(real), see(drawn)
    p = np.exp(np.float64(logits) - logits.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    expected = {
        "fid": frechet(drawn_pool, pool),
        "sfid": frechet(drawn_spatial, spatial),
        "inception_score": np.exp((p * (np.log(p + 1e-300) - np.log(p.mean(axis=0)))).sum(axis=1).mean()),
        "precision": share_inside(drawn_pool, pool),
        "recall": share_inside(pool, drawn_pool),
    }
    np.savez(tmp_path / "drawn.npz", arr_0=drawn)
    reference = {"arr_0": real, "mu": pool.mean(axis=0), "sigma": np.cov(pool, rowvar=False)}
    reference |= {"mu_s": spatial.mean(axis=0), "sigma_s": np.cov(spatial, rowvar=False)}
    np.savez(tmp_path / "reference.npz", **reference)
    where, given = tmp_path / "reference.npz", [f"inception={weights}"]
    if layout == "ours":
        from deco_jax.evaluation.stats import compute_stats

        np.savez(tmp_path / "real.npz", arr_0=real)
        where = tmp_path / "stats"
        compute_stats(None, str(tmp_path / "real.npz"), str(where), feature_weights=given)
    evaluate(str(tmp_path / "drawn.npz"), str(tmp_path / "out"), str(where), feature_weights=given)
    found = json.loads((tmp_path / "out" / "metrics.json").read_text())["metrics"]
    print({name: (found[name], value) for name, value in expected.items()})
    assert found.keys() == expected.keys() | {"kid"}
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-4, err_msg=name)
