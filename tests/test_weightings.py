"""Weights per timestep, and those of DDIM's theorem 1 (Math §6)."""

import math

import numpy as np
import pytest
import torch

from fastdiff.diffusion.gaussian import GaussianDiffusion
from fastdiff.diffusion.parameterizations import convert
from fastdiff.diffusion.schedules import NoiseSchedule
from fastdiff.diffusion.weightings import WEIGHTINGS, theorem1_gamma, weights

PREDICTIONS = ["eps", "x0", "v", "mean"]
SHAPE = (5, 2, 4, 4)
TIMES = torch.tensor([0, 1, 7, 12, 19])


@pytest.fixture(scope="module")
def schedule():
    return NoiseSchedule.linear(20, beta_start=0.01, beta_end=0.3)


@pytest.fixture(scope="module")
def batch():
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, *SHAPE, dtype=torch.float64, generator=generator)
    return x0.tanh(), noise


def model(x, t):
    return (1.3 * x).sin()


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_every_prediction_has_the_same_weighted_error(schedule, batch, name):
    """The same x0 predicted as eps, v or mean costs the same, whatever the prediction."""
    x0, noise = batch
    losses = {}
    for prediction in PREDICTIONS:
        diffusion = GaussianDiffusion(schedule, prediction, weighting=name)

        def network(x, t, prediction=prediction):
            return convert(schedule, "x0", prediction, x.sin(), x, t)

        losses[prediction] = diffusion.training_losses(network, x0, TIMES, noise)["loss"]
    for prediction in PREDICTIONS[1:]:
        torch.testing.assert_close(losses[prediction], losses["eps"], rtol=1e-4, atol=0)


def test_weights_have_the_published_forms():
    schedule = NoiseSchedule.cosine(1000)
    snr = schedule.alpha_bars / schedule.one_minus_alpha_bars
    five, one = torch.tensor(5.0), torch.tensor(1.0)
    ones = torch.ones_like(snr)
    for name, prediction, expected in (
        ("min_snr", "eps", torch.minimum(snr, five) / snr),
        ("min_snr", "x0", torch.minimum(snr, five)),
        ("min_snr", "v", torch.minimum(snr, five) / (snr + 1)),
        ("snr", "eps", ones),
        ("snr_plus_one", "v", ones),
        ("truncated_snr", "x0", torch.maximum(snr, one)),
        ("p2", "eps", 1 / (1 + snr)),
    ):
        torch.testing.assert_close(weights(name, schedule, prediction), expected)
    torch.testing.assert_close(weights("min_snr", schedule, "x0", gamma=2.0), snr.clamp(max=2))


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("variance", ["fixed_large", "fixed_small"])
def test_exact_weights_give_the_bound_up_to_a_constant(schedule, batch, prediction, variance):
    """DDPM eq. 12: the difference to L_{t-1} does not depend on the network."""
    x0, noise = batch
    t = TIMES[1:]
    weighted = GaussianDiffusion(schedule, prediction, variance, weighting="exact")
    bound = GaussianDiffusion(schedule, prediction, variance, "kl")
    constants = []
    for network in (model, lambda x, t: 0.3 * x - 0.1):
        error = weighted.training_losses(network, x0[1:], t, noise[1:])["loss"]
        nats = math.log(2) * bound.training_losses(network, x0[1:], t, noise[1:])["vb"]
        constants.append(nats - error)
    torch.testing.assert_close(constants[0], constants[1], rtol=1e-5, atol=1e-5)
    if prediction == "eps":
        s = schedule
        sigma2 = s.betas if variance == "fixed_large" else s.posterior_variance
        eq12 = s.betas**2 / (2 * sigma2 * s.alphas * s.one_minus_alpha_bars)
        torch.testing.assert_close(weighted.weighting[1:], eq12[1:])


def test_zero_terminal_snr_has_finite_weights():
    schedule = NoiseSchedule.linear(50).rescale_zero_terminal_snr()
    for prediction in ("x0", "v", "mean"):
        for name in WEIGHTINGS:
            assert bool(weights(name, schedule, prediction).isfinite().all()), (name, prediction)


# ------------------------------------------------------------------ DDIM's theorem 1


