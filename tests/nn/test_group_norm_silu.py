"""The GroupNormSiLU module."""

import pytest
import torch

from fastdiff.nn import GroupNormSiLU
from fastdiff.reference.group_norm_silu import group_norm_silu


def test_loads_the_state_of_torch_group_norm_and_gives_the_same():
    torch.manual_seed(0)
    norm = torch.nn.GroupNorm(4, 8, eps=1e-3)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    layer = GroupNormSiLU(4, 8, eps=1e-3)
    layer.load_state_dict(norm.state_dict())
    x = torch.randn(2, 8, 5, 5)
    expected = torch.nn.functional.silu(norm(x))
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)
    norm.load_state_dict(layer.state_dict())


def test_passes_everything_on():
    torch.manual_seed(0)
    x = torch.randn(2, 8, 5, 5)
    channel_bias, scale, shift = torch.randn(3, 2, 8)
    layer = GroupNormSiLU(4, 8, eps=1e-3, activation="identity")
    torch.nn.init.normal_(layer.weight)
    y = layer(x, channel_bias, scale, shift)
    expected = group_norm_silu(
        x, 4, layer.weight, layer.bias, 1e-3, channel_bias, scale, shift, "identity"
    )
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(y, layer(x), rtol=1e-2, atol=1e-2)


def test_without_affine_there_are_no_parameters():
    layer = GroupNormSiLU(4, 8, affine=False)
    assert not layer.state_dict()
    x = torch.randn(2, 8, 5, 5)
    expected = group_norm_silu(x, 4, None, None)
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)


def test_bad_settings():
    with pytest.raises(ValueError, match="num_groups must divide num_channels = 8, got 3"):
        GroupNormSiLU(3, 8)
    with pytest.raises(ValueError, match="activation must be one of silu, identity, got 'relu'"):
        GroupNormSiLU(4, 8, activation="relu")
