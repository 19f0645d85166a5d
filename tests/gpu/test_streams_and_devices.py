"""Calls follow the current stream, run on their inputs' device, and give the same bits every time.

The results themselves are compared with float64 by the op tests and `python -m fastdiff.verify`.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gpu.needs import GPU, two_devices
from torch import Tensor

import fastdiff
from fastdiff import ops
from fastdiff.verification import CASES, Case
from fastdiff.verification.cases import Inputs

pytestmark = GPU

cases = pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.op}: {c.variant}")


def results(case: Case, arguments: dict[str, Any]) -> list[Tensor]:
    """Outputs and gradients on the present stream, without a synchronization."""
    given = dict(arguments)
    for name in case.differentiable:
        given[name] = given[name].detach().requires_grad_()
    returned = case.function(**given)
    outputs = returned if isinstance(returned, tuple) else (returned,)
    found = [x.detach() for x in outputs]
    if case.differentiable:
        inputs = [given[name] for name in case.differentiable]
        differentiated = [outputs[i] for i in case.outputs]
        found += torch.autograd.grad(
            differentiated, inputs, [torch.ones_like(x) for x in differentiated]
        )
    return found


def inputs(case: Case, device: str, layout: str = "nchw") -> dict[str, Any]:
    return case.arguments(Inputs(torch.float32, layout, torch.device(device)))


def assert_same_bits(actual: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one.cpu(), other.cpu())


@pytest.mark.parametrize("index", [0, pytest.param(1, marks=two_devices)])
@cases
def test_runs_on_the_current_stream(case: Case, index: int, backend: str) -> None:
    """Inputs that a side stream is still writing are waited for: the default stream would not."""
    with torch.cuda.device(index):
        check_the_current_stream(case, backend)


def check_the_current_stream(case: Case, backend: str) -> None:
    arguments = inputs(case, "cuda")
    tensors = {k: v for k, v in arguments.items() if isinstance(v, Tensor)}
    late = arguments | {k: torch.zeros_like(v) for k, v in tensors.items()}
    with fastdiff.use_backend(backend):
        expected = results(case, arguments)
        results(case, late)  # compiles and loads what the side stream will need
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(200_000_000)  # clock cycles: a tenth of a second
            for name, tensor in tensors.items():
                late[name].copy_(tensor)
            actual = results(case, late)
            busy = not stream.query()
        stream.synchronize()
    assert busy, "the call waited for the device"
    assert_same_bits(actual, expected)


@two_devices
@cases
def test_runs_on_the_device_of_its_inputs(case: Case, backend: str) -> None:
    """While another device is the current one, which stays so."""
    with fastdiff.use_backend(backend):
        expected = results(case, inputs(case, "cuda:0"))
        with torch.cuda.device(0):
            actual = results(case, inputs(case, "cuda:1"))
            assert torch.cuda.current_device() == 0
    assert all(x.device == torch.device("cuda:1") for x in actual)
    same_model = len({torch.cuda.get_device_name(i) for i in (0, 1)}) == 1
    if same_model:
        assert_same_bits(actual, expected)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one.cpu(), other.cpu())


@two_devices
def test_inputs_on_two_devices_are_refused(backend: str) -> None:
    (case,) = (c for c in CASES if (c.op, c.variant) == ("q_sample", "noise given"))
    arguments = inputs(case, "cuda:0")
    with (
        fastdiff.use_backend(backend),
        pytest.raises((ValueError, RuntimeError), match=r"noise|device"),
    ):
        case.function(**arguments | {"noise": arguments["noise"].to("cuda:1")})


@pytest.mark.parametrize("layout", ["nchw", "channels_last", "vectors"])
@cases
def test_runs_repeat_bit_for_bit(case: Case, layout: str, backend: str) -> None:
    """Beside other work on the device too, which changes the order of the blocks."""
    arguments = inputs(case, "cuda", layout)
    with fastdiff.use_backend(backend):
        expected = results(case, arguments)
        other = torch.cuda.Stream()
        with torch.cuda.stream(other):
            load = torch.randn(2048, 2048, device="cuda")
        for _ in range(5):
            with torch.cuda.stream(other):
                load = load @ load / 2048
            assert_same_bits(results(case, arguments), expected)


def test_the_noise_is_that_of_the_cpu(backend: str) -> None:
    """Words are the same; a normal may differ by the functions' last bits."""
    with fastdiff.use_backend(backend):
        device = ops.philox_normal((3, 5, 17, 19), 11, device="cuda").cpu()
    torch.testing.assert_close(device, ops.philox_normal((3, 5, 17, 19), 11), rtol=1e-5, atol=1e-5)


def test_the_default_backend_of_a_device() -> None:
    """Of the current device, and by index; as fastdiff.info and the commands ask for it."""
    from fastdiff import _backends

    compiled = bool(fastdiff.backends()["cuda"])
    assert _backends.default_backend("cuda") == ("cuda" if compiled else "triton")
    for index in range(torch.cuda.device_count()):
        expected = ops_backend(f"cuda:{index}")
        assert _backends.default_backend(f"cuda:{index}") == expected
    assert _backends.default_backend("meta") == "reference"


def ops_backend(device: str) -> str:
    """What a call on that device selects."""
    from fastdiff import _backends

    return _backends.select_backend("q_sample", torch.zeros(1, device=device), None)
