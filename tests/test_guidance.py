"""Guidance on exact networks: classifier-free, classifier, thresholding (Math §7)."""

import pytest
import torch
from nn.networks import SMALL
from torch import nn

import fastdiff
from fastdiff import ops
from fastdiff.diffusion.analytic import GaussianDenoiser
from fastdiff.diffusion.gaussian import GaussianDiffusion
from fastdiff.diffusion.guidance import ClassifierFree, ClassifierGuidance, DynamicThresholding
from fastdiff.diffusion.parameterizations import convert
from fastdiff.diffusion.schedules import NoiseSchedule
from fastdiff.nn import NoisyClassifier
from fastdiff.samplers import DDIM, DDPM, Heun

DATA = (1, 2, 2)
SHAPE = (4, *DATA)
PREDICTIONS = ["eps", "x0", "v", "mean"]


@pytest.fixture(scope="module")
def schedule():
    return NoiseSchedule.linear(100, rescale=True)


def _classifier(x_t, t):
    """Two classes with log-odds 2 (w . x): the gradient is known."""
    score = x_t.flatten(1) @ torch.linspace(-1, 1, 4)
    return torch.stack([-score, score], 1)


def _gradient(x_t, y):
    score = x_t.flatten(1) @ torch.linspace(-1, 1, 4)
    slope = torch.where(y == 1, 2 * torch.sigmoid(-2 * score), -2 * torch.sigmoid(2 * score))
    return (slope[:, None] * torch.linspace(-1, 1, 4)).reshape(x_t.shape)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_classifier_guidance_changes_eps_as_published_for_every_prediction(schedule, prediction):
    """CG algorithm 2: eps^ = eps - s sqrt(1 - abar) grad log p(y | x_t)."""
    diffusion = GaussianDiffusion(schedule, prediction=prediction)
    y = torch.tensor([0, 1, 1, 0])
    guidance = ClassifierGuidance(_classifier, y, 2.5, diffusion)
    x_t, t = ops.philox_normal(SHAPE, 1), torch.tensor([0, 20, 60, 99])
    output = ops.philox_normal(SHAPE, 2)
    guided, uncond, scale = guidance(lambda x, t: output, x_t, t, {})
    assert (uncond, scale) == (None, 1.0)
    before = convert(schedule, prediction, "eps", output, x_t, t)
    after = convert(schedule, prediction, "eps", guided, x_t, t)
    s = schedule.sqrt_one_minus_alpha_bars[t].float().reshape(-1, 1, 1, 1)
    expected = before - 2.5 * s * _gradient(x_t, y)
    # At t = 0 eps comes from x0 with a gain of 1/s = 100.
    torch.testing.assert_close(after, expected, rtol=1e-4, atol=1e-3)


def test_the_mean_form_shifts_ddpm_s_mean_by_the_variance_times_the_gradient(schedule):
    """CG algorithm 1, for fixed and for learned variances."""
    y = torch.tensor([0, 1, 1, 0])
    x_T = ops.philox_normal(SHAPE, 3)
    for variance in ("fixed_large", "fixed_small", "learned_range"):
        diffusion = GaussianDiffusion(schedule, variance=variance)

        def model(x, t, diffusion=diffusion):
            out = 0.7 * x
            return torch.cat([out, 0.3 * x], 1) if diffusion.learns_variance else out

        states = []
        guided, plain = (
            DDPM(diffusion, spacing=[10, 70], clip_denoised=False).sample(
                model,
                x_T=x_T,
                seed=5,
                guidance=guidance,
                progress=False,
                callback=lambda k, t, x_t, pred, s=states: s.append(x_t),
            )
            for guidance in (
                ClassifierGuidance(_classifier, y, 1.5, diffusion, form="mean"),
                None,
            )
        )
        # states: x_T, x_10 guided, x_T, x_10 plain.
        spaced = GaussianDiffusion(schedule.respace([10, 70]), variance=variance)
        step = spaced.p_mean_variance(model, x_T, torch.ones(4, dtype=torch.int64), False)
        expected = states[3] + 1.5 * step.variance * _gradient(x_T, y)
        torch.testing.assert_close(states[1], expected, rtol=1e-4, atol=1e-5)
        assert not torch.equal(guided, plain)


