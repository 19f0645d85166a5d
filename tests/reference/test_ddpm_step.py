"""One ancestral step against DDPM algorithm 2 in float64 and against diffusers (Math §4, §7)."""

import pytest
import torch

from fastdiff import ops
from fastdiff.diffusion.schedules import NoiseSchedule
from fastdiff.reference.ddim_step import ddim_step
from fastdiff.reference.ddpm_step import ddpm_step
from fastdiff.reference.step_columns import StepColumn

T = 1000
SHAPE = (5, 2, 4, 4)
INDICES = [0, 40, 333, 700, 999]


@pytest.fixture(scope="module")
def schedule():
    return NoiseSchedule.linear(T)


@pytest.fixture(scope="module")
def tensors():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, *SHAPE, generator=generator, dtype=torch.float64).unbind(0)


def _column(values):
    return torch.as_tensor(values, dtype=torch.float64).reshape(-1, 1, 1, 1)


def _noised(schedule, x0, eps, indices):
    a = _column(schedule.sqrt_alpha_bars[indices])
    return a * x0 + _column(schedule.sqrt_one_minus_alpha_bars[indices]) * eps


@pytest.mark.parametrize("variance", ["fixed_large", "fixed_small"])
def test_step_is_equation_11_plus_noise(schedule, tensors, variance):
    """x_{t-1} = (x_t - beta/sqrt(1-abar) eps)/sqrt(alpha) + sigma z, on the full sequence."""
    x0, eps, noise = tensors
    x_t = _noised(schedule, x0, eps, INDICES)
    table = schedule.ddpm_table(variance=variance)
    # On the full sequence the row is t.
    x_s = ddpm_step(x_t, eps, torch.tensor(INDICES), table, clip=False, noise=noise)
    beta = _column(schedule.betas[INDICES])
    one_minus = _column(schedule.one_minus_alpha_bars[INDICES])
    variances = schedule.betas if variance == "fixed_large" else schedule.posterior_variance
    sigma = _column(variances[INDICES]).sqrt()
    sigma[0] = 0  # no noise at the last step
    expected = (x_t - beta / one_minus.sqrt() * eps) / (1 - beta).sqrt() + sigma * noise
    # Float32 coefficients; x0 = 160 (x_t - s eps) at t = 999 is scaled by c0 = 1e-4 again.
    torch.testing.assert_close(x_s, expected, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("variance", ["fixed_large", "fixed_small"])
def test_subsequence_uses_the_respaced_posterior(schedule, tensors, variance):
    x0, _, noise = tensors
    x_t = tensors[1]
    bars = schedule.alpha_bars[INDICES]
    prev = torch.cat([torch.ones(1, dtype=torch.float64), bars[:-1]])
    beta = 1 - bars / prev
    mean = (
        _column(prev.sqrt() * beta / (1 - bars)) * x0.clamp(-1, 1)
        + _column((bars / prev).sqrt() * (1 - prev) / (1 - bars)) * x_t
    )
    sigma = (beta if variance == "fixed_large" else beta * (1 - prev) / (1 - bars)).sqrt()
    sigma[0] = 0
    table = schedule.ddpm_table(INDICES, variance)
    x_s, pred_x0 = ddpm_step(
        x_t, x0, torch.arange(5), table, prediction="x0", noise=noise, return_pred_x0=True
    )
    assert torch.equal(pred_x0, x0.clamp(-1, 1))
    torch.testing.assert_close(x_s, mean + _column(sigma) * noise, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_step_agrees_with_diffusers(schedule, tensors, variance):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDPMScheduler(
        num_train_timesteps=T, beta_schedule="linear", variance_type=variance, clip_sample=True
    )
    x0, eps, _ = (x[:1].float() for x in tensors)
    table = schedule.ddpm_table(variance=variance)
    for t in (0, 1, 500, 999):
        x_t = _noised(schedule, x0, eps, [t]).float()
        noise = torch.randn(x_t.shape, generator=torch.Generator().manual_seed(t))
        theirs = scheduler.step(eps, t, x_t, generator=torch.Generator().manual_seed(t))
        ours, pred_x0 = ddpm_step(
            x_t, eps, torch.tensor([t]), table, noise=noise, return_pred_x0=True
        )
        # Their float32 cumulative products: see test_ddim_step.py.
        torch.testing.assert_close(pred_x0, theirs.pred_original_sample, rtol=2e-3, atol=2e-3)
        torch.testing.assert_close(ours, theirs.prev_sample, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("indices", [range(T), INDICES, range(0, T, 7)])
def test_ddim_with_eta_1_is_ddpm_with_the_small_variance(schedule, tensors, indices):
    """At every step, with the same noise (DDIM §4.1)."""
    indices = list(indices)
    ddpm, ddim = schedule.ddpm_table(indices, "fixed_small"), schedule.ddim_table(indices, 1.0)
    num = len(indices)
    generator = torch.Generator().manual_seed(0)
    x0, eps, noise = torch.randn(3, num, 8, generator=generator, dtype=torch.float64).unbind(0)
    a = schedule.sqrt_alpha_bars[indices, None]
    x_t = a * x0 + schedule.sqrt_one_minus_alpha_bars[indices, None] * eps
    step = torch.arange(num)
    ancestral = ddpm_step(x_t, eps, step, ddpm, noise=noise)
    implicit = ddim_step(x_t, eps, step, ddim, noise=noise)
    # Both round their coefficients to float32, 6e-8; DDIM's eps term is amplified by up to
    # a/s = 100 before it is scaled down.
    torch.testing.assert_close(implicit, ancestral, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        ddim[:, StepColumn.SIGMA], ddpm[:, StepColumn.SIGMA], rtol=1e-6, atol=0
    )


def test_learned_range_interpolates_the_log_variance(schedule, tensors):
    x0, eps, noise = tensors
    x_t = _noised(schedule, x0, eps, INDICES)
    v = torch.linspace(-1, 1, x_t.numel(), dtype=torch.float64).reshape(SHAPE)
    table = schedule.ddpm_table(INDICES, "learned_range")
    spaced = schedule.respace(INDICES)
    fraction = (v + 1) / 2
    log_variance = fraction * _column(spaced.betas.log()) + (1 - fraction) * _column(
        spaced.posterior_log_variance_clipped
    )
    sigma = (log_variance / 2).exp()
    sigma[0] = 0
    step, output = torch.arange(5), torch.cat([eps, v], 1)
    x_s = ddpm_step(x_t, output, step, table, learned_range=True, noise=noise)
    mean = ddpm_step(x_t, output, step, table, learned_range=True, noise=torch.zeros(SHAPE))
    torch.testing.assert_close(x_s - mean, sigma * noise, rtol=1e-5, atol=1e-6)


def test_learned_variance_is_the_outputs_log_variance(schedule, tensors):
    x0, eps, noise = tensors
    x_t = _noised(schedule, x0, eps, INDICES)
    table, step = schedule.ddpm_table(INDICES, "learned"), torch.arange(5)
    output = torch.cat([eps, x0], 1)
    x_s = ddpm_step(x_t, output, step, table, learned_range=True, noise=noise)
    mean = ddpm_step(x_t, output, step, table, learned_range=True, noise=torch.zeros(SHAPE))
    sigma = (x0 / 2).exp()
    sigma[0] = 0
    torch.testing.assert_close(x_s - mean, sigma * noise, rtol=1e-6, atol=1e-6)


def test_guidance_moves_the_mean_and_keeps_the_conditional_variance(schedule, tensors):
    x_t, cond, uncond = tensors
    v = torch.full(SHAPE, 0.5, dtype=torch.float64)
    table, step = schedule.ddpm_table(INDICES, "learned_range"), torch.arange(5)
    guided = ddpm_step(
        x_t,
        torch.cat([cond, v], 1),
        step,
        table,
        learned_range=True,
        uncond=torch.cat([uncond, -v], 1),
        guidance_scale=2.0,
        seed=1,
    )
    output = torch.cat([2 * cond - uncond, v], 1)
    expected = ddpm_step(x_t, output, step, table, learned_range=True, seed=1)
    torch.testing.assert_close(guided, expected)


def test_seed_is_its_noise(schedule, tensors):
    x_t, eps, _ = (x.float() for x in tensors)
    table, step = schedule.ddpm_table(INDICES), torch.arange(5)
    noise = ops.philox_normal(SHAPE, 11, stream=4)
    seeded = ddpm_step(x_t, eps, step, table, seed=11, stream=4)
    torch.testing.assert_close(seeded, ddpm_step(x_t, eps, step, table, noise=noise))


def test_samples_of_a_batch_may_be_at_different_steps(schedule, tensors):
    x_t, eps, noise = tensors
    table, step = schedule.ddpm_table(INDICES), torch.tensor([4, 0, 2, 2, 1])
    batched = ddpm_step(x_t, eps, step, table, noise=noise)
    for k in range(5):
        one = ddpm_step(
            x_t[k : k + 1], eps[k : k + 1], step[k : k + 1], table, noise=noise[k : k + 1]
        )
        torch.testing.assert_close(batched[k : k + 1], one, rtol=0, atol=0)


def test_bad_arguments(schedule):
    x, step, table = torch.zeros(SHAPE), torch.arange(5), schedule.ddpm_table(INDICES)
    with pytest.raises(ValueError, match="neither was given"):
        ddpm_step(x, x, step, table)
    with pytest.raises(ValueError, match=r"expected \(5, 4, 4, 4\)"):
        ddpm_step(x, x, step, table, learned_range=True, seed=0)
    with pytest.raises(ValueError, match=r"model_output .* expected \(5, 2, 4, 4\)$"):
        ddpm_step(x, torch.zeros(5, 4, 4, 4), step, table, seed=0)
    with pytest.raises(ValueError, match="unknown variance 'large'; choose from fixed_large"):
        schedule.ddpm_table(INDICES, "large")
