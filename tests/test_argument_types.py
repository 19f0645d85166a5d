"""None, a list or a number in place of a tensor or of one of our objects: a TypeError naming it."""

import pytest
import torch

import fastdiff
from fastdiff import samplers
from fastdiff.diffusion.parameterizations import convert
from fastdiff.images import image_grid, to_uint8

SCHEDULE = fastdiff.NoiseSchedule.linear(20)
GAUSSIAN = fastdiff.GaussianDiffusion(SCHEDULE)
CLASSES = fastdiff.CategoricalDiffusion(SCHEDULE, 4)
DDIM = samplers.DDIM(GAUSSIAN, steps=2)
UNET = fastdiff.UNet.from_preset("digits")
X = torch.zeros(2, 1, 8, 8)
T = torch.tensor([1, 2])
LABELS = torch.zeros(2, 5, dtype=torch.int64)


def model(x, t):
    return 0 * x


def logits(x, t):
    return x


CALLS = {
    "DDIM: diffusion": lambda bad: samplers.DDIM(bad, steps=2),
    "from_name: diffusion": lambda bad: samplers.from_name("heun", bad),
    "encode: x0": lambda bad: DDIM.encode(model, bad, progress=False),
    "decode: x_T": lambda bad: samplers.Heun(GAUSSIAN, 2).decode(model, bad),
    "the model's output": lambda bad: DDIM.sample(lambda x, t: bad, X.shape, progress=False),
    "Inpainting: sampler": lambda bad: samplers.Inpainting(bad, X, X),
    "Inpainting: known": lambda bad: samplers.Inpainting(DDIM, bad, X),
    "Inpainting: mask": lambda bad: samplers.Inpainting(DDIM, X, bad),
    "spaced_indices: schedule": lambda bad: samplers.spaced_indices(bad, 2),
    "slerp: a": lambda bad: samplers.slerp(bad, X, 0.5),
    "slerp: b": lambda bad: samplers.slerp(X, bad, 0.5),
    "interpolate: sampler": lambda bad: samplers.interpolate(bad, model, X, X),
    "interpolate: a": lambda bad: samplers.interpolate(DDIM, model, bad, X),
    "frames": lambda bad: samplers.Frames()(0, 1, X, bad),
    "to_uint8": to_uint8,
    "image_grid": image_grid,
    "GaussianDiffusion": fastdiff.GaussianDiffusion,
    "q_sample: x0": lambda bad: GAUSSIAN.q_sample(bad, T),
    "q_sample: x0, seed": lambda bad: GAUSSIAN.q_sample(bad, T, seed=0),
    "q_sample: t": lambda bad: GAUSSIAN.q_sample(X, bad, seed=0),
    "q_posterior: x0": lambda bad: GAUSSIAN.q_posterior(bad, X, T),
    "q_posterior: x_t": lambda bad: GAUSSIAN.q_posterior(X, bad, T),
    "q_posterior: t": lambda bad: GAUSSIAN.q_posterior(X, X, bad),
    "p_mean_variance: x_t": lambda bad: GAUSSIAN.p_mean_variance(model, bad, T),
    "p_mean_variance: t": lambda bad: GAUSSIAN.p_mean_variance(model, X, bad),
    "training_losses: x0": lambda bad: GAUSSIAN.training_losses(model, bad, T),
    "training_losses: t": lambda bad: GAUSSIAN.training_losses(model, X, bad, seed=0),
    "bits_per_dim: x0": lambda bad: GAUSSIAN.bits_per_dim(model, bad, progress=False),
    "flow_likelihood: diffusion": lambda bad: fastdiff.flow_likelihood(bad, model, X),
    "flow_likelihood: x0": lambda bad: fastdiff.flow_likelihood(GAUSSIAN, model, bad),
    "convert: value": lambda bad: convert(SCHEDULE, "eps", "v", bad, X, T),
    "convert: x_t": lambda bad: convert(SCHEDULE, "eps", "v", X, bad, T),
    "convert: t": lambda bad: convert(SCHEDULE, "eps", "v", X, X, bad),
    "CategoricalDiffusion": lambda bad: fastdiff.CategoricalDiffusion(bad, 4),
    "one_hot": CLASSES.one_hot,
    "q_probs: x0": lambda bad: CLASSES.q_probs(bad, T),
    "q_probs: t": lambda bad: CLASSES.q_probs(LABELS, bad),
    "classes, q_posterior: x0": lambda bad: CLASSES.q_posterior(bad, LABELS, T),
    "p_probs: t": lambda bad: CLASSES.p_probs(logits, LABELS, bad),
    "classes, training_losses: x0": lambda bad: CLASSES.training_losses(logits, bad, T),
    "classes, training_losses: t": lambda bad: CLASSES.training_losses(logits, LABELS, bad),
    "UNet: x_t": lambda bad: UNET(bad, T),
    "UNet: t": lambda bad: UNET(X, bad),
    "patch": fastdiff.patch,
    "unpatch": fastdiff.unpatch,
}


@pytest.mark.parametrize("bad", [None, [[1.0]], 3.5, object()], ids=["none", "list", "number", "x"])
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_it_is_a_type_error(call, bad):
    with pytest.raises(TypeError):
        call(bad)


@pytest.mark.parametrize("bad", [[[1.0]], "x", 3.5])
def test_what_may_be_none_may_not_be_something_else(bad):
    with pytest.raises(TypeError, match=r"sample: x_T is a .*, expected a torch.Tensor"):
        DDIM.sample(model, x_T=bad)
    with pytest.raises(TypeError, match=r"sample: x_T is a .*, expected a torch.Tensor"):
        CLASSES.sample(logits, (2, 5), x_T=bad)
    with pytest.raises(TypeError, match=r"UNet: x_self_cond is a .*, expected a torch.Tensor"):
        UNET(X, T, x_self_cond=bad)


