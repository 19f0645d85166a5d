"""Dropout's mask as a function of (key of the sample, stream, channel, pixel) (Math §9).

It is never stored: whoever needs it makes it again, with the same bits on every backend, in every
memory format and for every split of a batch.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastdiff.reference import checks
from fastdiff.reference.philox import sample_keys, sample_words


class Dropout(NamedTuple):
    """Which elements are dropped. One of `keys` and `seed` is given."""

    threshold: int
    """256 times the probability with which an element is dropped, 1 to 255."""
    keys: Tensor | None
    """(B,) int64: one key for each sample."""
    seed: int | None
    """Sample k has key number k of `sample_keys(seed, B)`."""
    stream: int

    @property
    def scale(self) -> float:
        """What elements that are kept are multiplied with: the expectation stays."""
        return 256 / (256 - self.threshold)


def dropout_threshold(op: str, dropout_p: float) -> int:
    """The threshold of `Dropout` for a probability; 0 for no dropout at all.

    256 p rounded to an integer, but at least 1 for p > 0 and at most 255.

    Raises
    ------
    TypeError, ValueError
        `dropout_p` is not a number in [0, 1).
    """
    if isinstance(dropout_p, bool) or not isinstance(dropout_p, (int, float)):
        raise TypeError(f"{op}: dropout_p is {checks.shown(dropout_p)}, expected a float")
    if not 0 <= dropout_p < 1:
        raise ValueError(f"{op}: dropout_p is {checks.shown(dropout_p)}, expected 0 <= p < 1")
    return min(max(round(256 * dropout_p), 1), 255) if dropout_p else 0


def dropout_mask(x: Tensor, dropout: Dropout) -> Tensor:
    r"""Which elements of x (B, C, \*spatial) are kept: bool, of the shape of x, contiguous.

    A Philox block decides for 4 channels at 4 pixels, counted in logical order whatever the memory
    format: byte p mod 4 (from the low end) of word c mod 4 of block (c div 4) ceil(P / 4) + p div 4
    belongs to channel c and pixel p of P. The element is dropped if the byte is below the
    threshold.
    """
    batch, channels = x.shape[:2]
    pixels = math.prod(x.shape[2:])
    rows, columns = (channels + 3) // 4, (pixels + 3) // 4
    keys = dropout.keys
    if keys is None:
        keys = sample_keys(dropout.seed, batch, device=x.device)
    words = sample_words(keys, 4 * rows * columns, dropout.stream)
    words = words.reshape(batch, rows, columns, 4).transpose(2, 3)  # (..., channel, column)
    shifts = torch.arange(0, 32, 8, device=x.device)
    values = (words[..., None] >> shifts) & 255
    kept = values.reshape(batch, 4 * rows, 4 * columns)[:, :channels, :pixels] >= dropout.threshold
    return kept.reshape(x.shape)
