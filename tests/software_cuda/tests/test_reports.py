"""Every kind of problem that the device reports, planted once."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from software_cuda import PROBLEMS, REPORTED, device

from .triton_kernels import fill_with_ones, wait_for_a_one, write_number_of_block

pytestmark = pytest.mark.gpu
two_devices = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")


def test_correct_launches_report_nothing(launchers):
    x, y = torch.empty(300, device="cuda"), torch.empty(300, device="cuda")
    assert launchers.fill(x, 7, 300) == 0
    assert launchers.twice(x, y) == 0
    assert (y == 14).all()
    assert [launch.grid for launch in device.launches[-2:]] == [(3, 1, 1)] * 2
    assert device.take_problems() == []


@pytest.mark.parametrize("elements", [1, 300, 512])
def test_an_access_behind_a_tensor_is_a_fault_that_lasts(launchers, elements):
    x = torch.zeros(elements, device="cuda")
    with device.expect("kernel fault") as reports:
        assert launchers.fill(x, 7, elements + 1) != 0
        with pytest.raises(RuntimeError, match=r"illegal|CUDA error"):
            x.add_(1)  # a device is of no use after a fault
    assert "OutOfBounds" in reports[0].what
    assert x.add_(1).sum() >= elements  # but works again when its problems have been taken


def test_blocks_that_write_to_the_same_place_are_a_fault():
    x = torch.zeros(128, device="cuda")
    with device.expect("kernel fault") as reports, pytest.raises(RuntimeError, match="CUDA"):
        write_number_of_block[(4,)](x)
    assert "RaceError" in reports[0].what


def test_a_kernel_that_does_not_end_is_a_fault(monkeypatch):
    assert device.emulation.options.timeout
    options = dataclasses.replace(device.emulation.options, timeout=1)
    monkeypatch.setattr(device.emulation, "options", options)
    x = torch.zeros(1, dtype=torch.int32, device="cuda")
    with device.expect("kernel fault") as reports, pytest.raises(RuntimeError, match="CUDA"):
        wait_for_a_one[(1,)](x)
    assert "KernelTimeout" in reports[0].what


def test_an_access_to_a_tensor_that_was_not_given_is_a_fault(launchers):
    both = torch.zeros(2, 128, device="cuda")
    x = torch.zeros(128, device="cuda")
    y = torch.zeros(128, device="cuda")
    distance = (y.data_ptr() - x.data_ptr()) // 4
    assert launchers.fill(both, 1, 256) == 0
    if distance > 0:
        with device.expect("kernel fault"):
            launchers.fill(x, 1, distance + 1)


def test_fresh_memory_is_nan_also_where_a_tensor_was_before():
    for _ in range(3):
        x = torch.empty(1000, device="cuda")
        address = x.data_ptr()
        assert x.isnan().all()
        x.fill_(1)
        del x
    assert torch.empty(1000, device="cuda").data_ptr() == address


def test_a_launch_on_another_stream_than_the_current(launchers):
    x, other = torch.zeros(8, device="cuda"), torch.cuda.Stream()
    with device.expect("foreign stream") as reports:
        launchers.fill(x, 1, 8, other)
    assert "fill_kernel" in reports[0].what
    assert "test_reports.py" in reports[0].where[1]
    with torch.cuda.stream(other):
        launchers.fill(x, 1, 8)
    assert device.take_problems() == []


@two_devices
def test_memory_of_another_device(launchers):
    here, there = torch.zeros(128, device="cuda:0"), torch.zeros(128, device="cuda:1")
    with device.expect("other device"), device.expect("kernel fault"):
        launchers.twice(here, there)


def test_memory_that_has_been_freed(launchers):
    x = torch.zeros(128, device="cuda")
    address = x.data_ptr()
    del x
    with device.expect("freed memory"):
        launchers.fill(address, 1, 128)


def test_padding_of_arguments_is_no_address(launchers):
    """Behind a bool the upper bytes of an old pointer: of the middle of a tensor that is gone."""
    x = torch.zeros(128, device="cuda")
    gone = torch.zeros(1 << 20, device="cuda")
    stale = gone.data_ptr() + (1 << 20)
    del gone
    assert launchers.padded(x, stale, 128) == 0
    assert (x == 7).all()
    assert device.take_problems() == []


def test_freed_memory_in_a_struct(launchers):
    x = torch.zeros(128, device="cuda")
    address = x.data_ptr()
    del x
    with device.expect("freed memory"):
        launchers.padded(address, 0, 128)


@pytest.mark.parametrize("index", [0, 1])
def test_freed_memory_in_an_array_that_a_variable_indexes(launchers, index):
    x, y = torch.zeros(2, 128, device="cuda"), torch.zeros(128, device="cuda")
    assert launchers.indexed(x, y, index, 128) == 0
    assert [x[0].sum(), y.sum()][index] == 128
    address = y.data_ptr()
    del y
    with device.expect("freed memory"):
        launchers.indexed(x, address, 1, 128)


def test_freed_memory_in_a_triton_kernel():
    address = torch.zeros(128, device="cuda").data_ptr()
    x = torch.zeros(128, device="cuda")
    assert x.data_ptr() == address
    fill_with_ones[(1,)](x, x.numel())
    assert x.sum() == 128
    del x
    with device.expect("freed memory"):
        fill_with_ones[(1,)](SimpleNamespace(data_ptr=lambda: address, dtype=torch.float32), 128)


@pytest.mark.parametrize("correct", ["record_stream", "wait", None])
@pytest.mark.parametrize("recorded", [True, False])
def test_memory_freed_while_another_stream_uses_it(launchers, correct, recorded):
    """Also where some other stream is recorded."""
    side, third = torch.cuda.Stream(), torch.cuda.Stream()
    y = torch.zeros(128, device="cuda")

    def use() -> None:
        temporary = torch.ones(128, device="cuda")
        if recorded:
            with torch.cuda.stream(third):
                y.clone()
            temporary.record_stream(third)
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            launchers.twice(temporary, y)
        if correct == "record_stream":
            temporary.record_stream(side)
        elif correct == "wait":
            torch.cuda.current_stream().wait_stream(side)

    with device.lazy():
        if correct:
            use()
            device.finish()
        else:
            with device.expect("freed in use"):
                use()
                device.finish()
    assert (y == 2).all()


@pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream")
def test_autograd_records_the_streams_of_its_nodes():
    """A gradient is accumulated, and freed, on other streams than it was made on."""
    side = torch.cuda.Stream()
    x = torch.arange(1000.0, device="cuda", requires_grad=True)
    with device.lazy():
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            accumulate = x.expand_as(x).grad_fn.next_functions[0][0]  # a node of this stream
            half = x / 2
        torch.cuda.current_stream().wait_stream(side)
        half.record_stream(torch.cuda.current_stream())
        (half * x).sum().backward()
        del half
        for _ in range(3):
            (x * x).sum().backward()
        device.finish()
    assert accumulate is not None
    assert torch.equal(x.grad, 7 * x.detach())


def test_memory_of_a_graph_may_be_freed_while_it_runs(launchers):
    """Its pool does not hand it out again: replays are on another stream than the capture was."""
    x = torch.ones(128, device="cuda")
    graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.graph(graph, stream=side):
        y = torch.empty(128, device="cuda")
        launchers.twice(x, y)
    with device.lazy():
        graph.replay()
        result = y.clone()
        del graph, y
        assert device.take_problems() == []
    assert (result == 2).all()


@pytest.mark.parametrize("instead", [False, True])
def test_a_graph_that_outlives_its_input(instead):
    """It would read what another tensor has written there, or what nobody has."""
    x = torch.ones(128, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = x * 2  # its memory, and that of temporaries, is the graph's
        z = (y + 1) * y
    graph.replay()
    assert device.take_problems() == []
    assert (z == 6).all()
    address = x.data_ptr()
    del x
    if instead:
        x = torch.ones(128, device="cuda")
        assert x.data_ptr() == address
    with device.expect("freed memory") as reports:
        graph.replay()
    assert "aten::mul" in reports[0].what


@pytest.mark.parametrize("waits", [True, False])
def test_memory_of_a_pool_is_taken_again_while_it_is_in_use(launchers, waits):
    """Who has a pool of memory, such as torch.compile, may order streams as late as that."""
    pool, side = torch.cuda.MemPool(), torch.cuda.Stream()
    y = torch.zeros(128, device="cuda")

    def taken() -> torch.Tensor:
        with torch.cuda.stream(side), torch.cuda.use_mem_pool(pool):
            return torch.ones(128, device="cuda")

    with device.lazy():
        x = taken()
        torch.cuda.current_stream().wait_stream(side)
        launchers.twice(x, y)
        del x
        if waits:
            side.wait_stream(torch.cuda.current_stream())
            taken()
        else:
            with device.expect("freed in use"):
                taken()
        device.finish()
    assert (y == 2).all()


@two_devices
def test_a_kernel_attribute_holds_for_one_device(launchers):
    on = [torch.arange(128.0, device=f"cuda:{i}") for i in range(2)]
    with torch.cuda.device(0):
        assert launchers.reverse(on[0], 60 << 10, ask=True) == 0
        assert launchers.reverse(on[0], 60 << 10, ask=False) == 0  # it stays set
    with torch.cuda.device(1), device.expect("launch refused"):
        assert launchers.reverse(on[1], 60 << 10, ask=False) != 0


def test_too_much_shared_memory_is_refused(launchers):
    x = torch.arange(128.0, device="cuda")
    too_much = torch.cuda.get_device_properties(0).shared_memory_per_block_optin + 1
    assert launchers.reverse(x, too_much, ask=True) == 1  # cudaErrorInvalidValue
    assert launchers.reverse(x, 512, ask=False) == 0
    assert x.tolist() == list(map(float, reversed(range(128))))


def test_a_function_that_is_not_implemented_says_so(capfd):
    function = ctypes.CDLL("libcudart.so.13").cudaIpcGetMemHandle
    with device.expect("not implemented") as reports:
        assert function(None, None) == 801  # cudaErrorNotSupported
    assert "cudaIpcGetMemHandle" in reports[0].what
    assert "cudaIpcGetMemHandle" in capfd.readouterr().err


@two_devices
def test_nccl_says_that_it_is_not_implemented(capfd):
    x = torch.ones(3, device="cuda")
    with device.expect("not implemented") as reports, pytest.raises(RuntimeError):
        torch.nn.parallel.comm.broadcast(x, [0, 1])
    assert "nccl" in reports[0].what
    assert "nccl" in capfd.readouterr().err


def test_an_operator_that_fails_after_its_call():
    """An index out of bounds: a device-side assert, on a GPU, when somebody waits."""
    x = torch.zeros(3, device="cuda")
    with device.expect("operator failed"), device.lazy():
        x.index_select(0, torch.tensor([5], device="cuda"))
        with pytest.raises(RuntimeError):
            torch.cuda.synchronize()


def test_work_that_fails_at_the_end_of_a_test():
    """Also if a tensor waits for it to be freed."""
    x, side = torch.zeros(3, device="cuda"), torch.cuda.Stream()
    with device.expect("operator failed"), device.lazy():
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            x.index_select(0, torch.tensor([5], device="cuda"))
        x.record_stream(side)
        del x
        device.finish()


def test_host_waits_name_the_line():
    x = torch.ones(3, device="cuda")
    with device.host_waits() as waits:
        y = x * 2 + x.sum()
    assert waits == []
    with device.host_waits() as waits:
        y.max().item()
    assert len(waits) == 1
    assert "test_host_waits_name_the_line" in waits[0].where[0]


def test_operators_and_launches_are_counted(launchers):
    x = torch.ones(3, device="cuda")
    before, calls = device.counts(), device.operator_calls()
    x.mul_(2).mul_(2)
    launchers.fill(x, 1, 3)
    after = device.counts()
    assert device.operator_calls()["aten::mul_.Tensor"] - calls.get("aten::mul_.Tensor", 0) == 2
    assert after.operators - before.operators == 2
    assert after.launches - before.launches == 1


def test_expecting_a_problem_that_does_not_come_fails():
    with pytest.raises(AssertionError, match="no foreign stream"), device.expect("foreign stream"):
        pass
    with pytest.raises(ValueError, match="kind"), device.expect("anything"):
        pass
    assert "kernel fault" in PROBLEMS


def test_threads_do_not_block_each_other(launchers):
    """Waits, frees and launches from two threads, with pauses in between.

    Tensors in reference cycles are freed by whoever collects garbage, which Python does anywhere.
    """
    failed = []

    def work(seed: int) -> None:
        try:
            for i in range(400):
                x = torch.full((64,), float(seed + i), device="cuda")
                cycle = [torch.empty(16, device="cuda") for _ in range(5)]
                cycle.append(cycle)
                launchers.twice(x, y := torch.empty(64, device="cuda"))
                assert y[0].item() == 2 * (seed + i)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(seed,), daemon=True) for seed in (1, 1000)]
    with device.jitter(300):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=120)
    assert not any(thread.is_alive() for thread in threads)
    assert failed == []


def test_a_kernel_that_cannot_run_here_is_a_fault_that_lasts():
    """torch launches it itself, and the device has no PTX of it."""
    x = torch.ones(2, 3, device="cuda")
    with device.expect("kernel fault"):
        with contextlib.suppress(RuntimeError):
            torch.nested.nested_tensor([x, x]).to_padded_tensor(0)
        with pytest.raises(RuntimeError, match="CUDA error"):
            x.sum().item()
    assert x.sum().item() == 6


_FOREIGN = """
import torch
from software_cuda import device
x, stream = torch.zeros(8, device="cuda"), torch.cuda.Stream()
device.reports.add("foreign stream", "planted")
"""


@pytest.mark.parametrize("take", ["", "device.take_problems()"])
def test_a_process_with_problems_that_nobody_took_fails(take):
    done = subprocess.run(
        [sys.executable, "-c", _FOREIGN + take], capture_output=True, text=True, check=False
    )
    assert done.returncode == (0 if take else REPORTED), done.stderr
    assert "foreign stream: planted" in done.stderr


@pytest.mark.parametrize("place", ["before", "after"])
def test_fixtures_are_watched(place, tmp_path):
    """A report in the setup or teardown of a fixture is an error of its test."""
    (tmp_path / "test_planted.py").write_text(
        f"""
