"""`patch` fuses what people write around a normalization, and leaves what must not fuse."""

import copy
import inspect

import pytest
import torch
from integrations.forms import FUSED, WRITES_WHAT_AUTOGRAD_KEEPS, Adaptive
from nn.networks import unzero

import fastdiff
from fastdiff.integrations import deferred

# Where eager mode knows more or less than a graph does.
PATCHED = FUSED | {
    "one_for_the_batch": "ba",  # the sum is asked for its shape
    "closed_over": "",  # the variable may be read by anybody
    "written_between": "a",  # the sum is computed before, and the rest fuses
}
BODIES = [
    name for name, f in vars(Adaptive).items() if inspect.isfunction(f) and name not in
    ("__init__", "forward")
]  # fmt: skip


def record(monkeypatch):
    """What each op that runs has: b(ias), (s)cale, s(h)ift, (a)ctivation."""
    parts, op = [], deferred.group_norm_silu

    def recorded(*arguments):
        *_, bias, scale, shift, activation = arguments
        given = bias is not None, scale is not None, shift is not None, activation == "silu"
        parts.append("".join(c for c, there in zip("bsha", given, strict=True) if there))
        return op(*arguments)

    monkeypatch.setattr(deferred, "group_norm_silu", recorded)
    return parts


def results(net, x, emb):
    x, emb = x.clone().requires_grad_(), emb.clone().requires_grad_()
    y = net(x, emb)
    if net.body in WRITES_WHAT_AUTOGRAD_KEEPS:
        return y.detach(), ()
    wanted = [x, emb, *net.parameters()]
    return y, torch.autograd.grad(y.square().sum(), wanted, allow_unused=True)


@pytest.mark.parametrize("body", BODIES)
def test_forms(body, monkeypatch):
    net = unzero(Adaptive(body))
    x, emb = torch.randn(3, 4, 5, 6), torch.randn(3, 6)
    wide = copy.deepcopy(net).double()
    wide.body = {"in_float32": "bias"}.get(body, body)  # the same, without the cast
    exact, exact_grads = results(wide, x.double(), emb.double())
    fastdiff.patch(net)
    parts = record(monkeypatch)
    for grad_enabled in (False, True):
        with torch.set_grad_enabled(grad_enabled):
            parts.clear()
            y = net(x, emb)
            assert y.requires_grad == grad_enabled
            torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=1e-5)
            if body in PATCHED:
                assert parts == [PATCHED[body]]
    _, grads = results(net, x, emb)
    for a, b in zip(grads, exact_grads, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert (a.double() - b).norm() <= 1e-5 * max(b.norm(), 1)
    half, original = copy.deepcopy(net).bfloat16(), copy.deepcopy(net)
    fastdiff.unpatch(original)
    original.bfloat16()
    for m in (half, original):  # as guided-diffusion keeps them
        m.norm.float()
    with torch.no_grad():
        y, before = (m(x.bfloat16(), emb.bfloat16()) for m in (half, original))
    assert y.dtype == before.dtype
    errors = [(z.double() - exact).norm() / exact.norm() for z in (y, before)]
    assert errors[0] <= max(1.5 * errors[1], 2.0**-8)  # fewer roundings; other luck
