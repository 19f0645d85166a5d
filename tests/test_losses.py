"""Every training loss: its value, its gradient, its weights (Math §6)."""

import math

import pytest
import torch

from fastdiff import ops
from fastdiff.diffusion.gaussian import GaussianDiffusion
from fastdiff.diffusion.losses import LOSSES
from fastdiff.diffusion.parameterizations import convert
from fastdiff.diffusion.schedules import NoiseSchedule

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
