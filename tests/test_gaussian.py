"""Forward process, posterior, reverse process and training losses (Math §3-§6)."""

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from fastdiff import ops
from fastdiff.diffusion.analytic import GaussianDenoiser
from fastdiff.diffusion.gaussian import GaussianDiffusion
from fastdiff.diffusion.schedules import NoiseSchedule

PREDICTIONS = ["eps", "x0", "v", "mean"]
SHAPE = (4, 2, 4, 4)


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    x0 = torch.rand(SHAPE, generator=generator) * 2 - 1
    noise = torch.randn(SHAPE, generator=generator)
    return x0, torch.tensor([0, 1, 500, 999]), noise


@pytest.fixture(scope="module")
def schedule():
    return NoiseSchedule.linear(1000)


# ------------------------------------------------------------------ forward process


@pytest.mark.parametrize("name", ["linear", "cosine", "jsd"])
def test_one_step_moments_iterate_to_the_closed_form(name):
    schedule = NoiseSchedule.from_name(name, 1000)
    scale, variance = 1.0, 0.0
    for t, beta in enumerate(schedule.betas.tolist()):
        scale, variance = math.sqrt(1 - beta) * scale, (1 - beta) * variance + beta
        assert math.isclose(scale, float(schedule.sqrt_alpha_bars[t]), rel_tol=1e-11, abs_tol=1e-12)
        assert math.isclose(variance, float(schedule.one_minus_alpha_bars[t]), rel_tol=1e-11)


def test_one_step_samples_iterate_to_the_closed_form():
    schedule = NoiseSchedule.linear(20, beta_end=0.3)
    diffusion = GaussianDiffusion(schedule)
    num = 40_000
    generator = torch.Generator().manual_seed(0)
    x = torch.full((num, 1), 0.8)
    for beta in schedule.betas.tolist():
        x = math.sqrt(1 - beta) * x + math.sqrt(beta) * torch.randn(x.shape, generator=generator)
    direct = diffusion.q_sample(torch.full((num, 1), 0.8), torch.full((num,), 19), seed=0)
    variance = float(schedule.one_minus_alpha_bars[-1])
    for samples in (x, direct):
        # Five standard errors of a normal's mean and variance.
        mean_error = float(samples.mean() - 0.8 * schedule.sqrt_alpha_bars[-1])
        assert abs(mean_error) < 5 * math.sqrt(variance / num)
        assert abs(float(samples.var()) - variance) < 5 * variance * math.sqrt(2 / num)


def test_q_sample_without_noise_follows_torch_manual_seed(schedule, batch):
    x0, t, _ = batch
    diffusion = GaussianDiffusion(schedule)
    torch.manual_seed(3)
    first, second = diffusion.q_sample(x0, t), diffusion.q_sample(x0, t)
    torch.manual_seed(3)
    assert torch.equal(diffusion.q_sample(x0, t), first)
    assert not torch.equal(first, second)
    noise = (first - schedule.sqrt_alpha_bars[t].float().view(-1, 1, 1, 1) * x0)[2:]
    assert float(noise.std()) > 0.5


def test_no_timestep_adds_zero_noise_in_bf16(schedule):
    diffusion = GaussianDiffusion(schedule)
    x0 = torch.zeros(1000, 1, dtype=torch.bfloat16)
    x_t = diffusion.q_sample(x0, torch.arange(1000), torch.ones_like(x0))
    # Float32 coefficients, rounded once to bf16's 8 bits: half an ulp is at most 2^-8 relative.
    expected = schedule.sqrt_one_minus_alpha_bars[:, None]
    torch.testing.assert_close(x_t.double(), expected, rtol=2.0**-8, atol=0)
    assert float(x_t.min()) > 0


