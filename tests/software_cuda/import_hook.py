"""Puts the device under torch while torch is being imported."""

from __future__ import annotations

import atexit
import ctypes
import functools
import importlib.abc
import importlib.machinery
import os
import sys
from typing import Any

from . import build
from .settings import Settings


class TorchFinder(importlib.abc.MetaPathFinder):
    """Loads the fake CUDA libraries before torch's first line, and the fallback after its last."""

    def __init__(self, settings: Settings):
        self.settings = settings

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name != "torch":
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            load_runtime(self.settings)
            execute(module)
            load_fallback(self.settings)

        spec.loader.exec_module = exec_module
        return spec


def load_runtime(settings: Settings) -> None:
    import software_cuda

    from .emulation import Emulation

    runtime, driver = build.fake_runtime(), build.fake_driver()
    # The dynamic loader goes by DT_SONAME: what torch's libraries need is there already.
    library = ctypes.CDLL(str(runtime), mode=ctypes.RTLD_GLOBAL)
    for other in filter(None, (driver, build.fake_nccl())):
        ctypes.CDLL(str(other), mode=ctypes.RTLD_GLOBAL)
    os.environ["TRITON_LIBCUDA_PATH"] = str(driver.parent)
    device = software_cuda.device
    device.settings, device.runtime = settings, library
    device.emulation = Emulation(library, settings.capability, device.reports)
    atexit.register(device.end)


def _no_symmetric_memory(*_: Any, **__: Any) -> None:
    raise NotImplementedError("symmetric memory: not on the software CUDA device")


def load_fallback(settings: Settings) -> None:
    import torch

    import software_cuda

    library = ctypes.CDLL(str(build.fallback()))
    library.sc_operator_calls.restype = ctypes.c_char_p
    library.sc_install_fallback()
    software_cuda.device.fallback = library
    load_library = torch.ops.load_library

    @functools.wraps(load_library)
    def load_ours(path: Any) -> None:
        ours = os.path.basename(path) == "_C_cuda.so"
        load_library(build.cuda_library(settings.arch) if ours else path)

    torch.ops.load_library = load_ours
    if torch.distributed.is_available():  # would crash without NVML
        torch._C._distributed_c10d._SymmetricMemory.empty_strided_p2p = _no_symmetric_memory
    torch._C._jit_set_texpr_fuser_enabled(False)  # TorchScript's kernels are machine code
    if build.coverage_folder():  # Python follows no lines in the threads of torch's engine
        torch.autograd.set_multithreading_enabled(False)
    if settings.rocm:
        from .rocm import look_like_rocm

        look_like_rocm()