import pytest
import torch
from software_cuda import device

@pytest.fixture
def planted():
    torch.zeros(1, device="cuda")
    if {place == "before"}:
        device.reports.add("foreign stream", "planted")
    yield
    if {place == "after"}:
        device.reports.add("foreign stream", "planted")

def test_with_it(planted):
    pass
"""
    )
    done = _pytest(tmp_path, "--software-cuda")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "1 error" in done.stdout
    assert "the software CUDA device reports" in done.stdout


@pytest.mark.parametrize(
    "ends", ["pytest.skip('x')", "pytest.xfail('x')", "raise KeyError", "assert 1"]
)
def test_no_ending_of_a_test_hides_a_report(ends, tmp_path):
    """The marked one fails, however it ends, and the next test is not blamed."""
    (tmp_path / "test_planted.py").write_text(
        f"""
import pytest
import torch
from software_cuda import device

@pytest.mark.xfail({ends == "raise KeyError"}, reason="expected", strict=False)
def test_planted():
    torch.zeros(1, device="cuda")
    device.reports.add("foreign stream", "planted")
    {ends}

def test_next():
    assert torch.zeros(1, device="cuda").sum() == 0
"""
    )
    done = _pytest(tmp_path, "--software-cuda", "sm_80")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "1 failed, 1 passed" in done.stdout
    assert "foreign stream: planted" in done.stdout


def _pytest(folder: Path, *options: str) -> subprocess.CompletedProcess:
    tests = str(Path(__file__).resolve().parents[2])
    line = [sys.executable, "-m", "pytest", "-p", "software_cuda.pytest_plugin", "-p", "no:xdist"]
    return subprocess.run(
        [*line, *options, "-c", "/dev/null", "--rootdir", str(folder), str(folder)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([tests, os.environ["PYTHONPATH"]])},
        capture_output=True,
        text=True,
        check=False,
    )
