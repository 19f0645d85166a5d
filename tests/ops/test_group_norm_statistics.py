"""Statistics of groups that come in parts, and normalizing with them."""

import pytest
import torch

from fastdiff import ops


def exact(x, num_groups, channel_bias=None):
    h = x.double()
    if channel_bias is not None:
        h = h + channel_bias.double()[(...,) + (None,) * (x.dim() - 2)]
    h = h.flatten(2).unflatten(1, (num_groups, -1)).flatten(2)
    return h.mean(2), h.var(2, correction=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(2, 8, 13), (2, 8, 9, 7), (1, 4, 3, 5, 6)])
@pytest.mark.parametrize("mean", [0.0, 1000.0])
def test_parts_together_are_the_whole(dtype, shape, mean):
    torch.manual_seed(0)
    x = (torch.randn(shape) + mean).to(dtype)
    bias = torch.randn(shape[:2])
    statistics = None
    for part in x.split(2, dim=2):
        statistics = ops.group_norm_statistics(part, 4, bias, before=statistics)
    expected_mean, expected_var = exact(x, 4, bias)
    # Values are rounded to float32 when the bias is added, and deviations summed in it.
    ulp = 1e-15 if dtype == torch.float64 else 6e-8
    assert (statistics.mean - expected_mean).abs().max() <= 4 * ulp * max(1, 2 * mean)
    error = (statistics.squares / statistics.count - expected_var).abs()
    assert (error <= 100 * ulp * max(1, 2 * mean) * expected_var).all()
    assert statistics.count == x[0].numel() / 4
    mean32, rstd = statistics.mean_rstd(1e-3)
    assert mean32.dtype == rstd.dtype == torch.float32
    torch.testing.assert_close(rstd.double(), (expected_var + 1e-3).rsqrt(), rtol=1e-3, atol=0)


def test_constant_groups_are_exact_however_they_are_cut():
    x = torch.full((1, 4, 6, 6), 3.7)
    statistics = None
    for part in x.split([1, 2, 3], dim=3):
        statistics = ops.group_norm_statistics(part, 2, before=statistics)
    assert torch.equal(statistics.squares, torch.zeros(1, 2, dtype=torch.float64))
    mean, rstd = statistics.mean_rstd()
    y = ops.group_norm_silu(x, 2, None, None, activation="identity", mean=mean, rstd=rstd)
    assert torch.equal(y, torch.zeros_like(x))


def test_empty_parts_change_nothing():
    x = torch.randn(2, 4, 3, 3)
    whole = ops.group_norm_statistics(x, 2)
    again = ops.group_norm_statistics(x[:, :, :0], 2, before=whole)
    assert again is whole
    nothing = ops.group_norm_statistics(x[:, :, :0], 2)
    assert nothing.count == 0
    assert ops.group_norm_statistics(x[:0], 2).mean.shape == (0, 2)  # no samples


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", ["silu", "identity"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_with_its_own_statistics_it_is_the_op(dtype, activation, layout):
    torch.manual_seed(0)
    x = torch.randn(2, 8, 5, 7).to(dtype).contiguous(memory_format=layout)
    operands = {n: torch.randn(2, 8) for n in ("channel_bias", "scale", "shift")}
    weight, bias = torch.randn(8), torch.randn(8)
    statistics = ops.group_norm_statistics(x, 4, operands["channel_bias"])
    mean, rstd = statistics.mean_rstd(1e-4)
    y = ops.group_norm_silu(
        x, 4, weight, bias, activation=activation, mean=mean, rstd=rstd, **operands
    )
    whole = ops.group_norm_silu(x, 4, weight, bias, 1e-4, activation=activation, **operands)
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=layout)
    # Statistics are float32; results of size 10, rounded once.
    rounding = {torch.float64: 1e-6, torch.float32: 1e-6, torch.bfloat16: 8e-3}[dtype]
    torch.testing.assert_close(y, whole, rtol=0, atol=10 * rounding)


def test_gradients_of_everything():
    torch.manual_seed(0)
    tensors = [torch.randn(2, 4, 3, dtype=torch.float64), torch.randn(2, 2, dtype=torch.float64)]
    tensors += [torch.rand(2, 2, dtype=torch.float64) + 0.5]
    tensors += [torch.randn(4, dtype=torch.float64) for _ in range(2)]
    tensors += [torch.randn(2, 4, dtype=torch.float64) for _ in range(3)]

    def op(x, mean, rstd, weight, bias, *others):
        return ops.group_norm_silu(x, 2, weight, bias, 1e-5, *others, mean=mean, rstd=rstd)

    assert torch.autograd.gradcheck(op, [t.requires_grad_() for t in tensors])


def test_what_does_not_fit():
    x, mean = torch.randn(2, 4, 3), torch.zeros(2, 2)
    with pytest.raises(ValueError, match="rstd is None, expected both mean and rstd or none"):
        ops.group_norm_silu(x, 2, None, None, mean=mean)
    with pytest.raises(ValueError, match="mean is None"):
        ops.group_norm_silu(x, 2, None, None, rstd=mean)
    with pytest.raises(ValueError, match=r"mean .*\(B, G\)"):
        ops.group_norm_silu(x, 4, None, None, mean=mean, rstd=mean)
    with pytest.raises(ValueError, match="dropout_p is given, expected none with mean and rstd"):
        ops.group_norm_silu(x, 2, None, None, mean=mean, rstd=mean, dropout_p=0.5, seed=0)
    with pytest.raises(ValueError, match=r"unknown activation"):
        ops.group_norm_silu(x, 2, None, None, mean=mean, rstd=mean, activation="relu")
    with pytest.raises(ValueError, match=r"num_groups is 3, expected a divisor"):
        ops.group_norm_statistics(x, 3)
    before = ops.group_norm_statistics(x[:1], 2)
    with pytest.raises(ValueError, match=r"before has statistics of shape \(1, 2\), expected"):
        ops.group_norm_statistics(x, 2, before=before)
    with pytest.raises(TypeError, match="x is a list"):
        ops.group_norm_statistics([x], 2)
