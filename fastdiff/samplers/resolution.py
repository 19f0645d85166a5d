"""Which steps a discretization resolves: others would leave noise that is not there (Math §7).

Schedules may jump at their noisy end (the cosine schedule's last step goes from sg = 20,300 to
642), and few steps jump everywhere. A sampler asks here and takes a step that is exact for pure
noise instead.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastdiff.diffusion.schedules import NoiseSchedule

# EDM's sigma_data: the standard deviation of images in [-1, 1] (Karras et al. 2022, table 1).
DATA_STD = 0.5

# By how much eq. 15 may enlarge the variance of Gaussian data in all its steps together.
MOST_EXCESS = 2.0

# The same of annealed Langevin dynamics, whose steps are coarse by nature.
MOST_LANGEVIN_EXCESS = 4.0

# Smallest ratio of the noise levels, data included, over which Heun's corrector is used.
LEAST_RATIO = 1 / 3

# Largest integral of beta over a step of Euler's on the reverse SDE: it leaves 1 + B^2 / 4 times
# the variance of pure noise.
MOST_TIME = 1.0


@torch.no_grad()
def euler_in_variance(schedule: NoiseSchedule, indices: Tensor) -> Tensor:
    """Which of the S steps DDIM's eq. 15 may take: all up to some noise level, bool (S,).

    A step from sg_t to sg_s leaves, of Gaussian data with standard deviation 1/2, (1 - u/2)^2 /
    (1 - u) times the variance that it should, u = (sg_t^2 - sg_s^2) / (sg_t^2 + 1/4): twice the
    square of sg_t / sg_s too much for a long one. The product of these, taken from clean data
    upwards, must not exceed 2. Row 0 ends at sg = 0, where the equation is singular.
    """
    level = 1 / schedule.respace(indices).snr + DATA_STD**2
    left = level[:-1] / level[1:]  # 1 - u
    excess = (((1 + left) / 2).square() / left).cumprod(0)
    return torch.cat([torch.tensor([False]), excess <= MOST_EXCESS])


@torch.no_grad()
def trapezoid(schedule: NoiseSchedule, indices: Tensor) -> Tensor:
    """Which of the S steps Heun's corrector may end, bool (S,).

    The corrected step is x0_t + w (x0_s - x0_t) plus noise of size sg_s, with w = (sg_t / sg_s - 1)
    / 2: for w > 1 an extrapolation, and where noise is all there is one of the network's errors. So
    sqrt(sg_s^2 + 1/4) must be at least a third of sqrt(sg_t^2 + 1/4), with 1/2 the data's standard
    deviation: what lies below the data's scale is known to the network.
    """
    level = 1 / schedule.respace(indices).snr + DATA_STD**2
    return torch.cat([torch.tensor([False]), (level[:-1] / level[1:]).sqrt() >= LEAST_RATIO])


@torch.no_grad()
def euler_in_time(schedule: NoiseSchedule, indices: Tensor) -> Tensor:
    """Which of the S steps are short for the reverse SDE, bool (S,): B <= 1."""
    return -schedule.respace(indices).log_alphas <= MOST_TIME


@torch.no_grad()
def check_langevin(
    schedule: NoiseSchedule, indices: Tensor, inner_steps: int, step_size: float
) -> None:
    """Raise ValueError unless Langevin steps can follow the S noise levels down.

    They can if Gaussian data of standard deviation 1/2 come out with at most four times their
    variance at the last level: ones that are far apart leave what few steps do not remove.
    """
    snr = schedule.respace(indices).snr
    excess = _langevin_excess(snr, inner_steps, step_size)
    if excess <= MOST_LANGEVIN_EXCESS:
        return
    needed = inner_steps
    while needed < 1000 and _langevin_excess(snr, needed, step_size) > MOST_LANGEVIN_EXCESS:
        needed += 1
    remedy = f"inner_steps={needed}, " if needed < 1000 else ""
    raise ValueError(
        f"inner_steps is {inner_steps}, too few for {len(indices)} noise levels so far apart: "
        f"Gaussian data would come out with {excess:.3g} times their variance; use {remedy}more "
        "steps or another spacing"
    )


def _langevin_excess(snr: Tensor, inner_steps: int, step_size: float) -> float:
    """The variance at the last level, over that of Gaussian data with the level's noise.

    In units of x / sqrt(abar) a step at level sg multiplies deviations by 1 - d/2 sg^2 / (sg^2 +
    1/4) and adds the variance d sg^2.
    """
    variance, level = DATA_STD**2, 1 / snr
    gain = (1 - step_size / 2 * level / (level + variance)).square()
    kept = gain**inner_steps
    added = step_size * level * (1 - kept) / (1 - gain)
    left = torch.cat([kept.new_ones(1), kept.cumprod(0)])  # of what a level adds, after those below
    ends = left[-1] * (1 + level[-1]) + (left[:-1] * added).sum()
    return float(ends / (variance + level[0]))
