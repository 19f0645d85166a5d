"""The Frechet distance against closed forms."""

import numpy as np
import pytest

from fastdiff.evaluation.frechet import frechet_distance


def _sample(mean, covariance, num=4000, seed=0):
    """A sample whose mean and covariance are exactly these."""
    x = np.random.default_rng(seed).normal(size=(num, len(mean)))
    x -= x.mean(0)
    x = x @ np.linalg.inv(np.linalg.cholesky(np.cov(x, rowvar=False))).T
    return x @ np.linalg.cholesky(covariance).T + mean


def test_of_gaussians():
    # Commuting covariances: |m|^2 + sum of (sqrt(l) - sqrt(l'))^2.
    a = _sample(np.zeros(2), np.diag([4.0, 9.0]))
    b = _sample(np.array([1.0, -2.0]), np.diag([1.0, 16.0]), seed=1)
    assert frechet_distance(a, b) == pytest.approx(5 + 1 + 1)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a))
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    # Rotating both changes nothing, though the product of the covariances is not symmetric.
    root = np.random.default_rng(2).normal(size=(2, 2, 2))
    c, d = (_sample(np.zeros(2), r @ r.T, seed=i) for i, r in enumerate(root))
    rotation = np.array([[0.6, -0.8], [0.8, 0.6]])
    assert frechet_distance(c @ rotation, d @ rotation) == pytest.approx(frechet_distance(c, d))


def test_of_features_that_are_constant():
    a = _sample(np.zeros(2), np.eye(2))
    b = _sample(np.zeros(2), 4 * np.eye(2), seed=1)
    dead = [np.column_stack([x, np.full(len(x), 0.3)]) for x in (a, b)]
    assert frechet_distance(*dead) == pytest.approx(2)


def test_in_float64_whatever_is_given():
    # At this offset float32 has steps of 1/16: variances of 1 would be lost in its means.
    a = _sample(np.full(2, 1e6), np.diag([4.0, 9.0])).astype(np.float32)
    b = _sample(np.full(2, 1e6), np.diag([1.0, 16.0]), seed=1).astype(np.float32)
    assert frechet_distance(a, b) == pytest.approx(2, rel=0.01)


@pytest.mark.parametrize("shapes", [((4,), (4,)), ((4, 2), (4, 3)), ((1, 2), (4, 2))])
def test_samples_that_have_no_covariance_are_refused(shapes):
    with pytest.raises(ValueError, match=r"a has shape .* expected \(N, D\) and \(M, D\)"):
        frechet_distance(*map(np.zeros, shapes))
    assert frechet_distance(np.zeros((3, 1)), np.ones((3, 1))) == 1
