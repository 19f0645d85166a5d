"""The probability flow's likelihood against exact densities, and its solver (Math §6)."""

import math

import pytest
import torch

from fastdiff import ops
from fastdiff.diffusion import _dormand_prince
from fastdiff.diffusion.analytic import GaussianDenoiser, MixtureDenoiser
from fastdiff.diffusion.gaussian import GaussianDiffusion
from fastdiff.diffusion.likelihood import flow_likelihood
from fastdiff.diffusion.schedules import NoiseSchedule

SHAPE = (2, 2, 2)


@pytest.fixture(scope="module")
def gaussian():
    """Mean and a full covariance of 8 dimensions, samples and their log densities."""
    generator = torch.Generator().manual_seed(0)
    root = 0.2 * torch.randn(8, 8, dtype=torch.float64, generator=generator)
    covariance = root @ root.T + 0.05 * torch.eye(8)
    mean = torch.linspace(-0.5, 0.5, 8, dtype=torch.float64).reshape(SHAPE)
    exact = torch.distributions.MultivariateNormal(mean.flatten(), covariance)
    torch.manual_seed(1)
    x0 = exact.sample((12,))
    return mean, covariance, x0.reshape(12, *SHAPE), exact.log_prob(x0)


def likelihood(schedule, prediction, model, x0, **options):
    diffusion = GaussianDiffusion(schedule, prediction)
    options = {"seed": 0, "end_snr": 0.0, "progress": False, **options}
    return flow_likelihood(diffusion, model, x0, **options)


SCHEDULES = {
    "cosine": NoiseSchedule.cosine(1000),
    "zero_snr": NoiseSchedule.linear(1000).rescale_zero_terminal_snr(),
}


@pytest.mark.parametrize(
    ("name", "prediction"), [("cosine", "eps"), ("zero_snr", "v"), ("zero_snr", "x0")]
)
def test_exact_density_of_a_gaussian(gaussian, name, prediction):
    mean, covariance, x0, exact = gaussian
    schedule = SCHEDULES[name]
    model = GaussianDenoiser(mean, covariance, schedule, prediction)
    result = likelihood(schedule, prediction, model, x0, probes=None)
    # Nats of the whole sample, not per dimension.
    assert float((result.log_likelihood - exact).abs().max()) < 1e-3
    bits = -exact / (8 * math.log(2)) + math.log2(127.5)
    torch.testing.assert_close(result.bits_per_dim, bits, rtol=0, atol=2e-4)
    assert float(result.standard_error.abs().max()) == 0
    # The latents: as many standard deviations away in every direction.
    back = model.decode(result.latents, torch.full((12,), 999))
    assert float((back - x0).abs().max()) < 1e-3
    assert float(result.evaluations.double().mean()) < 100


def test_what_a_terminal_snr_costs_is_the_prior_s_mismatch(gaussian):
    """With abar_T = 4e-5 the density of x_T is not quite N(0, I): the only error."""
    mean, covariance, x0, exact = gaussian
    schedule = NoiseSchedule.linear(1000)
    model = GaussianDenoiser(mean, covariance, schedule)
    result = likelihood(schedule, "eps", model, x0, probes=None)
    x_T = result.latents
    true = model.log_prob(x_T, torch.full((12,), 999))
    assumed = -0.5 * (x_T.square().flatten(1).sum(1) + 8 * math.log(2 * math.pi))
    corrected = result.log_likelihood - assumed + true
    assert float((corrected - exact).abs().max()) < 1e-3
    assert float((result.log_likelihood - exact).abs().max()) > 2e-3


def test_the_flow_of_eps_ends_where_its_errors_are_not_amplified(gaussian):
    mean, covariance, x0, exact = gaussian
    schedule = NoiseSchedule.cosine(1000)
    assert schedule.terminal_snr < 1e-8
    oracle = GaussianDenoiser(mean, covariance, schedule)

    def network(x, t):
        # Only where the SNR is below 1e-4; 0.01 of eps is 1 of v there, and 200 at the end.
        late = (schedule.snr < 1e-4)[t].reshape(-1, 1, 1, 1)
        return oracle(x, t) + 0.01 * late * (10 * x).sin()

    errors = {}
    for end_snr in (0.0, None):
        result = likelihood(
            schedule, "eps", network, x0[:4], probes=None, end_snr=end_snr, rtol=1e-3, atol=1e-3
        )
        errors[end_snr] = float((result.log_likelihood - exact[:4]).abs().mean())
    assert errors[None] < 0.02  # N(0, I) is assumed at an SNR of 1e-4: sqrt(SNR) times the mean
    assert errors[0.0] > 0.2
    with pytest.raises(ValueError, match=r"end_snr is 1000000\.0, expected at most .* 24"):
        likelihood(schedule, "eps", network, x0, end_snr=1e6)


