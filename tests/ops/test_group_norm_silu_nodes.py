"""group_norm_silu's autograd node in C++ and the one in Python do the same, whatever is asked."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable

import pytest
import torch
from op_harness import cpp_calls
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from fastdiff import ops

_module = importlib.import_module("fastdiff.ops.group_norm_silu")

NODES = ("C++", "Python")
NAMES = ("x", "weight", "bias", "channel_bias", "scale", "shift")


@pytest.fixture(params=NODES)
def node(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    _use(request.param, monkeypatch)
    return request.param


def _use(node: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cpp = cpp_calls().group_norm_silu if node == "C++" else None
    monkeypatch.setattr(_module, "_op", _module._op._replace(cpp=cpp))


def _inputs(given: tuple[str, ...] = NAMES) -> dict[str, Tensor | None]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"x": (3, 8, 5, 5), "weight": (8,), "bias": (8,)}
    return {
        name: torch.randn(shapes.get(name, (3, 8)), generator=generator) if name in given else None
        for name in NAMES
    }


def _call(inputs: dict[str, Tensor | None], activation: str = "silu") -> Tensor:
    return ops.group_norm_silu(
        inputs["x"], 4, inputs["weight"], inputs["bias"], 1e-5, inputs["channel_bias"],
        inputs["scale"], inputs["shift"], activation,
    )  # fmt: skip


@pytest.mark.parametrize("activation", ["silu", "identity"])
@pytest.mark.parametrize(
    "given", [NAMES, ("x",), ("x", "weight", "bias"), ("x", "bias", "scale", "shift")]
)
def test_same_bits_for_every_choice_of_gradients(
    given: tuple[str, ...], activation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    subsets = [s for n in range(1, len(given) + 1) for s in itertools.combinations(given, n)]
    for wanted in subsets:
        found = []
        for node in NODES:
            _use(node, monkeypatch)
            inputs = _inputs(given)
            for name in wanted:
                inputs[name].requires_grad_()
            y = _call(inputs, activation)
            assert ("CppNode" in y.grad_fn.name()) == (node == "C++")
            (y * torch.linspace(-1, 2, y.numel()).view_as(y)).sum().backward()
            assert {n for n in given if inputs[n].grad is not None} == set(wanted)
            found.append([y.detach(), *(inputs[name].grad for name in wanted)])
        for cpp, python in zip(*found, strict=True):
            torch.testing.assert_close(cpp, python, rtol=0, atol=0)


def test_nobody_records(node: str) -> None:
    inputs = _inputs()
    inputs["weight"].requires_grad_()
    expected = _call(inputs).detach()
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            y = _call(inputs)
        assert not y.requires_grad
        torch.testing.assert_close(y, expected, rtol=0, atol=0)
    assert not _call(_inputs()).requires_grad


def test_twice_only_if_the_graph_is_retained(node: str) -> None:
    inputs = _inputs()
    x = inputs["x"].requires_grad_()
    loss = _call(inputs).square().sum()
    (first,) = torch.autograd.grad(loss, x, retain_graph=True)
    (second,) = torch.autograd.grad(loss, x)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, x)


@pytest.mark.parametrize("changed", NAMES)
def test_an_input_changed_in_place_is_noticed(changed: str, node: str) -> None:
    inputs = _inputs()
    inputs["x" if changed != "x" else "weight"].requires_grad_()
    y = _call(inputs)
    inputs[changed].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_second_derivatives(node: str) -> None:
    inputs = {name: t.double().requires_grad_() for name, t in _inputs().items()}

    def f(*tensors: Tensor) -> Tensor:
        return _call(dict(zip(NAMES, tensors, strict=True)))

    assert torch.autograd.gradcheck(f, tuple(inputs.values()), fast_mode=True)
    assert torch.autograd.gradgradcheck(f, tuple(inputs.values()), fast_mode=True)
    one = _inputs(("x", "weight"))  # absent operands, and one without a gradient
    weight = one["weight"].requires_grad_()
    (gradient,) = torch.autograd.grad(_call(one).square().sum(), weight, create_graph=True)
    (second,) = torch.autograd.grad(gradient.sum(), weight)
    assert second.abs().min() > 0


def test_what_is_saved_passes_the_hooks(node: str) -> None:
    inputs = _inputs(("x", "weight"))
    x = inputs["x"].requires_grad_()
    packed: list[torch.Size] = []

    def pack(t: Tensor) -> Tensor:
        packed.append(t.shape)
        return t.detach().clone()

    with saved_tensors_hooks(pack, lambda t: t):
        y = _call(inputs)
    (found,) = torch.autograd.grad(y.square().sum(), x)
    assert sorted(packed, key=tuple) == sorted([x.shape, (8,), (3, 4), (3, 4)], key=tuple)
    (expected,) = torch.autograd.grad(_call(inputs).square().sum(), x)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_checkpointing(node: str) -> None:
    inputs = _inputs()
    x = inputs["x"].requires_grad_()
    (expected,) = torch.autograd.grad(_call(inputs).square().sum(), x)
    for reentrant in (False, True):
        y = torch.utils.checkpoint.checkpoint(
            lambda x: _call({**inputs, "x": x}), x, use_reentrant=reentrant
        )
        x.grad = None
        y.square().sum().backward()
        torch.testing.assert_close(x.grad, expected, rtol=0, atol=0)


def test_errors_name_the_argument(node: str) -> None:
    inputs = _inputs()
    inputs["x"].requires_grad_()
    for name in NAMES[1:]:
        with pytest.raises(ValueError, match=f"group_norm_silu: {name} has shape"):
            _call({**inputs, name: torch.ones(7)})
    with pytest.raises(TypeError, match=r"weight is a list, expected a torch\.Tensor"):
        _call({**inputs, "weight": [1.0] * 8})
    with pytest.raises(RuntimeError, match="shape"):
        _call(inputs).backward(torch.ones(2, 8, 5, 5))


class _Logged(Tensor):
    calls: list[Callable]

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.calls.append(func)
        return super().__torch_function__(func, types, args, kwargs)


def test_subclasses_see_the_operator(node: str) -> None:
    _Logged.calls = []
    inputs = _inputs()
    expected = _call(inputs)
    inputs["x"] = inputs["x"].as_subclass(_Logged)
    y = _call(inputs)
    assert torch.ops.fastdiff.group_norm_silu.default in _Logged.calls
    assert isinstance(y, _Logged)
    torch.testing.assert_close(y.as_subclass(Tensor), expected, rtol=0, atol=0)
