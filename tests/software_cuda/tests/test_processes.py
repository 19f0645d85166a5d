"""The device in child processes, with other settings, and out of memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from software_cuda import Settings

pytestmark = pytest.mark.gpu
_PROJECT = Path(__file__).resolve().parents[3]


def run(device: str, code: str, *command: str) -> str:
    """The output of Python code on a device of its own."""
    line = [sys.executable, "-m", "tests.software_cuda", "--device", device]
    done = subprocess.run(
        [*line, *(command or (sys.executable, "-c", code))],
        cwd=_PROJECT,
        capture_output=True,
        text=True,
        timeout=1800,  # for another architecture all kernels are compiled
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_running_out_of_memory():
    code = """
import torch
kept = torch.zeros(80 << 20, dtype=torch.uint8, device="cuda")
for attempt in range(2):
    try:
        torch.empty(400 << 20, dtype=torch.uint8, device="cuda")
        print("no error")
    except torch.OutOfMemoryError:
        print("out of memory")
print(kept.sum().item(), torch.empty(300 << 20, dtype=torch.uint8, device="cuda").numel() >> 20)
"""
    assert run("memory=0.4", code).split() == ["out", "of", "memory"] * 2 + ["0", "300"]


def test_problems_of_work_that_a_process_leaves_pending():
    code = """
import torch
x, index = torch.ones(9, device="cuda"), torch.tensor([77], device="cuda")
torch.cuda.synchronize()
torch.cuda._sleep(9)
y = x[index]
"""
    with pytest.raises(AssertionError, match=r"operator failed: aten::index\.Tensor"):
        run("sm_90", code)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_75", "sm_80", "sm_100", "sm_120"])
def test_other_architectures(arch):
    code = """
import torch, fastdiff
x = torch.linspace(-1, 1, 128, device="cuda").view(2, 4, 4, 4)
with fastdiff.use_backend("triton"):
    found = fastdiff.ops.group_norm_silu(x, 2, None, None).cpu()
with fastdiff.use_backend("reference"):
    expected = fastdiff.ops.group_norm_silu(x.cpu(), 2, None, None)
print(torch.cuda.get_device_capability(), torch.allclose(found, expected, atol=1e-6))
"""
    major, minor = Settings.parse(arch).capability
    assert run(arch, code).strip() == f"({major}, {minor}) True"


def test_grandchildren_and_rocm():
    child = """
import torch
from software_cuda import device
print(device.active, torch.version.hip is not None, torch.version.cuda,
      torch.cuda.get_device_capability())
"""
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}], check=True)"
    assert run("rocm", code).strip() == "True True None (9, 4)"


def test_settings_survive_the_environment():
    environment: dict[str, str] = {}
    settings = Settings((8, 0), devices=2, memory=3 << 30, lazy=True, rocm=True)
    settings.write(environment)
    assert Settings.parse(environment["SOFTWARE_CUDA"]) == settings


@pytest.mark.parametrize(
    "text",
    [
        *("sm_70", "80", "devices=0", "devices=x", "devices=²", "dev ices=2", "lazy=1", "fast"),
        *("memory=-1", "memory=inf", "memory=1e-12", "memory=1e300", "sm_90"),
    ],
)
def test_unknown_settings_are_named(text):
    with pytest.raises(ValueError, match=text):
        Settings.parse(f"sm_80,{text}")


@pytest.mark.parametrize("text", ["devices=1,devices=2", "lazy,eager", "memory=1,memory=1"])
def test_settings_that_contradict_each_other(text):
    with pytest.raises(ValueError, match="comes after another"):
        Settings.parse(text)


def test_no_process_goes_on_without_the_device_it_was_asked_for():
    line = [sys.executable, "-m", "tests.software_cuda"]
    code = "import os, subprocess, sys; os.environ['SOFTWARE_CUDA'] = 'sm_70'; "
    code += "sys.exit(subprocess.run([sys.executable, '-c', 'print(1)']).returncode)"
    for command, message in (
        (["python", "-I", "-c", "print(1)"], "python -I starts without"),
        (["python", "-c", code], "'sm_70' is none of"),
    ):
        done = subprocess.run(
            [*line, *command], cwd=_PROJECT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 2, done.stderr
        assert message in done.stderr
        assert done.stdout == ""
