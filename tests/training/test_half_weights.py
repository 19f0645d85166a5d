"""Half-precision copies of the weights: the numbers of autocast, bit for bit."""

import copy

import pytest
import torch

from fastdiff.nn import PRESETS, UNet
from fastdiff.training.half_weights import HalfWeights

DTYPES = [torch.bfloat16, torch.float16]


def network():
    torch.manual_seed(0)
    unet = UNet(PRESETS["tiny"].replace(dropout=0.0, num_classes=3))
    for parameter in unet.parameters():  # layers that start at zero give what is before no gradient
        torch.nn.init.normal_(parameter, std=0.1)
    return unet


def gradients(unet, module, half, dtype, parts):
    """The losses of the parts of a batch, and the gradients of the float32 weights."""
    x = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    t, y = torch.arange(8) * 5, torch.arange(8) % 3
    losses = []
    for part in torch.arange(8).chunk(parts):
        with torch.autocast("cpu", dtype):
            loss = module(x[part], t[part], y=y[part]).float().square().sum()
        loss.backward()
        if half is not None:
            half.collect()
        losses.append(loss.item())
    return losses, [p.grad for p in unet.parameters()]


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("parts", [1, 2, 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_losses_and_gradients_are_those_of_autocast(dtype, parts, channels_last):
    plain = network()
    if channels_last:
        plain.to(memory_format=torch.channels_last)
    unet = copy.deepcopy(plain)
    half = HalfWeights(unet, dtype)
    with torch.no_grad():  # changed since, as by an optimizer
        for one, other in zip(plain.parameters(), unet.parameters(), strict=True):
            one.mul_(0.9)
            other.mul_(0.9)
    half.refresh()
    expected_losses, expected = gradients(plain, plain, None, dtype, parts)
    losses, found = gradients(unet, half.module, half, dtype, parts)
    assert losses == expected_losses
    assert any(gradient.any() for gradient in expected)
    for (name, weight), one, other in zip(unet.named_parameters(), found, expected, strict=True):
        assert one.dtype == torch.float32
        assert one.stride() == weight.stride()
        assert torch.equal(one, other), name


def test_only_what_autocast_casts_is_copied():
    unet = network()
    half = HalfWeights(unet, torch.bfloat16)
    ours, theirs = (dict(m.named_parameters()) for m in (unet, half.module))
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        shared = "norm" in name or "class_embedding" in name
        assert (theirs[name] is weight) == shared, name
        assert theirs[name].dtype == (torch.float32 if shared else torch.bfloat16)
    assert all(weight.dtype == torch.float32 for weight in ours.values())


def test_weights_without_a_gradient_stay_without():
    unet = network()
    unet.conv_in.requires_grad_(False)
    half = HalfWeights(unet, torch.bfloat16)
    half.collect()
    assert all(weight.grad is None for weight in unet.parameters())
    gradients(unet, half.module, half, torch.bfloat16, 1)
    assert unet.conv_in.weight.grad is None
    assert unet.conv_out.weight.grad is not None