def test_both_forms_sample_the_posterior_of_a_gaussian_class(schedule):
    """Prior N(0, 1) and p(y | x0) ~ exp(c x0) make N(c, 1): guidance of scale 1 samples it.

    As x0 | x_t is N(a x_t, 1 - a^2), log p(y | x_t) = c a x_t + constant.
    """
    model = GaussianDenoiser(torch.zeros(DATA), torch.ones(DATA), schedule)
    diffusion, c, num = GaussianDiffusion(schedule), 0.8, 2048
    a = schedule.sqrt_alpha_bars.float()

    y = torch.zeros(num, dtype=torch.int64)
    for make, form in ((DDIM, "eps"), (DDPM, "mean"), (Heun, "eps")):
        sampler = make(diffusion, 100, clip_denoised=False)
        guidance = ClassifierGuidance(_Linear(c, a), y, 1.0, diffusion, form=form)
        samples = sampler.sample(model, (num, *DATA), seed=1, guidance=guidance, progress=False)
        mean, standard = float(samples.mean()), 1 / samples.numel() ** 0.5
        assert abs(mean - c) < 5 * standard + 0.02, (form, mean)
        assert abs(float(samples.var()) - 1) < 0.1


class _Linear(nn.Module):
    """log p(0 | x_t) = c a_t sum(x_t) - 60: class 0 is rare, so that log p is linear in x_t."""

    def __init__(self, c, a):
        super().__init__()
        self.c, self.a = c, a

    def forward(self, x_t, t):
        log_p = self.c * self.a[t] * x_t.flatten(1).sum(1) - 60
        return torch.stack([log_p, torch.zeros_like(log_p)], 1)


def test_classifier_free_guidance_is_classifier_guidance_with_the_implied_classifier(schedule):
    """cond - uncond of two Gaussians is the gradient of their log density ratio."""
    uncond = GaussianDenoiser(torch.zeros(DATA), torch.ones(DATA), schedule)
    cond = GaussianDenoiser(torch.full(DATA, 0.5), torch.ones(DATA), schedule)
    diffusion = GaussianDiffusion(schedule)

    def model(x, t, y):
        return cond(x, t) if y else uncond(x, t)

    sampler = DDIM(diffusion, 20, clip_denoised=False)
    free = sampler.sample(
        model,
        SHAPE,
        guidance=ClassifierFree(2.0, {"y": False}),
        model_kwargs={"y": True},
        progress=False,
    )
    y = torch.zeros(4, dtype=torch.int64)
    a = schedule.sqrt_alpha_bars.float()
    guidance = ClassifierGuidance(_Linear(0.5, a), y, 2.0, diffusion)
    classifier = sampler.sample(uncond, SHAPE, guidance=guidance, progress=False)
    torch.testing.assert_close(free, classifier, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("variance", ["fixed_large", "learned_range"])
def test_rescale_is_lin_et_al(schedule, variance):
    channels = 2 if variance == "fixed_large" else 4
    x_t, t = ops.philox_normal((3, 2, 4, 4), 1), torch.tensor([5, 50, 90])
    outputs = {y: ops.philox_normal((3, channels, 4, 4), 2 + y) for y in (0, 1)}

    def model(x, t, y):
        return outputs[y]

    plain, rescaled, half = (
        ClassifierFree(4.0, {"y": 0}, rescale=phi)(model, x_t, t, {"y": 1}) for phi in (0.0, 1, 0.5)
    )
    assert plain[1] is outputs[0]
    cfg = outputs[0][:, :2] + 4 * (outputs[1][:, :2] - outputs[0][:, :2])
    std = [x.flatten(1).std(1).reshape(3, 1, 1, 1) for x in (outputs[1][:, :2], cfg)]
    full = cfg * std[0] / std[1]
    torch.testing.assert_close(rescaled[0][:, :2], full)
    torch.testing.assert_close(half[0][:, :2], 0.5 * full + 0.5 * cfg)
    for output, uncond, scale in (rescaled, half):
        assert (uncond, scale) == (None, 1.0)
        assert torch.equal(output[:, 2:], outputs[1][:, 2:])  # the variance stays cond's


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_dynamic_thresholding_is_imagen_s(schedule, prediction):
    diffusion = GaussianDiffusion(schedule, prediction=prediction)
    x_t, t = 2 * ops.philox_normal((3, 1, 8, 8), 1), torch.tensor([30, 50, 70])
    x0 = ops.philox_normal((3, 1, 8, 8), 2) * torch.tensor([0.2, 1, 3]).reshape(3, 1, 1, 1)
    output = convert(schedule, "x0", prediction, x0, x_t, t)
    guided, uncond, scale = DynamicThresholding(diffusion, 0.9)(lambda x, t: output, x_t, t, {})
    assert (uncond, scale) == (None, 1.0)
    limit = torch.quantile(x0.flatten(1).abs(), 0.9, dim=1).clamp(min=1).reshape(3, 1, 1, 1)
    assert limit.flatten().tolist()[0] == 1
    expected = torch.minimum(torch.maximum(x0, -limit), limit) / limit
    actual = convert(schedule, prediction, "x0", guided, x_t, t)
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)
    # Nothing to do for the first sample: its output is untouched, bit for bit.
    assert torch.equal(guided[0], output[0])


