"""What a bound in bits/dim is worth: trivial models of the same images, a verdict in words."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

# Beyond this a covariance matrix takes seconds and gigabytes.
_LARGEST_GAUSSIAN = 4096

# Images that the trivial models are fitted to; more change the third digit.
MOST_IMAGES = 10_000


@dataclass(frozen=True)
class Yardsticks:
    """Bits/dim of models without a network, on the images that the network is evaluated on.

    Attributes
    ----------
    levels : int
        How many of the 256 grey levels occur in the data.
    uniform : float
        log2 of that: knows the levels and nothing else.
    pixels : float
        Every pixel its own histogram over those levels, independent of all others.
    gaussian : float or None
        A multivariate normal with mean and covariance of the data, as a density of dequantized
        images, like `--likelihood`; None for images of more than 4,096 numbers.
    """

    levels: int
    uniform: float
    pixels: float
    gaussian: float | None

    def named(self) -> list[tuple[str, float]]:
        """Those that there are, with names for people."""
        known = [
            (f"uniform over the data's {self.levels} levels", self.uniform),
            ("a histogram for each pixel", self.pixels),
            ("a Gaussian of the data's covariance", self.gaussian),
        ]
        return [(name, value) for name, value in known if value is not None]

    def verdict(self, bits: float, error: float) -> str:
        """How ``bits`` per dimension, plus or minus ``error``, compare with them."""
        beaten = [name for name, value in self.named() if bits < value - 2 * error]
        lost = [name for name, value in self.named() if bits > value + 2 * error]
        if not lost:
            found = "better than every trivial model" if len(beaten) == len(self.named()) else ""
            return found or "better than trivial models, or as good within its error"
        kept = f"; better than {' and '.join(beaten)}" if beaten else ""
        why = ""
        if self.levels < 128:
            why = (
                f": the data use {self.levels} of 256 levels, and the decoder spreads over their "
                f"neighbours ({math.log2(256 / self.levels):.1f} bits/dim for not knowing which)"
            )
        return f"worse than {' and '.join(lost)}{why}{kept}"


def yardsticks(fitted: np.ndarray, evaluated: np.ndarray, seed: int = 0) -> Yardsticks:
    """Fit trivial models to some images and evaluate them on others.

    Parameters
    ----------
    fitted, evaluated
        uint8, (M, ...) and (N, ...) of the same shape per image. Counts are increased by one, so
        that no level has probability 0.
    seed
        Of the dequantization noise.
    """
    a = fitted.reshape(len(fitted), -1)
    b = evaluated.reshape(len(evaluated), -1)
    occurring = np.unique(np.concatenate([a, b]))
    place = np.zeros(256, np.int64)
    place[occurring] = np.arange(len(occurring))
    counts = np.ones((a.shape[1], len(occurring)))
    where = np.broadcast_to(np.arange(a.shape[1]), a.shape)
    np.add.at(counts, (where, place[a]), 1)
    chances = counts / counts.sum(1, keepdims=True)
    pixels = -np.log2(chances[np.broadcast_to(np.arange(b.shape[1]), b.shape), place[b]]).mean()
    gaussian = None
    if a.shape[1] <= _LARGEST_GAUSSIAN:
        gaussian = _gaussian_bits(a.astype(np.float64), b.astype(np.float64), seed)
    return Yardsticks(len(occurring), math.log2(len(occurring)), float(pixels), gaussian)


def _gaussian_bits(a: np.ndarray, b: np.ndarray, seed: int) -> float:
    """-log2 of the density at b + u, u uniform over a level, per dimension and level."""
    noise = np.random.default_rng(seed).random(b.shape)
    deviations = a - a.mean(0)
    # Dequantization adds 1/12; of few images the covariance is singular without it.
    covariance = deviations.T @ deviations / max(1, len(a) - 1) + np.eye(a.shape[1]) / 12
    lower = np.linalg.cholesky(covariance)
    white = np.linalg.solve(lower, (b + noise - a.mean(0) - 0.5).T)
    log_density = -0.5 * (white**2).sum(0) - np.log(np.diag(lower)).sum()
    log_density -= 0.5 * a.shape[1] * math.log(2 * math.pi)
    return float(-log_density.mean() / (a.shape[1] * math.log(2)))


def frechet_verdict(ratio: float | None) -> str:
    """A Frechet distance in words, from how many times the floor it is."""
    if ratio is None:
        return "the features do not tell images apart at all"
    for most, words in (
        (1.5, "as near to the data as other real images, in these features"),
        (3.0, "close to the data, in these features"),
        (10.0, "clearly told from the data, but of its kind"),
    ):
        if ratio <= most:
            return words
    return "far from the data: train longer, or look at the samples for what is wrong"
