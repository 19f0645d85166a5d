"""Every sampler, schedule, spacing and number of steps on Gaussian data (Math §7)."""

import math

import pytest
import torch

from fastdiff.diffusion.analytic import GaussianDenoiser
from fastdiff.diffusion.gaussian import GaussianDiffusion
from fastdiff.diffusion.schedules import SCHEDULES, NoiseSchedule
from fastdiff.reference.step_columns import StepColumn
from fastdiff.samplers import DDIM, SAMPLERS, SPACINGS, Heun, ProbabilityFlow, from_name
from fastdiff.samplers.resolution import euler_in_variance

MEAN, VARIANCE, DATA = 0.3, 0.25, (1, 16, 16)
NAMES = [name for name in SCHEDULES if name != "scaled_linear"]  # which is quadratic

# The variance of samples over that which the exact flow and E[x0 | x] at the last timestep leave,
# by S. Found at T = 1000: 0.08 to 4.0, 0.10 to 3.7, 0.54 to 3.3; the lowest are Euler's steps on
# the constant schedule, whose sg spans five orders of magnitude. Before the rule: up to 4e7.
BOUNDS = {5: (0.07, 4.2), 10: (0.09, 4.2), 50: (0.5, 3.5), "T": (0.75, 2.0)}


def _process(name, T):
    if name == "cosine, zero terminal SNR":
        schedule = NoiseSchedule.cosine(T).rescale_zero_terminal_snr()
    else:
        schedule = NoiseSchedule.from_name(name, T)
    prediction = "v" if schedule.has_zero_terminal_snr else "eps"
    model = GaussianDenoiser(
        torch.full(DATA, MEAN), torch.full(DATA, VARIANCE), schedule, prediction
    )
    return GaussianDiffusion(schedule, prediction), model


def _check(sampler_name, schedule, T, steps, spacing):
    """Samples have the data's moments within bounds, or the sampler refuses with its reason."""
    diffusion, model = _process(schedule, T)
    count = T if steps == "T" else steps
    try:
        sampler = from_name(
            sampler_name, diffusion, steps=count, spacing=spacing, clip_denoised=False
        )
    except ValueError as error:
        reason = str(error)
        infinite = diffusion.schedule.has_zero_terminal_snr and "zero SNR" in reason
        coarse = sampler_name == "annealed_langevin" and "times their variance; use" in reason
        assert infinite or (coarse and steps != "T"), reason
        return None
    samples = sampler.sample(model, (4, *DATA), seed=1, progress=False, dtype=torch.float64)
    # The last step is E[x0 | x]: of what lies below that noise level nothing can be left.
    level = 1 / float(diffusion.schedule.snr[sampler.indices[0]])
    ratio = float(samples.var()) * (VARIANCE + level) / VARIANCE**2
    low, high = BOUNDS[steps]
    assert low < ratio < high, ratio
    # The mean of x_T is 0 where sqrt(abar_T) 0.3 would be right, which few of these levels hide.
    assert abs(float(samples.mean()) - MEAN) < 0.15
    return ratio


