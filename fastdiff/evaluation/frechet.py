"""How far apart two sets of images are."""

from __future__ import annotations

import numpy as np


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """|mu_a - mu_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)): FID's distance, of any features.

    Parameters
    ----------
    a, b
        (N, D) and (M, D), two samples of features or pixels. Finite samples of one distribution
        are at a distance above 0: compare with that of real images. Means and covariances are
        computed in float64.

    Raises
    ------
    ValueError
        The samples are not 2-d, of different D, of fewer than 2 rows, or not finite.

    Examples
    --------
    >>> import numpy, fastdiff.evaluation.frechet
    >>> a = numpy.random.default_rng(0).normal(size=(1000, 2))
    >>> round(fastdiff.evaluation.frechet.frechet_distance(a, a + [3.0, 4.0]), 6)
    25.0
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ValueError(
            f"a has shape {a.shape}, b {b.shape}, expected (N, D) and (M, D) with 2 or more rows"
        )
    for name, x in (("a", a), ("b", b)):
        bad = int((~np.isfinite(x)).any(1).sum())
        if bad:
            raise ValueError(f"{bad} of {len(x)} rows of {name} are not finite")
    cov_a, cov_b = (np.atleast_2d(np.cov(x, rowvar=False)) for x in (a, b))
    # tr (C_a C_b)^(1/2) from the symmetric R C_b R with R^2 = C_a: real whatever the rank
    # (some pixels are always black), where the root of the product is ill-conditioned.
    values, vectors = np.linalg.eigh(cov_a)
    root = vectors * np.sqrt(values.clip(min=0)) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ cov_b @ root).clip(min=0)).sum()
    difference = a.mean(0) - b.mean(0)
    return float(difference @ difference + np.trace(cov_a) + np.trace(cov_b) - 2 * cross)
