"""Backend choice: defaults, overrides, and errors instead of silent fallbacks."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import types

import pytest
import torch
from op_harness.inputs import tables

import fastdiff
from fastdiff import _backends, _gpus, _native, info, ops


def _call(**arguments: object) -> torch.Tensor:
    a, b = tables()
    defaults = {"x0": torch.ones(2, 3), "t": torch.tensor([1, 2]), "seed": 0}
    merged = {**defaults, "sqrt_alpha_bar": a, "sqrt_one_minus_alpha_bar": b, **arguments}
    return ops.q_sample(**merged)


def _run(program: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_backends_say_why_one_is_missing() -> None:
    status = fastdiff.backends()
    assert list(status) == ["reference", "cpu", "cuda", "triton"]
    assert status["reference"].available
    assert all(bool(s) != bool(s.reason) for s in status.values())


def test_use_backend_nests_and_restores() -> None:
    before = fastdiff.default_backend("cpu")
    with fastdiff.use_backend("reference"):
        first = _call()
        with fastdiff.use_backend("reference"):
            assert torch.equal(first, _call())
    assert fastdiff.default_backend("cpu") == before
    torch.testing.assert_close(_call(), first)


def test_unknown_backend_lists_the_names() -> None:
    with (
        pytest.raises(ValueError, match="'gpu'; choose from reference, cpu, cuda, triton"),
        fastdiff.use_backend("gpu"),
    ):
        pass


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_missing_backend_says_why() -> None:
    with (
        pytest.raises(RuntimeError, match=r"backend 'cuda' is not available: .+"),
        fastdiff.use_backend("cuda"),
    ):
        pass


@pytest.mark.skipif(not fastdiff.backends()["cpu"], reason="the CPU library is not built")
def test_forced_backend_never_falls_back() -> None:
    a, b = (x.double() for x in tables())
    doubles = {"sqrt_alpha_bar": a, "sqrt_one_minus_alpha_bar": b}
    assert _call(**doubles).dtype == torch.float32  # the default choice takes the reference
    with fastdiff.use_backend("cpu"):
        _call()
        with pytest.raises(RuntimeError, match="'cpu' was asked for, but only the reference takes"):
            _call(**doubles)


PROGRAM = """
import torch
from fastdiff import ops
print(ops.philox_normal((1, 4), seed=0)[0].tolist())
"""


def test_environment_variable() -> None:
    chosen = _run(PROGRAM, FASTDIFF_BACKEND="reference")
    assert chosen.returncode == 0, chosen.stderr
    default = ops.philox_normal((1, 4), seed=0)[0]
    torch.testing.assert_close(torch.tensor(json.loads(chosen.stdout)), default)
    wrong = _run(PROGRAM, FASTDIFF_BACKEND="gpu")
    assert "FASTDIFF_BACKEND: unknown backend 'gpu'" in wrong.stderr
    # Importing, and asking what is wrong, work all the same.
    info = _run("import runpy; runpy.run_module('fastdiff.info', run_name='x')",
                FASTDIFF_BACKEND="gpu")  # fmt: skip
    assert info.returncode == 0, info.stderr


def test_triton_backend_runs_interpreted_on_the_cpu() -> None:
    pytest.importorskip("triton")
    run = _run(PROGRAM, FASTDIFF_BACKEND="triton", TRITON_INTERPRET="1")
    assert run.returncode == 0, run.stderr
    torch.testing.assert_close(
        torch.tensor(json.loads(run.stdout)), ops.philox_normal((1, 4), seed=0)[0]
    )


def test_debug_mode_checks_timesteps() -> None:
    """FASTDIFF_DEBUG=1 runs the full checks before every call."""
    program = """
