"""Normalizations and activations of other classes, recognized by what they compute; the report."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from nn.networks import unzero
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastdiff
from fastdiff.integrations import recognition


class OwnGroupNorm(nn.Module):
    """In the style of EDM's."""

    def __init__(self, channels, num_groups=2, eps=1e-5):
        super().__init__()
        self.num_groups, self.eps = num_groups, eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x):
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        return F.group_norm(x, self.num_groups, weight, bias, self.eps)


class ByFormula(OwnGroupNorm):
    def forward(self, x):
        h = x.float().reshape(x.shape[0], self.num_groups, -1)
        mean, var = h.mean(2, keepdim=True), h.var(2, unbiased=False, keepdim=True)
        h = ((h - mean) * torch.rsqrt(var + self.eps)).view(x.shape)
        shape = (1, -1) + (1,) * (x.dim() - 2)
        return (h * self.weight.view(shape) + self.bias.view(shape)).to(x.dtype)


class EpsOutside(ByFormula):
    def forward(self, x):
        h = x.float().reshape(x.shape[0], self.num_groups, -1)
        h = (h - h.mean(2, keepdim=True)) / (
            h.var(2, unbiased=False, keepdim=True).sqrt() + self.eps
        )
        shape = (1, -1) + (1,) * (x.dim() - 2)
        return (h.view(x.shape) * self.weight.view(shape) + self.bias.view(shape)).to(x.dtype)


class Unbiased(ByFormula):
    def forward(self, x):
        h = x.float().reshape(x.shape[0], self.num_groups, -1)
        h = (h - h.mean(2, keepdim=True)) * torch.rsqrt(h.var(2, keepdim=True) + self.eps)
        shape = (1, -1) + (1,) * (x.dim() - 2)
        return (h.view(x.shape) * self.weight.view(shape) + self.bias.view(shape)).to(x.dtype)


class Wider(OwnGroupNorm):
    def forward(self, x):
        return F.group_norm(x.float(), self.num_groups, self.weight, self.bias, self.eps)


class Counting(OwnGroupNorm):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


class Block(nn.Module):
    """With any class of normalization."""

    def __init__(self, norm1, norm2):
        super().__init__()
        self.norm1, self.norm2 = norm1, norm2
        self.conv, self.proj = nn.Conv2d(4, 4, 3, padding=1), nn.Linear(6, 4)

    def forward(self, x, emb):
        h = self.conv(F.silu(self.norm1(x)))
        h = h + self.proj(emb)[:, :, None, None]
        return F.silu(self.norm2(h)) + x


def inputs():
    return torch.randn(2, 4, 5, 5), torch.randn(2, 6)


@pytest.mark.parametrize(
    ("cls", "reason"),
    [
        (OwnGroupNorm, None),
        (ByFormula, None),
        (EpsOutside, "computes something else"),
        (Unbiased, "computes something else"),
        (Counting, "a forward of its own, which names calls"),
    ],
)
def test_classes_of_ones_own(cls, reason):
    block = unzero(Block(cls(4), cls(4, eps=1e-3))).eval()
    inputs_ = inputs()
    expected = block(*inputs_)
    report = fastdiff.patch(block)
    torch.testing.assert_close(block(*inputs_), expected, rtol=1e-5, atol=1e-5)
    if reason is None:
        assert report.replaced == {
            "norm1": "group_norm + silu",
            "norm2": "channel_bias + group_norm + silu",
        }
    else:
        assert not report.replaced
        assert all(reason in why for why in report.left.values())
        assert len(report.left) == 2
        assert f"left, 2 x: {cls.__name__}" in str(report)


def test_a_class_that_calls_torchs_function_runs_the_op():
    """Wider returns float32 for every x: no GroupNorm, but the function in it is one."""
    block = unzero(Block(Wider(4), OwnGroupNorm(4))).eval()
    arguments = inputs()
    expected = block(*arguments)
    report = fastdiff.patch(block)
    assert not report.left
    assert report.replaced == {
        "norm1": "group_norm",
        "norm2": "channel_bias + group_norm + silu",
    }
    torch.testing.assert_close(block(*arguments), expected, rtol=1e-5, atol=1e-5)
    assert block.norm1(arguments[0].bfloat16()).dtype == torch.float32


