"""What the GPUs of this machine are, and which of them the compiled CUDA kernels run on."""

from __future__ import annotations

import functools
import re

import torch

from fastdiff import _native


def is_rocm() -> bool:
    """Whether "cuda" devices are AMD's: their capabilities are other numbers than NVIDIA's."""
    return torch.version.hip is not None


def architecture(index: int) -> str:
    """Such as "sm_90", or "gfx942" on ROCm."""
    properties = torch.cuda.get_device_properties(index)
    if is_rocm():
        return properties.gcnArchName.partition(":")[0]
    return f"sm_{properties.major}{properties.minor}"


@functools.cache
def why_no_triton(index: int) -> str | None:
    """Why Triton cannot compile for this GPU: on some its compiler ends the process."""
    if not is_rocm() or (name := architecture(index)).startswith("gfx9"):
        return None
    return f"the compiler of Triton 3.8 crashes for {name}"


def has_binary(capability: tuple[int, int], archs: str) -> bool:
    """Whether a GPU runs code compiled for these architectures, such as "8.0 9.0a 12.0+PTX".

    Machine code runs on the same major version from its minor version on, that of 9.0a on 9.0
    alone; PTX can be compiled for everything newer.
    """
    for major, minor, suffix, ptx in re.findall(r"\b(\d+)\.(\d)([af]?)(\+PTX)?", archs):
        compiled_for = int(major), int(minor)
        if capability == compiled_for:
            return True
        if suffix != "a" and capability[0] == compiled_for[0] and capability > compiled_for:
            return True
        if ptx and not suffix and capability > compiled_for:
            return True
    return False


@functools.cache
def why_no_binary(index: int) -> str | None:
    """Why the compiled CUDA kernels cannot run on this GPU; None if they can, or nobody knows."""
    build = _native.build_info()
    if build is None or not build.cuda_arch_list or not torch.cuda.is_available():
        return None
    if has_binary(torch.cuda.get_device_capability(index), build.cuda_arch_list):
        return None
    return (
        f"the build has no binary for {torch.cuda.get_device_name(index)} "
        f"({architecture(index)}), it has {build.cuda_arch_list}"
    )