import torch, fastdiff
table = torch.ones(10)
fastdiff.ops.q_sample(torch.ones(1, 2), torch.tensor([10]), table, table, seed=0)
"""
    run = _run(program, FASTDIFF_DEBUG="1")
    assert "IndexError: q_sample: t has values from 10 to 10" in run.stderr


def test_info_prints_a_table_and_json() -> None:
    facts = info.collect()
    assert facts["versions"]["fastdiff"] == fastdiff.__version__
    assert set(facts["backends"]) == set(fastdiff.backends())
    assert json.loads(json.dumps(facts)) == facts
    table = info._table(facts)
    for name, status in fastdiff.backends().items():
        assert name in table
        assert status.reason in table


@pytest.mark.parametrize(
    ("capability", "architectures", "runs"),
    [
        ((8, 0), "8.0 9.0", True),
        ((8, 9), "8.0 9.0", True),  # a later minor version
        ((8, 0), "8.6 9.0", False),
        ((7, 5), "8.0 9.0+PTX", False),  # T4
        ((7, 5), "7.5 8.0", True),
        ((11, 0), "8.0 9.0 10.0 12.0+PTX", False),  # Thor: 12.0 is newer
        ((11, 0), "8.0 9.0+PTX", True),
        ((12, 1), "12.0", True),
        ((13, 0), "12.0", False),
        ((13, 0), "12.0+PTX", True),
        ((9, 0), "9.0a", True),
        ((10, 3), "10.0a", False),
        ((10, 3), "10.0a+PTX", False),
        ((10, 3), "10.0f", True),
        ((11, 0), "10.0f+PTX", False),
    ],
)
def test_which_gpus_have_a_binary(capability, architectures, runs) -> None:
    """CUDA's rules: machine code within a major version, PTX for everything newer."""
    assert _gpus.has_binary(capability, architectures) == runs


@dataclasses.dataclass
class Gpu:
    """What torch says of a GPU."""

    name: str
    major: int
    minor: int
    multi_processor_count: int = 100
    gcnArchName: str = ""


T4, A100, THOR = Gpu("T4", 7, 5), Gpu("A100", 8, 0), Gpu("Thor", 11, 0)
# Capabilities as ROCm's torch reports them.
MI300, RX7900 = (
    Gpu("MI300X", 9, 4, gcnArchName="gfx942:sramecc+"),
    Gpu("RX 7900", 11, 0, 48, "gfx1100"),
)


@pytest.fixture
def gpus(monkeypatch):
    """gpus(*of, archs=..., hip=...): a machine with these GPUs and a build for these."""

    def install(*of: Gpu, archs: str = "8.0 9.0", hip: str | None = None) -> None:
        properties = {"is_available": lambda: bool(of), "device_count": lambda: len(of)}
        properties["get_device_properties"] = lambda device: of[torch.device(device).index or 0]
        properties["get_device_name"] = lambda index: of[index].name
        properties["get_device_capability"] = lambda index: (of[index].major, of[index].minor)
        properties["current_device"] = lambda: 0
        for name, function in properties.items():
            monkeypatch.setattr(torch.cuda, name, function)
        monkeypatch.setattr(torch.version, "hip", hip)
        monkeypatch.setattr(torch.version, "cuda", None if hip else "13.0")
        build = _native.build_info()._replace(cuda_arch_list=archs)
        monkeypatch.setattr(_native, "build_info", lambda: build)
        missing = "this torch is built without CUDA" if hip else None
        load = _native.load
        monkeypatch.setattr(_native, "load", lambda kind: missing if kind == "cuda" else load(kind))
        monkeypatch.setattr(_backends, "_without_kernels", "triton")
        monkeypatch.setattr(_backends, "_defaults", _backends._default_backends())
        monkeypatch.setattr(_backends, "_of_gpus", {})
        for cached in (_gpus.why_no_binary, _gpus.why_no_triton, _backends._missing):
            cached.cache_clear()

    yield install
    for cached in (_gpus.why_no_binary, _gpus.why_no_triton, _backends._missing):
        cached.cache_clear()


needs_build = pytest.mark.skipif(_native.build_info() is None, reason="pure Python")


@needs_build
@pytest.mark.parametrize("gpu", [T4, THOR], ids=lambda gpu: gpu.name)
def test_a_gpu_without_a_binary_uses_triton(gpus, gpu) -> None:
    gpus(gpu, archs="8.0 8.6 9.0 10.0 12.0+PTX")
    assert fastdiff.default_backend("cuda") == "triton"
    status = fastdiff.backends()["cuda"]
    assert not status
    assert f"no binary for {gpu.name} (sm_{gpu.major}{gpu.minor})" in status.reason
    assert "12.0+PTX" in status.reason
    with pytest.raises(RuntimeError, match="no binary for"), fastdiff.use_backend("cuda"):
        pass
    facts = info.collect()
    assert "this GPU has a binary: no, using triton" in facts["devices"]["cuda:0"]
    assert facts["default backend"]["cuda:0"] == "triton"


