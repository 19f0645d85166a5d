"""Categorical diffusion: exact marginals, exact samples, losses (DDIM appendix A, Math §8)."""

import pytest
import torch

from fastdiff import ops
from fastdiff.diffusion.categorical import CategoricalDiffusion, draw
from fastdiff.diffusion.schedules import NoiseSchedule

K, T = 3, 20
SIGMAS = [None, 0.0, 0.5, 1.0]


@pytest.fixture(scope="module")
def schedule():
    return NoiseSchedule.cosine(T)


def _all_pairs():
    """x0 and x_t over all K * K pairs, one sample each, one element per sample."""
    x0, x_t = torch.meshgrid(torch.arange(K), torch.arange(K), indexing="ij")
    return x0.reshape(-1, 1), x_t.reshape(-1, 1)


@pytest.mark.parametrize("sigma", SIGMAS)
@pytest.mark.parametrize(("t", "s"), [(0, -1), (1, 0), (7, 6), (19, 18), (12, 3), (19, -1)])
def test_the_posterior_has_the_exact_marginal(schedule, sigma, t, s):
    """sum over x_t of q(x_s | x_t, x0) q(x_t | x0) = q(x_s | x0): the forward process is kept."""
    diffusion = CategoricalDiffusion(schedule, K, sigma)
    x0, x_t = _all_pairs()
    times, previous = torch.full((K * K,), t), torch.full((K * K,), s)
    posterior = diffusion.q_posterior(diffusion.one_hot(x0), x_t, times, previous)[..., 0]
    assert float(posterior.min()) >= 0
    torch.testing.assert_close(posterior.sum(1), torch.ones(K * K), rtol=0, atol=1e-6)
    weights = diffusion.q_probs(x0, times)[..., 0].gather(1, x_t)
    marginal = (weights * posterior).reshape(K, K, K).sum(1)
    classes = torch.arange(K)[:, None]
    expected = diffusion.one_hot(classes)[..., 0]
    if s >= 0:
        expected = diffusion.q_probs(classes, previous[:K])[..., 0]
    torch.testing.assert_close(marginal, expected, rtol=0, atol=1e-6)


def test_forward_steps_compose(schedule):
    """q(x_t | x0) is the product of the one-step matrices alpha I + (1 - alpha)/K."""
    diffusion = CategoricalDiffusion(schedule, K)
    matrix = torch.eye(K, dtype=torch.float64)
    for t in range(T):
        alpha = schedule.alphas[t]
        matrix = matrix @ (alpha * torch.eye(K, dtype=torch.float64) + (1 - alpha) / K)
        actual = diffusion.q_probs(torch.arange(K)[:, None], torch.full((K,), t))[..., 0]
        torch.testing.assert_close(actual.double(), matrix, rtol=0, atol=1e-6)


def test_bayes_posterior_by_enumeration(schedule):
    diffusion = CategoricalDiffusion(schedule, K)
    x0, x_t = _all_pairs()
    t = 9
    times = torch.full((K * K,), t)
    actual = diffusion.q_posterior(diffusion.one_hot(x0), x_t, times)[..., 0]
    alpha = float(schedule.alphas[t])
    step = alpha * torch.eye(K) + (1 - alpha) / K
    prior = diffusion.q_probs(x0, times - 1)[..., 0]
    joint = prior * step[:, x_t[:, 0]].T
    torch.testing.assert_close(actual, joint / joint.sum(1, keepdim=True), rtol=0, atol=1e-6)


def test_sigma_1_draws_nothing_anew(schedule):
    """x_s is x_t or x0: no other class has weight."""
    diffusion = CategoricalDiffusion(schedule, K, 1.0)
    x0, x_t = _all_pairs()
    posterior = diffusion.q_posterior(diffusion.one_hot(x0), x_t, torch.full((K * K,), 9))
    other = (diffusion.one_hot(x0) + diffusion.one_hot(x_t)) == 0
    assert float(posterior[other].abs().max()) == 0


def _exact_model(diffusion, data):
    """p(x0 | x_t) of data that is one class with probabilities `data`, as logits."""

    def model(one_hot, t):
        x_t = one_hot.argmax(1)
        joint = torch.zeros_like(one_hot)
        for k in range(K):
            clean = torch.full_like(x_t, k)
            likelihood = diffusion.q_probs(clean, t).gather(1, x_t[:, None])[:, 0]
            joint[:, k] = data[k] * likelihood
        return joint.log()

    return model


