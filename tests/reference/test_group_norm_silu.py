"""The reference GroupNorm+SiLU against float64 arithmetic written out from its definition."""

import itertools

import pytest
import torch

from fastdiff.reference.group_norm_silu import group_norm_silu
from fastdiff.reference.layout import memory_format_of

FORMATS = {
    3: [torch.contiguous_format],
    4: [torch.contiguous_format, torch.channels_last],
    5: [torch.contiguous_format, torch.channels_last_3d],
}
SHAPES = [(2, 6, 5), (3, 8, 4, 4), (2, 12, 3, 5), (2, 6, 2, 3, 2)]
CASES = [(shape, memory_format) for shape in SHAPES for memory_format in FORMATS[len(shape)]]


def definition(x, num_groups, weight, bias, eps, channel_bias, scale, shift, silu):
    """The formula, element by element of (sample, group), in float64."""
    x = x.double()
    expand = (...,) + (None,) * (x.dim() - 2)
    h = x + (channel_bias.double()[expand] if channel_bias is not None else 0)
    y = torch.empty_like(h)
    size = x.shape[1] // num_groups
    for n, g in itertools.product(range(x.shape[0]), range(num_groups)):
        group = h[n, g * size : (g + 1) * size]
        mean = group.sum() / group.numel()
        var = ((group - mean) ** 2).sum() / group.numel()
        y[n, g * size : (g + 1) * size] = (group - mean) / (var + eps) ** 0.5
    if weight is not None:
        y = y * weight.double()[expand] + bias.double()[expand]
    if scale is not None:
        y = y * (1 + scale.double()[expand])
    if shift is not None:
        y = y + shift.double()[expand]
    return y / (1 + torch.exp(-y)) if silu else y


def arguments(shape, memory_format=torch.contiguous_format, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def randn(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype)

    batch, channels = shape[:2]
    x = (randn(*shape) * 2 + 1).contiguous(memory_format=memory_format)
    return {
        "x": x,
        "num_groups": 2,
        "weight": randn(channels),
        "bias": randn(channels),
        "eps": 1e-5,
        "channel_bias": randn(batch, channels),
        "scale": randn(batch, channels),
        "shift": randn(batch, channels),
    }


# Each output is a handful of roundings of numbers up to ~10: a few ulps of 10 in float32 and
# float64; the half formats are computed in float32 and rounded once, half an ulp of the output.
TOLERANCE = {
    torch.float64: {"rtol": 1e-13, "atol": 1e-13},
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
    torch.bfloat16: {"rtol": 2**-8, "atol": 1e-5},
    torch.float16: {"rtol": 2**-11, "atol": 1e-5},
}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("shape", "memory_format"), CASES, ids=str)
def test_equals_the_definition(shape, memory_format, dtype):
    given = arguments(shape, memory_format, dtype)
    y = group_norm_silu(**given)
    expected = definition(**given, silu=True)
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=memory_format)
    torch.testing.assert_close(y.double(), expected, **TOLERANCE[dtype])


OPTIONAL = ("channel_bias", "scale", "shift")


@pytest.mark.parametrize("activation", ["silu", "identity"])
@pytest.mark.parametrize(
    "present", [c for n in range(4) for c in itertools.combinations(OPTIONAL, n)], ids=str
)
def test_every_argument_may_be_left_out(present, activation):
    given = arguments((3, 8, 4, 4))
    given |= dict.fromkeys(set(OPTIONAL) - set(present))
    y = group_norm_silu(**given, activation=activation)
    expected = definition(**given, silu=activation == "silu")
    torch.testing.assert_close(y.double(), expected, **TOLERANCE[torch.float32])


def test_without_affine_parameters():
    given = arguments((3, 8, 4, 4)) | {"weight": None, "bias": None}
    expected = definition(**given, silu=True)
    torch.testing.assert_close(group_norm_silu(**given).double(), expected, rtol=1e-5, atol=1e-5)


def test_is_torch_group_norm_when_nothing_is_added():
    # Not bit for bit: torch's kernel on the CPU forms rstd x + (bias - rstd mean), which is not
    # exact in constant groups. Numbers up to 4 deviations, a dozen roundings.
    x = arguments((3, 8, 4, 4))["x"]
    weight, bias = torch.randn(8), torch.randn(8)
    size = 4 * weight.abs().max() + bias.abs().max()
    wide = [tensor.double() for tensor in (x, weight, bias)]
    expected = torch.nn.functional.silu(torch.nn.functional.group_norm(wide[0], 4, *wide[1:]))
    found = group_norm_silu(x, 4, weight, bias).double()
    assert (found - expected).abs().max() <= 12 * 2**-24 * size


@pytest.mark.parametrize("memory_format", FORMATS[4], ids=str)
def test_mean_far_above_the_deviation(memory_format):
    # float32 spaces numbers near 100 by 7.6e-6, 1/1310 of the deviation 0.01: that is what may be
    # lost. E[x^2] - E[x]^2 loses everything: 100^2 * 2^-24 is 6 times the variance 1e-4.
    generator = torch.Generator().manual_seed(0)
    x = 100 + 0.01 * torch.randn(4, 8, 16, 16, generator=generator)
    x = x.contiguous(memory_format=memory_format)
    y = group_norm_silu(x, 2, None, None, activation="identity")
    expected = group_norm_silu(x.double(), 2, None, None, activation="identity")
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=4 * 2**-17 / 0.01)


