"""Deterministic samplers on exact networks: orders, endpoints, encoding (Math §7, §10)."""

import itertools

import pytest
import torch

from fastdiff.diffusion.analytic import GaussianDenoiser, MixtureDenoiser
from fastdiff.diffusion.gaussian import GaussianDiffusion
from fastdiff.diffusion.schedules import NoiseSchedule
from fastdiff.samplers import DDIM, DPMSolverPP, Heun, ProbabilityFlow

DATA = (1, 2, 2)
ODE_SAMPLERS = [DDIM, ProbabilityFlow, Heun, DPMSolverPP]


@pytest.fixture(scope="module")
def schedule():
    return NoiseSchedule.linear(1000)


@pytest.fixture(scope="module")
def diffusion(schedule):
    return GaussianDiffusion(schedule)


@pytest.fixture(scope="module")
def model(schedule):
    """N(0.3, 0.4^2) data."""
    return GaussianDenoiser(torch.full(DATA, 0.3), torch.full(DATA, 0.4**2), schedule)


@pytest.fixture(scope="module")
def x_T():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(16, *DATA, generator=generator, dtype=torch.float64)


def _last_state(sampler, model, x_T):
    """The state at the first visited timestep, before the step to clean data."""
    seen = []
    sampler.sample(
        model, x_T=x_T, progress=False, callback=lambda step, t, x_t, pred_x0: seen.append((t, x_t))
    )
    return seen[-1]


@pytest.mark.parametrize(
    ("make", "spacing", "order", "tolerance"),
    [
        (DDIM, "linspace", 1, 0.15),
        (DDIM, "quadratic", 1, 0.15),
        (DDIM, "logsnr", 1, 0.15),
        (Heun, "linspace", 2, 0.4),
        (Heun, "quadratic", 2, 0.4),
        (Heun, "logsnr", 2, 0.4),
        (DPMSolverPP, "logsnr", 2, 0.4),
    ],
)
def test_order_of_convergence(diffusion, model, x_T, make, spacing, order, tolerance):
    """log error against log S, up to the last noise level that every S shares.

    The step from there to clean data is DDIM's in all samplers: it adds 1e-4 whatever S is.
    """
    steps, errors = (20, 40, 80, 160), []
    for num in steps:
        sampler = make(diffusion, num, spacing=spacing, clip_denoised=False)
        assert int(sampler.indices[0]) == 0
        t, state = _last_state(sampler, model, x_T)
        last = sampler.indices[-1:].expand(len(x_T))
        exact = model.flow(x_T, last, torch.full_like(last, t))
        errors.append(float((state - exact).square().mean().sqrt()))
    x = torch.tensor(steps, dtype=torch.float64).log()
    y = torch.tensor(errors, dtype=torch.float64).log()
    slope = float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())
    assert abs(-slope - order) < tolerance, errors


def test_higher_order_is_more_accurate_with_the_same_number_of_evaluations(diffusion, model, x_T):
    exact = model.decode(x_T, torch.full((len(x_T),), 999))

    def error(sampler):
        return float((sampler.sample(model, x_T=x_T, progress=False) - exact).abs().mean())

    ddim = error(DDIM(diffusion, 40, spacing="linspace", clip_denoised=False))
    assert error(Heun(diffusion, 20, "linspace", clip_denoised=False)) < ddim / 2
    assert error(DPMSolverPP(diffusion, 40, clip_denoised=False)) < ddim / 5


@pytest.mark.parametrize("kind", ["gaussian", "mixture"])
def test_all_end_at_the_same_point_as_S_grows(schedule, diffusion, model, x_T, kind):
    if kind == "mixture":
        means = torch.stack([torch.full(DATA, -0.5), torch.full(DATA, 0.6)])
        variances = torch.full((2, *DATA), 0.3)
        model = MixtureDenoiser(torch.tensor([0.4, 0.6]), means, variances, schedule)
    distances = {make: [] for make in ODE_SAMPLERS[1:]}
    for num in (50, 200):
        ends = {
            make: make(diffusion, num, spacing="linspace", clip_denoised=False).sample(
                model, x_T=x_T, progress=False
            )
            for make in ODE_SAMPLERS
        }
        for make, values in distances.items():
            values.append(float((ends[make] - ends[DDIM]).square().mean().sqrt()))
    for values in distances.values():
        # Both errors fall as 1/S, so their difference does.
        assert values[1] < values[0] / 3, values
        assert values[1] < 0.1, values


@pytest.mark.parametrize("make", ODE_SAMPLERS)
def test_reconstruction_improves_with_S(schedule, diffusion, make):
    """DDIM's Table 2 with an exact network: decode(encode(x0)) per dimension."""
    root = torch.tensor([[0.5, 0.1, 0, 0], [0, 0.4, 0.2, 0], [0, 0, 0.3, 0.1], [0.1, 0, 0, 0.6]])
    model = GaussianDenoiser(torch.full(DATA, 0.2), root @ root.T, schedule)
    x0 = model.sample_x0(4, torch.Generator().manual_seed(2))
    errors = []
    for num in (50, 200, 1000):
        sampler = make(diffusion, num, spacing="linspace", clip_denoised=False)
        x_T = sampler.encode(model, x0, progress=False)
        back = sampler.decode(model, x_T, progress=False)
        errors.append(float((back - x0).square().mean()))
    assert errors[2] < errors[1] < errors[0], errors
    assert errors[2] < 1e-3