def test_gradient_reaches_learned_betas(batch):
    x0, _, noise = batch
    logits = torch.linspace(-4, -1, 10, dtype=torch.float64, requires_grad=True)
    t = torch.tensor([0, 3, 6, 9])

    def loss(logits):
        diffusion = GaussianDiffusion(NoiseSchedule(logits.sigmoid()))
        return diffusion.training_losses(lambda x, t: x.sin(), x0.double(), t, noise.double())[
            "loss"
        ].mean()

    (grad,) = torch.autograd.grad(loss(logits), logits)
    step = 1e-2
    for i in (0, 5, 9):
        shift = torch.zeros_like(logits).index_fill(0, torch.tensor(i), step)
        with torch.no_grad():
            numeric = (loss(logits + shift) - loss(logits - shift)) / (2 * step)
        # Float32 tables: 1e-7 over a step of 1e-2; and the step's own second-order error.
        assert math.isclose(float(grad[i]), float(numeric), rel_tol=1e-2, abs_tol=2e-5)
    assert float(grad.abs().min()) > 0


# ------------------------------------------------------------------ posterior


@pytest.mark.parametrize("t", [1, 10, 500, 999])
def test_posterior_is_bayes_rule(schedule, t):
    x0, x_t = 0.3, 0.7
    grid = torch.linspace(-12, 12, 2_000_001, dtype=torch.float64)
    abar_s, beta = schedule.alpha_bars[t - 1], schedule.betas[t]
    log_prior = -((grid - abar_s.sqrt() * x0) ** 2) / (2 * (1 - abar_s))
    log_likelihood = -((x_t - (1 - beta).sqrt() * grid) ** 2) / (2 * beta)
    weights = (log_prior + log_likelihood).softmax(0)
    mean = (weights * grid).sum()
    variance = (weights * (grid - mean) ** 2).sum()
    actual = GaussianDiffusion(schedule).q_posterior(
        torch.full((1, 1), x0), torch.full((1, 1), x_t), torch.tensor([t])
    )
    # Float32 results; the grid itself is exact to 1e-10.
    torch.testing.assert_close(actual[0][0, 0].double(), mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(actual[1][0, 0].double(), variance, rtol=1e-6, atol=0)
    torch.testing.assert_close(actual[2][0, 0].double(), variance.log(), rtol=1e-6, atol=1e-6)


def test_posterior_at_the_first_timestep_is_x0(schedule, batch):
    x0, _, noise = batch
    mean, variance, log_variance = GaussianDiffusion(schedule).q_posterior(
        x0, noise, torch.zeros(4, dtype=torch.int64)
    )
    torch.testing.assert_close(mean, x0, rtol=1e-6, atol=0)
    assert float(variance.max()) == 0
    expected = schedule.posterior_variance[1].log().float()
    assert torch.equal(log_variance, expected.expand(SHAPE))


# ------------------------------------------------------------------ reverse process


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("clip", [False, True])
def test_all_predictions_describe_one_reverse_step(schedule, batch, prediction, clip):
    x0, t, noise = batch
    mean, variance = 0.9 * x0[0], 0.2 + x0[1].abs()
    x_t = GaussianDiffusion(schedule).q_sample(x0.double(), t, noise.double())
    oracle = GaussianDenoiser(mean, variance, schedule, "x0")
    expected_x0 = oracle(x_t, t)
    if clip:
        expected_x0 = expected_x0.clamp(-1, 1)
    model = GaussianDenoiser(mean, variance, schedule, prediction)
    diffusion = GaussianDiffusion(schedule, prediction=prediction)
    step = diffusion.p_mean_variance(model, x_t, t, clip_denoised=clip)
    # Rounded coefficients, 6e-8 each, of terms up to 4: 1/sqrt(abar) = 160 for eps and
    # 1/c0 = 7,800 for the mean, both at t = 999.
    amplification = {"eps": 160, "x0": 1, "v": 1, "mean": 7800}[prediction]
    atol = 2 * 4 * 6e-8 * amplification
    torch.testing.assert_close(step.pred_x0, expected_x0, rtol=1e-6, atol=atol)
    expected_mean = diffusion.q_posterior(expected_x0, x_t, t)[0]
    torch.testing.assert_close(step.mean, expected_mean, rtol=1e-5, atol=1e-5)
    a = schedule.sqrt_alpha_bars[t].reshape(-1, 1, 1, 1)
    s = schedule.sqrt_one_minus_alpha_bars[t].reshape(-1, 1, 1, 1)
    # Float32 coefficients again, up to a/s = 100 at t = 0.
    torch.testing.assert_close(step.pred_eps, (x_t - a * expected_x0) / s, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("clip", [False, True])
def test_a_half_precision_model_does_not_round_the_reverse_step(schedule, batch, prediction, clip):
    _, t, x_t = batch
    diffusion = GaussianDiffusion(schedule, prediction=prediction)

    def model(x, t):
        return x.sin().bfloat16()

    step = diffusion.p_mean_variance(model, x_t, t, clip_denoised=clip)
    # The same output, widened before anything is computed from it: not a bit may differ.
    wide = diffusion.p_mean_variance(lambda x, t: model(x, t).float(), x_t, t, clip_denoised=clip)
    for name in ("mean", "pred_x0", "pred_eps"):
        assert getattr(step, name).dtype == torch.float32
        assert torch.equal(getattr(step, name), getattr(wide, name))


def test_fixed_variances(schedule, batch):
    _, t, x_t = batch
    for name, expected in (
        ("fixed_large", schedule.betas),
        ("fixed_small", schedule.posterior_variance),
    ):
        diffusion = GaussianDiffusion(schedule, variance=name)
        step = diffusion.p_mean_variance(lambda x, t: x, x_t, t)
        assert step.variance.shape == SHAPE
        assert torch.equal(step.variance[:, 0, 0, 0], expected[t].float())
        torch.testing.assert_close(step.log_variance[1:].exp(), step.variance[1:])


def test_learned_variances(schedule, batch):
    _, t, x_t = batch
    for v, name in ((-1.0, "fixed_small"), (1.0, "fixed_large")):
        diffusion = GaussianDiffusion(schedule, variance="learned_range")
        step = diffusion.p_mean_variance(
            lambda x, t, v=v: torch.cat([x, torch.full_like(x, v)], 1), x_t, t
        )
        bound = GaussianDiffusion(schedule, variance=name).p_mean_variance(lambda x, t: x, x_t, t)
        torch.testing.assert_close(step.log_variance, bound.log_variance)
        torch.testing.assert_close(step.mean, bound.mean)
    step = GaussianDiffusion(schedule, variance="learned").p_mean_variance(
        lambda x, t: torch.cat([x, x / 2], 1), x_t, t
    )
    torch.testing.assert_close(step.log_variance, x_t / 2)
    torch.testing.assert_close(step.variance, (x_t / 2).exp())


def test_a_respaced_schedule_feeds_the_model_the_original_timesteps(schedule, batch):
    x0, _, noise = batch
    seen = []

    def model(x, t):
        seen.append(t.tolist())
        return x

    diffusion = GaussianDiffusion(schedule.respace([3, 500, 999]))
    t = torch.tensor([0, 1, 2, 2])
    diffusion.p_mean_variance(model, x0, t)
    diffusion.training_losses(model, x0, t, noise)
    assert seen == [[3, 500, 999, 999]] * 2


# ------------------------------------------------------------------ training


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_mse_is_zero_at_the_target_and_counts_from_there(schedule, batch, prediction):
    x0, t, noise = batch
    diffusion = GaussianDiffusion(schedule, prediction=prediction)
    x_t = diffusion.q_sample(x0, t, noise)
    a = schedule.sqrt_alpha_bars[t].float().reshape(-1, 1, 1, 1)
    s = schedule.sqrt_one_minus_alpha_bars[t].float().reshape(-1, 1, 1, 1)
    target = {
        "eps": noise,
        "x0": x0,
        "v": a * noise - s * x0,
        "mean": diffusion.q_posterior(x0, x_t, t)[0],
    }[prediction]
    offset = torch.tensor([0.0, 1.0, 2.0, 3.0])
    losses = diffusion.training_losses(
        lambda x, t: target + offset.reshape(-1, 1, 1, 1), x0, t, noise
    )
    torch.testing.assert_close(losses["loss"], offset**2, rtol=1e-5, atol=1e-10)
    assert torch.equal(losses["mse"], losses["loss"])


def test_a_seed_stands_for_its_noise(schedule, batch):
    x0, t, _ = batch
    diffusion = GaussianDiffusion(schedule)
    noise = ops.philox_normal(SHAPE, 7, stream=5)
    explicit = diffusion.training_losses(lambda x, t: x, x0, t, noise)["loss"]
    seeded = diffusion.training_losses(lambda x, t: x, x0, t, seed=7, stream=5)["loss"]
    keys = ops.sample_keys(7, 4)
    split = torch.cat(
        [
            diffusion.training_losses(lambda x, t: x, x0[i], t[i], seed=keys[i], stream=5)["loss"]
            for i in (slice(0, 1), slice(1, 4))
        ]
    )
    # The kernels' normals agree with each other to a few float32 ulps.
    torch.testing.assert_close(seeded, explicit, rtol=1e-5, atol=0)
    torch.testing.assert_close(split, seeded, rtol=1e-5, atol=0)


def test_training_without_noise_follows_torch_manual_seed(schedule, batch):
    x0, t, _ = batch
    diffusion = GaussianDiffusion(schedule)
    losses = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        losses.append(diffusion.training_losses(lambda x, t: x, x0, t)["loss"])
    assert torch.equal(losses[0], losses[1])
    assert not torch.equal(losses[0], losses[2])


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_uint8_with_flip_equals_pixels(schedule, batch, prediction):
    _, t, noise = batch
    levels = torch.randint(
        256, SHAPE, dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    flip = torch.tensor([True, False, True, False])
    pixels = levels.float() / 127.5 - 1
    pixels[flip] = pixels[flip].flip(-1)
    diffusion = GaussianDiffusion(schedule, prediction=prediction)
    actual = diffusion.training_losses(lambda x, t: x, levels, t, noise, flip=flip)["loss"]
    expected = diffusion.training_losses(lambda x, t: x, pixels, t, noise)["loss"]
    # x / 127.5 - 1 and (2 x - 255) / 255 differ by an ulp of 1.
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-9)


def test_weighting_scales_the_loss_only(schedule, batch):
    x0, t, noise = batch
    weighting = torch.linspace(0, 2, 1000)
    plain = GaussianDiffusion(schedule).training_losses(lambda x, t: x, x0, t, noise)
    weighted = GaussianDiffusion(schedule, weighting=weighting).training_losses(
        lambda x, t: x, x0, t, noise
    )
    torch.testing.assert_close(weighted["loss"], weighting[t] * plain["loss"])
    assert torch.equal(weighted["mse"], plain["mse"])


def test_loss_of_a_half_precision_model_is_float32(schedule, batch):
    x0, t, noise = batch
    losses = GaussianDiffusion(schedule).training_losses(
        lambda x, t: x.to(torch.bfloat16), x0, t, noise
    )
    assert losses["loss"].dtype == torch.float32


# ------------------------------------------------------------------ tracing

CALLS = {
    "q_sample": lambda d, x, t: d.q_sample(x, t, x),
    "training_losses": lambda d, x, t: d.training_losses(lambda x, t: x.sin(), x, t, x)["loss"],
    "p_mean_variance": lambda d, x, t: d.p_mean_variance(lambda x, t: x.sin(), x, t).mean,
}


def _small(beta_end):
    # Respaced and weighted, so that every table is needed.
    schedule = NoiseSchedule.linear(20, beta_end=beta_end).respace(range(0, 20, 2))
    return GaussianDiffusion(schedule, weighting=torch.linspace(1, 2, 10))


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_compiles_whole_before_any_eager_call(call):
    torch._dynamo.reset()
    x, t = torch.linspace(-1, 1, 24).reshape(2, 3, 2, 2), torch.tensor([1, 9])
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    # Two of them: what one has built must not be baked in for the other.
    for diffusion in (_small(0.02), _small(0.5)):
        torch.testing.assert_close(compiled(diffusion, x, t), call(diffusion, x, t))


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_a_first_call_on_fake_tensors_leaves_none_behind(call):
    x, t = torch.linspace(-1, 1, 24).reshape(2, 3, 2, 2), torch.tensor([1, 9])
    diffusion = _small(0.02)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert isinstance(call(diffusion, x, t), FakeTensor)
    actual = call(diffusion, x, t)
    assert type(actual) is torch.Tensor
    assert torch.equal(actual, call(_small(0.02), x, t))


# ------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prediction": "noise"}, "unknown prediction 'noise'; choose from eps, x0, v, mean"),
        ({"variance": "fixed"}, "unknown variance 'fixed'; choose from fixed_large"),
        ({"loss": "mae"}, "unknown loss 'mae'; choose from mse"),
        ({"weighting": "flat"}, "unknown weighting 'flat'; choose None, .*, or a tensor"),
        ({"weighting": torch.ones(3)}, r"weighting has shape \(3,\), expected \(1000,\)"),
        ({"weighting": -torch.ones(1000)}, "weighting must be finite and not negative"),
    ],
)
def test_unknown_options(schedule, options, message):
    with pytest.raises(ValueError, match=message):
        GaussianDiffusion(schedule, **options)