@pytest.mark.parametrize("channels", [slice(8), slice(None, None, 2)], ids=["first", "even"])
def test_channels_sliced_from_channels_last(channels):
    # Strides of no memory format, which torch.group_norm by itself takes for channels_last: the
    # tolerance is that of the test above.
    generator = torch.Generator().manual_seed(0)
    x = 100 + 0.01 * torch.randn(4, 16, 16, 16, generator=generator)
    x = x.contiguous(memory_format=torch.channels_last)[:, channels]
    y = group_norm_silu(x, 2, None, None, activation="identity")
    assert y.is_contiguous(memory_format=memory_format_of(x))
    expected = group_norm_silu(x.double(), 2, None, None, activation="identity")
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=4 * 2**-17 / 0.01)


@pytest.mark.parametrize("memory_format", FORMATS[4], ids=str)
def test_constant_group_gives_the_bias(memory_format):
    # The mean of 1024 equal numbers may be off by an ulp of 3, and is divided by sqrt(eps).
    x = torch.full((2, 8, 16, 16), 3.0).contiguous(memory_format=memory_format)
    bias = torch.randn(8, generator=torch.Generator().manual_seed(0))
    y = group_norm_silu(x, 2, torch.ones(8), bias, activation="identity")
    expected = bias[None, :, None, None].expand_as(y)
    torch.testing.assert_close(y, expected, rtol=0, atol=2 * 2**-22 / 1e-5**0.5)


def test_float16_whose_square_overflows():
    x = 1000 * torch.randn(2, 8, 8, 8, generator=torch.Generator().manual_seed(0)).half()
    y = group_norm_silu(x, 2, None, None)
    expected = group_norm_silu(x.double(), 2, None, None)
    torch.testing.assert_close(y.double(), expected, **TOLERANCE[torch.float16])


@pytest.mark.parametrize(("shape", "memory_format"), CASES, ids=str)
def test_gradients(shape, memory_format):
    given = arguments(shape, memory_format, torch.float64)
    names = ["x", "weight", "bias", "channel_bias", "scale", "shift"]
    tensors = [given[name].requires_grad_() for name in names]

    def function(*tensors):
        return group_norm_silu(**given | dict(zip(names, tensors, strict=True)))

    # Fast mode compares along random directions: all entries would be thousands of calls.
    assert torch.autograd.gradcheck(function, tensors, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, tensors, fast_mode=True)


def test_gradients_agree_between_memory_formats():
    gradients = []
    for memory_format in FORMATS[4]:
        given = arguments((3, 8, 4, 4), memory_format)
        given["x"].requires_grad_()
        y = group_norm_silu(**given)
        (y * torch.arange(y.numel()).reshape(y.shape) / y.numel()).sum().backward()
        gradients.append(given["x"].grad)
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)


def test_parameters_of_another_dtype():
    given = arguments((3, 8, 4, 4))
    mixed = given | {"x": given["x"].bfloat16()}
    expected = definition(**mixed, silu=True)
    y = group_norm_silu(**mixed)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), expected, **TOLERANCE[torch.bfloat16])


def test_strided_input():
    base = arguments((3, 16, 4, 8))["x"]
    x = base[:, ::2, :, ::2]
    expected = group_norm_silu(x.contiguous(), 2, None, None)
    torch.testing.assert_close(group_norm_silu(x, 2, None, None), expected)


@pytest.mark.parametrize("memory_format", FORMATS[4], ids=str)
def test_empty_batch(memory_format):
    x = torch.empty(0, 8, 4, 4).to(memory_format=memory_format).requires_grad_()
    channel_bias = torch.empty(0, 8)
    y = group_norm_silu(x, 2, torch.ones(8), torch.zeros(8), channel_bias=channel_bias)
    y.sum().backward()
    assert y.shape == x.grad.shape == (0, 8, 4, 4)


X = torch.zeros(2, 8, 4, 4)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": X.long()}, TypeError, "x has dtype torch.int64, expected a floating-point"),
        ({"x": torch.zeros(2, 8)}, ValueError, r"x has shape \(2, 8\), expected \(B, C, "),
        ({"num_groups": 3}, ValueError, "num_groups is 3, expected a divisor of the 8 channels"),
        ({"num_groups": 0}, ValueError, "num_groups is 0, expected a divisor"),
        (
            {"weight": torch.zeros(4)},
            ValueError,
            r"weight has shape .* expected \(C,\) = \(8,\)",
        ),
        (
            {"bias": torch.zeros(8).int()},
            TypeError,
            "bias has dtype torch.int32, expected a ",
        ),
        ({"channel_bias": torch.zeros(8)}, ValueError, r"channel_bias has shape .* \(2, 8\)"),
        ({"scale": torch.zeros(1, 8)}, ValueError, r"scale has shape \(1, 8\), expected"),
        ({"shift": torch.zeros(2, 8, 1, 1)}, ValueError, "shift has shape"),
        (
            {"activation": "relu"},
            ValueError,
            "unknown activation .relu.; choose from silu, id",
        ),
    ],
)
def test_bad_input_names_the_argument(changes, error, message):
    given = {"x": X, "num_groups": 2, "weight": torch.ones(8), "bias": torch.zeros(8)}
    with pytest.raises(error, match=message):
        group_norm_silu(**given | changes)