def test_dynamic_thresholding_of_a_guided_model_in_a_sampler(schedule):
    diffusion = GaussianDiffusion(schedule)
    seen = []

    def model(x, t, y):
        return -y * x  # x0 far outside [-1, 1] when guided

    guidance = DynamicThresholding(diffusion, 1.0, ClassifierFree(3.0, {"y": 0.0}))
    DDIM(diffusion, 5, clip_denoised=False).sample(
        model,
        SHAPE,
        guidance=guidance,
        model_kwargs={"y": 1.0},
        progress=False,
        callback=lambda k, t, x_t, pred_x0: seen.append(float(pred_x0.abs().max())),
    )
    # With percentile 1 the largest pixel of each sample lands on 1.
    assert seen[0] == pytest.approx(1, abs=1e-4)
    assert max(seen) < 1 + 1e-3


def test_respaced_schedules_find_their_own_index(schedule):
    """A sampler feeds original timesteps; guidance needs the schedule's index of them."""
    y = torch.zeros(4, dtype=torch.int64)
    samples = []
    for process, spacing in (
        (GaussianDiffusion(schedule), [3, 50, 99]),
        (GaussianDiffusion(schedule.respace([3, 50, 99])), [0, 1, 2]),
    ):
        guidance = DynamicThresholding(
            process, 0.9, ClassifierGuidance(_classifier, y, 2.0, process)
        )
        sampler = DDIM(process, spacing=spacing)
        samples.append(
            sampler.sample(lambda x, t: 0.5 * x, SHAPE, guidance=guidance, progress=False)
        )
    torch.testing.assert_close(*samples, rtol=1e-4, atol=1e-4)


class _Unconditional(nn.Module):
    def forward(self, x_t, t):
        return x_t


