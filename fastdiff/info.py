"""``python -m fastdiff.info``: versions, build facts, devices, backends; paste it into issues."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
from typing import Any

import torch

import fastdiff
from fastdiff import _cli, _gpus, _native

PROGRAM = "python -m fastdiff.info"
_PACKAGES = ("numpy", "triton", "diffusers")


def collect() -> dict[str, Any]:
    """Everything that the command prints, as nested dictionaries of JSON types."""
    build = _native.build_info()
    facts: dict[str, Any] = {"native build": "none: pure Python"}
    if build is not None:
        facts = {
            "compiler": build.compiler,
            "built with torch": f"{build.torch_version}; runs with {build.torch_target_version} on",
            "calls and autograd nodes": _native.dispatch()[1],
            **_instruction_sets(),
            "CUDA toolkit": build.cuda_version or "none",
            "CUDA architectures": build.cuda_arch_list or "none",
        }
    return {
        "versions": {
            "fastdiff": fastdiff.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            **{name: _version(name) for name in _PACKAGES},
        },
        "build": facts,
        "devices": {
            "platform": f"{platform.system()} {platform.machine()}",
            "CPU threads": torch.get_num_threads(),
            **_gpu_facts(),
        },
        "backends": {
            name: "available" if status else f"not available: {status.reason}"
            for name, status in fastdiff.backends().items()
        },
        "default backend": {
            device: fastdiff.default_backend(device)
            for device in ("cpu", *(_gpu_names() or ["cuda"]))
        },
    }


def _instruction_sets() -> dict[str, str]:
    if (reason := _native.load("cpu")) is not None:
        return {"CPU instruction set in use": f"none: {reason}"}
    return {
        "CPU instruction set in use": _native.simd_level(),
        "values of FASTDIFF_CPU_ISA": " ".join(_native.isa_names()),
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _gpu_names() -> list[str]:
    return (
        [f"cuda:{i}" for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    )


def _gpu_facts() -> dict[str, str]:
    """What torch is built for, and a line per GPU."""
    if torch.version.hip is not None:
        built_for = f"ROCm {torch.version.hip}"
    elif torch.version.cuda is not None:
        built_for = f"CUDA {torch.version.cuda}"
    else:
        return {"CUDA": "none: this torch is built without CUDA"}
    if not torch.cuda.is_available():
        return {"CUDA": f"none visible (torch is built for {built_for})"}
    lines = {"CUDA": f"torch is built for {built_for}"}
    for index, name in enumerate(_gpu_names()):
        lines[name] = (
            f"{torch.cuda.get_device_name(index)} ({_gpus.architecture(index)}), "
            f"this GPU has a binary: {_binary(index)}"
        )
    return lines


def _binary(index: int) -> str:
    without = _native.load("cuda") is not None or _gpus.why_no_binary(index) is not None
    return f"no, using {fastdiff.default_backend(f'cuda:{index}')}" if without else "yes"


def _table(facts: dict[str, dict[str, Any]]) -> str:
    width = max(len(key) for section in facts.values() for key in section)
    lines = []
    for title, section in facts.items():
        lines.append(title)
        lines += [f"  {key:<{width}}  {value}" for key, value in section.items()]
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    """Print the facts; return the exit code."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Print versions, build facts, devices, and which backends can be used here.",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    arguments = parser.parse_args(argv)
    facts = collect()
    print(json.dumps(facts, indent=2) if arguments.json else _table(facts))
    return 0


if __name__ == "__main__":
    _cli.run(PROGRAM, main)
