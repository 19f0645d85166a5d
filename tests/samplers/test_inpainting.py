"""Inpainting around any sampler, with and without jumps (RePaint, Math §7)."""

import math

import pytest
import torch

from fastdiff import ops
from fastdiff.diffusion.analytic import GaussianDenoiser
from fastdiff.diffusion.gaussian import GaussianDiffusion
from fastdiff.diffusion.schedules import NoiseSchedule
from fastdiff.samplers import DDIM, DDPM, DPMSolverPP, Inpainting

SHAPE = (3, 1, 4, 4)


@pytest.fixture(scope="module")
def diffusion():
    return GaussianDiffusion(NoiseSchedule.linear(50, rescale=True))


@pytest.fixture
def known():
    return ops.philox_normal(SHAPE, 1).clamp(-1, 1)


@pytest.fixture
def mask():
    mask = torch.zeros(4, 4)
    mask[:, :2] = 1
    return mask


def model(x_t, t):
    return 0.9 * x_t


@pytest.mark.parametrize("make", [DDPM, DDIM])
def test_with_nothing_known_it_is_the_inner_sampler(diffusion, known, make):
    inner = make(diffusion, 10)
    painted = Inpainting(inner, known, torch.zeros(4, 4)).sample(model, seed=5, progress=False)
    assert torch.equal(painted, inner.sample(model, SHAPE, seed=5, progress=False))


@pytest.mark.parametrize("resamples", [1, 3])
def test_known_pixels_come_back_and_the_rest_is_filled(diffusion, known, mask, resamples):
    sampler = Inpainting(DDPM(diffusion, 10), known, mask, jump_length=4, resamples=resamples)
    painted = sampler.sample(model, seed=5, progress=False)
    assert torch.equal(painted[..., :2], known[..., :2])
    assert float((painted[..., 2:] - known[..., 2:]).abs().min()) > 0
    again = sampler.sample(model, SHAPE, seed=5, progress=False)
    assert torch.equal(painted, again)


def test_every_state_holds_the_known_pixels_at_its_own_level(diffusion, mask):
    """Over many samples: mean and variance of q(x_t | known), also after jumps back."""
    num = 2000
    known = torch.full((1, 1, 4, 4), 0.7)
    sampler = Inpainting(DDPM(diffusion, 8, "trailing"), known, mask, jump_length=3, resamples=2)
    visited = []

    def look(step, t, x_t, pred_x0):
        visited.append(t)
        if step == 0:
            return  # pure noise
        abar = diffusion.schedule.alpha_bars[t]
        part = x_t[..., :2].double().flatten()
        standard = float(((1 - abar) / part.numel()).sqrt())
        assert abs(float(part.mean() - 0.7 * abar.sqrt())) < 5 * standard
        assert abs(float(part.var() / (1 - abar)) - 1) < 5 * math.sqrt(2 / part.numel())

    sampler.sample(model, (num, 1, 4, 4), seed=1, progress=False, callback=look)
    times = diffusion.schedule.timesteps[DDPM(diffusion, 8, "trailing").indices].tolist()
    groups = [times[7:4:-1], times[4:1:-1], times[1::-1]]
    assert visited == [t for group in groups for t in group * 2]


def test_resampling_brings_the_filled_part_in_line_with_the_known_one():
    """Two strongly correlated pixels: the hidden one should have the conditional mean."""
    schedule = NoiseSchedule.linear(100, rescale=True)
    covariance = 0.1 * torch.tensor([[1.0, 0.95], [0.95, 1.0]])
    exact = GaussianDenoiser(torch.zeros(1, 1, 2), covariance, schedule)
    known = torch.full((1, 1, 1, 2), 0.6)
    ddpm = DDPM(GaussianDiffusion(schedule), 50, "trailing", clip_denoised=False)
    gaps = []
    for resamples in (1, 4):
        sampler = Inpainting(
            ddpm, known, torch.tensor([1.0, 0.0]), jump_length=5, resamples=resamples
        )
        hidden = sampler.sample(exact, (500, 1, 1, 2), seed=3, progress=False)[..., 1]
        gaps.append(abs(float(hidden.mean()) - 0.95 * 0.6))
    # Replacing pixels is an approximation: resampling halves its error, it does not remove it.
    assert gaps[1] < 0.65 * gaps[0], gaps


def test_errors(diffusion, known, mask):
    ddpm = DDPM(diffusion, 10)
    with pytest.raises(ValueError, match=r"mask has shape \(5,\), expected one that broadcasts"):
        Inpainting(ddpm, known, torch.zeros(5))
    with pytest.raises(ValueError, match=r"known has shape .* torch\.uint8"):
        Inpainting(ddpm, known.to(torch.uint8), mask)
    with pytest.raises(ValueError, match="DPMSolverPP remembers earlier steps"):
        Inpainting(DPMSolverPP(diffusion, 10), known, mask, resamples=2)
    for name in ("resamples", "jump_length"):
        with pytest.raises(ValueError, match=f"{name} is 0, expected 1 or more"):
            Inpainting(ddpm, known, mask, **{name: 0})
    with pytest.raises(ValueError, match=r"samples of shape \(2, 1, 4, 4\) do not fit known"):
        Inpainting(ddpm, known, mask).sample(model, (2, 1, 4, 4), progress=False)
    with pytest.raises(ValueError, match="do not fit known"):
        Inpainting(ddpm, known, mask).sample(model, x_T=torch.zeros(3, 1, 4, 5), progress=False)