def test_eps_prediction_needs_a_signal():
    with pytest.raises(ValueError, match="zero terminal SNR"):
        GaussianDiffusion(NoiseSchedule.jsd(10))
    with pytest.raises(TypeError, match="expected a NoiseSchedule"):
        GaussianDiffusion("linear")


def test_model_output_channels(schedule, batch):
    x0, t, noise = batch
    with pytest.raises(ValueError, match=r"\(4, 4, 4, 4\), expected \(4, 2, 4, 4\).*learned_range"):
        GaussianDiffusion(schedule).training_losses(lambda x, t: torch.cat([x, x], 1), x0, t, noise)
    with pytest.raises(ValueError, match=r"\(4, 2, 4, 4\), expected \(4, 4, 4, 4\)"):
        GaussianDiffusion(schedule, variance="learned_range").p_mean_variance(lambda x, t: x, x0, t)
    with pytest.raises(TypeError, match="the model returned tuple"):
        GaussianDiffusion(schedule).p_mean_variance(lambda x, t: (x,), x0, t)


def test_mse_cannot_train_a_variance(schedule, batch):
    x0, t, noise = batch
    with pytest.raises(ValueError, match="no gradient to the variance channels"):
        GaussianDiffusion(schedule, variance="learned").training_losses(
            lambda x, t: torch.cat([x, x], 1), x0, t, noise
        )


