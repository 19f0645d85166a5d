"""Merged maps compute what the maps compute one by one."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastdiff.nn import UNet, UNetConfig

SMALL = UNetConfig(
    sample_size=8,
    in_channels=3,
    channels=32,
    channel_mult=(1, 2),
    num_res_blocks=1,
    attention_resolutions=(4, 8),
    num_groups=8,
)


def network(dtype: torch.dtype = torch.float64, **options: Any) -> UNet:
    torch.manual_seed(0)
    unet = UNet(SMALL.replace(**options)).to(dtype)
    for parameter in unet.parameters():
        nn.init.normal_(parameter, std=0.1)
    return unet


def results(unet: UNet, merged: bool | None, dtype: torch.dtype) -> dict[str, Tensor]:
    """The output, and all gradients."""
    unet.set_merged(merged).zero_grad()
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, 3, 8, 8, generator=generator).to(dtype).requires_grad_()
    output = unet(x, torch.tensor([0, 7, 999]))
    (
        output * torch.linspace(-1, 1, output.numel(), dtype=dtype).view(output.shape)
    ).sum().backward()
    named = {name: p.grad.clone() for name, p in unet.named_parameters()}
    return {"output": output.detach(), "x": x.grad, **named}


NETWORKS = {
    "additive": {},
    "scale and shift": {"time_conditioning": "scale_shift"},
    "heads": {"num_heads": 4, "num_res_blocks": 2},
    "no attention": {"attention_resolutions": (), "mid_attention": False},
    "one width": {"channel_mult": (1, 1)},
    "classes": {"time_embedding": "openai", "self_conditioning": True},
}


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_outputs_and_gradients_are_the_same_but_for_rounding(name, channels_last) -> None:
    unet = network(**NETWORKS[name])
    if channels_last:
        unet.to(memory_format=torch.channels_last)
    one_by_one, merged = (results(unet, flag, torch.float64) for flag in (False, True))
    # Gradients that are zero but for rounding (of a key's bias) have others' scale.
    scale = max(float(value.abs().max()) for value in one_by_one.values())
    for key, expected in one_by_one.items():
        assert merged[key].stride() == expected.stride(), key
        torch.testing.assert_close(merged[key], expected, rtol=1e-10, atol=1e-13 * scale)


@pytest.mark.parametrize("channels_last", [False, True])
def test_in_bfloat16_no_further_from_the_truth(channels_last) -> None:
    """In channels_last the shortcuts are linear maps."""
    exact = results(network(), False, torch.float64)
    unet = network(torch.bfloat16)
    if channels_last:
        unet.to(memory_format=torch.channels_last)
    errors = []
    for merged in (False, True):
        found = results(unet, merged, torch.bfloat16)
        apart = {k: (found[k].double() - exact[k]).norm() / exact["x"].norm() for k in exact}
        errors.append(torch.stack(list(apart.values())).norm())
    assert errors[1] < 1.25 * errors[0]


def test_on_a_cpu_maps_stay_single() -> None:
    unet = network()
    expected, found = (results(unet, flag, torch.float64) for flag in (False, None))
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_recomputing() -> None:
    unet = network()
    expected = results(unet, True, torch.float64)
    found = results(unet.set_recompute(), True, torch.float64)
    assert all(torch.equal(found[key], expected[key]) for key in expected)


class Doubled(nn.Linear):
    """As what an adapter puts in a map's place."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def test_a_map_that_is_more_than_its_weights_is_called() -> None:
    x, t = torch.randn(1, 3, 8, 8).double(), torch.tensor([5])
    calls = []
    for change in ("hook", "pre-hook", "class", "parametrization"):
        unet = network()
        attention = unet.mid_block.attentions[0]
        if change == "hook":
            attention.to_v.register_forward_hook(lambda *_: calls.append(1))
        elif change == "pre-hook":
            attention.to_v.register_forward_pre_hook(lambda *_: calls.append(1))
        elif change == "class":
            doubled = Doubled(attention.to_q.in_features, attention.to_q.out_features).double()
            doubled.load_state_dict(attention.to_q.state_dict())
            attention.to_q = doubled
        else:
            nn.utils.parametrizations.weight_norm(unet.mid_block.resnets[0].conv1)
        expected = copy.deepcopy(unet).set_merged(False)(x, t)
        calls.clear()
        found = unet.set_merged(True)(x, t)
        assert torch.equal(found, expected), change
        assert len(calls) == ("hook" in change), change
