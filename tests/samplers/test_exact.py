"""DDPM and DDIM with the exact network of a Gaussian: the samplers' own errors (Math §10)."""

import itertools
import math

import pytest
import torch

from fastdiff.diffusion.analytic import GaussianDenoiser
from fastdiff.diffusion.gaussian import GaussianDiffusion
from fastdiff.diffusion.schedules import NoiseSchedule
from fastdiff.samplers import DDIM, DDPM

DATA = (1, 2, 3)


@pytest.fixture(scope="module")
def schedule():
    return NoiseSchedule.linear(1000)


@pytest.fixture(scope="module")
def gaussian():
    generator = torch.Generator().manual_seed(0)
    root = 0.4 * torch.randn(6, 6, generator=generator, dtype=torch.float64)
    mean = 0.4 * torch.randn(DATA, generator=generator, dtype=torch.float64)
    return mean, root @ root.T


@pytest.fixture(scope="module")
def x_T():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(16, *DATA, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("spacing", ["linspace", "trailing", "quadratic", "logsnr"])
def test_ddim_converges_at_first_order_to_the_exact_flow(schedule, gaussian, x_T, spacing):
    model = GaussianDenoiser(*gaussian, schedule)
    diffusion = GaussianDiffusion(schedule)
    errors = []
    for steps in (20, 40, 80):
        sampler = DDIM(diffusion, steps, spacing=spacing, clip_denoised=False)
        x_0 = sampler.sample(model, x_T=x_T, progress=False)
        exact = model.decode(x_T, sampler.indices[-1:].expand(len(x_T)))
        errors.append(float((x_0 - exact).square().mean().sqrt()))
    orders = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert all(0.85 < order < 1.15 for order in orders), (errors, orders)


@pytest.mark.parametrize("prediction", ["x0", "v", "mean"])
def test_every_prediction_gives_the_same_samples(schedule, gaussian, x_T, prediction):
    expected, actual = (
        DDIM(GaussianDiffusion(schedule, prediction=kind), 20, spacing="linspace", eta=0.5).sample(
            GaussianDenoiser(*gaussian, schedule, kind), x_T=x_T, progress=False
        )
        for kind in ("eps", prediction)
    )
    # Float32 coefficients: 1/c0 = 7,800 of "mean" at t = 999, 6e-8 each.
    torch.testing.assert_close(
        actual, expected, rtol=0, atol=3e-3 if prediction == "mean" else 1e-4
    )


def test_encoding_then_decoding_returns_the_data(schedule, gaussian):
    """The reconstruction error falls with S as in DDIM's Table 2: a factor of 4 per doubling."""
    model = GaussianDenoiser(*gaussian, schedule)
    diffusion = GaussianDiffusion(schedule)
    x0 = model.sample_x0(32, torch.Generator().manual_seed(2))
    errors = []
    for steps in (10, 20, 40, 80):
        sampler = DDIM(diffusion, steps, spacing="trailing", clip_denoised=False)
        x_T = sampler.encode(model, x0, progress=False)
        back = sampler.sample(model, x_T=x_T, progress=False)
        errors.append(float((back - x0).square().mean()))
    assert all(b < a / 2 for a, b in itertools.pairwise(errors)), errors
    assert errors[-1] < 5e-3
    # The latents of data are standard normal, up to the flow's discretization.
    assert abs(float(x_T.mean())) < 5 / math.sqrt(x_T.numel()) + 0.02
    assert abs(float(x_T.std()) - 1) < 5 / math.sqrt(2 * x_T.numel()) + 0.02


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_encoding_agrees_between_predictions(schedule, gaussian, prediction):
    x0 = GaussianDenoiser(*gaussian, schedule).sample_x0(8, torch.Generator().manual_seed(2))
    latents = [
        DDIM(GaussianDiffusion(schedule, prediction=kind), 20).encode(
            GaussianDenoiser(*gaussian, schedule, kind), x0, progress=False
        )
        for kind in ("eps", prediction)
    ]
    # At abar = 1 the network is evaluated as if at index 0, where x0 - a x0 = 5e-5 counts
    # over s = 0.01 when eps comes from x0.
    torch.testing.assert_close(latents[1], latents[0], rtol=0, atol=5e-3)


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_only_a_deterministic_sampler_encodes(schedule, eta):
    diffusion = GaussianDiffusion(schedule)
    with pytest.raises(ValueError, match=f"deterministic sampler, this one has eta={eta:g}"):
        DDIM(diffusion, 10, eta).encode(lambda x, t: x, torch.zeros(1, *DATA))
    with pytest.raises(ValueError, match="sigma_hat=True"):
        DDIM(diffusion, 10, sigma_hat=True).encode(lambda x, t: x, torch.zeros(1, *DATA))
    with pytest.raises(ValueError, match="x0 has shape"):
        DDIM(diffusion, 10).encode(lambda x, t: x, torch.zeros(1, 2, dtype=torch.int64))


def _chain_moments(schedule, mean, variance, reverse_variance):
    """Mean and variance of DDPM samples of N(mean, variance) data, exactly: the chain is affine."""
    m, v = torch.zeros_like(mean), torch.ones_like(variance)
    for t in range(len(schedule) - 1, -1, -1):
        a, noise = schedule.sqrt_alpha_bars[t], schedule.one_minus_alpha_bars[t]
        gain = a * variance / (a**2 * variance + noise)  # x0_hat = mean + gain (x_t - a mean)
        c0, c1 = schedule.posterior_mean_coef_x0[t], schedule.posterior_mean_coef_x_t[t]
        m = c0 * (mean + gain * (m - a * mean)) + c1 * m
        v = (c0 * gain + c1) ** 2 * v + (reverse_variance[t] if t else 0)
    return m, v


@pytest.mark.parametrize("variance", ["fixed_large", "fixed_small"])
def test_ddpm_chain_has_the_data_moments_as_T_grows(variance):
    """The bias of the chain itself, without sampling noise, falls as 1/T."""
    mean = torch.tensor([0.5, -0.2, 0.1], dtype=torch.float64)
    data_variance = torch.tensor([0.05, 0.3, 0.8], dtype=torch.float64)
    errors = []
    for num in (250, 500, 1000):
        schedule = NoiseSchedule.linear(num, rescale=True)
        sigma2 = schedule.betas if variance == "fixed_large" else schedule.posterior_variance
        m, v = _chain_moments(schedule, mean, data_variance, sigma2)
        assert float((m - mean).abs().max()) < 0.01
        errors.append(float((v / data_variance - 1).abs().max()))
    assert errors[2] < errors[1] < errors[0]
    assert errors[2] < 0.05


@pytest.mark.parametrize("variance", ["fixed_large", "fixed_small"])
def test_ddpm_samples_have_the_chain_moments(variance):
    schedule = NoiseSchedule.linear(100, rescale=True)
    mean = torch.tensor([[[0.5, -0.2, 0.1]]], dtype=torch.float64)
    data_variance = torch.tensor([[[0.05, 0.3, 0.8]]], dtype=torch.float64)
    model = GaussianDenoiser(mean, data_variance, schedule)
    sampler = DDPM(GaussianDiffusion(schedule, variance=variance), clip_denoised=False)
    num = 4096
    samples = sampler.sample(model, (num, 1, 1, 3), seed=5, progress=False).double().flatten(1)
    sigma2 = schedule.betas if variance == "fixed_large" else schedule.posterior_variance
    m, v = (x.flatten() for x in _chain_moments(schedule, mean, data_variance, sigma2))
    # Five standard errors of a normal's mean, variance and correlation.
    assert bool(((samples.mean(0) - m).abs() < 5 * (v / num).sqrt()).all())
    assert bool(((samples.var(0) - v).abs() < 5 * v * math.sqrt(2 / num)).all())
    correlation = torch.corrcoef(samples.T) - torch.eye(3, dtype=torch.float64)
    assert float(correlation.abs().max()) < 5 / math.sqrt(num)


def test_ddpm_samples_have_a_full_covariance(gaussian, schedule):
    mean, covariance = gaussian
    model = GaussianDenoiser(mean, covariance, schedule)
    sampler = DDPM(GaussianDiffusion(schedule), 250, "trailing", clip_denoised=False)
    num = 2048
    samples = sampler.sample(model, (num, *DATA), seed=5, progress=False).double().flatten(1)
    variances = covariance.diagonal()
    bound = 5 * (variances / num).sqrt() + 0.01
    assert bool(((samples.mean(0) - mean.flatten()).abs() < bound).all())
    # Standard error of a covariance: sqrt((s_ii s_jj + s_ij^2)/n); plus the chain's own bias.
    error = (samples.T.cov() - covariance).abs()
    standard = ((variances[:, None] * variances + covariance**2) / num).sqrt()
    scale = (variances[:, None] * variances).sqrt()
    assert bool((error < 5 * standard + 0.1 * scale).all())
