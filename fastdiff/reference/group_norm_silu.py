"""Reference of `group_norm_silu`: group normalization, time embedding and SiLU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.reference import checks
from fastdiff.reference.dropout import Dropout, dropout_mask, dropout_threshold
from fastdiff.reference.layout import in_memory_format, memory_format_of

ACTIVATIONS = ("silu", "identity")


def group_norm_silu(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float = 1e-5,
    channel_bias: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    activation: str = "silu",
    *,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    stream: int = 0,
) -> Tensor:
    """See `fastdiff.ops.group_norm_silu`, which raises the same errors.

    Computes in float32, in float64 for float64 x, and rounds once, at the end. Differentiable any
    number of times in all tensors.
    """
    checks.check_name("group_norm_silu", "activation", activation, ACTIVATIONS)
    arguments = (x, num_groups, weight, bias, eps, channel_bias, scale, shift)
    check_arguments(*arguments)
    dropout = make_dropout(dropout_p, seed, stream)
    if dropout is not None:
        check_dropout(x, dropout)
    return unchecked_group_norm_silu(*arguments, activation, dropout)


def residual_group_norm_silu(
    x: Tensor,
    residual: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float = 1e-5,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    activation: str = "silu",
    *,
    sum_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See `fastdiff.ops.residual_group_norm_silu`, which raises the same errors."""
    op = "residual_group_norm_silu"
    checks.check_name(op, "activation", activation, ACTIVATIONS)
    check_arguments(x, num_groups, weight, bias, eps, None, scale, shift, op=op)
    check_summands(x, residual, sum_bias)
    summed = residual_sum(x, residual, sum_bias)
    y = unchecked_group_norm_silu(
        summed, num_groups, weight, bias, eps, None, scale, shift, activation
    )
    return summed.to(x.dtype), y.to(x.dtype)


def residual_sum(x: Tensor, residual: Tensor, sum_bias: Tensor | None) -> Tensor:
    """(x + residual) + sum_bias, rounded to the dtype of x but still in float32 (float64 for it).

    So gradients that come to the sum from several sides are added in float32.
    """
    compute_dtype = compute_dtype_of(x)
    exact = x.to(compute_dtype) + residual.to(compute_dtype)
    if sum_bias is not None:
        exact = exact + sum_bias.to(compute_dtype).reshape(-1, *[1] * (x.dim() - 2))
    if x.dtype != compute_dtype:
        rounded = exact.detach().to(x.dtype).to(compute_dtype)
        # The difference is a float32: nothing is rounded here. Where there is none, as of
        # infinities, the gradient is not defined either.
        difference = rounded - exact.detach()
        exact = torch.where(difference.isfinite(), exact + difference, rounded)
    return in_memory_format(exact, memory_format_of(x))


def check_summands(x: Tensor, residual: Tensor, sum_bias: Tensor | None) -> None:
    """What can be wrong with the arguments that `group_norm_silu` does not have."""
    op = "residual_group_norm_silu"
    checks.check_like(op, "residual", residual, "x", x)
    if residual.dtype != x.dtype:
        raise TypeError(f"{op}: residual has dtype {residual.dtype}, expected {x.dtype} as x")
    if sum_bias is not None:
        checks.check_operand(op, "sum_bias", sum_bias, (x.shape[1],), "(C,)", x.device)


def make_dropout(dropout_p: float, seed: int | Tensor | None, stream: int) -> Dropout | None:
    """The dropout that the public function's arguments mean; None for none."""
    op = "group_norm_silu"
    threshold = dropout_threshold(op, dropout_p)
    if threshold == 0:
        return None
    if seed is None:
        raise ValueError(f"{op}: seed is None, expected an int or keys (B,) for dropout")
    keys, integer = checks.split_seed(op, seed)
    return Dropout(threshold, keys, integer, checks.as_int64(op, "stream", stream))


