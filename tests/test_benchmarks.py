"""The benchmark suite itself: what it times, what it refuses to print, what it writes."""

from __future__ import annotations

import json
import os
import pathlib
import platform
import subprocess
import sys
import types

import pytest
import torch

import fastdiff

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # benchmarks/ is run from the root and not installed

from benchmarks import (  # noqa: E402
    allocator,
    bench_ddim_step,
    bench_q_sample,
    report,
    suite,
    timing,
)
from benchmarks.audit import inspect_kernels  # noqa: E402
from benchmarks.suite import Contender, Workload, run  # noqa: E402
from benchmarks.timing import CudaClock, Timing, measure  # noqa: E402
from fastdiff import _backends  # noqa: E402

CPU = torch.device("cpu")


def test_contenders_take_turns_and_the_order_rotates(monkeypatch):
    seconds = {"slow": 1.0, "fast": 0.25, "middle": 0.5}
    now, order = [0.0], []

    def function(name):
        def call():
            order.append(name)
            now[0] += seconds[name]

        return call

    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    measured = measure({name: function(name) for name in seconds}, CPU, rounds=3)
    assert {name: t.minimum for name, t in measured.items()} == seconds
    warm_up = 2 * len(seconds)
    assert order[warm_up:] == [
        *("slow", "fast", "middle"),
        *("fast", "middle", "slow"),
        *("middle", "slow", "fast"),
    ]


def test_short_functions_are_called_often_enough_to_be_timed(monkeypatch):
    now = [0.0]

    def call():
        now[0] += 1e-6

    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    measured = measure({"short": call}, CPU, rounds=2)["short"]
    assert measured.calls == 200
    assert measured.minimum == pytest.approx(1e-6)


def test_measuring_stops_when_the_time_is_spent(monkeypatch):
    now = [0.0]

    def call():
        now[0] += 1.0

    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    assert len(measure({"a": call}, CPU, rounds=50, max_seconds=5.5)["a"].seconds) == 6
    assert len(measure({"a": call}, CPU, rounds=50, max_seconds=0)["a"].seconds) == 3


def test_statistics():
    cpu = Timing((4.0, 1.0, 2.0, 3.0, 10.0), calls=1)
    assert (cpu.minimum, cpu.median) == (1.0, 3.0)
    assert cpu.spread == pytest.approx((4.0 - 2.0) / 3.0)


def test_cuda_clock_evicts_the_cache_outside_the_events(monkeypatch):
    log = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            log.append("record")

        def elapsed_time(self, end):
            return 3.0  # milliseconds

    properties = types.SimpleNamespace(L2_cache_size=1000)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: log.append("synchronize"))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    clock = CudaClock(CPU)
    assert clock._evict.nbytes >= 2 * properties.L2_cache_size
    clock._evict = types.SimpleNamespace(zero_=lambda: log.append("evict"))
    seconds = clock.sample(lambda: log.append("call"), 2)
    once = ["evict", "record", "call", "record"]
    assert log == once + once, "no synchronization between the calls"
    assert seconds() == pytest.approx(3e-3)
    assert log[-1] == "synchronize"


def test_a_wrong_contender_is_not_timed_and_gets_no_ratio():
    def error(result):
        return None if torch.equal(result, torch.ones(2)) else "not ones"

    contenders = {
        "ours": Contender(lambda: torch.ones(2), error),
        "right": Contender(lambda: torch.ones(2), error),
        "wrong": Contender(lambda: torch.full((2,), float("nan")), error),
    }
    record = run(Workload({"shape": "2"}, 16, contenders), CPU, rounds=2, max_seconds=1)
    assert set(record.timings) == {"ours", "right"}
    assert record.wrong == {"wrong": "not ones"}
    assert report.ratio(record, "ours", "wrong") == report.ratio(record, "wrong", "ours") == "wrong"
    assert report.ratio(record, "ours", "right").endswith("x")
    assert record.bandwidth("wrong") is None
    written = record.to_json()
    assert "wrong" not in written["contenders"]
    assert written["contenders"]["ours"]["min_s"] == record.timings["ours"].minimum