def test_the_message_names_argument_and_remedy():
    with pytest.raises(TypeError, match=r"^encode: x0 is None, expected a torch.Tensor$"):
        DDIM.encode(model, None)
    with pytest.raises(TypeError, match=r"^DDIM: diffusion is a list, expected a GaussianDiff"):
        samplers.DDIM([])


HUGE = 10**5000  # which Python refuses to print

NUMBERS = {
    "num_groups": lambda bad: fastdiff.ops.group_norm_silu(torch.zeros(2, 4, 3), bad, None, None),
    "eps": lambda bad: fastdiff.ops.group_norm_silu(torch.zeros(2, 4, 3), 2, None, None, eps=bad),
    "guidance_scale": lambda bad: fastdiff.ops.ddim_step(
        X, X, T, SCHEDULE.ddim_table(torch.arange(20)), uncond=X, guidance_scale=bad
    ),
    "shape": lambda bad: fastdiff.ops.philox_normal((2, bad), seed=0),
    "shape of samples": lambda bad: DDIM.sample(model, (bad, 1, 8, 8), progress=False),
    "shape of classes": lambda bad: CLASSES.sample(logits, (bad, 8), progress=False),
    "num": lambda bad: fastdiff.ops.sample_keys(0, bad),
    "num_timesteps": fastdiff.NoiseSchedule.cosine,
    "num_classes": lambda bad: fastdiff.CategoricalDiffusion(SCHEDULE, bad),
    "sigma": lambda bad: fastdiff.CategoricalDiffusion(SCHEDULE, 3, sigma=bad),
    "steps": lambda bad: samplers.DDIM(GAUSSIAN, bad),
    "eta": lambda bad: samplers.DDIM(GAUSSIAN, 2, eta=bad),
    "inner_steps": lambda bad: samplers.AnnealedLangevin(GAUSSIAN, 2, inner_steps=bad),
    "step_size": lambda bad: samplers.AnnealedLangevin(GAUSSIAN, 2, step_size=bad),
    "corrector_steps": lambda bad: samplers.PredictorCorrector(GAUSSIAN, 2, corrector_steps=bad),
    "snr": lambda bad: samplers.PredictorCorrector(GAUSSIAN, 2, snr=bad),
    "jump_length": lambda bad: samplers.Inpainting(DDIM, X, X, jump_length=bad),
    "resamples": lambda bad: samplers.Inpainting(DDIM, X, X, resamples=bad),
    "every": lambda bad: samplers.Frames(every=bad),
    "max_batch": lambda bad: GAUSSIAN.bits_per_dim(model, X, max_batch=bad, progress=False),
    "in_channels": lambda bad: fastdiff.UNet.from_preset("digits", in_channels=bad),
}
INTEGERS = sorted(NUMBERS.keys() - {"eps", "guidance_scale", "sigma", "eta", "step_size", "snr"})


@pytest.mark.parametrize("bad", [HUGE, -HUGE, -1], ids=["huge", "-huge", "-1"])
@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_that_cannot_be_is_named(name, bad):
    if name == "corrector_steps" and bad == HUGE:
        pytest.skip("it is positive; so many steps would only not end")
    with pytest.raises(ValueError, match=name.partition(" ")[0]) as found:
        NUMBERS[name](bad)
    assert len(str(found.value)) < 300


@pytest.mark.parametrize("bad", [2.5, "2", None])
@pytest.mark.parametrize("name", INTEGERS)
def test_a_number_that_is_no_int_is_named(name, bad):
    if name == "steps" and bad is None:
        pytest.skip("None is the default")
    kind = ValueError if name == "in_channels" else TypeError
    with pytest.raises(kind, match=name.partition(" ")[0]):
        NUMBERS[name](bad)


NAMES = {
    "activation": lambda bad: fastdiff.ops.group_norm_silu(X, 1, None, None, activation=bad),
    "kind": lambda bad: fastdiff.ops.eps_loss(X, seed=0, kind=bad),
    "reduction": lambda bad: fastdiff.ops.eps_loss(X, seed=0, reduction=bad),
    "prediction": lambda bad: fastdiff.GaussianDiffusion(SCHEDULE, bad),
    "variance": lambda bad: fastdiff.GaussianDiffusion(SCHEDULE, variance=bad),
    "loss": lambda bad: fastdiff.GaussianDiffusion(SCHEDULE, loss=bad),
    "loss of classes": lambda bad: fastdiff.CategoricalDiffusion(SCHEDULE, 3, loss=bad),
    "sampler": lambda bad: samplers.from_name(bad, GAUSSIAN),
    "schedule": fastdiff.NoiseSchedule.from_name,
    "predictor": lambda bad: samplers.PredictorCorrector(GAUSSIAN, 2, predictor=bad),
    "method": lambda bad: samplers.ReverseSDE(GAUSSIAN, 2, method=bad),
    "show": lambda bad: samplers.Frames(show=bad),
    "source": lambda bad: convert(SCHEDULE, bad, "v", X, X, T),
    "U-Net preset": fastdiff.UNet.from_preset,
}


@pytest.mark.parametrize(
    "bad", [None, ["eps"], {}, HUGE, "x" * 10_000], ids=["none", "list", "dict", "huge", "long"]
)
@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_is_none_lists_those_there_are(name, bad):
    with pytest.raises(ValueError, match=f"unknown {name.partition(' of ')[0]} ") as found:
        NAMES[name](bad)
    assert len(str(found.value)) < 500