@pytest.mark.parametrize("sigma", SIGMAS)
@pytest.mark.parametrize("steps", [T, 7])
def test_samples_with_the_exact_network_have_the_data_s_frequencies(schedule, sigma, steps):
    """With one element per datum the reverse chain is exact, for any S and sigma."""
    diffusion = CategoricalDiffusion(schedule, K, sigma)
    data = torch.tensor([0.6, 0.3, 0.1])
    num = 20_000
    samples = diffusion.sample(
        _exact_model(diffusion, data), (8, num // 8), steps=steps, seed=3, progress=False
    )
    frequencies = samples.flatten().bincount(minlength=K) / num
    standard = (data * (1 - data) / num).sqrt()
    # abar_T of the cosine schedule is 2e-5: x_T is uniform to far below the standard error.
    assert bool(((frequencies - data).abs() < 4 * standard).all()), frequencies


def test_draws_have_the_asked_probabilities():
    probs = torch.tensor([0.05, 0.15, 0.8])
    num = 50_000
    classes = draw(probs[None, :, None].expand(1, 3, num), 5, 2)
    frequencies = classes.flatten().bincount(minlength=3) / num
    assert bool(((frequencies - probs).abs() < 4 * (probs * (1 - probs) / num).sqrt()).all())
    certain = torch.tensor([0.0, 1.0, 0.0])[None, :, None].expand(1, 3, 1000)
    assert bool((draw(certain, 0, 0) == 1).all())


@pytest.mark.parametrize("sigma", SIGMAS)
def test_the_kl_is_that_of_torch_and_vanishes_for_the_truth(schedule, sigma):
    diffusion = CategoricalDiffusion(schedule, K, sigma, loss="kl")
    x0 = torch.randint(K, (6, 4, 4), generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0, 1, 5, 9, 15, 19])
    logits = torch.randn(6, K, 4, 4, generator=torch.Generator().manual_seed(1))

    def model(one_hot, t):
        return logits

    parts = diffusion.training_losses(model, x0, t, seed=2)
    x_t = diffusion.q_sample(x0, t, 2)
    true = diffusion.q_posterior(diffusion.one_hot(x0), x_t, t)
    predicted = diffusion.q_posterior(logits.softmax(1), x_t, t)
    terms = torch.xlogy(true, true) - torch.xlogy(true, predicted)
    torch.testing.assert_close(parts["loss"], terms.sum(1).mean((1, 2)), rtol=1e-5, atol=1e-6)
    cross_entropy = torch.nn.functional.cross_entropy(logits, x0, reduction="none").mean((1, 2))
    torch.testing.assert_close(parts["cross_entropy"], cross_entropy)
    # At t = 0 the KL is the reconstruction term.
    torch.testing.assert_close(parts["kl"][0], cross_entropy[0], rtol=1e-5, atol=1e-6)

    certain = 200 * diffusion.one_hot(x0)
    perfect = diffusion.training_losses(lambda x, t: certain, x0, t, seed=2)
    assert float(perfect["kl"].abs().max()) < 1e-5


def test_the_loss_is_smallest_at_the_exact_network(schedule):
    """Expected KL over data: any other prediction is worse."""
    diffusion = CategoricalDiffusion(schedule, K, loss="kl")
    data = torch.tensor([0.6, 0.3, 0.1])
    num = 4096
    x0 = torch.multinomial(
        data.expand(1, 3), num, replacement=True, generator=torch.Generator().manual_seed(0)
    ).reshape(num, 1)
    t = torch.arange(num) % T
    exact = _exact_model(diffusion, data)
    losses = [
        float(diffusion.training_losses(model, x0, t, seed=1)["kl"].mean())
        for model in (exact, lambda x, t: exact(x, t) * 0.7, lambda x, t: exact(x, t) * 1.5)
    ]
    assert losses[0] < min(losses[1:])


@pytest.mark.parametrize("loss", ["kl", "cross_entropy", "hybrid"])
def test_gradients_reach_the_network_and_are_finite(schedule, loss):
    diffusion = CategoricalDiffusion(schedule, K, loss=loss)
    logits = torch.zeros(T, K, 2, 2, requires_grad=True)
    x0 = torch.zeros(T, 2, 2, dtype=torch.int64)
    diffusion.training_losses(lambda x, t: logits, x0, torch.arange(T), seed=0)[
        "loss"
    ].sum().backward()
    assert bool(logits.grad.isfinite().all())
    assert float(logits.grad[:, 0].max()) <= 0  # towards class 0
    assert float(logits.grad[0, 0].max()) < 0


