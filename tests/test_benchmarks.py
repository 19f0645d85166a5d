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

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # benchmarks/ is run from the root and not installed

from benchmarks import (  # noqa: E402
    bench_ddim_step,
    bench_q_sample,
    inspect_kernels,
    machine,
    report,
    timing,
)
from benchmarks.suite import Contender, Workload, run  # noqa: E402
from benchmarks.timing import CudaClock, Timing, measure  # noqa: E402

CPU = torch.device("cpu")
TINY = ["--shapes", "digits b64", "--layouts", "nchw", "--no-compile", "--device", "cpu"]


def run_module(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


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
    assert (cpu.minimum, cpu.median, cpu.best) == (1.0, 3.0, 1.0)
    assert cpu.spread == pytest.approx((4.0 - 2.0) / 3.0)
    assert Timing((1.0, 2.0, 9.0), calls=1, on_cpu=False).best == 2.0


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


def inputs(mode: str, dtype: torch.dtype = torch.float32) -> bench_q_sample.Inputs:
    return bench_q_sample.Inputs((32, 3, 16, 16), dtype, torch.contiguous_format, mode, CPU)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", bench_q_sample.MODES)
def test_right_results_pass_the_gate(mode, dtype):
    torch.manual_seed(0)
    work = inputs(mode, dtype)
    for name, contender in bench_q_sample.contenders(work, compiled=False):
        if name == "diffusers" and dtype != torch.float32 and mode == "given":
            continue  # its half-precision tables are wrong, which is for the gate to say
        assert contender.error(contender.run()) is None, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", bench_ddim_step.MODES)
def test_the_gate_of_the_steps(mode, dtype):
    torch.manual_seed(0)
    work = bench_ddim_step.Inputs((16, 3, 16, 16), dtype, torch.channels_last, mode, CPU)
    for name, contender in bench_ddim_step.contenders(work, compiled=False):
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


def test_a_wrong_kernel_suppresses_its_numbers_and_fails_the_run(monkeypatch, capsys, tmp_path):
    right = bench_q_sample.ops.q_sample
    broken = types.SimpleNamespace(q_sample=lambda *args, **kw: right(*args, **kw) * 1.001)
    monkeypatch.setattr(bench_q_sample, "ops", broken)
    path = tmp_path / "out.json"
    options = ["--dtypes", "fp32", "--modes", "given", "--quick", "--rounds", "1"]
    assert bench_q_sample.main([*TINY, *options, "--json", str(path)]) == 1
    printed = capsys.readouterr().out
    assert "fastdiff, digits b64 fp32 nchw given: error" in printed
    row = next(line for line in printed.splitlines() if line.startswith("digits b64"))
    bandwidth = row.removeprefix("digits b64").split()[4]  # dtype, layout, mode, MiB, GB/s
    assert bandwidth == "-"
    assert not any(cell.endswith("x") for cell in row.split()), "no ratio"
    assert "fastdiff" not in json.loads(path.read_text())["records"][0]["contenders"]


def test_command_writes_what_it_measured(tmp_path):
    path = tmp_path / "out.json"
    done = run_module(
        "benchmarks.bench_q_sample", *TINY, "--dtypes", "fp32", "--quick", "--rounds", "2",
        "--threads", "1", "--json", str(path),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "goals" in done.stdout
    document = json.loads(path.read_text())
    facts = document["machine"]
    assert facts["threads"] == 1
    assert facts["torch"] == torch.__version__
    if platform.libc_ver()[0] == "glibc":
        assert facts["steady_allocator"], "the command did not start itself again"
    text = path.read_text()
    for private in (str(ROOT), str(pathlib.Path.home()), platform.node()):
        assert private not in text
    given, seed, uint8 = document["records"][:3]
    elements = 64 * 8 * 8
    assert [r["bytes"] for r in (given, seed, uint8)] == [12 * elements, 8 * elements, 5 * elements]
    for record in (given, seed, uint8):
        assert {"fastdiff", "eager", "copy_", "clone"} <= set(record["contenders"])
        for contender in record["contenders"].values():
            assert 0 < contender["min_s"] <= contender["median_s"] < 1


@pytest.mark.parametrize(
    ("module", "arguments", "expected"),
    [
        ("bench_q_sample", ["--shapes", "huge"], "invalid choice: 'huge'"),
        ("bench_q_sample", ["--rounds", "0"], "--rounds is 0, expected at least 1"),
        ("bench_q_sample", ["--device", "tpu"], "--device is 'tpu', expected cpu or cuda"),
        ("inspect_kernels", ["--arch", "sm_1"], "--arch is 'sm_1', expected one of sm_80"),
    ],
)
def test_bad_options(module, arguments, expected, capsys):
    main = {"bench_q_sample": bench_q_sample.main, "inspect_kernels": inspect_kernels.main}[module]
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    assert expected in capsys.readouterr().err


FAULTS = """
import resource, torch
if {steady}:
    from benchmarks import machine
    machine.ensure_steady_allocator()
for _ in range(3): torch.ones(1 << 24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4): torch.ones(1 << 24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the settings are glibc's")
def test_steady_allocator_keeps_its_pages():
    clean = {k: v for k, v in os.environ.items() if k not in machine.STEADY_ALLOCATOR}
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
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith(name))
    assert str(kernel["registers"]) in row.split()
