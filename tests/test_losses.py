"""Every training loss: its value, its gradient, its weights (SPEC §6)."""

import math

import pytest
import torch

from fastdiff import ops
from fastdiff.gaussian import GaussianDiffusion
from fastdiff.losses import LOSSES
from fastdiff.parameterizations import convert
from fastdiff.schedules import NoiseSchedule
from fastdiff.weightings import WEIGHTINGS, theorem1_gamma, weights

PREDICTIONS = ["eps", "x0", "v", "mean"]
T = 20
SHAPE = (5, 2, 4, 4)
TIMES = torch.tensor([0, 1, 7, 12, 19])


@pytest.fixture(scope="module")
def schedule():
    return NoiseSchedule.linear(T, beta_start=0.01, beta_end=0.3)


@pytest.fixture(scope="module")
def batch():
    generator = torch.Generator().manual_seed(0)
    levels = torch.randint(256, SHAPE, dtype=torch.uint8, generator=generator)
    x0 = (2 * levels.double() - 255) / 255
    return x0, torch.randn(SHAPE, dtype=torch.float64, generator=generator)


def column(values):
    return values.reshape(-1, 1, 1, 1)


def model(x, t):
    return (1.3 * x).sin()


def with_variance(x, t):
    return torch.cat([(1.3 * x).sin(), 0.5 * x.cos()], dim=1)


# ------------------------------------------------------------------ values


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize(
    ("loss", "element"),
    [
        ("mse", lambda d: d**2),
        ("rescaled_mse", lambda d: T * d**2),
        ("l1", lambda d: d.abs()),
        ("huber", lambda d: torch.where(d.abs() < 1, d**2 / 2, d.abs() - 0.5)),
    ],
)
def test_errors_by_hand(schedule, batch, prediction, loss, element):
    x0, noise = batch
    diffusion = GaussianDiffusion(schedule, prediction, loss=loss)
    x_t = diffusion.q_sample(x0, TIMES, noise)
    target = convert(schedule, "x0", prediction, x0, x_t, TIMES)
    expected = element(model(x_t, TIMES) - target).flatten(1).mean(1)
    parts = diffusion.training_losses(model, x0, TIMES, noise)
    # Float32 tables: 6e-8, at t = 0 over sqrt(1 - abar) = 0.1.
    torch.testing.assert_close(parts["loss"], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("variance", ["fixed_large", "fixed_small", "learned", "learned_range"])
def test_kl_is_the_term_of_the_bound(schedule, batch, prediction, variance):
    x0, _ = batch
    network = with_variance if variance.startswith("learned") else model
    keys = ops.sample_keys(3, len(x0))
    diffusion = GaussianDiffusion(schedule, prediction, variance, "kl")
    parts = diffusion.training_losses(network, x0, TIMES, seed=keys, stream=4)
    x_t = diffusion.q_sample(x0, TIMES, seed=keys, stream=4)
    step = diffusion.p_mean_variance(network, x_t, TIMES, clip_denoised=False)
    mean, _, log_variance = diffusion.q_posterior(x0, x_t, TIMES)
    q, p = (
        torch.distributions.Normal(m, (v.double() / 2).exp())
        for m, v in ((mean, log_variance), (step.mean, step.log_variance))
    )
    expected = torch.distributions.kl_divergence(q, p).flatten(1).mean(1) / math.log(2)
    torch.testing.assert_close(parts["vb"][1:], expected[1:], rtol=1e-4, atol=1e-6)
    assert float(parts["vb"][0]) > 0  # L_0: tests/test_bound.py
    assert torch.equal(parts["loss"], parts["vb"])
    rescaled = GaussianDiffusion(schedule, prediction, variance, "rescaled_kl")
    scaled = rescaled.training_losses(network, x0, TIMES, seed=keys, stream=4)
    torch.testing.assert_close(scaled["loss"], T * parts["loss"])
    assert torch.equal(scaled["vb"], parts["vb"])


@pytest.mark.parametrize("variance", ["learned", "learned_range"])
def test_hybrid_adds_a_thousandth_of_the_bound(schedule, batch, variance):
    x0, noise = batch
    losses = {
        name: GaussianDiffusion(schedule, variance=variance, loss=name).training_losses(
            with_variance, x0, TIMES, noise
        )
        for name in ("hybrid", "kl")
    }
    mse = GaussianDiffusion(schedule).training_losses(model, x0, TIMES, noise)["loss"]
    hybrid = losses["hybrid"]
    torch.testing.assert_close(hybrid["mse"], mse)
    torch.testing.assert_close(hybrid["vb"], losses["kl"]["vb"])
    torch.testing.assert_close(hybrid["loss"], mse + T / 1000 * hybrid["vb"])


@pytest.mark.parametrize("loss", ["kl", "hybrid"])
def test_bounds_of_levels_flips_and_seeds(schedule, loss):
    levels = torch.randint(256, SHAPE, dtype=torch.uint8, generator=torch.manual_seed(1))
    flip = torch.tensor([True, False, True, False, True])
    diffusion = GaussianDiffusion(schedule, variance="learned_range", loss=loss)
    actual = diffusion.training_losses(with_variance, levels, TIMES, seed=7, stream=2, flip=flip)
    pixels = (2 * levels.float() - 255) / 255
    pixels[flip] = pixels[flip].flip(-1)
    noise = ops.philox_normal(SHAPE, 7, stream=2)
    expected = diffusion.training_losses(with_variance, pixels, TIMES, noise)
    for name in ("loss", "vb", "mse"):
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-4, atol=1e-5)
        assert actual[name].dtype == torch.float32