@pytest.mark.parametrize("sigma", [None, 0.5])
def test_samples_do_not_depend_on_how_the_batch_is_split(schedule, sigma):
    diffusion = CategoricalDiffusion(schedule, K, sigma)

    def model(x, t):
        return 2 * x

    whole = diffusion.sample(model, (5, 4, 4), seed=3, progress=False)
    keys = ops.sample_keys(3, 5)
    parts = [
        diffusion.sample(model, (len(k), 4, 4), seed=k, progress=False) for k in keys.split([2, 3])
    ]
    assert torch.equal(torch.cat(parts), whole)
    assert not torch.equal(whole, diffusion.sample(model, (5, 4, 4), seed=4, progress=False))


def test_an_explicit_sigma_is_the_share_it_stands_for(schedule):
    limit = schedule.one_minus_alpha_bars_prev / schedule.one_minus_alpha_bars
    explicit = CategoricalDiffusion(schedule, K, 0.5 * limit)
    share = CategoricalDiffusion(schedule, K, 0.5)
    x0, x_t = _all_pairs()
    for t in range(T):
        times = torch.full((K * K,), t)
        posteriors = [d.q_posterior(d.one_hot(x0), x_t, times) for d in (explicit, share)]
        torch.testing.assert_close(*posteriors)
    CategoricalDiffusion(schedule, K, limit.float())  # the limit itself, rounded, is allowed


def test_errors(schedule):
    limit = schedule.one_minus_alpha_bars_prev / schedule.one_minus_alpha_bars
    with pytest.raises(ValueError, match=r"sigma\[0\] is 0\.1, expected 0\.\.0 = .* is negative"):
        CategoricalDiffusion(schedule, K, torch.full((T,), 0.1))
    too_large = limit.clone()
    too_large[7] *= 1.01
    with pytest.raises(ValueError, match=r"sigma\[7\] is .*, expected 0\.\."):
        CategoricalDiffusion(schedule, K, too_large)
    with pytest.raises(ValueError, match=r"sigma is 1\.5, expected 0\.\.1"):
        CategoricalDiffusion(schedule, K, 1.5)
    with pytest.raises(ValueError, match=r"sigma has shape \(3,\), expected \(20,\)"):
        CategoricalDiffusion(schedule, K, torch.zeros(3))
    with pytest.raises(ValueError, match="unknown loss 'mse'; choose from kl, cross_entropy"):
        CategoricalDiffusion(schedule, K, loss="mse")
    with pytest.raises(ValueError, match="num_classes is 1"):
        CategoricalDiffusion(schedule, 1)
    diffusion = CategoricalDiffusion(schedule, K, limit)
    with pytest.raises(ValueError, match="sigma was given for each of the 20 timesteps, but 5"):
        diffusion.sample(lambda x, t: x, (1, 2), steps=5, progress=False)
    with pytest.raises(ValueError, match=r"steps is 21, expected 1\.\.20"):
        diffusion.sample(lambda x, t: x, (1, 2), steps=21, progress=False)
    with pytest.raises(ValueError, match=r"the model returned shape \(1, 2, 2\), expected logits"):
        diffusion.sample(lambda x, t: x[:, :2], (1, 2), progress=False)
    with pytest.raises(TypeError, match=r"classes have dtype torch\.float32"):
        diffusion.q_sample(torch.zeros(1, 2), torch.tensor([0]), seed=0)


@pytest.mark.parametrize("sigma", SIGMAS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_samples_are_not_drawn_from_predictions_that_are_not_finite(schedule, sigma, value):
    """The first class would be, and a picture of it looks like any other."""

    def network(x, t):
        logits = x.clone()
        logits[1:3, :, 2] = torch.where(t[0] == 7, value, 0.0)
        return logits

    diffusion = CategoricalDiffusion(schedule, K, sigma=sigma)
    with pytest.raises(RuntimeError, match="predictions for 2 of 4 samples are not finite"):
        diffusion.sample(network, (4, 5), progress=False)
    # A class that is ruled out is no fault.
    classes = diffusion.sample(
        lambda x, t: torch.tensor([0.0, *[-torch.inf] * (K - 1)])[:, None].expand(x.shape),
        (4, 5),
        progress=False,
    )
    assert (classes == 0).all()
