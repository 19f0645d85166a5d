"""Compiling block by block: gradients come block by block."""

import pytest
import torch

from fastdiff.nn import PRESETS, UNet
from fastdiff.nn.blocks import ResnetBlock
from fastdiff.training.compiling import compiled


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=torch._dynamo.config.recompile_limit):
        yield
    torch._dynamo.reset()


def network():
    torch.manual_seed(0)
    unet = UNet(PRESETS["tiny"].replace(dropout=0.0))
    for parameter in unet.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return unet


def step(unet, call):
    """The output, the gradients, and how many backward passes were compiled."""
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    output = call(x, torch.tensor([3, 40]))
    with torch.autograd.profiler.profile() as profiler:
        output.square().sum().backward()
    passes = [e for e in profiler.function_events if e.name == "CompiledFunctionBackward"]
    return output.detach(), [p.grad for p in unet.parameters()], len(passes)


@pytest.mark.parametrize("regional", [False, True])
def test_values_are_those_of_the_network(regional):
    """A backward pass for each block hands its gradients over when it ends."""
    expected, gradients, _ = step(unet := network(), unet)
    unet = network()
    names = [name for name, _ in unet.named_parameters()]
    call = compiled(unet, regional=regional, backend="aot_eager")
    output, found, passes = step(unet, call)
    torch.testing.assert_close(output, expected)
    for name, one, other in zip(names, found, gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4, msg=name)
    assert [name for name, _ in unet.named_parameters()] == names
    blocks = sum(isinstance(module, ResnetBlock) for module in unet.modules())
    assert passes >= blocks if regional else passes == 1
