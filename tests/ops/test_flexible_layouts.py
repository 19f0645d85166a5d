"""Inductor may choose the strides of what ops get (torch.Tag.flexible_layout): it lays out
convolutions as it likes, and converts nothing around an op. For that every fake must tell the
strides of the results whatever the strides of the inputs are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from op_harness.sampler_step import strided, table_for
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

import fastdiff
from fastdiff.nn import GroupNormSiLU
from fastdiff.ops._sampler_step import Arguments

B, C, GROUPS = 2, 4, 2
T = 1000
OPS = torch.ops.fastdiff
SCHEDULE = fastdiff.NoiseSchedule.linear(T)

# image(channels=C) makes the next image-shaped argument.
Image = Callable[..., Tensor]


def q_sample(image: Image) -> tuple:
    tables = SCHEDULE.tables("cpu")
    t = torch.tensor([3, 700])
    known = t, tables.sqrt_alpha_bar, tables.sqrt_one_minus_alpha_bar
    return image(), *known, image(), None, None, 0, None, None


def eps_loss_with_gradient(image: Image) -> tuple:
    return image(), image(), None, None, 0, None, 1, 0


def eps_loss_backward(image: Image) -> tuple:
    return torch.ones(B), image(), image(), None, None, 0, None, 0, 0, True, True


def step(op: str, image: Image) -> tuple:
    two = 2 if op == "ddpm_step" else 1
    index, table = torch.tensor([1, 4]), table_for(op)
    return Arguments(
        image(), image(two * C), index, table, 0, True, two == 2, image(two * C), 2.0, image(),
        None, None, 0, True,
    )  # fmt: skip


def step_backward(op: str, image: Image) -> tuple:
    return image(), image(), [True] * 4, *step(op, image)


def vlb_terms_backward(image: Image) -> tuple:
    table = SCHEDULE.ddpm_table(torch.arange(T), variance="learned_range")
    inputs = image(), image(), image(2 * C), torch.tensor([0, 8]), table, image()
    return torch.ones(3, B), *inputs, None, None, 0, 0, True, True, False


def group_norm_silu(image: Image) -> tuple:
    return image(), GROUPS, torch.ones(C), None, 1e-5, torch.ones(B, C), None, None, 0


def group_norm_silu_backward(image: Image) -> tuple:
    statistics = torch.zeros(B, GROUPS), torch.ones(B, GROUPS)
    small = torch.ones(C), None, torch.ones(B, C), None, None
    needs = True, True, False, True, False, False
    return image(), image(), *statistics, GROUPS, *small, 0, *needs


CALLS = {
    "q_sample": q_sample,
    "eps_loss_with_gradient": eps_loss_with_gradient,
    "eps_loss_backward": eps_loss_backward,
    "ddim_step": lambda image: step("ddim_step", image),
    "ddpm_step": lambda image: step("ddpm_step", image),
    "ddim_step_backward": lambda image: step_backward("ddim_step", image),
    "ddpm_step_backward": lambda image: step_backward("ddpm_step", image),
    "vlb_terms_backward": vlb_terms_backward,
    "group_norm_silu": group_norm_silu,
    "group_norm_silu_backward": group_norm_silu_backward,
}


def placement(x: Tensor) -> tuple:
    """What compiled code relies on; the strides of dimensions of size 1 are never used."""
    strides = [s for s, size in zip(x.stride(), x.shape, strict=True) if size > 1]
    return x.shape, strides, x.dtype, x.device


@pytest.mark.parametrize("name", CALLS)
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_fakes_tell_the_strides(name: str, data: st.DataObject) -> None:
    size = data.draw(st.lists(st.integers(1, 4), min_size=2, max_size=2))
    seeds: Iterator[int] = iter(range(100))

    def image(channels: int = C) -> Tensor:
        return strided(data, [B, channels, *size], next(seeds))

    arguments = tuple(CALLS[name](image))
    op = getattr(OPS, name).default
    with torch.no_grad():
        results = op(*arguments)
        with FakeTensorMode(allow_non_fake_inputs=False) as mode:
            fakes = op(*tree_map_only(Tensor, mode.from_tensor, arguments))
    if isinstance(results, Tensor):
        results, fakes = (results,), (fakes,)
    for real, fake in zip(results, fakes, strict=True):
        assert placement(real) == placement(fake)


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm, self.conv = GroupNormSiLU(4, channels), nn.Conv2d(channels, channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.norm(x))


def test_inductor_converts_no_layout_around_an_op() -> None:
    """Between convolutions, which it runs in channels_last on the CPU, there are our ops alone."""
    from torch._inductor.utils import fresh_cache, run_and_get_code

    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(16, 16, 3), Block(16), Block(16))
    x = torch.randn(2, 16, 12, 12)

    def loss_and_gradients(f: Callable) -> list[Tensor]:
        network.zero_grad()
        loss = F.mse_loss(f(x), torch.ones(2, 16, 6, 6))
        loss.backward()
        return [loss.detach(), *(p.grad for p in network.parameters())]

    expected = loss_and_gradients(network)
    torch._dynamo.reset()
    with fresh_cache():  # its key does not know the tags of our ops
        compiled = torch.compile(network, fullgraph=True)
        found, sources = run_and_get_code(lambda: loss_and_gradients(compiled))
    torch._dynamo.reset()
    code = "\n".join(sources)
    assert code.count("torch.ops.fastdiff.group_norm_silu.default(") == 2
    assert code.count("torch.ops.fastdiff.group_norm_silu_backward.default(") == 2
    around = [line for line in code.splitlines() if "cpp_fused_group_norm_silu" in line]
    assert not around, around
    for actual, right in zip(found, expected, strict=True):
        torch.testing.assert_close(actual, right)
