"""`compile_pass` finds silu(group_norm(x)) in graphs, and changes nothing else."""

import pytest
import torch
import torch.nn.functional as F
from integrations.forms import FUSED, WRITES_WHAT_AUTOGRAD_KEEPS, Adaptive
from nn.networks import unzero
from torch import nn

import fastdiff
from fastdiff.integrations.compile_pass import group_norm_silu_any_rank

OPS = (torch.ops.fastdiff.group_norm_silu.default, group_norm_silu_any_rank)


class Net(nn.Module):
    """Seven normalizations: with SiLU as module, function and product, and without."""

    def __init__(self):
        super().__init__()
        self.norm, self.plain = nn.GroupNorm(2, 4), nn.GroupNorm(4, 4, affine=False)
        self.act, self.conv = nn.SiLU(), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        h = self.conv(self.act(self.norm(x)))
        h = self.conv(F.silu(F.group_norm(h, 2, weight=self.norm.weight, eps=1e-3)))
        h = torch.group_norm(h, 1, self.norm.weight, self.norm.bias, 1e-5)
        h = h * torch.sigmoid(h)
        h = self.conv(F.relu(self.plain(h)))
        n = self.norm(h)
        h = F.silu(n) + n  # the normalization itself is used too
        flat = F.silu(F.group_norm(h.mean((2, 3)), 2))  # (N, C): not an image
        return self.conv(self.plain(h).mul(0.5)) + flat[:, :, None, None]


def ops_in(graph_module):
    """Whether each op in the graph applies SiLU: the schema counts silu 0, identity 1."""
    found = [n for n in graph_module.graph.nodes if n.target in OPS]
    return [n.args[-1] if n.target is OPS[1] else n.args[-1] == 0 for n in found]


@pytest.fixture(scope="module")
def net():
    return unzero(Net())


@pytest.mark.parametrize("capture", ["symbolic_trace", "export", "compile"])
def test_graphs_of_every_kind(net, capture):
    x = torch.randn(2, 4, 6, 6, requires_grad=True)
    expected = net(x)
    (expected_grad,) = torch.autograd.grad(expected.square().sum(), x)
    if capture == "compile":
        graphs = []

        def backend(graph_module, example_inputs):
            graphs.append(fastdiff.compile_pass(graph_module))
            return graph_module.forward

        run = torch.compile(net, backend=backend, fullgraph=True)
        actual = run(x)
        graph = graphs[0]
    else:
        trace = {
            "symbolic_trace": torch.fx.symbolic_trace,
            "export": lambda m: torch.export.export(m, (x,)).module(),
        }[capture]
        graph = trace(net)
        assert fastdiff.compile_pass(graph) is graph
        actual = graph(x)
    expected_ops = [True, True, True, False, False]
    if capture == "symbolic_trace":  # without shapes, (N, C) is found when the graph runs
        expected_ops.append(True)
    assert ops_in(graph) == [*expected_ops, False]
    assert graph.meta["fastdiff"] == len(expected_ops) + 1
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    (grad,) = torch.autograd.grad(actual.square().sum(), x)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-4, atol=1e-4)


def parts_in(graph_module):
    (op,) = [n for n in graph_module.graph.nodes if n.target is OPS[0]]
    *_, bias, scale, shift, activation = op.args
    given = bias is not None, scale is not None, shift is not None, activation == 0
    return "".join(letter for letter, there in zip("bsha", given, strict=True) if there)


# torch.export puts what is computed without gradients into a graph of its own, and knows that a
# tensor and what was written into it in place are the same.
EXPORTED = FUSED | {"without_gradients_inside": None, "overwritten_by_its_activation": "a"}


@pytest.mark.parametrize("capture", ["export", "compile", "dynamic"])
@pytest.mark.parametrize("body", FUSED)
def test_time_embeddings(body, capture):
    torch._dynamo.reset()
    net = unzero(Adaptive(body))
    x, emb = torch.randn(3, 4, 5, 6), torch.randn(3, 6)
    expected = net(x, emb)
    graphs = []

    def backend(graph_module, example_inputs):
        graphs.append(fastdiff.compile_pass(graph_module))
        return graph_module.forward

    if capture == "export":
        run = fastdiff.compile_pass(torch.export.export(net, (x, emb)).module())
        graphs.append(run)
    else:
        run = torch.compile(net, backend=backend, fullgraph=True, dynamic=capture == "dynamic")
    actual = run(x, emb)
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    wanted = (EXPORTED if capture == "export" else FUSED)[body]
    if wanted is None:
        assert graphs[0].meta["fastdiff"] == 0
    else:
        assert parts_in(graphs[0]) == wanted
    if body in WRITES_WHAT_AUTOGRAD_KEEPS:
        return
    wanted = list(net.parameters())
    grads = [
        torch.autograd.grad(y.square().sum(), wanted, allow_unused=True)
        for y in (run(x, emb), net(x, emb))
    ]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_autocast_keeps_the_dtypes(net):
    """There torch normalizes in float32 what arrives in bfloat16."""
    torch._dynamo.reset()
    x = torch.randn(2, 4, 6, 6).bfloat16()

    def block(x):
        with torch.autocast("cpu", torch.bfloat16):
            return F.silu(net.norm(net.conv(x)))

    def backend(graph_module, example_inputs):
        assert fastdiff.compile_pass(graph_module).meta["fastdiff"] == 1
        return graph_module.forward

    expected = block(x)
    actual = torch.compile(block, backend=backend, fullgraph=True)(x)
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual, expected, rtol=0.01, atol=0.01)


def test_only_graphs():
    with pytest.raises(TypeError, match=r"got a Sequential, expected a torch\.fx\.GraphModule"):
        fastdiff.compile_pass(nn.Sequential())


def test_backend_is_registered_by_name():
    from importlib.metadata import entry_points

    (entry,) = entry_points(group="torch_dynamo_backends", name="fastdiff")
    assert entry.value == "fastdiff.integrations.compile_pass:backend"


@pytest.mark.slow
def test_inductor_backend(net):
    x = torch.randn(2, 4, 6, 6)
    compiled = torch.compile(net, backend="fastdiff", fullgraph=True)
    torch.testing.assert_close(compiled(x), net(x), rtol=1e-5, atol=1e-5)
