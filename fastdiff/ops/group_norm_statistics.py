"""`group_norm_statistics`: mean and variance of groups whose elements come in parts."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastdiff.reference.group_norm_silu import check_arguments, compute_dtype_of

_OP = "group_norm_statistics"


class GroupNormStatistics(NamedTuple):
    """Of the elements of each group so far; float64, as they are few and added up often.

    Examples
    --------
    >>> import torch, fastdiff
    >>> statistics = fastdiff.ops.group_norm_statistics(torch.ones(2, 4, 3), 2)
    >>> [tuple(value.shape) for value in statistics.mean_rstd(eps=1e-5)]
    [(2, 2), (2, 2)]
    """

    count: Tensor
    """(): the number of elements in a group."""
    mean: Tensor
    """(B, G)."""
    squares: Tensor
    """(B, G): the sum of squared deviations from the mean."""

    def mean_rstd(self, eps: float = 1e-5) -> tuple[Tensor, Tensor]:
        """mean and 1 / sqrt(var + eps), (B, G) float32, as `ops.group_norm_silu` takes them.

        With the biased variance, as group normalization has it.
        """
        rstd = (self.squares / self.count + eps).rsqrt()
        return self.mean.float(), rstd.float()


def group_norm_statistics(
    x: Tensor,
    num_groups: int,
    channel_bias: Tensor | None = None,
    *,
    before: GroupNormStatistics | None = None,
) -> GroupNormStatistics:
    r"""Statistics of the groups of x + channel_bias, together with those of `before`.

    For images that are never whole in memory: call it with one tile after another, then
    ``group_norm_silu(tile, ..., mean=mean, rstd=rstd)`` normalizes every tile as if it were in the
    whole image. A tile's squares are summed about its own mean, and two sets of statistics are put
    together by Chan, Golub & LeVeque 1983, eq. 2.1: with counts n and m, means a and b,

        mean = a + (b - a) m / (n + m),   squares = s + t + (b - a)^2 n m / (n + m),

    so that nothing is lost where the mean is large. Plain PyTorch, on any device.

    Parameters
    ----------
    x
        (B, C, \*spatial) with 1 to 3 spatial dimensions, floating point, of any strides.
    num_groups
        G, a divisor of C.
    channel_bias
        (B, C), floating point, or None for zeros.
    before
        What earlier calls returned, for the same B and G.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what was given and what was expected.

    Examples
    --------
    >>> import torch, fastdiff
    >>> x, statistics = torch.randn(2, 8, 6, 6), None
    >>> for tile in x.split(2, dim=2):
    ...     statistics = fastdiff.ops.group_norm_statistics(tile, 4, before=statistics)
    >>> mean, rstd = statistics.mean_rstd()
    >>> y = fastdiff.ops.group_norm_silu(x[:, :, :2], 4, None, None, mean=mean, rstd=rstd)
    >>> whole = fastdiff.ops.group_norm_silu(x, 4, None, None)
    >>> torch.allclose(y, whole[:, :, :2], atol=1e-6)
    True
    """
    check_arguments(x, num_groups, None, None, 1.0, channel_bias, None, None, op=_OP)
    h = x.to(compute_dtype_of(x))
    if channel_bias is not None:
        h = h + channel_bias.to(h.dtype)[(...,) + (None,) * (x.dim() - 2)]
    h = h.flatten(2).unflatten(1, (num_groups, x.shape[1] // num_groups)).flatten(2)
    shape = x.shape[0], num_groups
    if before is not None and before.mean.shape != shape:
        raise ValueError(
            f"{_OP}: before has statistics of shape {tuple(before.mean.shape)}, expected (B, G) = "
            f"{shape}"
        )
    if h.numel() == 0:
        zeros = torch.zeros(shape, dtype=torch.float64, device=x.device)
        return before or GroupNormStatistics(zeros.new_zeros(()), zeros, zeros)
    first = h[..., :1]  # of a constant group the deviations from it are 0, whatever is rounded
    variance, mean = torch.var_mean(h - first, dim=2, correction=0)
    count = torch.tensor(h.shape[2], dtype=torch.float64, device=x.device)
    mean, squares = mean.double() + first[..., 0].double(), variance.double() * count
    if before is None:
        return GroupNormStatistics(count, mean, squares)
    total = before.count + count
    difference = mean - before.mean
    return GroupNormStatistics(
        total,
        before.mean + difference * (count / total),
        before.squares + squares + difference.square() * (before.count * count / total),
    )
