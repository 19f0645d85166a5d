"""The oracles themselves, against quadrature, autograd and samples (Math §10)."""

import math

import pytest
import torch

from fastdiff.diffusion.analytic import GaussianDenoiser, MixtureDenoiser
from fastdiff.diffusion.parameterizations import convert
from fastdiff.diffusion.schedules import NoiseSchedule

DATA = (1, 2, 2)
TIMES = torch.tensor([0, 30, 99])


@pytest.fixture(scope="module")
def schedule():
    return NoiseSchedule.linear(100, rescale=True)


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def _mixture(schedule, generator, full, prediction="eps"):
    weights = torch.tensor([0.2, 0.5, 0.3])
    means = torch.randn(3, *DATA, generator=generator, dtype=torch.float64)
    if full:
        root = 0.5 * torch.randn(3, 4, 4, generator=generator, dtype=torch.float64)
        covariances = root @ root.mT
    else:
        covariances = 0.1 + torch.rand(3, *DATA, generator=generator, dtype=torch.float64)
    return MixtureDenoiser(weights, means, covariances, schedule, prediction)


def _torch_mixture(model, schedule, t):
    """q(x_t) as a torch.distributions object, for one t."""
    abar = schedule.alpha_bars[t]
    eye = torch.eye(4, dtype=torch.float64)
    axes = eye.expand(len(model.means), 4, 4) if model.axes is None else model.axes
    covariances = axes @ torch.diag_embed(model.variances) @ axes.mT
    components = torch.distributions.MultivariateNormal(
        abar.sqrt() * model.means, abar * covariances + (1 - abar) * eye
    )
    return torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(model.log_weights.exp()), components
    )


@pytest.mark.parametrize("full", [False, True])
def test_density_and_score(schedule, generator, full):
    model = _mixture(schedule, generator, full)
    x_t = torch.randn(3, *DATA, generator=generator, dtype=torch.float64).requires_grad_()
    for i, t in enumerate(TIMES.tolist()):
        expected = _torch_mixture(model, schedule, t).log_prob(x_t[i].flatten())
        actual = model.log_prob(x_t, TIMES)[i]
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
    (expected_score,) = torch.autograd.grad(model.log_prob(x_t, TIMES).sum(), x_t)
    torch.testing.assert_close(model.score(x_t, TIMES), expected_score, rtol=1e-9, atol=1e-9)
    eps = -schedule.sqrt_one_minus_alpha_bars[TIMES].reshape(-1, 1, 1, 1) * expected_score
    torch.testing.assert_close(model(x_t, TIMES), eps, rtol=1e-9, atol=1e-9)


def test_optimal_eps_is_the_conditional_expectation(schedule):
    """E[eps | x_t] by quadrature over x0, in one dimension."""
    model = MixtureDenoiser(
        torch.tensor([0.3, 0.7]),
        torch.tensor([[-0.5], [0.6]]),
        torch.tensor([[0.1], [0.02]]),
        schedule,
    )
    grid = torch.linspace(-6, 6, 400_001, dtype=torch.float64)
    density = _gauss(grid, -0.5, 0.1) * 0.3 + _gauss(grid, 0.6, 0.02) * 0.7
    for t in (5, 50, 99):
        a, s = schedule.sqrt_alpha_bars[t], schedule.sqrt_one_minus_alpha_bars[t]
        eps = (0.4 - a * grid) / s
        weights = density * torch.exp(-(eps**2) / 2)
        expected = (weights * eps).sum() / weights.sum()
        actual = model(torch.full((1, 1), 0.4, dtype=torch.float64), torch.tensor([t]))
        # The data's float32 parameters.
        torch.testing.assert_close(actual[0, 0], expected, rtol=1e-6, atol=1e-6)


