"""q(x_t | x_{t-1}), DDIM's eq. 8 and real-valued time against closed forms (Math §3)."""

import math

import pytest
import torch

from fastdiff.diffusion.forward_steps import continuous_tables
from fastdiff.diffusion.gaussian import GaussianDiffusion
from fastdiff.diffusion.schedules import NoiseSchedule

SHAPE = (3, 2, 4, 5)


@pytest.fixture(params=["linear", "cosine", "jsd"])
def diffusion(request):
    return GaussianDiffusion(NoiseSchedule.from_name(request.param, 40), prediction="v")


def _random(seed):
    return torch.randn(SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_one_step_is_equation_2(diffusion):
    x, noise, t = _random(0), _random(1), torch.tensor([0, 17, 39])
    betas = diffusion.schedule.betas[t].view(3, 1, 1, 1)
    found = diffusion.q_step(x, t, noise)
    torch.testing.assert_close(
        found, (1 - betas).sqrt() * x + betas.sqrt() * noise, rtol=1e-6, atol=1e-6
    )
    seeded = diffusion.q_step(x.float(), t, seed=5)
    assert torch.equal(seeded, diffusion.q_step(x.float(), t, seed=5))
    assert not torch.equal(seeded, diffusion.q_step(x.float(), t))


def test_iterated_steps_have_the_closed_form_s_moments(diffusion):
    """Signal and noise variance of T one-step calls: exact, by feeding signal and noise apart."""
    signal, variance = torch.ones(1, 1, dtype=torch.float64), 0.0
    for t in range(20):
        at = torch.tensor([t])
        signal = diffusion.q_step(signal, at, torch.zeros_like(signal))
        gain = float(diffusion.q_step(torch.ones(1, 1, dtype=torch.float64), at, torch.zeros(1, 1)))
        added = float(diffusion.q_step(torch.zeros(1, 1), at, torch.ones(1, 1)))
        variance = gain**2 * variance + added**2
    assert float(signal) == pytest.approx(float(diffusion.schedule.sqrt_alpha_bars[19]), rel=1e-5)
    assert variance == pytest.approx(float(diffusion.schedule.one_minus_alpha_bars[19]), rel=1e-5)


def test_equation_8_with_eta_1_is_the_markov_step(diffusion):
    x, x0, noise, t = _random(0), _random(1), _random(2), torch.tensor([1, 17, 38])
    found = diffusion.q_step_given_x0(x, x0, t, 1.0, noise)
    torch.testing.assert_close(found, diffusion.q_step(x, t, noise), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("eta", [0.0, 0.3, 0.8, 1.0])
def test_equation_8_by_bayes_rule(diffusion, eta):
    """q(x_t | x_s, x0) q(x_s | x0) = q_sigma(x_s | x_t, x0) q(x_t | x0): the joint moments."""
    schedule = diffusion.schedule
    zero, one = torch.zeros(1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
    for t in (1, 9, 38):
        at = torch.tensor([t])
        coef_x = float(diffusion.q_step_given_x0(one, zero, at, eta, zero))
        coef_x0 = float(diffusion.q_step_given_x0(zero, one, at, eta, zero))
        scale = float(diffusion.q_step_given_x0(zero, zero, at, eta, one))
        s2, t2 = (float(schedule.one_minus_alpha_bars[i]) for i in (t - 1, t))
        # The marginal of x_t.
        a_s, a_t = (float(schedule.sqrt_alpha_bars[i]) for i in (t - 1, t))
        assert coef_x * a_s + coef_x0 == pytest.approx(a_t, abs=1e-5)
        assert coef_x**2 * s2 + scale**2 == pytest.approx(t2, abs=1e-5)
        # The covariance of x_s and x_t: DDIM's c s_t, with c of eq. 12.
        sigma2 = eta**2 * s2 / t2 * float(schedule.betas[t])
        c = math.sqrt(max(0.0, s2 - sigma2))
        assert coef_x * s2 == pytest.approx(c * math.sqrt(t2), abs=1e-5)


def test_the_first_step_is_that_of_all(diffusion):
    x0, noise, t = _random(1), _random(2), torch.zeros(3, dtype=torch.int64)
    for eta in (0.0, 1.0):
        found = diffusion.q_step_given_x0(x0, x0, t, eta, noise)
        expected = diffusion.q_sample(x0, t, noise)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_real_times_meet_whole_ones_and_lie_between():
    schedule = NoiseSchedule.cosine(50)
    whole = torch.arange(51, dtype=torch.float64)
    signal, noise = continuous_tables(schedule, whole)
    assert float(signal[0]) == 1
    assert float(noise[0]) == 0
    torch.testing.assert_close(signal[1:], schedule.sqrt_alpha_bars, rtol=1e-12, atol=0)
    torch.testing.assert_close(noise[1:], schedule.sqrt_one_minus_alpha_bars, rtol=1e-12, atol=0)
    signal, noise = continuous_tables(schedule, torch.linspace(0, 50, 1001).double())
    assert bool((signal[1:] < signal[:-1]).all())
    torch.testing.assert_close(signal**2 + noise**2, torch.ones_like(signal))
    # beta(u) is constant over a step: half of it takes half of log abar.
    half, _ = continuous_tables(schedule, torch.tensor([9.5]))
    expected = (schedule.alpha_bars[8] * schedule.alpha_bars[9]).sqrt().sqrt()
    assert float(half) == pytest.approx(float(expected), rel=1e-12)


def test_errors(diffusion):
    x, t = _random(0), torch.tensor([1, 2, 3])
    with pytest.raises(ValueError, match=r"eta is 2, expected 0 \(no noise\) to 1"):
        diffusion.q_step_given_x0(x, x, t, 2)
    with pytest.raises(ValueError, match="x0 has shape"):
        diffusion.q_step_given_x0(x, x[:, :1], t)
    with pytest.raises(ValueError, match=r"times are from -1\.0 to 3\.0, expected 0\.\."):
        continuous_tables(diffusion.schedule, torch.tensor([-1.0, 3.0]))
    with pytest.raises(ValueError, match=r"expected 0\.\.49"):
        continuous_tables(NoiseSchedule.jsd(50), torch.tensor([49.5]))
