"""The bound: its terms, its exact value for Gaussian data, progressive coding (Math §6, §7)."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from fastdiff import ops
from fastdiff.diffusion.analytic import GaussianDenoiser
from fastdiff.diffusion.bound import BitsPerDim, timestep_strata
from fastdiff.diffusion.gaussian import GaussianDiffusion
from fastdiff.diffusion.schedules import NoiseSchedule
from fastdiff.reference.philox import derived_keys

LEVELS = (2 * torch.arange(256, dtype=torch.float64) - 255) / 255
SHAPE = (1, 8, 8)


def images(num, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (num, *SHAPE), dtype=torch.uint8, generator=generator)


def smooth(x, t):
    """Some model that is neither right nor degenerate."""
    return (1.3 * x).sin() + 0.01 * t.reshape(-1, 1, 1, 1).to(x.dtype)


def doubled(x, t):
    """The same with variance channels."""
    return torch.cat([smooth(x, t), (2 * x).cos()], dim=1)


# ------------------------------------------------------------------ the terms


@pytest.mark.parametrize("prediction", ["eps", "x0", "v", "mean"])
@pytest.mark.parametrize("variance", ["fixed_large", "learned_range"])
@pytest.mark.parametrize("clip", [False, True])
def test_terms_are_the_divergences_of_posterior_and_reverse_step(prediction, variance, clip):
    """Against torch.distributions, on p_mean_variance and q_posterior."""
    # Noise so wide that differences of cdf, unlike ours, have enough digits.
    schedule = NoiseSchedule.linear(20, beta_start=0.3, beta_end=0.3)
    diffusion = GaussianDiffusion(schedule, prediction=prediction, variance=variance)
    model = doubled if diffusion.learns_variance else smooth
    x0 = (2 * images(2).double() - 255) / 255
    keys = ops.sample_keys(5, 2)
    bits = diffusion.bits_per_dim(model, x0, keys, clip_denoised=clip, progress=False)
    for k in range(2):
        t = torch.arange(20)
        pixels = x0[k].expand(20, *SHAPE)
        noise_keys = derived_keys(keys[k].expand(20), t)
        x_t = diffusion.q_sample(pixels, t, seed=noise_keys)
        step = diffusion.p_mean_variance(model, x_t, t, clip_denoised=clip)
        mean, _, log_variance = diffusion.q_posterior(pixels, x_t, t)
        p = torch.distributions.Normal(step.mean, (step.log_variance.double() / 2).exp())
        q = torch.distributions.Normal(mean, (log_variance.double() / 2).exp())
        expected = torch.distributions.kl_divergence(q, p)
        low = torch.where(pixels[0] < -0.999, 0.0, p.cdf(pixels - 1 / 255)[0])
        high = torch.where(pixels[0] > 0.999, 1.0, p.cdf(pixels + 1 / 255)[0])
        expected[0] = -(high - low).log()
        expected = expected.flatten(1).mean(1) / math.log(2)
        # Float32 tables, whose 6e-8 the differences of the decoder and 1/beta amplify.
        torch.testing.assert_close(bits.vb[k], expected, rtol=1e-4, atol=1e-5)
        x0_mse = (step.pred_x0 - pixels).square().flatten(1).mean(1)
        torch.testing.assert_close(bits.x0_mse[k], x0_mse, rtol=1e-4, atol=1e-7)
        noise = ops.philox_normal(pixels.shape, noise_keys).double()
        eps_mse = (step.pred_eps - noise).square().flatten(1).mean(1)
        torch.testing.assert_close(bits.eps_mse[k], eps_mse, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(bits.prior, schedule.prior_kl(x0))
    torch.testing.assert_close(bits.total, bits.prior + bits.vb.sum(1))


@pytest.mark.parametrize("variance", ["fixed_large", "fixed_small", "learned_range"])
def test_a_term_is_the_mean_of_the_log_ratio(variance):
    """KL(q || p) against Monte Carlo: x_{t-1} ~ q, averaged log q - log p."""
    schedule = NoiseSchedule.linear(20, beta_end=0.3)
    diffusion = GaussianDiffusion(schedule, variance=variance)
    model = doubled if diffusion.learns_variance else smooth
    t = torch.tensor([1, 7, 19])
    x0, noise = torch.randn(2, 3, 1, 1, 1, dtype=torch.float64, generator=torch.manual_seed(0))
    x_t = diffusion.q_sample(x0, t, noise)
    kl, _, _ = ops.vlb_terms(
        x0,
        x_t,
        model(x_t, t),
        t,
        diffusion.bound_table(),
        noise=noise,
        variance=variance,
        clip=False,
    )
    mean, var, _ = diffusion.q_posterior(x0, x_t, t)
    step = diffusion.p_mean_variance(model, x_t, t, clip_denoised=False)
    q = torch.distributions.Normal(mean.flatten(), var.flatten().double().sqrt())
    p = torch.distributions.Normal(step.mean.flatten(), step.variance.flatten().double().sqrt())
    num = 200_000
    x_s = q.sample((num,))
    ratio = (q.log_prob(x_s) - p.log_prob(x_s)) / math.log(2)
    error = ratio.std(0) / math.sqrt(num)
    assert bool((error < 0.02 * kl + 0.01).all())  # a test that can fail
    assert bool(((ratio.mean(0) - kl).abs() < 4 * error).all())


@pytest.mark.parametrize("mean", [-1.0, -0.3, 0.99, 1.4])
def test_the_decoder_s_256_levels_have_probability_one(mean):
    schedule = NoiseSchedule.linear(20, beta_end=0.3)
    diffusion = GaussianDiffusion(schedule, prediction="x0")
    bits = diffusion.bits_per_dim(
        lambda x, t: torch.full_like(x, mean),
        LEVELS.reshape(256, 1, 1, 1),
        seed=0,
        clip_denoised=False,
        progress=False,
    )
    # Rounded means of float32 width: 256 probabilities, each right to some 1e-7.
    assert float((2 ** -bits.vb[:, 0]).sum()) == pytest.approx(1, abs=1e-6)


# ------------------------------------------------------------------ exact values


def log_snr_schedule(num, first=1e-3, last_snr=1e-4):
    """beta_1 = first, wide enough for the levels to look continuous; then even in log-SNR."""
    log_snr = torch.linspace(
        math.log((1 - first) / first), math.log(last_snr), num, dtype=torch.float64
    )
    alpha_bars = torch.cat([torch.ones(1, dtype=torch.float64), log_snr.sigmoid()])
    return NoiseSchedule(1 - alpha_bars[1:] / alpha_bars[:-1])


@pytest.fixture(scope="module")
def gaussian():
    """Mean and variance of every pixel, levels drawn from it, and their exact bits/dim."""
    generator = torch.Generator().manual_seed(0)
    mean, variance, normal = torch.rand(3, *SHAPE, dtype=torch.float64, generator=generator)
    mean, variance = 0.4 * mean - 0.2, 0.04 + 0.04 * variance
    normal = torch.randn(24, *SHAPE, dtype=torch.float64, generator=generator)
    levels = ((mean + variance.sqrt() * normal + 1) * 127.5).round().clamp(1, 254)
    x0 = levels / 127.5 - 1
    pixel = torch.distributions.Normal(mean, variance.sqrt())
    probability = pixel.cdf(x0 + 1 / 255) - pixel.cdf(x0 - 1 / 255)
    return mean, variance, x0, -probability.log2().flatten(1).mean(1)


class WithPosteriorVariance(torch.nn.Module):
    """The optimal network that knows the variance of q(x_{t-1} | x_t), too, for `learned`."""

    def __init__(self, mean, variance, schedule):
        super().__init__()
        self.eps = GaussianDenoiser(mean, variance, schedule)
        self.variance, self.schedule = variance, schedule

    def forward(self, x_t, t):
        s, shape = self.schedule, (-1, *[1] * (x_t.dim() - 1))
        noise, alpha_bar = (x[t].reshape(shape) for x in (s.one_minus_alpha_bars, s.alpha_bars))
        # Of x0 given x_t, carried to x_{t-1} by the posterior's mean.
        of_x0 = self.variance * noise / (alpha_bar * self.variance + noise)
        c0 = s.posterior_mean_coef_x0[t].reshape(shape)
        total = s.posterior_variance[t].reshape(shape) + c0.square() * of_x0
        return torch.cat([self.eps(x_t, t), total.log().expand_as(x_t)], dim=1)


def expected_bound(diffusion, model, x0):
    """E[bits_per_dim] without sampling noise, of one image, pixel by pixel independent.

    With a linear model a KL is quadratic in a pixel's noise: noise +1 and -1 give its mean. L_0 is
    nearly quadratic: 9 Gauss-Hermite nodes.
    """

    def terms(t, node):
        pixels = x0.expand(len(t), *x0.shape)
        noise = torch.full_like(pixels, node)
        x_t = diffusion.q_sample(pixels, t, noise)
        return ops.vlb_terms(
            pixels,
            x_t,
            model(x_t, t),
            t,
            diffusion.bound_table(),
            noise=noise,
            variance=diffusion.variance,
            clip=False,
        )[0].sum()

    later = torch.arange(1, diffusion.num_timesteps)
    nodes, weights = np.polynomial.hermite_e.hermegauss(9)
    decoder = sum(
        w * terms(torch.tensor([0]), n) for n, w in zip(nodes, weights / weights.sum(), strict=True)
    )
    prior = diffusion.schedule.prior_kl(x0[None])[0]
    return float(prior + (terms(later, 1.0) + terms(later, -1.0)) / 2 + decoder)


def test_bound_approaches_the_exact_bits_per_dim_as_T_grows(gaussian):
    mean, variance, x0, exact = gaussian
    gaps = []
    for num in (800, 3200, 12800):
        schedule = log_snr_schedule(num)
        diffusion = GaussianDiffusion(schedule)
        model = GaussianDenoiser(mean, variance, schedule)
        gaps.append(expected_bound(diffusion, model, x0[0]) - float(exact[0]))
    assert 0 < gaps[2] < 1e-3
    # The fixed variance misses the exact one by O(1/T) per step: the gap is O(1/T).
    assert gaps[0] / gaps[1] == pytest.approx(4, abs=0.5)
    assert gaps[1] / gaps[2] == pytest.approx(4, abs=1)


@pytest.mark.parametrize("num", [10, 100])
def test_bound_is_tight_at_any_T_with_the_exact_variance(gaussian, num):
    mean, variance, x0, exact = gaussian
    schedule = log_snr_schedule(num)
    diffusion = GaussianDiffusion(schedule, variance="learned")
    model = WithPosteriorVariance(mean, variance, schedule)
    # The levels are not quite continuous: bin^2 / (12 beta_1) = 5e-3, squared over 4.
    assert abs(expected_bound(diffusion, model, x0[0]) - float(exact[0])) < 1e-4


def test_sampled_bits_per_dim_agree_with_the_exact_ones(gaussian):
    mean, variance, x0, exact = gaussian
    schedule = log_snr_schedule(100)
    diffusion = GaussianDiffusion(schedule, variance="learned")
    model = WithPosteriorVariance(mean, variance, schedule)
    bits = diffusion.bits_per_dim(
        model, x0, seed=0, clip_denoised=False, max_batch=600, progress=False
    )
    difference = bits.total - exact
    error = float(difference.std()) / math.sqrt(len(x0))
    assert error < 0.03
    assert abs(float(difference.mean())) < 4 * error


# ------------------------------------------------------------------ batching


def test_the_result_does_not_depend_on_how_pairs_are_batched():
    diffusion = GaussianDiffusion(NoiseSchedule.linear(30, beta_end=0.3))
    x0, sizes = images(3), []

    def model(x, t):
        sizes.append(len(x))
        return smooth(x, t)

    whole = diffusion.bits_per_dim(model, x0, seed=3, max_batch=1000, progress=False)
    assert sizes == [90]
    sizes.clear()
    part = diffusion.bits_per_dim(model, x0, seed=3, max_batch=7, progress=False)
    assert max(sizes) == 7
    assert sum(sizes) == 90
    keys = ops.sample_keys(3, 3)
    last = diffusion.bits_per_dim(model, x0[2:], keys[2:], max_batch=64, progress=False)
    other = diffusion.bits_per_dim(model, x0, seed=4, progress=False)
    for name in ("total", "prior", "vb", "x0_mse", "eps_mse"):
        value = getattr(whole, name)
        # Vectorized loops may round a pair differently at another place of the batch.
        torch.testing.assert_close(getattr(part, name), value, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(getattr(last, name), value[2:], rtol=1e-5, atol=1e-6)
    assert float((other.vb - whole.vb).abs().min()) > 0


def test_pairs_get_their_sample_s_arguments_and_the_original_timesteps():
    schedule = NoiseSchedule.linear(40, beta_end=0.3).respace([3, 11, 39])
    diffusion, seen = GaussianDiffusion(schedule), []

    def model(x, t, y, scale):
        seen.extend(zip(t.tolist(), y.tolist(), strict=True))
        return scale * x

    kwargs = {"y": torch.tensor([7, 8]), "scale": 0.5}
    diffusion.bits_per_dim(
        model, images(2), seed=0, max_batch=4, model_kwargs=kwargs, progress=False
    )
    assert sorted(seen) == [(t, y) for t in (3, 11, 39) for y in (7, 8)]


def test_a_network_is_evaluated_without_dropout_and_in_its_own_dtype():
    network = torch.nn.Sequential(torch.nn.Conv2d(1, 1, 3, padding=1), torch.nn.Dropout(0.5))
    network.bfloat16()

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.network = network

        def forward(self, x, t):
            return self.network(x)

    model = Model().train()
    diffusion = GaussianDiffusion(NoiseSchedule.linear(5, beta_end=0.3))
    torch.manual_seed(0)
    first = diffusion.bits_per_dim(model, images(2), seed=0, progress=False)
    second = diffusion.bits_per_dim(model, images(2), seed=0, progress=False)
    assert torch.equal(first.vb, second.vb)
    assert first.vb.dtype == torch.float32
    assert model.training
    assert network[1].training


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("prediction", ["eps", "x0", "v", "mean"])
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_an_output_that_is_not_finite_has_no_bits(prediction, clip, value):
    """A clip makes a pixel of an infinity, whose bits look like any others."""
    diffusion = GaussianDiffusion(NoiseSchedule.linear(20), prediction=prediction)

    def spoiled(x, t, y):
        output = smooth(x, t)
        output[(y == 1) & (t == 7), 0, 2, 3] = value
        return output

    options = {"seed": 3, "clip_denoised": clip, "model_kwargs": {"y": torch.arange(3)}}
    bits = diffusion.bits_per_dim(spoiled, images(3), **options, progress=False)
    assert bits.total.isfinite().tolist() == [True, False, True]
    for term in (bits.vb, bits.x0_mse, bits.eps_mse):
        assert (~term.isfinite()).nonzero().tolist() == [[1, 7]]


def test_no_images_have_no_bits():
    diffusion = GaussianDiffusion(NoiseSchedule.linear(5, beta_end=0.3))
    bits = diffusion.bits_per_dim(smooth, images(0), seed=0, progress=False)
    assert bits.vb.shape == (0, 5)
    assert bits.total.shape == (0,)


# ------------------------------------------------------------------ progressive coding


def test_rate_and_distortion_by_hand(tmp_path):
    bits = BitsPerDim(
        total=torch.tensor([6.5, 8.5]),
        prior=torch.tensor([0.5, 0.5]),
        vb=torch.tensor([[3.0, 2.0, 1.0], [4.0, 3.0, 1.0]]),
        x0_mse=torch.tensor([[0.01, 0.09, 0.25], [0.01, 0.09, 0.25]]),
        eps_mse=torch.zeros(2, 3),
    )
    curve = bits.rate_distortion()
    # x_T after L_T; then one term after the other; at last the image itself.
    assert curve.rate.tolist() == pytest.approx([0.5, 1.5, 4.0, 7.5])
    assert curve.distortion.tolist() == pytest.approx([63.75, 38.25, 12.75, 0.0])
    curve.plot(tmp_path / "curve.png")
    pixels = np.asarray(Image.open(tmp_path / "curve.png").convert("L"))
    assert min(pixels.shape) > 200
    assert 0.001 < (pixels < 128).mean() < 0.2


def test_distortion_falls_and_rate_grows_with_a_good_model(gaussian):
    mean, variance, x0, _ = gaussian
    schedule = log_snr_schedule(30)
    model = GaussianDenoiser(mean, variance, schedule)
    bits = GaussianDiffusion(schedule).bits_per_dim(model, x0, seed=0, progress=False)
    curve = bits.rate_distortion()
    assert float(curve.rate.diff().min()) > 0
    assert float(curve.rate[-1]) == pytest.approx(float(bits.total.mean()))
    noise, alpha_bar = (
        x[:, None, None, None] for x in (schedule.one_minus_alpha_bars, schedule.alpha_bars)
    )
    mse = (variance * noise / (alpha_bar * variance + noise)).flatten(1).mean(1)
    # 24 images of 64 normals: 3.6 % of a mean square, 1.8 % of its root.
    torch.testing.assert_close(
        curve.distortion[:-1], 127.5 * mse.sqrt().flip(0), rtol=0.072, atol=0
    )


# ------------------------------------------------------------------ bad input


def test_bad_arguments_are_named():
    diffusion = GaussianDiffusion(NoiseSchedule.linear(5, beta_end=0.3))
    with pytest.raises(ValueError, match="max_batch is 0, expected 1 or more"):
        diffusion.bits_per_dim(smooth, images(2), seed=0, max_batch=0)
    with pytest.raises(ValueError, match=r"seed has shape \(3,\).*keys \(2,\)"):
        diffusion.bits_per_dim(smooth, images(2), seed=ops.sample_keys(0, 3))
    with pytest.raises(ValueError, match="the model returned shape"):
        diffusion.bits_per_dim(doubled, images(2), seed=0, progress=False)


def _by_t(x_t, t):
    """A network that is wrong by more the later t, so that terms differ by orders of magnitude."""
    return x_t * (t / 400).reshape(-1, 1, 1, 1)


def test_strata_estimate_the_bound_without_bias():
    """Mean over many seeds against all terms; and of less variance than as many uniform ranges."""
    diffusion = GaussianDiffusion(NoiseSchedule.cosine(400))
    x0 = images(6)
    strata = timestep_strata(diffusion, _by_t, x0, 20, seed=1)
    assert int(strata[0]) == 0
    assert int(strata[1]) == 1
    assert 10 <= len(strata) <= 20
    assert bool((strata[1:] > strata[:-1]).all())
    many = x0.repeat_interleave(150, 0)
    whole = diffusion.bits_per_dim(_by_t, many, seed=2, max_batch=8192, progress=False)
    part = diffusion.bits_per_dim(_by_t, many, seed=3, strata=strata, progress=False)
    error = (part.total - whole.total).std() / len(many) ** 0.5
    assert abs(float((part.total - whole.total).mean())) < 4 * float(error)
    even = torch.cat([torch.tensor([0]), torch.linspace(1, 399, len(strata)).long()[:-1]])
    uniform = diffusion.bits_per_dim(_by_t, many, seed=3, strata=even, progress=False)
    spread = [float((p.total - whole.total).std()) for p in (part, uniform)]
    assert spread[0] < spread[1]
    # The rate of the curve is the total; a range's terms are the same.
    assert float(part.rate_distortion().rate[-1]) == pytest.approx(float(part.total.mean()))
    assert torch.equal(part.vb[:, int(strata[3])], part.vb[:, int(strata[4]) - 1])


def test_strata_of_every_timestep_are_the_whole_bound():
    diffusion = GaussianDiffusion(NoiseSchedule.linear(30))
    x0 = images(3)
    strata = timestep_strata(diffusion, _by_t, x0, 30)
    assert torch.equal(strata, torch.arange(30))
    found = diffusion.bits_per_dim(_by_t, x0, seed=2, strata=strata, progress=False)
    assert torch.equal(found.vb, diffusion.bits_per_dim(_by_t, x0, seed=2, progress=False).vb)


def test_a_sample_s_timesteps_do_not_depend_on_the_batch():
    diffusion = GaussianDiffusion(NoiseSchedule.linear(60))
    x0 = images(4)
    strata, keys = torch.tensor([0, 1, 10, 40]), ops.sample_keys(5, 4)
    whole = diffusion.bits_per_dim(_by_t, x0, keys, strata=strata, progress=False, max_batch=3)
    last = diffusion.bits_per_dim(_by_t, x0[3:], keys[3:], strata=strata, progress=False)
    torch.testing.assert_close(whole.total[3:], last.total, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("strata", [[1, 5], [0, 5, 5], [0, 60], []])
def test_bad_strata(strata):
    diffusion = GaussianDiffusion(NoiseSchedule.linear(60))
    x0 = torch.zeros(1, 1, 4, 4)
    with pytest.raises(ValueError, match="strata must rise from 0 to at most 59"):
        diffusion.bits_per_dim(_by_t, x0, strata=torch.tensor(strata), progress=False)
