"""What `compile_pass` does on CUDA devices only: biases of convolutions go into the op."""

import pytest
import torch
import torch.nn.functional as F
from gpu.needs import GPU
from torch import nn

import fastdiff
from fastdiff.integrations.conv_bias import _CONVOLUTIONS

pytestmark = GPU
device = "cuda"


class Block(nn.Module):
    """A residual block whose second normalization has a time embedding and a convolution before."""

    def __init__(self, dims):
        super().__init__()
        conv = getattr(nn, f"Conv{dims}d")
        self.norm1, self.norm2 = nn.GroupNorm(2, 4), nn.GroupNorm(2, 4)
        self.conv1, self.conv2 = (conv(4, 4, 3, padding=1) for _ in range(2))
        self.time = nn.Linear(3, 4)

    def forward(self, x, t):
        h = self.conv1(F.silu(self.norm1(self.conv2(x))))  # conv2 has two users of its parameters
        t = self.time(t).unflatten(1, (4, *[1] * (x.dim() - 2)))
        return x + self.conv2(F.silu(self.norm2(h + t)))


def convolutions_with_bias(graph_module):
    found = [n for n in graph_module.graph.nodes if n.target in _CONVOLUTIONS]
    assert found
    return sum(isinstance(n.args[2] if len(n.args) > 2 else n.kwargs.get("bias"), torch.fx.Node)
               for n in found)  # fmt: skip


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("capture", ["compile", "export"])
def test_biases_of_convolutions_go_into_the_normalization(dims, capture):
    torch.manual_seed(0)
    block = Block(dims).to(device).double().float()
    x = torch.randn(2, 4, *[5] * dims, device=device, requires_grad=True)
    t = torch.randn(2, 3, device=device)
    graphs = []

    def take(graph_module):
        before = convolutions_with_bias(graph_module)
        graphs.append((before, convolutions_with_bias(fastdiff.compile_pass(graph_module))))
        return graph_module

    if capture == "compile":
        run = torch.compile(block, backend=lambda gm, _: take(gm).forward, fullgraph=True)
    else:
        run = take(torch.export.export(block, (x, t)).module())
    results = []
    for forward in (block, run):
        y = forward(x, t)
        gradients = torch.autograd.grad(y.square().sum(), [x, *block.parameters()])
        results.append([y.detach(), *gradients])
    # Two of three: what follows the last is a sum.
    assert graphs == [(3, 1)]
    for expected, actual in zip(*results, strict=True):
        # A hundred roundings of float32 at the size of the largest.
        torch.testing.assert_close(
            actual, expected, rtol=0, atol=1e-5 * expected.abs().max().item()
        )


def test_biases_that_others_see_stay():
    class Features(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(4, 4, 1), nn.GroupNorm(2, 4)

        def forward(self, x):
            h = self.conv(x)
            return self.norm(h), h

    net, x = Features().to(device), torch.randn(2, 4, 3, 3, device=device)
    program = torch.export.export(net, (x,)).module()
    assert convolutions_with_bias(fastdiff.compile_pass(program)) == 1
    for expected, actual in zip(net(x), program(x), strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


def test_modules_that_a_tracer_kept_whole():
    net = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.SiLU()).to(device)
    x = torch.randn(2, 4, 5, 5, device=device)
    graph = torch.fx.symbolic_trace(net)
    torch.fx.passes.shape_prop.ShapeProp(graph).propagate(x)
    for node in graph.graph.nodes:  # what tracers with shapes leave
        if "tensor_meta" in node.meta:
            m = node.meta["tensor_meta"]
            node.meta["val"] = torch.empty(m.shape, dtype=m.dtype, device=device)
    fastdiff.compile_pass(graph)
    assert convolutions_with_bias(graph) == 0
    torch.testing.assert_close(graph(x), net(x), rtol=0, atol=1e-5)