@pytest.mark.parametrize("make", [DDIM, Heun, DPMSolverPP])
def test_encoding_approaches_the_exact_flow(diffusion, model, make):
    """From the lowest noise level on; the step from clean data to there is a guess of eps."""
    x0 = model.sample_x0(16, torch.Generator().manual_seed(3))
    errors = []
    for num in (100, 400):
        sampler = make(diffusion, num, spacing="linspace", clip_denoised=False)
        seen = []
        x_T = sampler.encode(
            model, x0, progress=False, callback=lambda k, t, x_t, pred, s=seen: s.append(x_t)
        )
        first = torch.zeros(len(x0), dtype=torch.int64)
        exact = model.flow(seen[1], first, torch.full_like(first, 999))
        errors.append(float((x_T - exact).square().mean().sqrt()))
    assert errors[1] < errors[0] / 2, errors
    assert errors[1] < 0.05


def test_the_probability_flow_step_is_equation_15(schedule):
    diffusion = GaussianDiffusion(schedule)
    sampler = ProbabilityFlow(diffusion, spacing=[100, 300, 340], clip_denoised=False)
    abar = schedule.alpha_bars
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, *DATA, generator=generator, dtype=torch.float64)
    states = []
    sampler.sample(
        lambda x, t: 0.3 * x - 0.1,
        x_T=x,
        progress=False,
        callback=lambda step, t, x_t, pred_x0: states.append(x_t),
    )
    for (before, after), (t, s) in zip(
        itertools.pairwise(states), [(340, 300), (300, 100)], strict=True
    ):
        eps = 0.3 * before - 0.1
        gap = ((1 - abar[s]) / abar[s] - (1 - abar[t]) / abar[t]) / 2
        expected = before / abar[t].sqrt() + gap * (abar[t] / (1 - abar[t])).sqrt() * eps
        # The table is float32: 6e-8 of the terms' size, which is up to 300.
        torch.testing.assert_close(after / abar[s].sqrt(), expected, rtol=1e-6, atol=1e-4)


def test_heun_counts_two_evaluations_per_step_but_one_in_the_last(diffusion):
    times = []

    def spy(x_t, t):
        times.append(int(t[0]))
        return 0.1 * x_t

    sampler = Heun(diffusion, spacing=[10, 300, 500])
    sampler.sample(spy, (1, *DATA), progress=False)
    assert times == [500, 300, 300, 10, 10]
    times.clear()
    sampler.encode(spy, torch.zeros(1, *DATA), progress=False)
    assert times == [0, 10, 10, 300, 300, 500]


@pytest.mark.parametrize("make", [ProbabilityFlow, Heun, DPMSolverPP])
@pytest.mark.parametrize("prediction", ["x0", "v"])
def test_predictions_agree(schedule, x_T, make, prediction):
    samples = [
        make(GaussianDiffusion(schedule, prediction=kind), 20, "linspace").sample(
            GaussianDenoiser(torch.full(DATA, 0.3), torch.full(DATA, 0.1), schedule, kind),
            x_T=x_T,
            progress=False,
        )
        for kind in ("eps", prediction)
    ]
    # x0 from eps at t = 999 multiplies float32 rounding by 1/sqrt(abar) = 157, and the step of
    # the probability flow by as much again.
    torch.testing.assert_close(samples[1], samples[0], rtol=0, atol=2e-3)


def test_dpm_solver_starts_at_zero_terminal_snr():
    schedule = NoiseSchedule.cosine(100).rescale_zero_terminal_snr()
    model = GaussianDenoiser(torch.full(DATA, 0.3), torch.full(DATA, 0.04), schedule, "v")
    diffusion = GaussianDiffusion(schedule, prediction="v")
    x_T = torch.randn(8, *DATA, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    samples = DPMSolverPP(diffusion, 40, clip_denoised=False).sample(model, x_T=x_T, progress=False)
    exact = model.decode(x_T, torch.full((8,), 99))
    assert float((samples - exact).abs().max()) < 0.02
    for make in (Heun, ProbabilityFlow):
        with pytest.raises(ValueError, match=f"{make.__name__} starts at a finite noise level"):
            make(diffusion, 10, "trailing")
    with pytest.raises(ValueError, match="DPMSolverPP starts at a finite noise level"):
        DPMSolverPP(diffusion, 10, "trailing").encode(model, x_T, progress=False)


@pytest.mark.parametrize("make", [ProbabilityFlow, Heun, DPMSolverPP])
def test_arguments(diffusion, make):
    with pytest.raises(ValueError, match=r"steps is 1001, expected 1\.\.1000"):
        make(diffusion, 1001)
    with pytest.raises(ValueError, match="5 is followed by 3"):
        make(diffusion, spacing=[5, 3])
    assert make(diffusion).steps == 50