def test_instance_and_layer_normalizations(monkeypatch):
    norms = {
        "instance": nn.InstanceNorm2d(4, affine=True),
        "plain": nn.InstanceNorm2d(4),
        "images": nn.LayerNorm((4, 5, 5), elementwise_affine=False),
        "tracked": nn.InstanceNorm2d(4, track_running_stats=True),
        "tokens": nn.LayerNorm(5),
        "affine": nn.LayerNorm((4, 5, 5)),
    }
    model = unzero(nn.ModuleDict(norms)).eval()
    x = torch.randn(2, 4, 5, 5)
    expected = {name: m(x) for name, m in model.items()}
    report = fastdiff.patch(model)
    assert report.replaced.keys() == {"instance", "plain", "images"}
    assert "running statistics" in report.left["tracked"]
    for name, m in model.items():
        torch.testing.assert_close(m(x), expected[name], rtol=1e-5, atol=1e-5)
    for odd in (torch.randn(4, 5, 5), torch.randn(2, 4, 1, 1)):  # no batch; one pixel
        fresh = nn.InstanceNorm2d(4)
        for m in (fresh, model["plain"].train()):
            if odd.dim() == 3:
                torch.testing.assert_close(m(odd), F.instance_norm(odd[None])[0])
            else:
                with pytest.raises(ValueError, match="more than 1 spatial element"):
                    m(odd)


class Adaptive(nn.Module):
    """k-diffusion's AdaGN and diffusers' AdaGroupNorm: functional, with weights from a time."""

    def __init__(self):
        super().__init__()
        self.mapper = nn.Linear(6, 8)

    def forward(self, x, emb):
        scale, shift = self.mapper(emb)[:, :, None, None].chunk(2, dim=1)
        x = F.group_norm(x, 2, eps=1e-4)
        return x * (1 + scale) + shift


def test_adaptive_group_norm_by_function():
    module = unzero(Adaptive())
    arguments = inputs()
    expected = module(*arguments)
    report = fastdiff.patch(module)
    assert report.replaced == {"": "group_norm + scale_shift"}
    torch.testing.assert_close(module(*arguments), expected, rtol=1e-5, atol=1e-5)
    fastdiff.unpatch(module)
    assert torch.equal(module(*arguments), expected)


class Listed(nn.Module):
    """score_sde's NCSN++ and MONAI's autoencoders keep all layers in one list."""

    def __init__(self):
        super().__init__()
        self.all_modules = nn.ModuleList(
            [nn.Conv2d(4, 4, 1), nn.GroupNorm(2, 4), nn.Conv2d(4, 4, 1), nn.GroupNorm(4, 4)]
        )
        self.act = nn.SiLU()

    def forward(self, x):
        modules, i = self.all_modules, 0
        h = modules[i](x)
        i += 1
        h = self.act(modules[i](h))
        for block in self.all_modules[2:]:
            h = block(h)
        return h


def test_normalizations_in_a_list():
    module = unzero(Listed())
    x = inputs()[0]
    expected = module(x)
    report = fastdiff.patch(module)
    torch.testing.assert_close(module(x), expected, rtol=1e-5, atol=1e-5)
    assert report.replaced == {
        "all_modules.1": "group_norm + silu",
        "all_modules.3": "group_norm",
    }


