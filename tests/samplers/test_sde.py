"""Samplers that add noise, on exact networks: moments, and steps written twice (Math §7)."""

import itertools
import math

import pytest
import torch

from fastdiff import ops
from fastdiff.diffusion.analytic import GaussianDenoiser
from fastdiff.diffusion.gaussian import GaussianDiffusion
from fastdiff.diffusion.schedules import NoiseSchedule
from fastdiff.reference.step_columns import StepColumn
from fastdiff.samplers import DDIM, DDPM, AnnealedLangevin, PredictorCorrector, ReverseSDE
from fastdiff.samplers.predictor_corrector import PREDICTORS
from fastdiff.samplers.reverse_sde import METHODS

DATA = (1, 1, 3)
MEAN = torch.tensor([0.5, -0.2, 0.1], dtype=torch.float64)
VARIANCE = torch.tensor([0.05, 0.3, 0.8], dtype=torch.float64)

_ROOT = torch.tensor([[0.5, 0.1, 0.0], [0.2, 0.4, 0.2], [0.0, 0.3, 0.6]], dtype=torch.float64)
COVARIANCE = _ROOT @ _ROOT.T


def _chain_moments(rows):
    """Mean and variance after these table rows, exactly: with Gaussian data every row is affine."""
    c = StepColumn
    m, v = torch.zeros_like(MEAN), torch.ones_like(VARIANCE)
    for row in rows.double():
        a, s = row[c.SQRT_ALPHA_BAR], row[c.SQRT_ONE_MINUS_ALPHA_BAR]
        gain = a * VARIANCE / (a**2 * VARIANCE + s**2)  # x0 = MEAN + gain (x - a MEAN)
        x0 = MEAN + gain * (m - a * MEAN)
        slope = row[c.COEF_X0] * gain + row[c.COEF_X_T] + row[c.COEF_EPS] * (1 - a * gain) / s
        m = row[c.COEF_X0] * x0 + row[c.COEF_X_T] * m + row[c.COEF_EPS] * (m - a * x0) / s
        v = slope**2 * v + row[c.SIGMA] ** 2
    return m, v


def _langevin_rows(sampler):
    table, S = sampler._table(), sampler.steps
    order = [r for i in range(S - 1, -1, -1) for r in [i] * (sampler.inner_steps - 1) + [S + i]]
    return table[[*order, 2 * S]]


@pytest.mark.parametrize("method", METHODS)
def test_the_reverse_sde_chain_has_the_data_moments_as_T_grows(method):
    """Euler-Maruyama's bias, without sampling noise, falls as 1/T."""
    errors = []
    for num in (250, 500, 1000):
        diffusion = GaussianDiffusion(NoiseSchedule.linear(num, rescale=True))
        m, v = _chain_moments(ReverseSDE(diffusion, method=method)._table().flip(0))
        assert float((m - MEAN).abs().max()) < 1e-3
        errors.append(float((v / VARIANCE - 1).abs().max()))
    assert all(1.8 < a / b < 2.2 for a, b in itertools.pairwise(errors)), errors
    assert errors[-1] < 0.02


def test_annealed_langevin_has_the_data_moments_as_it_slows_down():
    diffusion = GaussianDiffusion(NoiseSchedule.linear(1000))
    errors = []
    for inner in (2, 5, 20):
        m, v = _chain_moments(_langevin_rows(AnnealedLangevin(diffusion, 200, inner_steps=inner)))
        assert float((m - MEAN).abs().max()) < 1e-2
        errors.append(float((v / VARIANCE - 1).abs().max()))
    assert errors[2] < errors[1] < errors[0]
    assert errors[2] < 0.03


SAMPLERS = {
    "ddpm_large": lambda s: DDPM(GaussianDiffusion(s), clip_denoised=False),
    "ddpm_small": lambda s: DDPM(GaussianDiffusion(s, variance="fixed_small"), clip_denoised=False),
    "reverse_sde": lambda s: ReverseSDE(GaussianDiffusion(s), clip_denoised=False),
    "langevin": lambda s: AnnealedLangevin(
        GaussianDiffusion(s), 100, inner_steps=4, step_size=1.0, clip_denoised=False
    ),
}