def test_exact_density_of_a_mixture():
    weights = torch.tensor([0.3, 0.7])
    means = torch.tensor([[-0.6, 0.4], [0.5, -0.3]], dtype=torch.float64)
    variances = torch.tensor([[0.05, 0.1], [0.2, 0.06]], dtype=torch.float64)
    schedule = NoiseSchedule.cosine(1000)
    model = MixtureDenoiser(weights, means, variances, schedule)
    x0 = model.sample_x0(16, torch.Generator().manual_seed(0))
    components = torch.distributions.Normal(means, variances.sqrt())
    exact = (components.log_prob(x0[:, None]).sum(-1) + weights.double().log()).logsumexp(1)
    result = likelihood(schedule, "eps", model, x0, probes=None, rtol=1e-6, atol=1e-6)
    # Linear interpolation over pi / 2000 of an angle, where the flow bends most.
    assert float((result.log_likelihood - exact).abs().max()) < 2e-3


def test_probes_are_unbiased_and_know_their_error(gaussian):
    mean, covariance, x0, exact = gaussian
    schedule = NoiseSchedule.cosine(1000)
    model = GaussianDenoiser(mean, covariance, schedule)
    result = likelihood(schedule, "eps", model, x0, probes=16)
    error = result.standard_error * 8 * math.log(2)
    assert 0.1 < float(error.mean()) < 1
    z = (result.log_likelihood - exact) / error
    # Twelve t statistics of 15 degrees: not far, and not all near either.
    assert float(z.abs().max()) < 5
    assert 0.3 < float(z.square().mean()) < 3
    one = likelihood(schedule, "eps", model, x0[:2], probes=1)
    assert bool(one.standard_error.isnan().all())
    assert bool(one.log_likelihood.isfinite().all())


