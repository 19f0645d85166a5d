"""How far apart two sets of images are."""

from __future__ import annotations

import numpy as np


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """|mu_a - mu_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)): FID's distance, of any features.

    Parameters
    ----------
    a, b
        (N, D) and (M, D), two samples of features or pixels. Finite samples of one distribution
        are at a distance above 0: compare with that of real images.

    Examples
    --------
    >>> import numpy, fastdiff.metrics
    >>> a = numpy.random.default_rng(0).normal(size=(1000, 2))
    >>> round(fastdiff.metrics.frechet_distance(a, a + [3.0, 4.0]), 6)
    25.0
    """
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    # tr (C_a C_b)^(1/2) from the symmetric R C_b R with R^2 = C_a: real whatever the rank
    # (some pixels are always black), where the root of the product is ill-conditioned.
    values, vectors = np.linalg.eigh(cov_a)
    root = vectors * np.sqrt(values.clip(min=0)) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ cov_b @ root).clip(min=0)).sum()
    difference = a.mean(0) - b.mean(0)
    return float(difference @ difference + np.trace(cov_a) + np.trace(cov_b) - 2 * cross)