@needs_build
def test_every_gpu_has_its_own_default(gpus) -> None:
    gpus(A100, T4)
    names = ["cuda", "cuda:0", "cuda:1"]
    assert [fastdiff.default_backend(name) for name in names] == ["cuda", "cuda", "triton"]
    assert fastdiff.backends()["cuda"]  # one of them runs it
    devices = info.collect()["devices"]
    assert devices["cuda:0"].endswith("this GPU has a binary: yes")
    assert devices["cuda:1"].endswith("this GPU has a binary: no, using triton")

    class On(torch.Tensor):
        """A tensor as select_backend sees it."""

        is_cpu = False
        device = torch.device("cuda:1")

    x = torch.ones(2).as_subclass(On)
    assert _backends.select_backend("op", x, None) == "triton"
    with (
        fastdiff.use_backend("cuda"),
        pytest.raises(RuntimeError, match=r"no binary for T4 \(sm_75"),
    ):
        _backends.select_backend("op", x, None)


@needs_build
def test_a_compiled_call_asks_once(monkeypatch) -> None:
    """torch.compile takes a GPU's default as a constant: no graph break, no recompilation."""
    asked, graphs = [], []
    monkeypatch.setattr(_gpus, "why_no_binary", lambda index: asked.append(index) or "no binary")
    monkeypatch.setattr(_backends, "_defaults", {"cpu": "cpu", "cuda": "cuda"})
    monkeypatch.setattr(_backends, "_of_gpus", {})
    monkeypatch.setattr(_backends, "_without_kernels", "triton")

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    @torch.compile(fullgraph=True, backend=backend)
    def f(x):
        missing = _backends._why_not("cuda", 0)
        return x + 1 if _backends._of_gpu(0) == "triton" and missing else x - 1

    x = torch.zeros(2)
    assert [f(x)[0].item() for _ in range(3)] == [1, 1, 1]
    assert len(graphs) == 1
    assert set(asked) == {0}


@needs_build
@pytest.mark.parametrize("gpu", [MI300, RX7900], ids=lambda gpu: gpu.name)
def test_rocm_is_not_taken_for_nvidia(gpus, gpu) -> None:
    """gfx942 has the "capability" 9.4 and gfx1100 11.0: neither has clusters, nor pairs tried."""
    pytest.importorskip("triton")
    from fastdiff.triton_kernels import _launch

    device = torch.device("cuda:0")
    array = types.SimpleNamespace(device=device, data_ptr=lambda: 64)
    gpus(Gpu("H100", 9, 0))
    assert _launch.max_blocks(device) == (8 if _launch.compiles_clusters(triton_version()) else 1)
    assert _launch.holds_pairs(array)
    gpus(gpu, hip="7.0")
    assert _launch.max_blocks(device) == 1
    assert not _launch.holds_pairs(array)
    default = "triton" if gpu is MI300 else "reference"  # gfx1100: the compiler crashes
    assert fastdiff.default_backend("cuda") == default
    name = gpu.gcnArchName.partition(":")[0]
    devices = info.collect()["devices"]
    assert devices["CUDA"] == "torch is built for ROCm 7.0"
    assert devices["cuda:0"] == f"{gpu.name} ({name}), this GPU has a binary: no, using {default}"
    if gpu is RX7900:  # a clear error before the compiler could end the process
        with (
            pytest.raises(RuntimeError, match="crashes for gfx1100"),
            fastdiff.use_backend("triton"),
        ):
            pass


def triton_version() -> str:
    import triton

    return triton.__version__


def test_default_backend_takes_a_device_and_refuses_what_is_none():
    assert fastdiff.default_backend(torch.device("cpu")) == fastdiff.default_backend("cpu")
    for wrong in (None, 0, torch.zeros(1)):
        with pytest.raises(TypeError, match="device_type is"):
            fastdiff.default_backend(wrong)