def test_a_wrong_peer_is_reported_but_does_not_fail_the_run():
    def error(result):
        return None if result else "no"

    def fail(peer):
        contenders = {"ours": Contender(lambda: True, error)}
        contenders["other"] = Contender(lambda: False, error, peer=peer)
        return run(Workload({}, 1, contenders), CPU, rounds=1)

    assert fail(peer=False).failed()
    record = fail(peer=True)
    assert not record.failed()
    assert record.wrong == {"other": "no"}
    assert record.to_json()["peers_wrong"] == ["other"]


def test_on_cuda_a_graph_of_every_contender_is_timed_and_checked(monkeypatch):
    """With a stand-in for CUDA: what is timed, under which name, and what is left out."""
    ran = []

    def capture(function):
        result = function()
        if result == "waits":
            raise RuntimeError("operation not permitted when stream is capturing")
        return (lambda: ran.append(result)), "stale" if result == "stale once" else result

    def measured(functions, *_):
        return {name: Timing((1.0,), 1) for name in functions}

    monkeypatch.setattr(suite, "capture", capture)
    monkeypatch.setattr(suite, "measure", measured)
    results = {"fastdiff": "right", "eager": "waits", "compile": "stale once", "copy_": "right"}
    contenders = {
        name: Contender(lambda r=result: r, lambda r: "stale result" if r == "stale" else None)
        for name, result in results.items()
    }
    record = run(Workload({}, 1, contenders), torch.device("cuda"), rounds=1)
    assert set(record.timings) == {"fastdiff", "fastdiff (graph)", "eager", "compile", "copy_"}
    assert record.wrong["compile (graph)"] == "stale result"
    assert record.wrong["eager (graph)"].startswith("no CUDA graph: operation not permitted")
    assert record.peers_wrong == {"eager (graph)"}
    assert record.failed(), "a stale graph is a wrong result"
    assert ran == ["right", "stale once"]


def test_a_backend_is_a_contender(monkeypatch):
    work = Workload({}, 1, {"fastdiff": Contender(fastdiff_backend, lambda _: None)})
    monkeypatch.setattr(fastdiff, "default_backend", lambda device: "cpu")
    contenders = suite.with_backends(work, CPU).contenders
    assert list(contenders) == ["fastdiff", "fastdiff reference"]
    assert contenders["fastdiff reference"].run() == "reference"


def fastdiff_backend() -> str:
    return _backends.select_backend("q_sample", "cpu", None)


def inputs(mode: str, dtype: torch.dtype = torch.float32) -> bench_q_sample.Inputs:
    return bench_q_sample.Inputs((32, 3, 16, 16), dtype, torch.contiguous_format, mode, CPU)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", bench_q_sample.MODES)
def test_right_results_pass_the_gate(mode, dtype):
    torch.manual_seed(0)
    work = inputs(mode, dtype)
    for name, contender in bench_q_sample.contenders(work, with_compile=False):
        if name == "diffusers" and dtype != torch.float32 and mode == "given":
            continue  # its half-precision tables are wrong, which is for the gate to say
        assert contender.error(contender.run()) is None, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", bench_ddim_step.MODES)
def test_the_gate_of_the_steps(mode, dtype):
    torch.manual_seed(0)
    work = bench_ddim_step.Inputs((16, 3, 16, 16), dtype, torch.channels_last, mode, CPU)
    for name, contender in bench_ddim_step.contenders(work, with_compile=False):
        assert contender.error(contender.run()) is None, name
    right = work.call()()
    assert work.error(right * 1.02) is not None
    for name, result in (("nan", right * float("nan")), ("dtype", right.double())):
        assert work.error(result) is not None, name
        assert work.error(result, peer=True) is not None, name
    if dtype == torch.float32:
        assert work.error(right * 1.2, peer=True) is not None