@pytest.mark.parametrize("steps", [5, 10])
@pytest.mark.parametrize("schedule", [*NAMES, "cosine, zero terminal SNR"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_few_steps(sampler, schedule, steps):
    for spacing in SPACINGS:
        _check(sampler, schedule, 1000, steps, spacing)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_fifty_and_all_of_two_schedules(sampler, schedule):
    for spacing in ("trailing", "logsnr"):
        _check(sampler, schedule, 100, 50, spacing)
    _check(sampler, schedule, 100, "T", "leading")


@pytest.mark.slow
@pytest.mark.parametrize("steps", [50, "T"])
@pytest.mark.parametrize("schedule", [*NAMES, "cosine, zero terminal SNR"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_many_steps(sampler, schedule, steps):
    for spacing in SPACINGS if steps == 50 else ["leading"]:
        _check(sampler, schedule, 1000, steps, spacing)


def test_equation_15_takes_the_steps_that_it_resolves():
    """Of the cosine schedule all but the noisiest few; of a linear one, whose jumps are small, all.
    The others are DDIM's."""
    for name, least, most in (("cosine", 980, 998), ("linear", 999, 999)):
        schedule = NoiseSchedule.from_name(name, 1000)
        rows = euler_in_variance(schedule, torch.arange(1000))
        assert least <= int(rows.sum()) <= most
        assert not bool(rows[0])
        assert bool(rows[1 : int(rows.sum()) + 1].all())  # up to some level, none above
    diffusion = GaussianDiffusion(NoiseSchedule.cosine(1000))
    flow, ddim = (s(diffusion, 20, spacing="logsnr") for s in (ProbabilityFlow, DDIM))
    rows = euler_in_variance(diffusion.schedule, flow.indices)
    assert 1 <= int(rows.sum()) <= 12
    torch.testing.assert_close(flow._table()[~rows], ddim._table()[~rows], rtol=1e-6, atol=1e-7)


def test_the_excess_of_equation_15_is_that_of_its_table():
    """The rule's product against the table run as an affine recursion of a Gaussian's deviation."""
    schedule = NoiseSchedule.linear(1000)
    indices = torch.arange(0, 1000, 25)
    c = StepColumn
    sampler = ProbabilityFlow(GaussianDiffusion(schedule), spacing=indices)
    rows = euler_in_variance(schedule, indices)
    assert 10 < int(rows.sum()) < len(rows) - 1
    top = int(rows.sum())
    spaced = schedule.respace(indices)
    deviation = (spaced.alpha_bars * VARIANCE + spaced.one_minus_alpha_bars).sqrt()
    x = deviation[top]
    table = sampler._table().double()
    for row in range(top, 0, -1):
        eps = spaced.sqrt_one_minus_alpha_bars[row] * x / deviation[row] ** 2
        x = table[row, c.COEF_X_T] * x + table[row, c.COEF_EPS] * eps
    excess = float((x / deviation[0]) ** 2)
    assert 1.7 < excess <= 2.0 + 1e-4
    # One more step would have been too much.
    eps = spaced.sqrt_one_minus_alpha_bars[top + 1] / deviation[top + 1]
    level = 1 / spaced.snr
    factor = 1 + (level[top] - level[top + 1]) / (2 * (level[top + 1] + VARIANCE))
    true = ((level[top] + VARIANCE) / (level[top + 1] + VARIANCE)).sqrt()
    assert excess * float(factor / true) ** 2 > 2.0


def test_heun_evaluates_once_where_it_does_not_correct():
    times = []

    def spy(x_t, t):
        times.append(int(t[0]))
        return 0.1 * x_t

    schedule = NoiseSchedule.cosine(1000)  # sg = 20,300, 642, 321, ...
    Heun(GaussianDiffusion(schedule), spacing=[900, 997, 998, 999]).sample(
        spy, (1, 1, 2, 2), progress=False
    )
    assert times == [999, 998, 997, 997, 900]


@pytest.mark.parametrize("sampler", ["probability_flow", "heun"])
@pytest.mark.parametrize("spacing", ["trailing", "logsnr"])
def test_a_network_s_errors_are_not_blown_up(sampler, spacing):
    """The exact network of data at +-1 with an error of 0.05 in every x0, clipped as for images."""
    schedule = NoiseSchedule.cosine(1000)
    diffusion = GaussianDiffusion(schedule, prediction="x0")

    def model(x, t):
        a, noise = schedule.sqrt_alpha_bars[t], schedule.one_minus_alpha_bars[t]
        shape = (-1, 1, 1, 1)
        x0 = torch.tanh(a.reshape(shape) * x / noise.reshape(shape))
        return x0 + 0.05 * torch.sin(37.0 * t.reshape(shape) + 1000 * x)

    x = from_name(sampler, diffusion, steps=50, spacing=spacing).sample(
        model, (64, 1, 8, 8), seed=0, dtype=torch.float64, progress=False
    )
    share = float((x > 0).double().mean())
    assert abs(share - 0.5) < 5 * math.sqrt(0.25 / x.numel())
    assert float((x.abs() - 1).abs().mean()) < 0.1


def test_langevin_says_how_many_steps_it_needs():
    diffusion = GaussianDiffusion(NoiseSchedule.linear(1000))
    with pytest.raises(ValueError, match=r"inner_steps is 5, too few for 5 noise levels") as found:
        from_name("annealed_langevin", diffusion, steps=5)
    needed = int(str(found.value).partition("use inner_steps=")[2].partition(",")[0])
    from_name("annealed_langevin", diffusion, steps=5, inner_steps=needed)
    with pytest.raises(ValueError, match="too few"):
        from_name("annealed_langevin", diffusion, steps=5, inner_steps=needed - 1)