@pytest.mark.parametrize("loss", ["l1", "huber", "rescaled_mse"])
def test_noise_of_a_seed_is_not_stored(schedule, batch, loss, monkeypatch):
    x0 = batch[0].float()
    diffusion = GaussianDiffusion(schedule, loss=loss)
    noise = ops.philox_normal(SHAPE, 3, stream=7)
    stored = diffusion.training_losses(model, x0, TIMES, noise)["loss"]

    def refuse(*_, **__):
        raise AssertionError("the noise was made in memory")

    monkeypatch.setattr(ops, "philox_normal", refuse)
    regenerated = diffusion.training_losses(model, x0, TIMES, seed=3, stream=7)["loss"]
    torch.testing.assert_close(regenerated, stored, rtol=1e-5, atol=0)


# ------------------------------------------------------------------ gradients


def outputs(schedule, batch, learned):
    """A leaf that is the network's output, and a model that returns it."""
    generator = torch.Generator().manual_seed(2)
    shape = (SHAPE[0], SHAPE[1] * (2 if learned else 1), *SHAPE[2:])
    leaf = torch.randn(shape, dtype=torch.float64, generator=generator) / 2
    return leaf.requires_grad_(), lambda x, t: leaf


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("variance", ["fixed_large", "learned", "learned_range"])
def test_gradient_of_the_bound(schedule, batch, prediction, variance):
    x0, noise = batch
    leaf, network = outputs(schedule, batch, variance.startswith("learned"))
    diffusion = GaussianDiffusion(schedule, prediction, variance, "kl")

    def loss():
        return diffusion.training_losses(network, x0, TIMES, noise)["loss"].sum()

    (grad,) = torch.autograd.grad(loss(), leaf)
    assert float(grad.abs().amin()) > 0
    direction = torch.randn(leaf.shape, dtype=torch.float64, generator=torch.manual_seed(3))
    step = 1e-5
    with torch.no_grad():
        leaf += step * direction
        high = loss()
        leaf -= 2 * step * direction
        low = loss()
    # Central differences: step^2 = 1e-10 of the third derivative, 1e-16 / step of rounding.
    expected = float((high - low) / (2 * step))
    assert float((grad * direction).sum()) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("variance", ["learned", "learned_range"])