def unchecked_group_norm_silu(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    channel_bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    activation: str,
    dropout: Dropout | None = None,
) -> Tensor:
    """`group_norm_silu` of arguments that passed `check_arguments`."""
    compute_dtype = compute_dtype_of(x)
    memory_format = memory_format_of(x)

    def cast(parameter: Tensor | None) -> Tensor | None:
        return None if parameter is None else parameter.to(compute_dtype)

    def per_channel(parameter: Tensor) -> Tensor:
        return parameter.to(compute_dtype)[(...,) + (None,) * (x.dim() - 2)]

    # Other strides are copied first: for them torch.group_norm chooses a kernel by its own rule.
    h = _biased(in_memory_format(x, memory_format), channel_bias)
    if h.numel() == 0:  # torch.group_norm refuses some empty tensors
        y = h if weight is None else h * cast(weight).reshape(-1, *[1] * (x.dim() - 2))
        y = y if bias is None else y + cast(bias).reshape(-1, *[1] * (x.dim() - 2))
    else:
        # PyTorch's kernels compute rstd h + (bias - rstd mean), which is off by 0.1 in a group of
        # 1e4 everywhere, and the channels_last one on the CPU E[h^2] - E[h]^2: with mean 100 and
        # standard deviation 0.01 it is off by 10. A constant added to a group does not change the
        # result, so the mean is subtracted first, and needs no gradient for the same reason.
        h = h - per_channel(_group_mean(h.detach(), num_groups))
        factors, terms = cast(weight), cast(bias)
        if factors is None and terms is not None:
            # Torch 2.10 cannot differentiate it with a bias alone: "tensor does not have a device".
            factors = torch.ones_like(terms)
        y = torch.group_norm(h, num_groups, factors, terms, eps, torch.backends.cudnn.enabled)
    y = _modulated(y, scale, shift, activation)
    if dropout is not None:
        y = torch.where(dropout_mask(x, dropout), y * dropout.scale, 0)
    # On CUDA torch.group_norm always returns the contiguous format; on the CPU this is a no-op.
    return in_memory_format(y.to(x.dtype), memory_format)