@pytest.mark.parametrize("num_timesteps", [300, pytest.param(1000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", SAMPLERS)
def test_mean_and_covariance_within_four_standard_errors(name, num_timesteps):
    """Of data with a full covariance; the samplers' bias is about one standard error here."""
    schedule = NoiseSchedule.linear(num_timesteps, rescale=True)
    model = GaussianDenoiser(MEAN.reshape(DATA), COVARIANCE, schedule)
    samples = SAMPLERS[name](schedule).sample(model, (512, *DATA), seed=7, progress=False)
    _assert_moments(samples.double().flatten(1))


def test_predictor_corrector_within_four_standard_errors():
    """Of 32 independent points per image: its step size wants dozens of dimensions. The bias of the
    usual snr, 0.16, is as large as four standard errors here; it falls with the square."""
    schedule = NoiseSchedule.linear(300, rescale=True)
    covariance = torch.kron(torch.eye(32, dtype=torch.float64), COVARIANCE)
    model = GaussianDenoiser(MEAN.repeat(32).reshape(1, 8, 12), covariance, schedule)
    sampler = PredictorCorrector(GaussianDiffusion(schedule), snr=0.08, clip_denoised=False)
    samples = sampler.sample(model, (64, 1, 8, 12), seed=2, progress=False)
    _assert_moments(samples.double().reshape(64 * 32, 3))


def _assert_moments(samples):
    num, variances = len(samples), COVARIANCE.diagonal()
    assert bool(((samples.mean(0) - MEAN).abs() < 4 * (variances / num).sqrt()).all())
    # Standard error of a normal's covariance: sqrt((s_ii s_jj + s_ij^2) / n).
    standard = ((variances[:, None] * variances + COVARIANCE**2) / num).sqrt()
    assert bool(((samples.T.cov() - COVARIANCE).abs() < 4 * standard).all())


def test_sampled_langevin_and_reverse_sde_have_the_moments_of_their_chains():
    """Few coarse steps, whose bias is far larger than the statistical error."""
    schedule = NoiseSchedule.linear(1000)
    model = GaussianDenoiser(MEAN.reshape(DATA), VARIANCE.reshape(DATA), schedule)
    diffusion, num = GaussianDiffusion(schedule), 4096
    sde = ReverseSDE(diffusion, 30, "linspace", clip_denoised=False)
    langevin = AnnealedLangevin(diffusion, 15, inner_steps=4, step_size=1.0, clip_denoised=False)
    for sampler, rows in ((sde, sde._table().flip(0)), (langevin, _langevin_rows(langevin))):
        m, v = _chain_moments(rows)
        assert float((v / VARIANCE - 1).abs().max()) > 0.1
        samples = sampler.sample(model, (num, *DATA), seed=5, progress=False).double().flatten(1)
        assert bool(((samples.mean(0) - m).abs() < 4 * (v / num).sqrt()).all())
        assert bool(((samples.var(0) - v).abs() < 4 * v * math.sqrt(2 / num)).all())


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize(
    ("steps", "spacing"), [(None, "leading"), (7, "trailing"), (30, "quadratic"), (33, "logsnr")]
)
def test_ddim_with_eta_1_is_ddpm_with_the_small_variance_step_by_step(steps, spacing, clip):
    """The same noise, so equal states, not only distributions; S = 7 and 33 do not divide T."""
    schedule = NoiseSchedule.linear(100, rescale=True)
    diffusion = GaussianDiffusion(schedule, variance="fixed_small")
    model = GaussianDenoiser(MEAN.reshape(DATA), VARIANCE.reshape(DATA), schedule)
    trails = []
    for sampler in (
        DDPM(diffusion, steps, spacing, clip_denoised=clip),
        DDIM(diffusion, steps or 100, 1.0, spacing, clip_denoised=clip),
    ):
        trail = []
        end = sampler.sample(
            model,
            (4, *DATA),
            seed=3,
            dtype=torch.float64,
            progress=False,
            callback=lambda step, t, x_t, pred_x0, trail=trail: trail.append((t, x_t)),
        )
        trails.append([*trail, (-1, end)])
    assert len(trails[0]) == (steps or 100) + 1
    for (t, x), (other_t, other_x) in zip(*trails, strict=True):
        assert t == other_t
        # The tables are float32: the first DDPM rows cancel to about 1e-5 of the state.
        torch.testing.assert_close(x, other_x, rtol=1e-4, atol=1e-4)


def test_the_reverse_sde_step_tends_to_ddpm_s():
    """As beta -> 0: the coefficients of x_t, eps and z agree to second order in beta."""
    gaps = []
    for num in (1000, 4000):
        schedule = NoiseSchedule.linear(num, rescale=True)
        sde = ReverseSDE(GaussianDiffusion(schedule))._table().double()
        c = StepColumn
        # DDPM eq. 11 in the same columns.
        x = schedule.alphas.rsqrt()
        eps = -schedule.betas * x / schedule.sqrt_one_minus_alpha_bars
        gap = torch.stack([sde[:, c.COEF_X_T] - x, sde[:, c.COEF_EPS] - eps]).abs().amax(1)
        gaps.append(gap / schedule.betas.max())
        noise = (sde[1:, c.SIGMA] / schedule.betas[1:].sqrt() - 1).abs().max()
        assert float(noise) < float(schedule.betas.max())
    assert bool((gaps[1] < gaps[0] / 2).all()), gaps


def test_the_corrector_is_algorithm_5():
    schedule = NoiseSchedule.linear(100, rescale=True)
    sampler = PredictorCorrector(
        GaussianDiffusion(schedule), spacing=[60], corrector_steps=2, snr=0.2, clip_denoised=False
    )
    states = []

    def spy(x_t, t):
        states.append(x_t)
        return 0.5 * x_t + 0.1

    x_T = ops.philox_normal((3, 1, 2, 2), 9)
    sampler.sample(spy, x_T=x_T, seed=4, progress=False)
    assert len(states) == 3
    s = float(schedule.sqrt_one_minus_alpha_bars[60])
    for k in (1, 2):
        x, z = states[k - 1], ops.philox_normal(x_T.shape, 4, stream=k)
        g = -(0.5 * x + 0.1) / s
        for i in range(3):
            step = 2 * float(schedule.alphas[60]) * float(0.2 * z[i].norm() / g[i].norm()) ** 2
            expected = x[i] + step * g[i] + math.sqrt(2 * step) * z[i]
            torch.testing.assert_close(states[k][i], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("predictor", PREDICTORS)
def test_without_corrector_only_the_predictor_is_left(predictor):
    schedule = NoiseSchedule.linear(100, rescale=True)
    diffusion = GaussianDiffusion(schedule)
    model = GaussianDenoiser(MEAN.reshape(DATA), VARIANCE.reshape(DATA), schedule)
    sampler = PredictorCorrector(diffusion, 10, predictor=predictor, corrector_steps=0)
    alone = PREDICTORS[predictor](diffusion, None, sampler.indices)
    samples = [s.sample(model, (4, *DATA), seed=1, progress=False) for s in (sampler, alone)]
    assert torch.equal(*samples)


def test_correcting_helps_a_coarse_predictor():
    """In 96 dimensions: the step size needs |g| to be about the same for every sample."""
    schedule = NoiseSchedule.linear(1000)
    mean, variance = (values.repeat(32).reshape(1, 8, 12) for values in (MEAN, VARIANCE))
    model = GaussianDenoiser(mean, variance, schedule)
    diffusion, num = GaussianDiffusion(schedule), 128
    errors = []
    for corrector_steps in (0, 1):
        sampler = PredictorCorrector(
            diffusion, 40, "linspace", corrector_steps=corrector_steps, clip_denoised=False
        )
        samples = sampler.sample(model, (num, 1, 8, 12), seed=2, progress=False).double()
        deviations = (samples - mean).flatten(1).reshape(num, 32, 3)
        errors.append(float((deviations.square().mean((0, 1)) / VARIANCE - 1).abs().max()))
    # 32 x 128 independent numbers per variance.
    assert errors[1] < errors[0] - 4 * math.sqrt(2 / (32 * num)), errors


def test_errors():
    diffusion = GaussianDiffusion(NoiseSchedule.linear(100, rescale=True))
    with pytest.raises(ValueError, match="unknown method 'milstein'; choose from euler_maruyama"):
        ReverseSDE(diffusion, method="milstein")
    with pytest.raises(ValueError, match="unknown predictor 'heun'; choose from reverse_diffusion"):
        PredictorCorrector(diffusion, predictor="heun")
    with pytest.raises(ValueError, match="snr is 0, expected a positive"):
        PredictorCorrector(diffusion, snr=0)
    with pytest.raises(ValueError, match="corrector_steps is -1"):
        PredictorCorrector(diffusion, corrector_steps=-1)
    with pytest.raises(ValueError, match=r"step_size is 4, expected a number in \(0, 4\)"):
        AnnealedLangevin(diffusion, step_size=4)
    with pytest.raises(ValueError, match="inner_steps is 0"):
        AnnealedLangevin(diffusion, inner_steps=0)
    jsd = GaussianDiffusion(NoiseSchedule.jsd(100), prediction="v")
    for make in (ReverseSDE, AnnealedLangevin, PredictorCorrector):
        with pytest.raises(ValueError, match=f"{make.__name__} starts at a finite noise level"):
            make(jsd)
    for sampler in (ReverseSDE(diffusion), DDPM(diffusion), AnnealedLangevin(diffusion)):
        for call in (sampler.encode, sampler.decode):
            with pytest.raises(ValueError, match=f"is {type(sampler).__name__}, which adds noise"):
                call(lambda x, t: x, torch.zeros(1, *DATA))