def test_hybrid_s_bound_trains_the_variance_alone(schedule, batch, prediction, variance):
    x0, noise = batch
    leaf, network = outputs(schedule, batch, learned=True)

    def gradient(loss, part):
        diffusion = GaussianDiffusion(schedule, prediction, variance, loss)
        parts = diffusion.training_losses(network, x0, TIMES, noise)
        return torch.autograd.grad(parts[part].sum(), leaf, allow_unused=True)[0]

    hybrid, mse, kl = (
        gradient("hybrid", "loss"),
        gradient("hybrid", "mse"),
        gradient("kl", "loss"),
    )
    channels = SHAPE[1]
    assert float(kl[:, :channels].abs().min()) > 0  # what is kept from the mean
    assert torch.equal(hybrid[:, :channels], mse[:, :channels])
    torch.testing.assert_close(hybrid[:, channels:], T / 1000 * kl[:, channels:])


@pytest.mark.parametrize("loss", ["kl", "hybrid"])
def test_losses_of_learned_variances_compile_whole(schedule, batch, loss):
    torch._dynamo.reset()
    x0, noise = (x.float() for x in batch)
    diffusion = GaussianDiffusion(schedule, variance="learned_range", loss=loss)

    def call(scale):
        def network(x, t):
            return scale * with_variance(x, t)

        return diffusion.training_losses(network, x0, TIMES, noise)["loss"].sum()

    gradients = []
    for function in (call, torch.compile(call, fullgraph=True, backend="aot_eager")):
        scale = torch.tensor(0.7, requires_grad=True)
        gradients.append(torch.autograd.grad(function(scale), scale)[0])
    torch.testing.assert_close(gradients[1], gradients[0])


# ------------------------------------------------------------------ weights


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


def test_weights_apply_to_the_error_and_not_to_the_bound(schedule, batch):
    x0, noise = batch
    weighting = torch.linspace(0, 2, T)
    for loss in ("mse", "l1", "huber", "rescaled_mse"):
        plain = GaussianDiffusion(schedule, loss=loss)
        weighted = GaussianDiffusion(schedule, loss=loss, weighting=weighting)
        expected = weighting[TIMES] * plain.training_losses(model, x0, TIMES, noise)["loss"]
        actual = weighted.training_losses(model, x0, TIMES, noise)["loss"]
        torch.testing.assert_close(actual, expected)
    hybrid = GaussianDiffusion(
        schedule, variance="learned_range", loss="hybrid", weighting=weighting
    ).training_losses(with_variance, x0, TIMES, noise)
    expected = weighting[TIMES] * hybrid["mse"] + T / 1000 * hybrid["vb"]
    torch.testing.assert_close(hybrid["loss"], expected)


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
    import numpy as np

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


# ------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "mae"}, f"unknown loss 'mae'; choose from {', '.join(LOSSES)}"),
        ({"loss": "hybrid"}, "variance='fixed_large' is fixed; choose variance='learned' or 'lea"),
        ({"loss": "kl", "weighting": "min_snr"}, "loss='kl' has the bound's own weights"),
        ({"weighting": "max_snr"}, "unknown weighting 'max_snr'; choose None, min_snr, snr, "),
        (
            {"weighting": "exact", "variance": "learned", "loss": "hybrid"},
            "weighting 'exact' belongs to variance='fixed_large' or 'fixed_small', not 'learned'",
        ),
    ],
)
def test_combinations_without_use_are_refused(schedule, options, message):
    with pytest.raises(ValueError, match=message):
        GaussianDiffusion(schedule, **options)


def test_unknown_names_of_weights(schedule):
    with pytest.raises(ValueError, match="unknown weighting 'flat'; choose from min_snr, snr"):
        weights("flat", schedule)
    with pytest.raises(
        ValueError, match="unknown prediction 'score'; choose from eps, x0, v, mean"
    ):
        weights("snr", schedule, "score")
    with pytest.raises(ValueError, match=r"gamma is 0\.0, expected a positive number"):
        weights("min_snr", schedule, gamma=0.0)
