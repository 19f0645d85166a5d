"""`Sampler.sample(cuda_graph=True)` gives the images that it gives without."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from gpu.needs import GPU
from torch import Tensor, nn

import fastdiff
from fastdiff.nn import NoisyClassifier, UNet, UNetConfig
from fastdiff.samplers import DDIM, DDPM, SAMPLERS, Inpainting, from_name

pytestmark = [*GPU, pytest.mark.usefixtures("deterministic_convolutions")]

BATCH, SHAPE, CLASSES = 2, (1, 8, 8), 3
SCHEDULE = fastdiff.NoiseSchedule.linear(100)
# Of what a replay does otherwise than a call, nothing is rounded: only libraries may choose others.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def network(**options: Any) -> UNet:
    torch.manual_seed(0)
    unet = UNet(
        UNetConfig(
            in_channels=1,
            sample_size=8,
            channels=32,
            channel_mult=(1, 2),
            num_res_blocks=1,
            attention_resolutions=(),
            **options,
        )
    )
    for parameter in unet.parameters():
        if parameter.dim() > 1 and not parameter.any():
            nn.init.xavier_uniform_(parameter)
    return unet.eval().requires_grad_(False).cuda()


def launches(graph: bool, sampler: Any, model: Any, **options: Any) -> tuple[Tensor, int]:
    """The samples, and how often the model's forward pass ran in Python."""
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    handle = model.register_forward_pre_hook(count)
    try:
        options = {"progress": False, "seed": 1} | options
        return sampler.sample(model, (BATCH, *SHAPE), cuda_graph=graph, **options), calls
    finally:
        handle.remove()


