"""What the numbers were measured on."""

from __future__ import annotations

import importlib.metadata
import os
import pathlib
import platform
import shutil
import subprocess
from typing import Any

import torch

import fastdiff
from benchmarks.allocator import STEADY_ALLOCATOR
from benchmarks.suite import COPIES, copies
from benchmarks.timing import measure
from fastdiff import _native


def cpu_model() -> str:
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


# Far larger than any cache.
COPIED_BYTES = 256 << 20
PEERS = (
    "triton",
    "diffusers",
    "denoising-diffusion-pytorch",
    "liger-kernel",
    "apex",
    "openvino",
    "onnxruntime",
)


# In `facts` of a device that is a program (tests/software_cuda), and wherever they are shown.
NO_GPU = "of a CUDA device in software: they are no GPU's and say nothing about one"


def is_software(device: torch.device | str) -> bool:
    return "software" in torch.cuda.get_device_properties(device).name


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def copy_bandwidth(device: torch.device, rounds: int = 9) -> float:
    """Bytes per second, read and written, of the faster copy of a tensor that no cache holds."""
    source = torch.zeros(COPIED_BYTES, dtype=torch.uint8, device=device)
    functions = {name: contender.run for name, contender in copies(source).items()}
    timings = measure(functions, device, rounds, max_seconds=3)
    return 2 * COPIED_BYTES / min(timings[name].median for name in COPIES)


def clock_mhz(device: torch.device) -> int | None:
    """The multiprocessors' clock, if nvidia-smi is there and says it."""
    if (tool := shutil.which("nvidia-smi")) is None:
        return None
    command = [tool, "--query-gpu=clocks.sm", "--format=csv,noheader,nounits"]
    command += ["-i", str(device.index or 0)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return int(done.stdout) if done.stdout.strip().isdigit() else None


def facts(device: torch.device) -> dict[str, Any]:
    """Everything needed to judge a number, and nothing that names a user, a host or a path."""
    build = _native.build_info()
    known: dict[str, Any] = {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "simd": _native.simd_level() if _native.load("cpu") is None else None,
        "torch_simd": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "fastdiff": fastdiff.__version__,
        "python": platform.python_version(),
        "compiler": build.compiler if build else None,
        "steady_allocator": all(os.environ.get(k) == v for k, v in STEADY_ALLOCATOR.items()),
        "load": round(os.getloadavg()[0], 2),
        **{name: found for name in PEERS if (found := version(name)) is not None},
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        known |= {
            "gpu": properties.name,
            "multiprocessors": properties.multi_processor_count,
            "l2_bytes": properties.L2_cache_size,
            "cuda": torch.version.cuda,
            "clock_mhz": clock_mhz(device),
        }
        if is_software(device):
            known["times"] = NO_GPU
    return known
