"""The mask of dropout: its definition, element by element, and its statistics."""

from __future__ import annotations

import math

import pytest
import torch

from fastdiff import ops
from fastdiff.reference.dropout import Dropout, dropout_mask, dropout_threshold
from fastdiff.reference.philox import philox4x32

KEYS = torch.tensor([0, -1, 0x0123456789ABCDEF])


@pytest.mark.parametrize("shape", [(3, 6, 3, 5), (3, 4, 8), (3, 1, 1, 1, 1), (3, 9, 2, 2)])
def test_definition(shape: tuple[int, ...]) -> None:
    """Math §9, one element at a time: in integers, without the tricks of the reference."""
    stream = (5 << 32) + 7
    mask = dropout_mask(torch.empty(shape), Dropout(100, KEYS, None, stream)).flatten(2)
    pixels = math.prod(shape[2:])
    for b, c, p in torch.cartesian_prod(*map(torch.arange, mask.shape)).tolist():
        block = c // 4 * math.ceil(pixels / 4) + p // 4
        counter = tuple(torch.tensor(n) for n in (block, 0, 7, 5))
        key = int(KEYS[b]) & (2**64 - 1)
        words = philox4x32(counter, (torch.tensor(key & 0xFFFFFFFF), torch.tensor(key >> 32)))
        byte = int(words[c % 4]) >> 8 * (p % 4) & 255
        assert bool(mask[b, c, p]) == (byte >= 100)


@pytest.mark.parametrize(
    ("p", "threshold"), [(0.0, 0), (1e-9, 1), (0.1, 26), (0.5, 128), (0.75, 192), (0.9999, 255)]
)
def test_probability_is_a_multiple_of_one_256th(p: float, threshold: int) -> None:
    assert dropout_threshold("op", p) == threshold
    if threshold:  # kept elements are scaled by what makes the expectation exact
        scale = Dropout(threshold, None, 0, 0).scale
        assert math.isclose((1 - threshold / 256) * scale, 1)


def masks(num: int, threshold: int, streams: tuple[int, ...] = (0,)) -> torch.Tensor:
    """(stream, sample, element) as +-1 of mean 0 and variance 1 in expectation."""
    x = torch.empty(num, 64, 16, 16)
    kept = torch.stack([dropout_mask(x, Dropout(threshold, None, 1, s)) for s in streams])
    p = threshold / 256
    return ((kept.double() - (1 - p)) / math.sqrt(p * (1 - p))).flatten(2)


@pytest.mark.parametrize("threshold", [1, 26, 128, 255])
def test_mean(threshold: int) -> None:
    values = masks(16, threshold)
    assert abs(values.mean()) < 5 / math.sqrt(values.numel())
    # Of each sample, of each channel: 5 standard deviations of 16 and 64 means.
    assert values.mean(2).abs().max() < 5 / math.sqrt(values.shape[2])
    of_channels = values.reshape(16, 64, 256).mean((0, 2))
    assert of_channels.abs().max() < 5 / math.sqrt(16 * 256)


def test_independent_elements_samples_and_streams() -> None:
    """Correlations of masks with shifted ones are those of independent variables."""
    values = masks(4, 26, (0, 1, 2**32, -1))
    images = values.reshape(4, 4, 64, 16, 16)
    bound = 5 / math.sqrt(images[0].numel())
    for dim in (2, 3, 4):  # neighbours in channels and pixels, within Philox blocks and across
        for shift in (1, 2, 3, 4, 8):
            product = images * images.roll(shift, dim)
            assert product.mean((1, 2, 3, 4)).abs().max() < bound
    for dim in (0, 1):  # streams, samples
        for shift in (1, 2, 3):
            other = values.roll(shift, dim)
            assert (values * other).mean((1, 2)).abs().max() < bound


def test_seed_and_keys_are_one_mask() -> None:
    x = torch.empty(5, 4, 3, 3)
    of_seed = dropout_mask(x, Dropout(60, None, 9, 2))
    of_keys = dropout_mask(x, Dropout(60, ops.sample_keys(9, 5), None, 2))
    assert torch.equal(of_seed, of_keys)
    part = dropout_mask(x[3:], Dropout(60, ops.sample_keys(9, 2, offset=3), None, 2))
    assert torch.equal(of_seed[3:], part)
