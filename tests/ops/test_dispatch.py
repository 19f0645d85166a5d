"""Calls through `fastdiff._dispatch`, in C++, give what the same calls in Python give."""

from __future__ import annotations

import importlib
import types
from collections.abc import Callable

import pytest
import torch
from op_harness import cpp_calls
from torch import Tensor
from torch.autograd import forward_ad

import fastdiff
from fastdiff import _native, ops

SHAPE = (3, 4, 5, 5)
SCHEDULE = fastdiff.NoiseSchedule.linear(1000)
TABLES = SCHEDULE.tables("cpu")
STEPS = SCHEDULE.ddpm_table()
T = torch.tensor([0, 7, 999])
SEEDS = {"seed": 3, "large seed": 2**64 - 1, "keys": torch.tensor([1, -2, 3])}


def _randn(*shape: int) -> Tensor:
    return torch.randn(*(shape or SHAPE), generator=torch.Generator().manual_seed(len(shape)))


def _q_sample(x: Tensor, noise: dict) -> Tensor:
    tables = TABLES.sqrt_alpha_bar, TABLES.sqrt_one_minus_alpha_bar
    return ops.q_sample(x, T, *tables, **noise)


def _posterior_mean(x: Tensor, noise: dict) -> Tensor:
    tables = TABLES.posterior_coef_x0, TABLES.posterior_coef_x_t
    return ops.posterior_mean(x, _randn(*SHAPE), T, *tables)


# By op, with its main input and its noise or seed.
CALLS: dict[str, Callable] = {
    "q_sample": _q_sample,
    "posterior_mean": _posterior_mean,
    "eps_loss": lambda x, noise: ops.eps_loss(x, **noise),
    "ddim_step": lambda x, noise: ops.ddim_step(x, _randn(*SHAPE), T, STEPS, **noise),
    "ddpm_step": lambda x, noise: ops.ddpm_step(
        _randn(*SHAPE), x, T, STEPS, return_pred_x0=True, **noise
    ),
    "vlb_terms": lambda x, noise: ops.vlb_terms(
        _randn(*SHAPE), _randn(*SHAPE), x, T, STEPS, **noise
    ),
}


@pytest.fixture
def cpp() -> types.ModuleType:
    return cpp_calls()


class _Spied:
    """An op's C++ call, with what it returned to each caller."""

    def __init__(self, name: str, monkeypatch: pytest.MonkeyPatch, *, enabled: bool = True) -> None:
        module = importlib.import_module(f"fastdiff.ops.{name}")
        self.call, self.returned = module._op.cpp, []
        op = module._op._replace(cpp=self if enabled else None)
        monkeypatch.setattr(module, "_op", op)

    def __call__(self, *arguments: object) -> object:
        self.returned.append(self.call(*arguments))
        return self.returned[-1]


def _tensors(found: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return found if isinstance(found, tuple) else (found,)


@pytest.mark.parametrize("noise", ["given", *SEEDS])
@pytest.mark.parametrize("name", CALLS)
def test_same_bits(
    name: str, noise: str, cpp: types.ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"noise": _randn(*SHAPE)} if noise == "given" else {"seed": SEEDS[noise]}
    results = []
    for enabled in (True, False):
        with monkeypatch.context() as patch:
            spy = _Spied(name, patch, enabled=enabled)
            results.append(_tensors(CALLS[name](_randn(), given)))
        assert [found is not None for found in spy.returned] == [True] * enabled
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("name", CALLS)
def test_python_records(name: str, cpp: types.ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    noise = {"noise": _randn(*SHAPE)}
    gradients = []
    for enabled in (True, False):
        with monkeypatch.context() as patch:
            spy = _Spied(name, patch, enabled=enabled)
            x = _randn().requires_grad_()
            total = sum(y.square().sum() for y in _tensors(CALLS[name](x, noise)))
            assert spy.returned == [None] * enabled
            with torch.no_grad():
                CALLS[name](x, noise)
            assert [found is None for found in spy.returned] == [True, False][: 2 * enabled]
        gradients += torch.autograd.grad(total, x)
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


@pytest.mark.parametrize("name", CALLS)
def test_bad_arguments_get_the_clear_message(name: str, cpp: types.ModuleType) -> None:
    with pytest.raises(TypeError, match=f"^{name}: .* has dtype torch.int32, expected .*floating"):
        CALLS[name](_randn().int(), {"noise": _randn(*SHAPE)})
    if name != "posterior_mean":
        with pytest.raises(TypeError, match=f"^{name}: .*seed.* has dtype"):
            CALLS[name](_randn(), {"seed": torch.ones(3)})


def test_neither_tangents_nor_transforms_pass_unseen(cpp: types.ModuleType) -> None:
    tables = TABLES.sqrt_alpha_bar, TABLES.sqrt_one_minus_alpha_bar
    rest = (T, *tables, _randn(*SHAPE), None, None, 0, None, None)
    found = []
    torch.func.grad(lambda x: (found.append(cpp.q_sample(x, *rest)), x.sum())[1])(_randn())
    with forward_ad.dual_level():
        found.append(cpp.q_sample(forward_ad.make_dual(_randn(), _randn(*SHAPE)), *rest))
    assert found == [None, None]
    assert cpp.q_sample(_randn(), *rest) is not None


def test_raw_operators_are_recorded() -> None:
    """The kernel at the Autograd key gets every argument, dtypes too, and its outputs back."""
    tables = TABLES.sqrt_alpha_bar, TABLES.sqrt_one_minus_alpha_bar
    x = _randn().requires_grad_()
    raw = torch.ops.fastdiff.q_sample
    arguments = (x, T, *tables, None, None, 5, 0, None, torch.bfloat16)
    y = raw(*arguments)
    expected = ops.q_sample(x, T, *tables, seed=5, dtype=torch.bfloat16)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected, rtol=0, atol=0)
    (found,) = torch.autograd.grad(y.float().sum(), x)
    torch.testing.assert_close(found, torch.autograd.grad(expected.float().sum(), x)[0])
    with torch.no_grad():
        assert not raw(*arguments).requires_grad
    steps = torch.ops.fastdiff.ddpm_step(
        x, _randn(*SHAPE), T, STEPS, 0, False, False, None, 1.0, None, None, 5, 0, True
    )
    assert [y.requires_grad for y in steps] == [True, True]
    with pytest.raises(RuntimeError, match=r"does not run under torch\.func's transforms"):
        torch.func.grad(lambda x: raw(x, *arguments[1:]).float().sum())(x.detach())


def test_no_other_torch_gets_it(monkeypatch: pytest.MonkeyPatch) -> None:
    load = _native.dispatch.__wrapped__
    other = types.SimpleNamespace(torch_version="2.9.9+other")
    monkeypatch.setattr(_native, "build_info", lambda: other)
    assert load() == (None, "Python (the build's C++ is for torch 2.9.9+other only)")
    monkeypatch.setattr(_native, "build_info", lambda: None)
    assert load() == (None, "Python (no native build)")
