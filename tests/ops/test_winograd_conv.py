"""winograd_conv, the inference form's 3x3 convolution: float64, borders, bits, bad arguments."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from op_harness import assert_close, available
from torch import Tensor

from fastdiff.ops._winograd_conv import winograd_conv
from fastdiff.reference import winograd_conv as reference

# (B, C, O, H, W) of x: one tile, odd multiples of 16 channels, an odd map to be doubled, more tiles
# than one piece of work has, fewer than a panel of rows.
SHAPES = {
    "tile": (1, 16, 16, 2, 2),
    "odd blocks": (2, 48, 80, 4, 6),
    "few tiles": (3, 64, 32, 8, 8),
    "pieces": (2, 256, 32, 24, 20),
    "one block and a half": (5, 32, 48, 10, 14),
}
RAW = {"kernel": winograd_conv, "reference": reference.winograd_conv}


def make(shape: str, upsample: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, weight (O, C, 3, 3), bias and residual."""
    batch, channels, out_channels, height, width = SHAPES[shape]
    generator = torch.Generator().manual_seed(0)

    def randn(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    scale = 2 if upsample else 1
    return (
        randn(batch, channels, height, width),
        randn(out_channels, channels, 3, 3) / (9 * channels) ** 0.5,
        randn(out_channels),
        randn(batch, out_channels, scale * height, scale * width),
    )


def doubled(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


def magnitude(x: Tensor, weight: Tensor) -> Tensor:
    """Sum of the absolute values of everything that Winograd's sums add up."""
    input_, kernel, output = (
        torch.tensor(matrix, dtype=torch.float64).abs()
        for matrix in (reference.INPUT, reference.KERNEL, reference.OUTPUT)
    )
    d = F.pad(x.double().abs(), (1, 1, 1, 1)).unfold(2, 4, 2).unfold(3, 4, 2)
    transformed = torch.einsum("pi,bcyxij,qj->bcyxpq", input_, d, input_)
    g = torch.einsum("pi,ocij,qj->ocpq", kernel, weight.double().abs(), kernel)
    m = torch.einsum("bcyxpq,ocpq->boyxpq", transformed, g)
    y = torch.einsum("rp,boyxpq,sq->boyrxs", output, m, output)
    return y.reshape(*y.shape[:2], x.shape[2], x.shape[3])


@pytest.mark.parametrize("implementation", RAW)
@pytest.mark.parametrize("upsample", [False, True], ids=["same", "upsample"])
@pytest.mark.parametrize("extras", ["bias", "residual", "both", "neither"])
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_float64(shape: str, extras: str, upsample: bool, implementation: str) -> None:
    x, weight, bias, residual = make(shape, upsample)
    wide = doubled(x) if upsample else x
    expected = F.conv2d(wide.double(), weight.double(), padding=1)
    bound = magnitude(wide, weight)
    bias = bias if extras in ("bias", "both") else None
    residual = residual if extras in ("residual", "both") else None
    for extra in (None if bias is None else bias[:, None, None], residual):
        if extra is not None:
            expected, bound = expected + extra.double(), bound + extra.double().abs()
    y = RAW[implementation](
        x, reference.transform_weight(weight, upsample), bias, residual, len(weight), upsample
    )
    assert y.is_contiguous(memory_format=torch.channels_last)
    # C sums, two additions an axis before them and two after, the weight, bias and residual.
    assert_close(y, expected, magnitude=bound, operations=x.shape[1] + 11)


def test_float64_reference_is_the_convolution() -> None:
    x, weight, bias, residual = (v.double() for v in make("odd blocks"))
    packed = reference.transform_weight(weight).double()
    y = reference.winograd_conv(x, packed, bias, residual, len(weight))
    expected = F.conv2d(x, weight, bias, padding=1) + residual
    # The transformed weights are float32.
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("upsample", [False, True], ids=["same", "upsample"])
@pytest.mark.parametrize("shape", SHAPES)
def test_any_strides_any_threads_and_any_batch_give_the_same_bits(
    shape: str, upsample: bool
) -> None:
    if available("cpu") is not None:
        pytest.skip("the CPU library is not built")
    x, weight, bias, residual = make(shape, upsample)
    packed, out_channels = reference.transform_weight(weight, upsample), len(weight)

    def run(x: Tensor, residual: Tensor, packed: Tensor = packed) -> Tensor:
        return winograd_conv(x, packed, bias, residual, out_channels, upsample)

    expected = run(x, residual)
    last = {"memory_format": torch.channels_last}
    spread = torch.stack([x, x], -1)[..., 0]
    assert torch.equal(run(x.contiguous(**last), residual.contiguous(**last)), expected)
    assert torch.equal(run(spread, residual, packed.repeat_interleave(2)[::2]), expected)
    alone = [run(x[i : i + 1], residual[i : i + 1]) for i in range(len(x))]
    assert torch.equal(torch.cat(alone), expected)
    threads = torch.get_num_threads()
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            assert torch.equal(run(x, residual), expected)
    finally:
        torch.set_num_threads(threads)


def test_an_empty_batch_is_empty() -> None:
    x, weight, bias, residual = make("tile")
    packed = reference.transform_weight(weight)
    y = winograd_conv(x[:0], packed, bias, residual[:0], 16, False)
    assert y.shape == (0, 16, 2, 2)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_within_its_tiles(bad: float) -> None:
    x, weight, bias, _ = make("few tiles")
    packed = reference.transform_weight(weight)
    expected = winograd_conv(x, packed, bias, None, 32, False)
    x[1, 7, 3, 4] = bad
    y = winograd_conv(x, packed, bias, None, 32, False)
    finite = y.isfinite()
    assert not finite[1, :, 2:5, 3:6].any(), "every result that the pixel belongs to"
    touched = torch.zeros(8, 8, dtype=torch.bool)
    touched[2:6, 2:6] = True  # tiles of rows 2-3 and 4-5, and of columns alike
    assert torch.equal(y[:, :, ~touched], expected[:, :, ~touched])
    assert torch.equal(y[[0, 2]], expected[[0, 2]])


def test_bad_arguments_are_refused() -> None:
    if available("cpu") is not None:
        pytest.skip("the CPU library is not built")
    x, weight, bias, residual = make("few tiles")
    good = {
        "x": x,
        "weight": reference.transform_weight(weight),
        "bias": bias,
        "residual": residual,
        "out_channels": 32,
        "upsample": False,
    }
    winograd_conv(**good)
    cases = [
        ({"x": x.double()}, "float32 of shape"),
        ({"x": x[0]}, "float32 of shape"),
        ({"x": x[:, :, :7], "residual": None}, "must be even, got 7 x 8"),
        ({"x": x[:, :24], "residual": None}, "multiples of 16, got 24 and 32"),
        ({"out_channels": 24}, "multiples of 16, got 64 and 24"),
        ({"out_channels": 0}, "multiples of 16"),
        ({"out_channels": -16}, "multiples of 16"),
        ({"weight": good["weight"][1:]}, "weight must have shape"),
        ({"weight": good["weight"].double()}, "weight has the wrong dtype"),
        ({"upsample": True, "residual": None}, "weight must have shape"),
        ({"bias": bias[1:]}, "bias must have shape"),
        ({"residual": residual[:1]}, "residual must have the shape"),
        ({"residual": residual.double()}, "residual must be float32"),
    ]
    for change, message in cases:
        with pytest.raises(RuntimeError, match=message):
            winograd_conv(**{**good, **change})


@pytest.mark.parametrize("upsample", [False, True], ids=["same", "upsample"])
def test_opcheck(upsample: bool) -> None:
    x, weight, bias, residual = make("odd blocks", upsample)
    packed = reference.transform_weight(weight, upsample)
    torch.library.opcheck(
        winograd_conv,
        (x, packed, bias, residual, len(weight), upsample),
        test_utils=("test_schema", "test_faketensor"),
    )
