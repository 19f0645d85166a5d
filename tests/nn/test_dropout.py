"""Dropout in the U-Net: masks that belong to keys of samples, not to torch's random state."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastdiff import UNet
from fastdiff.nn import NoisyClassifier, preset_config
from fastdiff.nn.blocks import ResnetBlock

SMALL = {"channels": 8, "num_groups": 4, "sample_size": 8, "channel_mult": (1, 2)}
SMALL |= {"num_res_blocks": 1, "attention_resolutions": (4,), "dropout": 0.3}
KEYS = torch.tensor([7, -1, 2**62])


def build(**changes: object) -> UNet:
    torch.manual_seed(0)
    unet = UNet.from_preset("ddpm_cifar10", **{**SMALL, **changes})
    for parameter in unet.parameters():  # the zero-initialized ones would hide differences
        torch.nn.init.normal_(parameter, std=0.1)
    return unet.train()


def inputs() -> tuple[Tensor, Tensor]:
    x = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    return x, torch.tensor([3, 500, 900])


def test_keys_decide_and_random_states_do_not() -> None:
    unet, (x, t) = build(), inputs()
    y = unet(x, t, dropout_keys=KEYS)
    before = torch.get_rng_state()
    assert torch.equal(unet(x, t, dropout_keys=KEYS), y)
    assert torch.equal(torch.get_rng_state(), before)
    other = unet(x, t, dropout_keys=KEYS + torch.tensor([0, 1, 0]))
    changed = (other - y).abs().amax((1, 2, 3))
    assert changed[1] > 0.01
    assert not changed[[0, 2]].any()


def test_without_keys_torchs_random_state_decides() -> None:
    unet, (x, t) = build(), inputs()
    torch.manual_seed(5)
    first, second = unet(x, t), unet(x, t)
    assert (first - second).abs().max() > 0.01
    torch.manual_seed(5)
    assert torch.equal(unet(x, t), first)


@pytest.mark.parametrize("merged", [False, True])
def test_samples_keep_their_masks_in_other_batches_and_formats(merged: bool) -> None:
    unet, (x, t) = build().set_merged(merged), inputs()
    y = unet(x, t, dropout_keys=KEYS)
    for k in (0, 2):
        part = slice(k, k + 1)
        alone = unet(x[part], t[part], dropout_keys=KEYS[part])
        torch.testing.assert_close(alone, y[part])
    unet.to(memory_format=torch.channels_last)
    torch.testing.assert_close(unet(x, t, dropout_keys=KEYS), y)


def test_eval_mode_has_no_dropout() -> None:
    unet, (x, t) = build(), inputs()
    y = unet.eval()(x, t)
    assert torch.equal(unet(x, t, dropout_keys=KEYS), y)
    assert torch.equal(build(dropout=0.0)(x, t, dropout_keys=KEYS), y)


def test_every_layer_has_masks_of_its_own() -> None:
    for network in (build(), NoisyClassifier(preset_config("digits"), num_classes=3)):
        streams = [m.dropout_stream for m in network.modules() if isinstance(m, ResnetBlock)]
        assert len(set(streams)) == len(streams) > 2
    block = next(m for m in build().modules() if isinstance(m, ResnetBlock))
    x, temb = torch.randn(3, 8, 8, 8), torch.randn(3, 32)
    first = block(x, temb, KEYS)
    block.dropout_stream += 1
    assert (block(x, temb, KEYS) - first).abs().max() > 0.01


def test_expectation_is_the_network_without_dropout() -> None:
    """Of one layer, in which dropout is followed by a linear map."""
    block = next(m for m in build(num_res_blocks=1).modules() if isinstance(m, ResnetBlock))
    x, temb, num = torch.randn(1, 8, 8, 8), torch.randn(1, 32), 2000
    with torch.no_grad():
        exact = block.eval()(x, temb)
        block.train()
        many = block(x.expand(num, -1, -1, -1), temb.expand(num, -1), torch.arange(num))
    deviation = many.std(0) / num**0.5
    assert ((many.mean(0) - exact[0]).abs() < 5 * deviation + 1e-5).all()


def test_classifier_trains_with_dropout() -> None:
    classifier = NoisyClassifier(preset_config("digits", dropout=0.5), num_classes=3).train()
    torch.nn.init.normal_(classifier.linear_out.weight)
    for module in classifier.modules():
        if isinstance(module, ResnetBlock):
            torch.nn.init.normal_(module.conv2.weight, std=0.1)
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([1, 2])
    torch.manual_seed(0)
    first = classifier(x, t)
    assert (classifier(x, t) - first).abs().max() > 1e-3
    torch.manual_seed(0)
    assert torch.equal(classifier(x, t), first)


@pytest.mark.parametrize(
    ("keys", "error", "message"),
    [
        (KEYS.int(), ValueError, r"dropout_keys must be int64 of shape \(B,\) = \(3,\).*int32"),
        (KEYS[:2], ValueError, r"dropout_keys must be .*got torch.int64 of shape \(2,\)"),
        ([1, 2, 3], TypeError, "dropout_keys is a list"),
    ],
)
def test_wrong_keys(keys: object, error: type, message: str) -> None:
    unet, (x, t) = build(), inputs()
    with pytest.raises(error, match=message):
        unet(x, t, dropout_keys=keys)


def test_compiled_training_has_one_graph_for_all_keys() -> None:
    torch._dynamo.reset()
    unet, (x, t) = build(), inputs()
    graphs = []

    def recorded(graph: torch.fx.GraphModule, _: list) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    compiled = torch.compile(unet, fullgraph=True, backend=recorded)
    for k in range(3):
        found = compiled(x, t, dropout_keys=KEYS + k)
        torch.testing.assert_close(found, unet(x, t, dropout_keys=KEYS + k))
    assert len(graphs) == 1
    compiled = torch.compile(unet, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(unet(x, t, dropout_keys=KEYS).square().sum(), unet.parameters())
    found = torch.autograd.grad(compiled(x, t, dropout_keys=KEYS).square().sum(), unet.parameters())
    torch.testing.assert_close(found, expected)


def test_traced_by_fx_in_training_mode() -> None:
    unet, (x, t) = build(), inputs()
    traced = torch.fx.symbolic_trace(unet, concrete_args={"y": None, "x_self_cond": None})
    expected = unet(x, t, dropout_keys=KEYS)
    torch.testing.assert_close(traced(x, t, dropout_keys=KEYS), expected)
    traced = torch.fx.symbolic_trace(
        unet, concrete_args={"y": None, "x_self_cond": None, "dropout_keys": None}
    )
    torch.manual_seed(3)
    expected = unet(x, t)
    torch.manual_seed(3)
    torch.testing.assert_close(traced(x, t), expected)