@pytest.mark.parametrize("mode", bench_q_sample.MODES)
def test_the_gate_finds_wrong_values(mode):
    work = inputs(mode)
    right = bench_q_sample.fastdiff_call(work)()
    assert work.values_error(right) is None
    one_off = right.clone()
    one_off[0, 0, 0, 0] += 1e-4
    nan = right.clone()
    nan[-1, -1, -1, -1] = float("nan")
    for wrong in (one_off, nan, right.roll(1, -1), right.double(), right[:1]):
        assert work.values_error(wrong) is not None


def test_the_gate_finds_wrong_noise():
    torch.manual_seed(0)
    work = inputs("seed")
    shape = (-1, 1, 1, 1)
    mean = work.a[work.t].view(shape) * work.x0
    std = work.b[work.t].view(shape)
    normal = torch.randn_like(mean)
    assert work.distribution_error(mean + std * normal) is None
    for noise in (0 * normal, 1.1 * normal, normal + 0.1, torch.rand_like(normal)):
        assert work.distribution_error(mean + std * noise) is not None


def test_bad_options_of_inspect_kernels(capsys):
    with pytest.raises(SystemExit) as exit_:
        inspect_kernels.main(["--arch", "sm_1"])
    assert exit_.value.code == 2
    assert "--arch is 'sm_1', expected one of sm_80" in capsys.readouterr().err


FAULTS = """
import resource
if {steady}:
    from benchmarks import allocator
    allocator.ensure_steady_allocator()
import torch
from benchmarks import command  # as the benchmarks do: what is imported decides on the heap's holes
for _ in range(3): torch.ones(1 << 24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4): torch.ones(1 << 24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_report_with_a_number_that_is_not_finite_is_not_written(bad, tmp_path):
    document = {"machine": {"cores": 2, "copy_gb_s": 3.5}, "records": [{"us": [1.0, bad]}]}
    with pytest.raises(SystemExit) as refused:
        report.write_json(
            tmp_path / "out.json", "test", {}, [types.SimpleNamespace(to_json=lambda: document)]
        )
    assert str(refused.value).startswith("1 of 3 numbers are not finite, nothing was written: ")
    assert f"records[0].records[0].us[1] is {bad}" in str(refused.value)
    assert not (tmp_path / "out.json").exists()
    document["records"][0]["us"][1] = 2.0
    assert json.loads(report.to_json(document)) == document


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the settings are glibc's")
def test_steady_allocator_keeps_its_pages():
    clean = {k: v for k, v in os.environ.items() if k not in allocator.STEADY_ALLOCATOR}
    faults = {}
    for steady in (True, False):
        command = [sys.executable, "-c", FAULTS.format(steady=steady)]
        done = subprocess.run(
            command, cwd=ROOT, env=clean, capture_output=True, text=True, check=True
        )
        faults[steady] = int(done.stdout)
    # Four tensors of 64 MiB: with 4 KiB pages 65,536 faults if each is mapped anew (fewer with
    # larger pages), and none if memory is kept.
    assert faults[False] > 100
    assert faults[True] < faults[False] / 10


@pytest.mark.skipif(inspect_kernels.cuda_library() is None, reason="the CUDA library is not built")
@pytest.mark.skipif(inspect_kernels.cubin.find_cuobjdump() is None, reason="no cuobjdump")
def test_inspect_kernels_prints_and_writes(capsys, tmp_path):
    path = tmp_path / "kernels.json"
    arch = inspect_kernels.cubin.architectures(inspect_kernels.cuda_library())[0]
    name = "philox_normal_kernel<fp32,4>"
    options = ["--backend", "cuda", "--arch", arch, "--kernel", name, "--json", str(path)]
    assert inspect_kernels.main(options) == 0
    (kernel,) = json.loads(path.read_text())
    assert (kernel["name"], kernel["threads"], kernel["spills"]) == (name, 128, 0)
    assert kernel["classes"]["memory"] == sum(a["instructions"] for a in kernel["accesses"])
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith(name))
    assert str(kernel["registers"]) in row.split()
