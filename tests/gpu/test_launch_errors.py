"""A launch that fails is told once, by its own op; kernel attributes are no thread's own."""

from __future__ import annotations

import sys
import threading
from typing import Any

import pytest
import torch
from gpu.needs import GPU
from gpu.software import on_software_device
from gpu.test_streams_and_devices import inputs, results
from torch import Tensor

import fastdiff
from fastdiff import ops
from fastdiff.verification import CASES, Case

pytestmark = [
    *GPU,
    pytest.mark.skipif(
        torch.cuda.is_available() and not on_software_device(),
        reason="about the software CUDA device: it refuses launches on request",
    ),
]


@pytest.fixture
def device() -> Any:
    return sys.modules["software_cuda"].device


@pytest.fixture(autouse=True)
def compiled_kernels() -> Any:
    if not (status := fastdiff.backends()["cuda"]):
        pytest.skip(f"cuda: {status.reason}")
    with fastdiff.use_backend("cuda"):
        yield


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.op}: {c.variant}")
def test_a_refused_launch_is_told_by_its_op_alone(
    case: Case, device: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = inputs(case, "cuda")
    expected = results(case, arguments)
    errors = sys.modules["ptx_emulator.errors"]

    def refuse(*_: Any) -> None:
        raise errors.LaunchError("planted", errors.CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES)

    with device.expect("launch refused"), monkeypatch.context() as planted:
        planted.setattr(device.emulation, "_prepare", refuse)
        with pytest.raises(RuntimeError, match="CUDA error: too many resources"):
            results(case, arguments)
    x = torch.ones(3, device="cuda")  # torch asks for the last error after each of its launches
    assert (x + x).sum().item() == 6
    for one, other in zip(results(case, arguments), expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.op}: {c.variant}")
def test_an_error_that_other_code_left_is_not_ours(case: Case, device: Any) -> None:
    arguments = inputs(case, "cuda")
    expected = results(case, arguments)
    assert device.runtime.cudaSetDevice(99) == 101  # cudaErrorInvalidDevice
    try:
        found = results(case, arguments)
    finally:
        device.runtime.cudaGetLastError()
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def test_threads_that_need_different_amounts_of_shared_memory(device: Any) -> None:
    """Both more than a kernel has without asking: what one asks for is not the other's limit."""
    generator = torch.Generator().manual_seed(0)
    tensors = [
        torch.randn((1, channels, 4, 4), generator=generator).bfloat16().cuda()
        for channels in (4096, 2304)
    ]
    expected = [ops.group_norm_silu(x, 1, None, None) for x in tensors]
    torch.cuda.synchronize()
    shared = {launch.dynamic_shared_bytes for launch in device.launches}
    assert sum(number > 48 << 10 for number in shared) == 2, shared
    found: list[list[Tensor]] = [[], []]

    def work(index: int) -> None:
        with fastdiff.use_backend("cuda"):
            for _ in range(25):
                found[index].append(ops.group_norm_silu(tensors[index], 1, None, None))

    threads = [threading.Thread(target=work, args=(index,), daemon=True) for index in range(2)]
    with device.jitter(3000):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(300)
    for index in range(2):
        assert len(found[index]) == 25
        assert all(torch.equal(y, expected[index]) for y in found[index])
