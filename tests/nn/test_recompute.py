"""Recomputing normalized activations: the same gradients from less memory."""

from __future__ import annotations

import pathlib
import sys

import pytest
import torch
from torch import nn

from fastdiff import UNet, ops
from fastdiff.nn import GroupNormSiLU

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))  # benchmarks/

from benchmarks import activation_memory

SMALL = {
    "sample_size": 8,
    "channels": 16,
    "channel_mult": (1, 2),
    "num_res_blocks": 1,
    "attention_resolutions": (4,),
    "num_groups": 4,
}


def unet_of(conditioning: str, dropout: float) -> UNet:
    torch.manual_seed(0)
    unet = UNet.from_preset(
        "ddpm_cifar10", **SMALL, time_conditioning=conditioning, dropout=dropout
    )
    for parameter in unet.parameters():  # the zero-initialized ones would hide differences
        nn.init.normal_(parameter, std=0.1)
    return unet.train()


def gradients(unet: UNet, memory_format: torch.memory_format) -> list[torch.Tensor]:
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    x = x.contiguous(memory_format=memory_format).requires_grad_()
    torch.manual_seed(2)  # of the dropout
    loss = unet(x, torch.tensor([3, 500])).square().sum()
    return list(torch.autograd.grad(loss, [x, *unet.parameters()]))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("conditioning", ["additive", "scale_shift"])
def test_gradients_are_the_same_bit_for_bit(conditioning, dropout, memory_format):
    unet = unet_of(conditioning, dropout)
    kept = gradients(unet, memory_format)
    recomputed = gradients(unet.set_recompute(), memory_format)
    for a, b in zip(kept, recomputed, strict=True):
        assert torch.equal(a, b)


def test_convolutions_run_once_and_normalizations_twice(monkeypatch):
    unet = unet_of("additive", 0.0).set_recompute()
    calls = {"conv": 0, "norm": 0}
    conv, norm = nn.Conv2d.forward, ops.group_norm_silu
    ended = []

    def counted_conv(self, x):
        calls["conv"] += 1
        y = conv(self, x)
        ended.append(self)
        return y

    def counted_norm(*args, **kwargs):
        calls["norm"] += 1
        return norm(*args, **kwargs)

    monkeypatch.setattr(nn.Conv2d, "forward", counted_conv)
    module = sys.modules[GroupNormSiLU.__module__]  # which has the function by the same name
    monkeypatch.setattr(module, "group_norm_silu", counted_norm)
    loss = unet(torch.randn(1, 3, 8, 8), torch.tensor([7])).sum()
    forward_calls, forward_ended = dict(calls), len(ended)
    loss.backward()
    silu = [m for m in unet.modules() if isinstance(m, GroupNormSiLU) and m.activation == "silu"]
    assert calls["norm"] - forward_calls["norm"] == len(silu)
    # Entered again, but stopped before they computed anything.
    assert calls["conv"] - forward_calls["conv"] == len(silu)
    assert len(ended) == forward_ended


def test_without_gradients_nothing_is_checkpointed(monkeypatch):
    from fastdiff.nn import blocks

    def refuse(*_args, **_kwargs):
        raise AssertionError("checkpoint was called")

    monkeypatch.setattr(blocks, "checkpoint", refuse)
    unet = unet_of("additive", 0.0).set_recompute()
    with torch.no_grad():
        unet(torch.randn(1, 3, 8, 8), torch.tensor([7]))


@pytest.mark.cpu_kernels
def test_memory_falls_by_the_activations_that_are_not_kept():
    """Of each normalization eager keeps x, its own result and the activation's; fused keeps x and
    the latter, which recomputing drops too."""
    unet = unet_of("additive", 0.0)
    batch = 2
    sizes = []

    def remember(module, arguments):
        sizes.append((arguments[0].numel() * 4, module.activation == "silu"))

    hooks = [
        m.register_forward_pre_hook(remember)
        for m in unet.modules()
        if isinstance(m, GroupNormSiLU)
    ]
    unet(torch.zeros(batch, 3, 8, 8), torch.zeros(batch, dtype=torch.int64))
    for hook in hooks:
        hook.remove()
    activations = sum(size for size, silu in sizes if silu)
    eager, fused, recompute = (
        activation_memory.saved_bytes(unet, name, batch) for name in activation_memory.SETTINGS
    )
    small = 0.03 * eager  # statistics and time embeddings
    assert abs((eager - fused) - activations) < small
    assert abs((fused - recompute) - activations) < small