@pytest.mark.parametrize(
    ("t", "error"),
    [
        (torch.tensor([0, 1, 2]), ValueError),
        (torch.tensor([0.0, 1, 2, 3]), TypeError),
        (torch.tensor([0, 1, 2, 1000]), IndexError),
        (torch.tensor([-1, 1, 2, 3]), IndexError),
    ],
)
def test_bad_timesteps(schedule, batch, t, error):
    x0, _, noise = batch
    diffusion = GaussianDiffusion(schedule)
    with pytest.raises(error, match=r"\bt (has|is)"):
        diffusion.p_mean_variance(lambda x, t: x, x0, t)
    with pytest.raises(error, match=r"\bt (has|is)"):
        diffusion.training_losses(lambda x, t: x, x0, t, noise)
    with pytest.raises(error, match=r"\bt (has|is)"):
        diffusion.q_posterior(x0, x0, t)


def test_noise_of_a_seed_is_not_stored_for_eps_prediction(schedule, batch, monkeypatch):
    x0, t, _ = batch
    diffusion = GaussianDiffusion(schedule)
    noise = ops.philox_normal(x0.shape, 3, stream=7)
    stored = diffusion.training_losses(lambda x, _: 0.5 * x, x0, t, noise)["loss"]

    def refuse(*_, **__):
        raise AssertionError("the noise was made in memory")

    monkeypatch.setattr(ops, "philox_normal", refuse)
    regenerated = diffusion.training_losses(lambda x, _: 0.5 * x, x0, t, seed=3, stream=7)["loss"]
    assert torch.equal(stored, regenerated)