def _gauss(x, mean, variance):
    return torch.exp(-((x - mean) ** 2) / (2 * variance)) / math.sqrt(2 * math.pi * variance)


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("prediction", ["x0", "v", "mean"])
def test_predictions_agree_with_the_conversions(schedule, full, prediction):
    eps_model, model = (
        _mixture(schedule, torch.Generator().manual_seed(0), full, kind)
        for kind in ("eps", prediction)
    )
    x_t = torch.randn(3, *DATA, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = convert(schedule, "eps", prediction, eps_model(x_t, TIMES), x_t, TIMES)
    # Float32 coefficients up to 1/sqrt(abar) = 170.
    torch.testing.assert_close(model(x_t, TIMES), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("full", [False, True])
def test_samples_have_the_mixture_s_moments(schedule, generator, full):
    model = _mixture(schedule, generator, full)
    num = 20_000
    samples = model.sample_x0(num, generator).flatten(1)
    weights = model.log_weights.exp()[:, None]
    mean = (weights * model.means).sum(0)
    axes = torch.eye(4, dtype=torch.float64).expand(3, 4, 4) if model.axes is None else model.axes
    within = axes @ torch.diag_embed(model.variances) @ axes.mT
    offsets = model.means - mean
    covariance = (weights[..., None] * (within + offsets[:, :, None] * offsets[:, None])).sum(0)
    deviation = covariance.diagonal().sqrt()
    assert bool(((samples.mean(0) - mean).abs() < 5 * deviation / math.sqrt(num)).all())
    # A mixture's covariance estimate scatters at most like that of a heavier-tailed normal.
    error = (samples.T.cov() - covariance).abs() / (deviation[:, None] * deviation)
    assert float(error.max()) < 8 / math.sqrt(num)


def test_decode_is_the_probability_flow(schedule):
    """d x/sqrt(abar) = eps d sg (DDIM eq. 14) along decode's trajectory, by finite differences."""
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(4, 4, generator=generator, dtype=torch.float64)
    dense = NoiseSchedule.linear(20_000, rescale=True)
    model = GaussianDenoiser(torch.full(DATA, 0.3), root @ root.T, dense)
    x0 = torch.randn(1, *DATA, generator=generator, dtype=torch.float64)
    t = 9000
    # Invert decode: it is affine, x0 = decode(0) + M x_t.
    basis = torch.eye(4, dtype=torch.float64).reshape(4, *DATA)

    def state(t):
        times = torch.full((4,), t)
        offset = model.decode(torch.zeros_like(basis), times)
        matrix = (model.decode(basis, times) - offset).flatten(1).T
        return torch.linalg.solve(matrix, (x0 - offset[:1]).flatten())

    a = dense.sqrt_alpha_bars
    sg = dense.sqrt_one_minus_alpha_bars / a
    slope = (state(t + 1) / a[t + 1] - state(t - 1) / a[t - 1]) / (sg[t + 1] - sg[t - 1])
    eps = model(state(t).reshape(1, *DATA), torch.tensor([t])).flatten()
    torch.testing.assert_close(slope, eps, rtol=1e-5, atol=1e-6)


def test_zero_terminal_snr_expects_the_mean():
    schedule = NoiseSchedule.jsd(10)
    model = GaussianDenoiser(torch.full(DATA, 0.3), torch.ones(DATA), schedule, "x0")
    out = model(torch.randn(1, *DATA), torch.tensor([9]))
    torch.testing.assert_close(out, torch.full((1, *DATA), 0.3))


def test_respaced_schedules_are_asked_at_the_original_timesteps(schedule):
    mean, variance = torch.zeros(DATA), torch.full(DATA, 0.3)
    model = GaussianDenoiser(mean, variance, schedule)
    spaced = GaussianDenoiser(mean, variance, schedule.respace([3, 50, 99]))
    x, t = torch.ones(2, *DATA), torch.tensor([50, 99])
    torch.testing.assert_close(spaced(x, t), model(x, t))


def test_errors(schedule):
    ones = torch.ones(DATA)
    with pytest.raises(ValueError, match="unknown prediction 'score'"):
        GaussianDenoiser(ones, ones, schedule, "score")
    with pytest.raises(ValueError, match=r"covariances has shape \(1, 3\)"):
        GaussianDenoiser(ones, torch.ones(3), schedule)
    with pytest.raises(ValueError, match="negative variances"):
        GaussianDenoiser(ones, -ones, schedule)
    with pytest.raises(ValueError, match=r"weights has shape \(2,\)"):
        MixtureDenoiser(torch.ones(2), torch.ones(3, 2), torch.ones(3, 2), schedule)
    with pytest.raises(ValueError, match="weights must be positive"):
        MixtureDenoiser(torch.zeros(3), torch.ones(3, 2), torch.ones(3, 2), schedule)
    with pytest.raises(ValueError, match=r"expected \(B, 1, 2, 2\)"):
        GaussianDenoiser(ones, ones, schedule)(torch.zeros(1, 3), torch.tensor([0]))