def assert_same(
    sampler: Any, model: Any, kinds: int = 1, evaluations: int = 1, **options: Any
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of what cannot be captured
        found, calls = launches(True, sampler, model, **options)
    expected, without = launches(False, sampler, model, **options)
    torch.testing.assert_close(found, expected, **CLOSE)
    assert found.isfinite().all()
    assert found.std() > 0
    assert calls == 4 * kinds  # three to warm up, one captured
    assert calls < without


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler(name: str) -> None:
    options = {"inner_steps": 4, "steps": 6} if name == "annealed_langevin" else {"steps": 6}
    sampler = from_name(name, fastdiff.GaussianDiffusion(SCHEDULE), **options)
    assert_same(sampler, network())


def test_every_backend(backend: str) -> None:
    with fastdiff.use_backend(backend):
        assert_same(DDPM(fastdiff.GaussianDiffusion(SCHEDULE), 6), network())


def test_another_backend_or_autocast_takes_another_graph() -> None:
    model, sampler = network(), DDIM(fastdiff.GaussianDiffusion(SCHEDULE), 6)
    launches(True, sampler, model)
    with fastdiff.use_backend("reference"):
        _, calls = launches(True, sampler, model)
        assert calls == 4
    with torch.autocast("cuda", torch.bfloat16):
        found, calls = launches(True, sampler, model)
        assert calls == 4
        torch.testing.assert_close(found, launches(False, sampler, model)[0], rtol=1e-2, atol=1e-2)


def test_guidance_and_classes() -> None:
    model = network(num_classes=CLASSES, null_class=True)
    diffusion = fastdiff.GaussianDiffusion(SCHEDULE)
    null = torch.full((BATCH,), CLASSES, device="cuda")
    free = fastdiff.ClassifierFree(2.0, {"y": null})
    dynamic = fastdiff.DynamicThresholding(diffusion, 0.9, free)
    for guidance in (free, dynamic):
        sampler = DDIM(diffusion, 4, eta=1.0)
        for labels in ([0, 1], [2, 0]):  # replayed with other labels
            kwargs = {"y": torch.tensor(labels, device="cuda")}
            found = launches(True, sampler, model, guidance=guidance, model_kwargs=kwargs)
            expected = launches(False, sampler, model, guidance=guidance, model_kwargs=kwargs)
            torch.testing.assert_close(found[0], expected[0], **CLOSE)
        assert found[1] == 0  # the second call had the graph of the first


@pytest.mark.parametrize("form", ["eps", "mean"])
def test_classifier_guidance(form: str) -> None:
    torch.manual_seed(1)
    diffusion = fastdiff.GaussianDiffusion(SCHEDULE)
    classifier = NoisyClassifier(network().config, num_classes=CLASSES).eval().cuda()
    y = torch.tensor([0, 2], device="cuda")
    guidance = fastdiff.ClassifierGuidance(classifier, y, 1.0, diffusion, form=form)
    assert_same(DDPM(diffusion, 8), network(), guidance=guidance)


def test_self_conditioning_has_two_kinds_of_inputs() -> None:
    diffusion = fastdiff.GaussianDiffusion(SCHEDULE, self_conditioning=True)
    assert_same(DDIM(diffusion, 10), network(self_conditioning=True), kinds=2)


def test_inpainting() -> None:
    diffusion = fastdiff.GaussianDiffusion(SCHEDULE)
    known = torch.linspace(-1, 1, 64, device="cuda").view(1, *SHAPE)
    mask = torch.zeros(1, 1, 8, 8, device="cuda")
    mask[..., :4] = 1
    assert_same(Inpainting(DDPM(diffusion, 8), known, mask, resamples=2), network())


def test_new_weights_and_shapes_are_seen() -> None:
    model, sampler = network(), DDIM(fastdiff.GaussianDiffusion(SCHEDULE), 6)
    launches(True, sampler, model)
    model.conv_out.weight.data.mul_(0.5)  # in place: the same graph
    found, calls = launches(True, sampler, model)
    torch.testing.assert_close(found, launches(False, sampler, model)[0], **CLOSE)
    assert calls == 0
    model.conv_out.weight.data = model.conv_out.weight.data * 2  # elsewhere: another
    found, calls = launches(True, sampler, model)
    torch.testing.assert_close(found, launches(False, sampler, model)[0], **CLOSE)
    assert calls == 4
    x_T = torch.randn(BATCH + 1, *SHAPE, device="cuda")
    found = sampler.sample(model, x_T=x_T, cuda_graph=True, progress=False)
    torch.testing.assert_close(found, sampler.sample(model, x_T=x_T, progress=False), **CLOSE)


def test_a_function_and_the_numbers_among_its_arguments() -> None:
    """Not every model is a module; a graph keeps the numbers that it was captured with."""
    calls = []

    def model(x: Tensor, t: Tensor, strength: float) -> Tensor:
        calls.append(strength)
        return x * strength

    sampler = DDIM(fastdiff.GaussianDiffusion(SCHEDULE), 6)
    options = {"shape": (BATCH, *SHAPE), "device": "cuda", "progress": False, "seed": 1}
    for strength in (0.5, 0.25, 0.5):
        kwargs = {"strength": strength}
        found = sampler.sample(model, cuda_graph=True, model_kwargs=kwargs, **options)
        expected = sampler.sample(model, model_kwargs=kwargs, **options)
        torch.testing.assert_close(found, expected, **CLOSE)
    # Twice a graph, and three runs of 6 without.
    assert len(calls) == 2 * 4 + 3 * 6


class _Reads(nn.Module):
    """Reads a value on the host."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return x * 0.1 if float(x.sum()) < 1e9 else x


class _Broken(nn.Module):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        raise RuntimeError("no such layer")


def test_a_model_that_cannot_be_captured_runs_without() -> None:
    sampler = DDIM(fastdiff.GaussianDiffusion(SCHEDULE), 4)
    options = {"progress": False, "device": "cuda"}
    stream = torch.cuda.current_stream()
    with pytest.warns(UserWarning, match="no CUDA graph of the model"):
        found = sampler.sample(_Reads(), (BATCH, *SHAPE), cuda_graph=True, **options)
    torch.testing.assert_close(found, sampler.sample(_Reads(), (BATCH, *SHAPE), **options))
    assert torch.cuda.current_stream() == stream
    with pytest.raises(RuntimeError, match="no such layer"):
        sampler.sample(_Broken(), (BATCH, *SHAPE), cuda_graph=True, **options)


def test_too_little_memory_for_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(torch.cuda, "graph", full)
    model, sampler = network(), DDIM(fastdiff.GaussianDiffusion(SCHEDULE), 4)
    with pytest.warns(UserWarning, match="there is not enough memory for it"):
        found, _ = launches(True, sampler, model)
    torch.testing.assert_close(found, launches(False, sampler, model)[0], **CLOSE)