class Unbound(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.GroupNorm(2, 4)

    def forward(self, x, flag):
        if flag:
            h = self.norm(x)
        x = x.clone().mul_(2)
        return F.silu(h) + x


def test_a_variable_that_was_never_assigned_is_still_an_error():
    module = unzero(Unbound())
    x = inputs()[0]
    expected = module(x, True)
    fastdiff.patch(module)
    torch.testing.assert_close(module(x, True), expected)
    with pytest.raises(UnboundLocalError):
        module(x, False)


def test_without_source_the_normalization_alone_and_a_reason():
    space = {"nn": nn, "F": F}
    exec(
        "class Made(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.norm = nn.GroupNorm(2, 4)\n"
        "    def forward(self, x):\n"
        "        return F.silu(self.norm(x))\n",
        space,
    )
    module, x = unzero(space["Made"]()), inputs()[0]
    expected = module(x)
    report = fastdiff.patch(module)
    assert report.replaced == {"norm": "group_norm"}
    assert report.reasons == {"Made.forward": "it has no source"}
    assert "Made.forward is as it was, as it has no source" in str(report)
    torch.testing.assert_close(module(x), expected, rtol=1e-5, atol=1e-5)


def test_the_report_counts_accesses_after_a_call():
    block = unzero(Block(nn.GroupNorm(2, 4), nn.GroupNorm(2, 4)))
    report = fastdiff.patch(block)
    assert report.bytes_saved == 0
    assert "call the network once" in str(report)
    block(*inputs())
    # SiLU twice and the time embedding once: a read and a write of 2 * 4 * 5 * 5 floats each.
    assert report.bytes_saved == 3 * 2 * 4 * 2 * 4 * 5 * 5
    assert "Block: 1 x group_norm + silu" in str(report)
    assert fastdiff.patch(block) == report
    keys = set(vars(Block(nn.GroupNorm(2, 4), nn.GroupNorm(2, 4)).norm1))
    fastdiff.unpatch(block)
    assert set(vars(block.norm1)) == keys
    again = pickle.loads(pickle.dumps(block))
    assert type(again) is Block


class Functional(nn.Module):
    """A class of one's own, as physicsnemo's: another function outside of training."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = (nn.Parameter(torch.rand(4)) for _ in range(2))

    def forward(self, x):
        if not self.training:
            return x
        return F.silu(F.group_norm(x, 2, self.weight, self.bias))


def test_the_report_counts_what_functions_normalize():
    module, x = Functional(), torch.randn(2, 4, 5, 5)
    expected = module(x)
    report = fastdiff.patch(module)
    assert torch.equal(module.eval()(x), x)
    assert report.bytes_saved == 0
    torch.testing.assert_close(module.train()(x), expected, rtol=1e-5, atol=1e-5)
    assert report.bytes_saved == 2 * 4 * 2 * 4 * 5 * 5
    assert report.replaced == {"": "group_norm + silu"}
    fastdiff.unpatch(module)
    assert "_fastdiff_ran" not in vars(module)


class Attention(nn.Module):
    """guided-diffusion's block: tokens, and a checkpoint around everything."""

    def __init__(self):
        super().__init__()
        self.norm, self.qkv = nn.GroupNorm(2, 4), nn.Conv1d(4, 4, 1)

    def forward(self, x):
        return checkpoint(self._forward, x, use_reentrant=False)

    def _forward(self, x):
        b, c, *spatial = x.shape
        x = x.reshape(b, c, -1)
        return (x + self.qkv(self.norm(x))).reshape(b, c, *spatial)


def test_compiled_with_gradients_under_a_checkpoint():
    module = unzero(Attention())
    x = inputs()[0].requires_grad_()
    (expected,) = torch.autograd.grad(module(x).square().sum(), x)
    fastdiff.patch(module)
    torch._dynamo.reset()
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    (grad,) = torch.autograd.grad(compiled(x).square().sum(), x)
    torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-5)


def test_a_copy_of_a_patched_block_is_patched_and_names_stay():
    block = unzero(Block(OwnGroupNorm(4), OwnGroupNorm(4)))
    arguments = inputs()
    expected = block(*arguments)
    fastdiff.patch(block)
    for other in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert type(other.norm1).__name__ == "OwnGroupNorm"
        assert isinstance(other.norm1, OwnGroupNorm)
        torch.testing.assert_close(other(*arguments), expected, rtol=1e-5, atol=1e-5)
        assert fastdiff.patch(other).replaced["norm2"] == "channel_bias + group_norm + silu"
    assert recognition.why_not_group_norm(OwnGroupNorm(4)) is None
