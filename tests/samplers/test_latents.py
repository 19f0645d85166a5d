"""Interpolation, consistency, frames and names of samplers (DDIM §5, Math §7)."""

import builtins
import math

import numpy as np
import pytest
import torch
from PIL import Image

from fastdiff import ops
from fastdiff.diffusion.analytic import GaussianDenoiser
from fastdiff.diffusion.gaussian import GaussianDiffusion
from fastdiff.diffusion.schedules import NoiseSchedule
from fastdiff.images import image_grid, to_uint8
from fastdiff.samplers import (
    DDIM,
    DDPM,
    SAMPLERS,
    Frames,
    consistency,
    from_name,
    interpolate,
    slerp,
)

DATA = (1, 4, 4)


@pytest.fixture(scope="module")
def schedule():
    return NoiseSchedule.linear(200, rescale=True)


@pytest.fixture(scope="module")
def diffusion(schedule):
    return GaussianDiffusion(schedule)


@pytest.fixture(scope="module")
def model(schedule):
    return GaussianDenoiser(torch.full(DATA, 0.2), torch.full(DATA, 0.09), schedule)


@pytest.fixture(scope="module")
def latents():
    return ops.philox_normal((3, *DATA), 1), ops.philox_normal((3, *DATA), 2)


def test_slerp_is_an_arc(latents):
    a, b = (x.double() / x.double().flatten(1).norm(dim=1).reshape(-1, 1, 1, 1) for x in latents)
    fractions = torch.linspace(0, 1, 7)
    points = slerp(a, b, fractions).flatten(2)
    torch.testing.assert_close(points.norm(dim=2), torch.ones(7, 3, dtype=torch.float64))
    angle = torch.acos((points[0] * points[-1]).sum(1))
    for f, point in zip(fractions.tolist(), points, strict=True):
        # Constant speed along the arc.
        torch.testing.assert_close(torch.acos((points[0] * point).sum(1).clamp(max=1)), f * angle)
        torch.testing.assert_close(slerp(a, b, f).flatten(1), point)


def test_slerp_of_parallel_and_of_half_precision_latents(latents):
    a, b = latents
    torch.testing.assert_close(slerp(a, 3 * a, 0.5), 2 * a)
    torch.testing.assert_close(slerp(a, a + 1e-9, 0.3), a)
    half = slerp(a.bfloat16(), b.bfloat16(), 0.25)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), slerp(a, b, 0.25), rtol=0, atol=0.05)
    with pytest.raises(ValueError, match=r"b has shape \(1, 1, 4, 4\), expected \(3, 1, 4, 4\)"):
        slerp(a, b[:1], 0.5)


def test_interpolation_goes_from_one_sample_to_the_other(diffusion, model, latents):
    sampler = DDIM(diffusion, 10, spacing="trailing")
    path = interpolate(sampler, model, *latents, num=5, progress=False)
    assert path.shape == (5, 3, *DATA)
    for end, x_T in ((0, latents[0]), (4, latents[1])):
        expected = sampler.sample(model, x_T=x_T, progress=False)
        torch.testing.assert_close(path[end], expected, rtol=1e-5, atol=1e-5)
    middle = sampler.sample(model, x_T=slerp(*latents, 0.5), progress=False)
    torch.testing.assert_close(path[2], middle, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"decode needs a deterministic sampler.*eta=1"):
        interpolate(DDIM(diffusion, 10, 1.0), model, *latents, progress=False)
    with pytest.raises(ValueError, match="num is 1"):
        interpolate(sampler, model, *latents, num=1)


def test_consistency_approaches_one_image(diffusion, model, latents):
    def make(num):
        return DDIM(diffusion, num, spacing="linspace")

    samples = consistency(make, model, latents[0], steps=(5, 20, 80), progress=False)
    assert list(samples) == [5, 20, 80]
    exact = model.decode(latents[0], torch.full((3,), 199))
    errors = [float((x - exact).abs().mean()) for x in samples.values()]
    assert errors[2] < errors[1] / 2 < errors[0] / 4
    with pytest.raises(ValueError, match="decode needs a deterministic sampler"):
        consistency(lambda num: DDPM(diffusion, num), model, latents[0])


def test_frames_are_the_predictions_along_the_chain(diffusion, model, tmp_path):
    frames, states, seen = Frames(every=2), Frames(show="x_t"), []

    def both(step, t, x_t, pred_x0):
        seen.append((t, x_t, pred_x0))
        frames(step, t, x_t, pred_x0)
        states(step, t, x_t, pred_x0)

    sampler = DDIM(diffusion, 10, spacing="trailing")
    sampler.sample(model, (6, *DATA), progress=False, callback=both)
    assert frames.times == [t for t, *_ in seen[1::2]]
    for image, (_, _, pred_x0) in zip(frames.images, seen[1::2], strict=True):
        assert torch.equal(image, to_uint8(pred_x0))
    for image, (_, x_t, _) in zip(states.images, seen, strict=True):
        assert torch.equal(image, to_uint8(x_t))

    frames.gif(tmp_path / "a.gif")
    with Image.open(tmp_path / "a.gif") as gif:
        assert gif.n_frames == len(frames.images) == 5
        gif.seek(4)
        assert np.array_equal(np.asarray(gif.convert("L")), image_grid(frames.images[4]))
    frames.strip(tmp_path / "a.png", num=3)
    picked = torch.stack([frames.images[i] for i in (0, 2, 4)], 1).flatten(0, 1)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "a.png")), image_grid(picked, 3))
    frames.strip(tmp_path / "b.png", num=1)
    last = np.asarray(image_grid(frames.images[-1], 1))
    assert np.array_equal(np.asarray(Image.open(tmp_path / "b.png")), last)

    frames.clear()
    with pytest.raises(ValueError, match="no frames yet"):
        frames.strip(tmp_path / "c.png")
    with pytest.raises(ValueError, match="unknown show 'eps'; choose from pred_x0, x_t"):
        Frames(show="eps")
    with pytest.raises(ValueError, match="every is 0"):
        Frames(every=0)


def test_pictures_without_pillow_say_what_to_install(monkeypatch):
    real = builtins.__import__

    def no_pillow(name, *args, **kwargs):
        if name.split(".")[0] == "PIL":
            raise ModuleNotFoundError("No module named 'PIL'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_pillow)
    with pytest.raises(ModuleNotFoundError, match=r'need Pillow; .* "fastdiff\[train\]"'):
        image_grid(torch.zeros(1, 1, 2, 2, dtype=torch.uint8))


@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers_by_name(diffusion, model, name):
    sampler = from_name(name, diffusion, steps=8, spacing="trailing", clip_denoised=False)
    assert type(sampler) is SAMPLERS[name]
    assert sampler.steps == 8
    expected = SAMPLERS[name](diffusion, steps=8, spacing="trailing", clip_denoised=False)
    samples = [s.sample(model, (2, *DATA), seed=1, progress=False) for s in (sampler, expected)]
    assert torch.equal(*samples)
    assert math.isfinite(float(samples[0].sum()))


def test_unknown_names_and_options_list_the_known_ones(diffusion):
    with pytest.raises(ValueError, match="unknown sampler 'euler'; choose from ddim, ddpm, prob"):
        from_name("euler", diffusion)
    with pytest.raises(ValueError, match="ddpm takes no eta; its options: steps, spacing, clip"):
        from_name("ddpm", diffusion, eta=0.5)
    with pytest.raises(ValueError, match="heun takes no eta; its options: steps, spacing, clip"):
        from_name("heun", diffusion, eta=0.5)