@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_theorem_1_for_a_gaussian(eta):
    """J_sigma - L_gamma is the same for every eps_theta, J_sigma from its definition.

    J = E_q[log q_sigma(x_{1:T} | x0) - log p(x_{0:T})]: every factor is evaluated as a density and
    averaged over the joint distribution of x0 ~ N(0.3, 0.4^2) and the noises by Gauss-Hermite
    quadrature, exact for polynomials of this degree. (Factors without eps_theta are left out.)
    """
    schedule = NoiseSchedule.linear(6, beta_start=0.05, beta_end=0.4)
    abar, abar_s = schedule.alpha_bars, schedule.alpha_bars_prev
    sigma = eta * ((1 - abar_s) / (1 - abar) * (1 - abar / abar_s)).sqrt()
    sigma[0] = 0.2  # of p(x0 | x_1) alone
    gamma = theorem1_gamma(schedule, sigma)
    nodes, w = (torch.as_tensor(x) for x in _hermite(12))
    grid = torch.cartesian_prod(nodes, nodes, nodes)
    weight = torch.cartesian_prod(w, w, w).prod(1)
    x0, eps, z = 0.3 + 0.4 * grid[:, 0], grid[:, 1], grid[:, 2]

    def log_normal(x, mean, std):
        return torch.distributions.Normal(mean, std).log_prob(x)

    differences = []
    for slope, bend in ((0.0, 0.0), (0.7, 0.0), (0.5, 0.3)):
        j = l_gamma = 0.0
        for t in range(6):
            a, s = abar[t].sqrt(), (1 - abar[t]).sqrt()
            x_t = a * x0 + s * eps
            eps_theta = slope * x_t + bend * x_t**2 * (t + 1) / 6
            f = (x_t - s * eps_theta) / a
            l_gamma += float((weight * gamma[t] * (eps_theta - eps) ** 2).sum())
            if t == 0:
                j -= float((weight * log_normal(x0, f, sigma[0])).sum())
                continue
            direction = (1 - abar_s[t] - sigma[t] ** 2).clamp(min=0).sqrt()

            def q_mean(x0, a=a, s=s, x_t=x_t, t=t, direction=direction):
                return abar_s[t].sqrt() * x0 + direction * (x_t - a * x0) / s

            x_s = q_mean(x0) + sigma[t] * z
            ratio = log_normal(x_s, q_mean(x0), sigma[t]) - log_normal(x_s, q_mean(f), sigma[t])
            j += float((weight * ratio).sum())
        differences.append(j - l_gamma)
    assert differences[1] == pytest.approx(differences[0], rel=1e-9)
    assert differences[2] == pytest.approx(differences[0], rel=1e-9)


def _hermite(order):
    nodes, weights = np.polynomial.hermite_e.hermegauss(order)
    return nodes, weights / weights.sum()


def test_theorem_1_at_ddpm_s_sigma_is_ddpm_eq_12():
    schedule = NoiseSchedule.linear(1000)
    sigma = schedule.posterior_log_variance_clipped.mul(0.5).exp()
    gamma = theorem1_gamma(schedule, sigma)
    exact = weights("exact", schedule, variance="fixed_small")
    # c_t is a difference of numbers 1e4 times larger.
    torch.testing.assert_close(gamma, exact, rtol=1e-9, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s[:-1], r"sigma has shape \(9,\), expected \(10,\)"),
        (lambda s: s.index_fill(0, torch.tensor(3), 0.0), r"sigma\[3\] is 0\.0, expected a pos"),
        (lambda s: s.index_fill(0, torch.tensor(0), 0.0), r"sigma\[0\] is 0\.0"),
        (lambda s: s.index_fill(0, torch.tensor(1), 0.5), r"sigma\[1\] is 0\.5.* at most 0\.01"),
    ],
)
def test_impossible_sigmas_are_named(change, message):
    schedule = NoiseSchedule.linear(10)
    sigma = schedule.posterior_log_variance_clipped.mul(0.5).exp()
    theorem1_gamma(schedule, sigma)
    with pytest.raises(ValueError, match=message):
        theorem1_gamma(schedule, change(sigma))


def test_unknown_names_of_weights(schedule):
    with pytest.raises(ValueError, match="unknown weighting 'flat'; choose from min_snr, snr"):
        weights("flat", schedule)
    with pytest.raises(
        ValueError, match="unknown prediction 'score'; choose from eps, x0, v, mean"
    ):
        weights("snr", schedule, "score")
    with pytest.raises(ValueError, match=r"gamma is 0\.0, expected a positive number"):
        weights("min_snr", schedule, gamma=0.0)
