"""Which S of the T timesteps a sampler visits (DDIM §4.2 and app. D, IDDPM, Math §7)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from fastdiff._types import check_type
from fastdiff.diffusion._schedule_checks import as_indices
from fastdiff.diffusion.schedules import NoiseSchedule
from fastdiff.reference.checks import shown

Spacing = str | Sequence[int] | np.ndarray | Tensor
"""A name, sections such as "100,50,25", or the indices themselves."""


def leading(num_timesteps: int, steps: int, schedule: NoiseSchedule) -> np.ndarray:
    """i (T // S)."""
    return np.arange(steps) * (num_timesteps // steps)


def linspace(num_timesteps: int, steps: int, schedule: NoiseSchedule) -> np.ndarray:
    """round(linspace(0, T - 1, S)); T - 1 for S = 1."""
    return np.round(_ramp(0, num_timesteps - 1, steps))


def trailing(num_timesteps: int, steps: int, schedule: NoiseSchedule) -> np.ndarray:
    """round(arange(T, 0, -T/S)) - 1, reversed; T - 1 is always visited."""
    # k T / S rounds once; a floating-point arange drifts, and can have S + 1 entries.
    return np.round(np.arange(1, steps + 1) * num_timesteps / steps) - 1


def quadratic(num_timesteps: int, steps: int, schedule: NoiseSchedule) -> np.ndarray:
    """floor(linspace(0, sqrt(0.8 T), S)^2), made distinct (DDIM app. D)."""
    ideal = np.floor(_ramp(0, np.sqrt(0.8 * num_timesteps), steps) ** 2)
    return _distinct(ideal.astype(np.int64), num_timesteps)


def logsnr(num_timesteps: int, steps: int, schedule: NoiseSchedule) -> np.ndarray:
    """The indices nearest to S even steps in log-SNR from t = 0 to T - 1, made distinct.

    A last index with zero SNR is kept as the last step and left out of the even steps.
    """
    log_snr = schedule.snr.detach().log().numpy()
    if not np.isfinite(log_snr[-1]) and steps > 1:
        head = logsnr(num_timesteps - 1, steps - 1, schedule.respace(range(num_timesteps - 1)))
        return np.append(head, num_timesteps - 1)
    if steps == 1:
        return np.array([num_timesteps - 1])
    targets = _ramp(log_snr[0], log_snr[-1], steps)
    nearest = np.abs(log_snr[None] - targets[:, None]).argmin(1)
    return _distinct(nearest, num_timesteps)


SPACINGS: dict[str, Callable[[int, int, NoiseSchedule], np.ndarray]] = {
    "leading": leading,
    "linspace": linspace,
    "trailing": trailing,
    "quadratic": quadratic,
    "logsnr": logsnr,
}
"""Spacings by name."""


def spaced_indices(
    schedule: NoiseSchedule, steps: int | None = None, spacing: Spacing = "leading"
) -> Tensor:
    """S strictly increasing indices in 0..T-1.

    Parameters
    ----------
    steps
        S. None: T for a named spacing, whatever a list or sections hold otherwise.
    spacing
        "leading", "linspace", "trailing", "quadratic", "logsnr"; a list of indices; or sections
        such as "100,50,25": T is cut into that many equal parts, each visited that many times
        (IDDPM).

    Returns
    -------
    Tensor
        (S,) int64 on the CPU.

    Raises
    ------
    TypeError, ValueError
        S outside 1..T, an unknown name, or a list that is unsorted, repeated or out of range.

    Examples
    --------
    >>> import fastdiff
    >>> schedule = fastdiff.NoiseSchedule.linear(1000)
    >>> fastdiff.samplers.spaced_indices(schedule, 4, "trailing").tolist()
    [249, 499, 749, 999]
    """
    check_type("spaced_indices", NoiseSchedule, schedule=schedule)
    num_timesteps = schedule.num_timesteps
    if steps is not None:
        if isinstance(steps, bool) or not isinstance(steps, int | np.integer):
            raise TypeError(f"steps is {shown(steps)}, expected an int")
        if not 1 <= steps <= num_timesteps:
            raise ValueError(
                f"steps is {shown(steps)}, expected 1..{num_timesteps}, the schedule's T"
            )
    if isinstance(spacing, str) and spacing in SPACINGS:
        values = SPACINGS[spacing](num_timesteps, steps or num_timesteps, schedule)
        return torch.from_numpy(np.asarray(values, dtype=np.int64))
    if isinstance(spacing, str):
        indices = torch.tensor(_sections(spacing, num_timesteps))
    else:
        indices = as_indices(spacing, limit=num_timesteps, name="spacing")
    if steps is not None and steps != len(indices):
        raise ValueError(
            f"steps is {steps}, but spacing has {len(indices)} timesteps; leave steps out"
        )
    return indices


def _sections(spacing: str, num_timesteps: int) -> list[int]:
    """Indices of "100,50,25": even strides inside each of the equal sections (IDDPM)."""
    try:
        counts = [int(part) for part in spacing.split(",")]
    except ValueError:
        raise ValueError(
            f"unknown spacing {shown(spacing)}; choose from {', '.join(SPACINGS)}, sections such "
            "as '100,50,25', or a list of indices"
        ) from None
    base, longer = divmod(num_timesteps, len(counts))
    indices, start = [], 0
    for i, count in enumerate(counts):
        size = base + (i < longer)
        if not 1 <= count <= size:
            raise ValueError(
                f"spacing {shown(spacing)} asks for {count} timesteps in section {i + 1} of "
                f"{len(counts)}, which has {size}; expected 1..{size}"
            )
        stride = (size - 1) / (count - 1) if count > 1 else 1
        indices += [start + round(stride * k) for k in range(count)]
        start += size
    return indices


def _ramp(start: float, end: float, steps: int) -> np.ndarray:
    """linspace that keeps the end, the noisy one, if there is a single step."""
    return np.linspace(start, end, steps) if steps > 1 else np.array([end])


def _distinct(ideal: np.ndarray, num_timesteps: int) -> np.ndarray:
    """The strictly increasing indices that push non-decreasing `ideal` ones up as little as needed.

    Small timesteps of an uneven spacing round to the same index; the sampler still makes S steps.
    """
    offsets = np.arange(len(ideal))
    up = np.maximum.accumulate(ideal - offsets) + offsets
    # What the end of the range leaves no room for moves down again.
    return np.minimum(up, num_timesteps - len(ideal) + offsets)
