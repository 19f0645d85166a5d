"""philox_normal: identical words, normals within float32 ulps, and the right distribution."""

from __future__ import annotations

import math

import pytest
import torch
from op_harness import assert_close, evaluate, implementation_params
from op_harness.inputs import SHAPES

from fastdiff import ops, reference

FLOATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# (counter, key, words) from the known-answer file of Random123 (Salmon et al. 2011).
KNOWN_ANSWERS = [
    (
        (0, 0, 0, 0),
        (0, 0),
        (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
    ),
    (
        (0xFFFFFFFF,) * 4,
        (0xFFFFFFFF,) * 2,
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_philox_known_answers(counter: tuple, key: tuple, words: tuple) -> None:
    as_tensors = [tuple(torch.tensor([w]) for w in group) for group in (counter, key)]
    assert tuple(int(w) for w in reference.philox4x32(*as_tensors)) == words


def test_keys_are_splitmix64() -> None:
    # The first outputs of the public-domain C implementation for seed 1234567.
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    keys = reference.sample_keys(1234567, 3)
    assert [int(k) % 2**64 for k in keys] == published
    assert torch.equal(ops.sample_keys(1234567, 2, offset=1), keys[1:])


@pytest.mark.parametrize("implementation", implementation_params())
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        *((shape, "fp32") for shape in SHAPES if shape != "rows"),
        # The dtype only changes the width of the store.
        *((shape, dtype) for shape in ("vectors", "odd") for dtype in ("bf16", "fp16")),
    ],
)
def test_matches_reference(shape: str, layout: str, dtype: str, implementation: str) -> None:
    size = SHAPES[shape]
    last = torch.channels_last if len(size) == 4 else torch.channels_last_3d
    memory_format = torch.contiguous_format if layout == "contiguous" else last
    seed, stream = -3, 2**33 + 1
    arguments = {
        "out": torch.full(size, math.nan, dtype=FLOATS[dtype]).contiguous(
            memory_format=memory_format
        ),
        "keys": None,
        "seed": seed,
        "stream": stream,
    }
    (normals,) = evaluate("philox_normal_", implementation, arguments).outputs
    expected = reference.normals(reference.sample_keys(seed, size[0]), size, stream, torch.float64)
    # Measured: below 2 ulps of float32 on every backend; 4 ulps are 8 roundings.
    assert_close(
        normals,
        expected,
        magnitude=expected.abs(),
        operations=8,
        implementation=implementation,
    )


def test_distribution() -> None:
    """Moments, tails and the empirical distribution of 4 million normals (8 keys)."""
    n = ops.philox_normal((8, 2**19), seed=11).double()
    count = n.numel()
    # Standard errors of the first four moments of N(0, 1).
    for power, value, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((n**power).mean() - value) < 5 * math.sqrt(variance / count)
    # Kolmogorov-Smirnov distance: 1.95 / sqrt(n) is exceeded once in a thousand samples.
    sorted_n = n.flatten().sort().values
    cdf = 0.5 * (1 + torch.erf(sorted_n / math.sqrt(2)))
    empirical = torch.arange(1, count + 1, dtype=torch.float64) / count
    assert (cdf - empirical).abs().max() < 1.95 / math.sqrt(count)
    # The tails: within 5 standard errors of the expected counts.
    for tail in (3.0, 4.0):
        p = math.erfc(tail / math.sqrt(2))
        assert abs((n.abs() > tail).sum() - count * p) < 5 * math.sqrt(count * p)
    assert n.abs().max() < math.sqrt(2 * 32 * math.log(2)) + 1e-6  # u1 = 2^-32 gives 6.66


@pytest.mark.parametrize("axis", ["keys", "streams", "elements", "pairs"])
def test_independence(axis: str) -> None:
    size = 2**18
    if axis == "keys":
        x, y = ops.philox_normal((2, size), seed=1)
    elif axis == "streams":
        x, y = (ops.philox_normal((1, size), seed=1, stream=s)[0] for s in (0, 1))
    else:
        n = ops.philox_normal((1, 2 * size), seed=1)[0]
        x, y = (n[::2], n[1::2]) if axis == "pairs" else (n[:-4], n[4:])
    x, y = x.double(), y.double()
    # Correlations of x with y and of their squares have standard error 1 / sqrt(n).
    assert abs((x * y).mean()) < 5 / math.sqrt(len(x))
    assert abs(((x**2 - 1) * (y**2 - 1)).mean() / 2) < 5 / math.sqrt(len(x))


def test_extreme_words_are_finite() -> None:
    """u1 rounds to 1 at the top end: the normal is 0, never NaN; at the bottom it is 6.66."""
    words = torch.tensor([0xFFFFFFFF, 0, 0xFFFFFF80, 1 << 30, 0, 0, 0, 0xFFFFFFFF])
    n = reference.box_muller(words)
    assert n.isfinite().all()
    assert n[0] == 0
    assert n.abs().max() == pytest.approx(math.sqrt(64 * math.log(2)), rel=1e-6)


@pytest.mark.parametrize("implementation", implementation_params())
def test_strided_keys(implementation: str) -> None:
    keys = reference.sample_keys(2, 6)[::2]
    arguments = {"out": torch.full((3, 8), math.nan), "keys": keys, "seed": None, "stream": 1}
    (normals,) = evaluate("philox_normal_", implementation, arguments).outputs
    expected = reference.normals(keys, (3, 8), 1, torch.float64)
    assert_close(normals, expected, magnitude=expected.abs(), operations=8)


def test_does_not_depend_on_the_batch_or_format() -> None:
    whole = ops.philox_normal((6, 3, 5, 7), seed=9, stream=4)
    keys = ops.sample_keys(9, 6)
    parts = [ops.philox_normal((2, 3, 5, 7), keys[i : i + 2], stream=4) for i in (0, 2, 4)]
    assert torch.equal(whole, torch.cat(parts))
    last = ops.philox_normal((6, 3, 5, 7), seed=9, stream=4, memory_format=torch.channels_last)
    assert torch.equal(whole, last)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"shape": ()}, ValueError, r"shape is \(\)"),
        ({"dtype": torch.int32}, TypeError, "dtype has dtype torch.int32"),
        ({"seed": torch.zeros(3)}, TypeError, "seed has dtype torch.float32"),
        ({"seed": torch.zeros(2, dtype=torch.int64)}, ValueError, r"seed has shape \(2,\)"),
        ({"seed": None}, TypeError, "seed is None, expected an int"),
        ({"seed": 1.5}, TypeError, "seed is 1.5, expected an int"),
        ({"memory_format": torch.channels_last}, ValueError, "needs 4 dimensions"),
        ({"memory_format": torch.preserve_format}, ValueError, "memory_format is"),
    ],
)
def test_bad_input(arguments: dict, error: type, message: str) -> None:
    arguments = {"shape": (3, 8), "seed": 0, **arguments}
    with pytest.raises(error, match=message):
        ops.philox_normal(**arguments)