def test_guidance_without_a_conditional_model_is_an_error(schedule):
    sampler = DDIM(GaussianDiffusion(schedule), 3)
    y = torch.zeros(4, dtype=torch.int64)

    def sample(model, guidance, **kwargs):
        sampler.sample(model, SHAPE, guidance=guidance, model_kwargs=kwargs, progress=False)

    free = ClassifierFree(3.0, {"y": y})
    with pytest.raises(ValueError, match="needs a conditional model, this _Unconditional takes"):
        sample(_Unconditional(), free, y=y)
    with pytest.raises(ValueError, match="this function takes no argument y"):
        sample(lambda x, t: x, free, y=y)
    with pytest.raises(ValueError, match=r"this UNet was built without classes \(num_classes=None"):
        sample(fastdiff.UNet(SMALL["digits"]), free, y=y)
    with pytest.raises(ValueError, match="replaces y in model_kwargs, which has nothing"):
        sample(lambda x, t, y: x, free)
    with pytest.raises(ValueError, match="replaces nothing in model_kwargs, which has y"):
        sample(lambda x, t, y: x, ClassifierFree(3.0, {}), y=y)
    with pytest.raises(ValueError, match="takes no argument y"):
        sample(_Unconditional(), DynamicThresholding(sampler.diffusion, guidance=free), y=y)


def test_errors(schedule):
    diffusion = GaussianDiffusion(schedule)
    y = torch.zeros(4, dtype=torch.int64)
    mean = ClassifierGuidance(_classifier, y, 1.0, diffusion, form="mean")
    with pytest.raises(ValueError, match="shifts the mean of DDPM's steps, DDIM has none"):
        DDIM(diffusion, 3).sample(lambda x, t: x, SHAPE, guidance=mean, progress=False)
    with pytest.raises(ValueError, match="unknown form 'score'; choose from eps, mean"):
        ClassifierGuidance(_classifier, y, 1.0, diffusion, form="score")
    with pytest.raises(ValueError, match="y has shape"):
        ClassifierGuidance(_classifier, y.float(), 1.0, diffusion)
    guidance = ClassifierGuidance(_classifier, y, 1.0, diffusion)
    with pytest.raises(ValueError, match="y has 4 classes, expected 2"):
        DDIM(diffusion, 3).sample(lambda x, t: x, (2, *DATA), guidance=guidance, progress=False)
    with pytest.raises(ValueError, match=r"rescale is 1\.5, expected 0"):
        ClassifierFree(1.0, {"y": y}, rescale=1.5)
    with pytest.raises(ValueError, match="percentile is 0, expected"):
        DynamicThresholding(diffusion, 0)


def test_the_noisy_classifier_learns_and_depends_on_the_time():
    torch.manual_seed(0)
    classifier = NoisyClassifier(SMALL["digits"], 2)
    schedule = NoiseSchedule.cosine(100)
    diffusion = GaussianDiffusion(schedule)
    optimizer = torch.optim.Adam(classifier.parameters(), lr=2e-3)
    for step in range(160):
        y = torch.arange(32) % 2
        x0 = (0.8 * (2.0 * y - 1)).reshape(-1, 1, 1, 1).expand(32, 1, 4, 4)
        t = torch.randint(100, (32,))
        loss = nn.functional.cross_entropy(classifier(diffusion.q_sample(x0, t, seed=step), t), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    early, late = torch.full((32,), 5), torch.full((32,), 99)
    logits = [classifier(diffusion.q_sample(x0, t, seed=99), t) for t in (early, late)]
    assert float((logits[0].argmax(1) == y).float().mean()) == 1
    # At the last timestep nothing is left to see, and it has learned to say so: four seeds gave
    # confidences of 0.94 to 0.97 and 0.56 to 0.61.
    confidence = [x.softmax(1).max(1).values.mean().item() for x in logits]
    assert confidence[1] < confidence[0] - 0.2, confidence
    with pytest.raises(ValueError, match="num_classes must be 2 or more, got 1"):
        NoisyClassifier(SMALL["digits"], 1)


@pytest.mark.parametrize("scale", [None, "2", [1.0]])
def test_a_scale_is_a_number(scale):
    with pytest.raises(TypeError, match="scale is"):
        ClassifierFree(scale, {})