def normalized_with(
    x: Tensor,
    num_groups: int,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    channel_bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    activation: str,
) -> Tensor:
    """`group_norm_silu` with statistics (B, G) that are given, of arguments that were checked."""
    compute_dtype = compute_dtype_of(x)

    def per_channel(parameter: Tensor) -> Tensor:
        return parameter.to(compute_dtype)[(...,) + (None,) * (x.dim() - 2)]

    def per_group(statistic: Tensor) -> Tensor:
        return per_channel(statistic.repeat_interleave(x.shape[1] // num_groups, dim=1))

    y = (_biased(x, channel_bias) - per_group(mean)) * per_group(rstd)
    if weight is not None:
        y = y * per_channel(weight)
    if bias is not None:
        y = y + per_channel(bias)
    y = _modulated(y, scale, shift, activation)
    return in_memory_format(y.to(x.dtype), memory_format_of(x))


def check_arguments(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    channel_bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    op: str = "group_norm_silu",
) -> None:
    """Everything that can be wrong with the arguments but the activation."""
    checks.check_tensor(op, "x", x)
    checks.check_float(op, "x", x.dtype)
    if not 3 <= x.dim() <= 5:
        raise ValueError(
            f"{op}: x has shape {tuple(x.shape)}, expected (B, C, *spatial) with 1 to 3 spatial "
            "dimensions"
        )
    batch, channels = x.shape[:2]
    if isinstance(num_groups, bool) or not isinstance(num_groups, (int, torch.SymInt)):
        raise TypeError(f"{op}: num_groups is {checks.shown(num_groups)}, expected an int")
    if num_groups < 1 or channels % num_groups:
        raise ValueError(
            f"{op}: num_groups is {checks.shown(num_groups)}, expected a divisor of the {channels} "
            "channels of x"
        )
    if isinstance(eps, bool) or not isinstance(eps, (int, float, torch.SymFloat)):
        raise TypeError(f"{op}: eps is {eps!r}, expected a float")
    if not 0 < eps <= checks.LARGEST_FLOAT:
        raise ValueError(f"{op}: eps is {checks.shown(eps)}, expected a positive number")
    for name, operand in (("weight", weight), ("bias", bias)):
        if operand is not None:
            checks.check_operand(op, name, operand, (channels,), "(C,)", x.device)
    for name, operand in (("channel_bias", channel_bias), ("scale", scale), ("shift", shift)):
        if operand is not None:
            checks.check_operand(op, name, operand, (batch, channels), "(B, C)", x.device)


def check_dropout(x: Tensor, dropout: Dropout) -> None:
    """What can be wrong with the keys of a dropout, and with what a raw operator is given."""
    op, (threshold, keys, seed, _) = "group_norm_silu", dropout
    if not 1 <= threshold <= 255:
        raise ValueError(f"{op}: threshold is {checks.shown(threshold)}, expected 1 to 255")
    checks.check_noise_source(op, None, keys, seed, required=True)
    if keys is not None:
        checks.check_per_sample(op, "seed", keys, torch.int64, x.shape[0], x.device)


def group_statistics(
    x: Tensor, num_groups: int, eps: float, channel_bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Mean and 1 / sqrt(var + eps) of each group of x + channel_bias: (B, G) each.

    float32, or float64 for float64 x; zeros for groups without elements.
    """
    h = _biased(x, channel_bias).flatten(2)
    h = h.unflatten(1, (num_groups, h.shape[1] // num_groups)).flatten(2)
    if h.numel() == 0:
        return h.new_zeros(h.shape[:2]), h.new_zeros(h.shape[:2])
    variance, mean = torch.var_mean(h, dim=2, correction=0)
    return mean, (variance + eps).rsqrt()


def group_norm_silu_backward(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    channel_bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    activation: str,
    dropout: Dropout | None = None,
) -> tuple[Tensor, ...]:
    r"""Gradients of x, weight, bias, channel_bias, scale and shift, written out.

    With h_hat = (x + channel_bias - mean) rstd, gamma = weight (1 + scale), dz = grad act'(z) times
    what dropout multiplied the element with, per channel of a sample s0 = sum dz,
    s1 = sum dz h_hat, s2 = sum h_hat, and per group of N elements m0 = sum gamma s0 / N,
    m1 = sum gamma s1 / N:

        dx = rstd (gamma dz - m0 - h_hat m1)       dchannel_bias = sum of dx over positions
        dshift = s0                                dscale = weight s1 + bias s0
        dbias = sum over B of (1 + scale) s0       dweight = sum over B of (1 + scale) s1

    Parameters
    ----------
    grad
        (B, C, \*spatial), the gradient of the result.
    mean, rstd
        (B, G), from `group_statistics`.
    x, num_groups, weight, bias, channel_bias, scale, shift, activation
        As in `group_norm_silu`.
    dropout
        That of the forward pass.

    Returns
    -------
    tuple of Tensor
        Six, in float32 (float64 for float64 x), those of absent operands too.
    """
    compute_dtype = compute_dtype_of(x)
    batch, channels = x.shape[:2]
    size = channels // num_groups

    def operand(parameter: Tensor | None, neutral: float) -> Tensor:
        if parameter is None:
            return x.new_full((batch, channels, 1), neutral, dtype=compute_dtype)
        return parameter.to(compute_dtype).expand(batch, channels)[..., None]

    def per_group(values: Tensor) -> Tensor:
        return values.to(compute_dtype).repeat_interleave(size, dim=1)[..., None]

    def group_mean(sums: Tensor) -> Tensor:
        groups = sums.unflatten(1, (num_groups, size)).sum(2)
        return groups.repeat_interleave(size, dim=1) / (size * max(1, positions))

    weight, bias = operand(weight, 1), operand(bias, 0)
    factor, shift = 1 + operand(scale, 0), operand(shift, 0)
    gamma, rstd = weight * factor, per_group(rstd)
    h_hat = (_biased(x, channel_bias).flatten(2) - per_group(mean)) * rstd
    positions = h_hat.shape[2]
    dz = grad.to(compute_dtype).flatten(2)
    if dropout is not None:
        dz = torch.where(dropout_mask(x, dropout).flatten(2), dz * dropout.scale, 0)
    if activation == "silu":
        z = h_hat * gamma + bias * factor + shift
        sigmoid = torch.sigmoid(z)
        dz = dz * sigmoid * (1 + z * (1 - sigmoid))
    s0, s1 = dz.sum(2, keepdim=True), (dz * h_hat).sum(2, keepdim=True)
    m0, m1 = group_mean(gamma * s0), group_mean(gamma * s1)
    dx = rstd * (gamma * dz - m0 - h_hat * m1)
    s2 = h_hat.sum(2, keepdim=True)
    d_channel_bias = rstd * (gamma * s0 - positions * m0 - s2 * m1)
    return (
        dx.reshape(x.shape),
        (factor * s1).sum((0, 2)),
        (factor * s0).sum((0, 2)),
        d_channel_bias[..., 0],
        (weight * s1 + bias * s0)[..., 0],
        s0[..., 0],
    )


def compute_dtype_of(x: Tensor) -> torch.dtype:
    """What statistics and arithmetic are in: float32, or float64 for float64 x."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _modulated(y: Tensor, scale: Tensor | None, shift: Tensor | None, activation: str) -> Tensor:
    """What follows a normalization: act(y (1 + scale) + shift)."""
    for_pixels = (...,) + (None,) * (y.dim() - 2)
    if scale is not None:
        y = y * (1 + scale.to(y.dtype)[for_pixels])
    if shift is not None:
        y = y + shift.to(y.dtype)[for_pixels]
    return F.silu(y) if activation == "silu" else y


def _biased(x: Tensor, channel_bias: Tensor | None) -> Tensor:
    h = x.to(compute_dtype_of(x))
    if channel_bias is None:
        return h
    return h + channel_bias.to(h.dtype)[(...,) + (None,) * (x.dim() - 2)]


def _group_mean(h: Tensor, num_groups: int) -> Tensor:
    """Mean of each group, repeated for its channels: (B, C). Exact in constant groups."""
    group_size = h.shape[1] // num_groups
    first = h[:, ::group_size].flatten(2)[..., :1].sum(2, keepdim=True)  # 0 without elements
    elements = h.flatten(2).unflatten(1, (num_groups, group_size)).flatten(2)
    means = first + (elements - first).mean(2, keepdim=True)
    return means.expand(-1, -1, group_size).flatten(1)