def test_a_sample_s_result_does_not_depend_on_the_others(gaussian):
    mean, covariance, x0, _ = gaussian
    schedule = NoiseSchedule.cosine(100)
    model = GaussianDenoiser(mean, covariance, schedule)
    sizes = []

    def counted(x, t, y):
        assert torch.equal(y[: len(y) // 2], y[len(y) // 2 :])
        sizes.append(len(x))
        return model(x, t)

    labels = {"y": torch.arange(12)}
    options = {"probes": 2, "dequantize": True}
    whole = likelihood(schedule, "eps", counted, x0, model_kwargs=labels, **options)
    assert max(sizes) == 24
    sizes.clear()
    part = likelihood(schedule, "eps", counted, x0, model_kwargs=labels, max_batch=9, **options)
    assert max(sizes) == 8
    keys = ops.sample_keys(0, 12)
    last = likelihood(schedule, "eps", model, x0[7:], seed=keys[7:], **options)
    for name in ("log_likelihood", "bits_per_dim", "standard_error", "latents", "evaluations"):
        value = getattr(whole, name)
        torch.testing.assert_close(getattr(part, name), value, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(getattr(last, name), value[7:], rtol=1e-9, atol=1e-9)


def test_dequantized_bits_bound_those_of_the_levels():
    """E_u[-log2 p(x + u)] >= -log2 of the level's probability, and close to it."""
    mean = torch.zeros(1, 2, 2, dtype=torch.float64)
    variance = torch.full_like(mean, 0.01**2)  # little wider than a level
    schedule = NoiseSchedule.cosine(4000)
    model = GaussianDenoiser(mean, variance, schedule)
    levels = torch.full((200, 1, 2, 2), 128, dtype=torch.uint8)
    pixel = torch.distributions.Normal(0.0, torch.tensor(0.01, dtype=torch.float64))
    level = torch.tensor(1 / 255, dtype=torch.float64)
    exact = -float((pixel.cdf(2 * level) - pixel.cdf(0 * level)).log2())
    plain = likelihood(schedule, "eps", model, levels[:1], probes=None)
    noisy = likelihood(schedule, "eps", model, levels, probes=None, dequantize=True)
    flat = -float((pixel.log_prob(level) + math.log(2 / 255)) / math.log(2))
    # Float32 images; the first timestep's noise, 0.0035, is a third of the data's own width.
    assert float(plain.bits_per_dim[0]) == pytest.approx(flat, abs=0.02)
    u = torch.linspace(0, 2 / 255, 2001, dtype=torch.float64)
    expected = -float((pixel.log_prob(u) + math.log(2 / 255)).mean() / math.log(2))
    error = float(noisy.bits_per_dim.std()) / math.sqrt(200)
    assert float(noisy.bits_per_dim.mean()) == pytest.approx(expected, abs=4 * error + 0.02)
    assert expected > exact


def test_a_float32_network_is_evaluated_without_dropout():
    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = torch.nn.Conv2d(2, 2, 1)
            self.dropout = torch.nn.Dropout(0.5)

        def forward(self, x, t):
            return self.dropout(self.conv(x).tanh())

    torch.manual_seed(0)
    model = Network().train()
    x0 = torch.randint(256, (3, *SHAPE), dtype=torch.uint8)
    results = [
        likelihood(NoiseSchedule.cosine(50), "v", model, x0, probes=probes, rtol=1e-4, atol=1e-4)
        for probes in (None, None, 64)
    ]
    assert torch.equal(results[0].bits_per_dim, results[1].bits_per_dim)
    assert results[0].latents.dtype == torch.float32
    assert model.dropout.training
    difference = (results[2].bits_per_dim - results[0].bits_per_dim).abs()
    assert bool((difference < 5 * results[2].standard_error + 1e-3).all())


def test_bad_arguments_are_named(gaussian):
    mean, covariance, x0, _ = gaussian
    schedule = NoiseSchedule.cosine(10)
    model = GaussianDenoiser(mean, covariance, schedule)
    with pytest.raises(ValueError, match="probes is 0, expected 1 or more, or None"):
        likelihood(schedule, "eps", model, x0, probes=0)
    with pytest.raises(ValueError, match="max_batch is 1, expected 2 or more"):
        likelihood(schedule, "eps", model, x0, max_batch=1)
    with pytest.raises(ValueError, match=r"seed has shape \(2,\)"):
        likelihood(schedule, "eps", model, x0, seed=ops.sample_keys(0, 2))
    with pytest.raises(RuntimeError, match=r"no step .* for 12 of 12 samples: .*not finite"):
        likelihood(schedule, "eps", lambda x, t: x * torch.nan, x0)


# ------------------------------------------------------------------ the solver


def solve(slope, y, end, tolerance, **options):
    settings = {"first_step": 0.1, "parts": (y.shape[1],), **options}
    return _dormand_prince.integrate(slope, y, 0.0, end, rtol=tolerance, atol=tolerance, **settings)


def test_the_solver_s_error_follows_its_tolerance():
    y0 = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    exact = torch.tensor([[math.cos(5.0), -math.sin(5.0)]], dtype=torch.float64)
    errors, taken = [], []
    for tolerance in (1e-4, 1e-6, 1e-8, 1e-10):
        y, count = solve(lambda u, y, rows: torch.stack([y[:, 1], -y[:, 0]], 1), y0, 5.0, tolerance)
        errors.append(float((y - exact).norm()))
        taken.append(int(count))
    assert all(e < 100 * t for e, t in zip(errors, (1e-4, 1e-6, 1e-8, 1e-10), strict=True))
    # Fifth order: error ~ steps^-5.
    order = math.log(errors[0] / errors[3]) / math.log(taken[3] / taken[0])
    assert order == pytest.approx(5, abs=0.8)


def test_every_sample_takes_its_own_steps():
    rates = torch.tensor([0.1, 1.0, 30.0], dtype=torch.float64)

    def slope(u, y, rows):
        return -rates[rows, None] * (y - u[:, None].cos())

    y0, finished = torch.ones(3, 1, dtype=torch.float64), []
    together, taken = solve(slope, y0, 2.0, 1e-7, on_finish=finished.append)
    assert sum(finished) == 3
    assert int(taken[0]) < int(taken[1]) < int(taken[2])
    for k, rate in enumerate(rates.tolist()):
        alone, count = solve(
            lambda u, y, rows, k=k: slope(u, y, rows + k), y0[k : k + 1], 2.0, 1e-7
        )
        torch.testing.assert_close(alone[0], together[k], rtol=1e-12, atol=0)
        assert int(count) == int(taken[k])
        # y' = -r (y - cos u): r/(1 + r^2) (r cos u + sin u) + C exp(-r u).
        particular = rate / (1 + rate**2) * (rate * math.cos(2) + math.sin(2))
        exact = particular + (1 - rate**2 / (1 + rate**2)) * math.exp(-2 * rate)
        assert float(together[k]) == pytest.approx(exact, abs=1e-6)


def test_the_solver_gives_up_with_a_reason():
    y0 = torch.ones(1, 1, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"no step is small enough at 0\.5"):
        solve(lambda u, y, rows: 1 / (0.5 - u[:, None]).abs() ** 1.5, y0, 1.0, 1e-6)
    with pytest.raises(RuntimeError, match="more than 5 steps"):
        solve(lambda u, y, rows: (100 * u[:, None]).cos(), y0, 1.0, 1e-9, max_steps=5)
