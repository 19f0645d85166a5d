"""Tolerances that follow from the dtypes: no constant is chosen until a test passes."""

from __future__ import annotations

import torch
from torch import Tensor


def unit_roundoff(dtype: torch.dtype) -> float:
    """Largest relative error of rounding to `dtype`: half the gap between neighbours."""
    return torch.finfo(dtype).eps / 2


def assert_close(
    actual: Tensor,
    expected: Tensor,
    *,
    magnitude: Tensor,
    operations: int,
    implementation: str = "",
    compute: torch.dtype | None = None,
) -> None:
    """|actual - expected| <= float32 error of the arithmetic + one rounding to the result's dtype.

    Parameters
    ----------
    expected
        The float64 reference.
    magnitude
        Sum of the absolute values of the terms that were added up, as rounding errors are relative
        to those and not to the (possibly cancelling) result.
    operations
        Roundings on the way to the result, counting a float32 function of k ulps as 2 k.
    compute
        Dtype of the arithmetic; default: float64 for a float64 result, else float32.
    """
    assert actual.shape == expected.shape
    assert not actual.isnan().any(), "an element was not written"
    dtype = actual.dtype
    if compute is None:
        compute = torch.float64 if dtype == torch.float64 else torch.float32
    bound = operations * unit_roundoff(compute) * magnitude
    if dtype != compute:
        # Triton's interpreter truncates to bfloat16, which costs a whole gap instead of half of it.
        gaps = 2 if implementation == "triton-interpreted" and dtype == torch.bfloat16 else 1
        bound = bound + gaps * unit_roundoff(dtype) * (expected.abs() + bound)
        bound = bound + gaps * torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    error = (actual.double() - expected).abs()
    worst = (error - bound).max() if error.numel() else torch.tensor(0.0)
    assert worst <= 0, f"error exceeds the bound by {worst:.3g} (largest error {error.max():.3g})"
