"""Self-conditioning: the network is given its own estimate of x0 (Chen et al. 2022, Math §7)."""

import pytest
import torch
from nn.networks import build, inputs

from fastdiff.diffusion.gaussian import GaussianDiffusion
from fastdiff.diffusion.guidance import ClassifierFree
from fastdiff.diffusion.schedules import NoiseSchedule
from fastdiff.nn import UNet
from fastdiff.nn.diffusers_format import UnsupportedByDiffusersError, unet2d_config
from fastdiff.samplers import DDIM, SAMPLERS, from_name

SHAPE = (3, 2, 4, 4)
SCHEDULE = NoiseSchedule.linear(50, rescale=True)


def test_no_estimate_is_an_estimate_of_zero_and_another_one_counts():
    unet = build("digits", self_conditioning=True)
    x_t, t = inputs(unet)
    assert unet.conv_in.in_channels == 2 * unet.config.in_channels
    assert unet(x_t, t).shape == x_t.shape
    assert torch.equal(unet(x_t, t), unet(x_t, t, x_self_cond=torch.zeros_like(x_t)))
    estimate = torch.zeros_like(x_t)
    estimate[1] = 0.5
    changed = (unet(x_t, t) != unet(x_t, t, x_self_cond=estimate)).flatten(1).any(1)
    assert changed.tolist() == [False, True, False]
    assert UNet.from_config(unet.config.to_dict()).config == unet.config


def test_what_does_not_fit_is_named():
    plain, unet = build("digits"), build("digits", self_conditioning=True)
    x_t, t = inputs(unet)
    with pytest.raises(ValueError, match="takes no estimate of x0; set self_conditioning"):
        plain(x_t, t, x_self_cond=x_t)
    with pytest.raises(ValueError, match=r"x_self_cond must have the shape of x_t, .*got \(1,"):
        unet(x_t, t, x_self_cond=x_t[:1])
    with pytest.raises(UnsupportedByDiffusersError, match="self_conditioning=True"):
        unet2d_config(unet.config)


@pytest.mark.parametrize("prediction", ["eps", "x0", "v", "mean"])
def test_training_gives_the_clipped_estimate_without_its_gradient(prediction):
    diffusion = GaussianDiffusion(SCHEDULE, prediction, self_conditioning=True)
    x0 = torch.rand(SHAPE, generator=torch.Generator().manual_seed(0)) * 2 - 1
    t = torch.tensor([0, 20, 49])
    weight = torch.tensor(0.7, requires_grad=True)
    given = []

    def model(x_t, t, x_self_cond=None):
        given.append((x_t, x_self_cond))
        return weight * x_t if x_self_cond is None else weight * (x_t + x_self_cond)

    losses = diffusion.training_losses(model, x0, t, seed=1, self_condition=True)["loss"]
    (x_t, nothing), (again, estimate) = given
    assert nothing is None
    assert again is x_t
    assert not estimate.requires_grad
    step = diffusion.p_mean_variance(model, x_t, t)
    torch.testing.assert_close(estimate, step.pred_x0.detach())
    assert estimate.abs().max() == 1  # some of it was clipped
    # The loss is that of a model which knows the estimate.
    known = diffusion.training_losses(lambda x_t, t: weight * (x_t + estimate), x0, t, seed=1)[
        "loss"
    ]
    assert torch.equal(losses, known)
    given.clear()
    diffusion.training_losses(model, x0, t, seed=1)
    assert [x_self_cond for _, x_self_cond in given] == [None]


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("guided", [False, True])
def test_every_step_is_given_the_x0_of_the_one_before(name, guided):
    diffusion = GaussianDiffusion(SCHEDULE, self_conditioning=True)
    # As many as its noise levels need, which are far apart.
    inner = {"inner_steps": 15} if name == "annealed_langevin" else {}
    sampler = from_name(name, diffusion, steps=5, **inner)
    given, predicted, calls = [], [], []

    def model(x_t, t, y=None, x_self_cond=None):
        given.append(x_self_cond)
        if x_self_cond is None:
            return 0.9 * x_t
        return 0.9 * x_t - 0.2 * x_self_cond

    def watch(step, t, x_t, pred_x0):
        calls.append(len(given))
        predicted.append(pred_x0)

    options = {}
    if guided:
        options["guidance"] = ClassifierFree(2.0, {"y": torch.zeros(3)})
        options["model_kwargs"] = {"y": torch.ones(3)}
    images = sampler.sample(model, SHAPE, progress=False, callback=watch, **options)
    assert all(estimate is None for estimate in given[: calls[0]])
    for k in range(1, 5):
        for estimate in given[calls[k - 1] : calls[k]]:
            assert torch.equal(estimate, predicted[k - 1])
    # The same process without it leaves the model alone; a second run starts without an estimate.
    plain = from_name(name, GaussianDiffusion(SCHEDULE), steps=5, **inner)
    given.clear()
    assert not torch.equal(plain.sample(model, SHAPE, progress=False, **options), images)
    assert all(estimate is None for estimate in given)
    assert torch.equal(sampler.sample(model, SHAPE, progress=False, **options), images)


def test_a_half_precision_network_gets_a_half_precision_estimate():
    unet = build("digits", self_conditioning=True).to(torch.bfloat16)
    size = unet.config.sample_size
    sampler = DDIM(GaussianDiffusion(SCHEDULE, self_conditioning=True), steps=3)
    images = sampler.sample(unet, (2, 1, size, size), progress=False)
    assert images.dtype == torch.float32
    assert images.isfinite().all()
