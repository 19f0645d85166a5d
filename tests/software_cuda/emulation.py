"""The Python half: answers the hooks of csrc/runtime.h with the PTX emulator."""

from __future__ import annotations

import ctypes
import hashlib
import itertools
import os
import struct
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ptx_emulator.counters import MemoryRange
from ptx_emulator.cuda_runtime import runtime as base
from ptx_emulator.cuda_runtime.fatbin import extract_ptx, read_image
from ptx_emulator.devices import find_device
from ptx_emulator.errors import EmulatorError, LaunchError
from ptx_emulator.launch import LaunchOptions, Program

from .reports import Reports

_LAUNCH_FAILURE = 719  # cudaErrorLaunchFailure


class _Hooks(ctypes.Structure):
    """struct Hooks of runtime.h."""

    _fields_ = (
        (
            "prepare_launch",
            ctypes.CFUNCTYPE(
                *base.KERNEL,
                *(base.dim_pointer, base.dim_pointer, ctypes.c_uint64),
                *(ctypes.POINTER(ctypes.c_void_p), base.dim_pointer, ctypes.c_int),
                *(base.int64_pointer, ctypes.POINTER(base.uint64_pointer), base.int64_pointer),
            ),
        ),
        (
            "run_launch",
            ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int64, base.uint64_pointer, ctypes.c_int64),
        ),
        ("drop_launch", ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int64)),
        ("kernel_attribute", base.GetAttributeHook),
        ("set_kernel_attribute", base.SetAttributeHook),
        ("resident_blocks", base.ResidentBlocksHook),
        ("resident_clusters", base.ResidentClustersHook),
        ("device_attribute", base.DeviceAttributeHook),
        ("symbol", base.SymbolHook),
        (
            "load_module",
            ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.POINTER(ctypes.c_int)),
        ),
        ("report", ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_char_p, ctypes.c_char_p)),
    )


_ENDLESS = 240.0  # seconds of a kernel: less than CI gives a test


class _Programs:
    """Images by number, read when they are first used: torch registers thousands."""

    def __init__(self, library: ctypes.CDLL, capability: tuple[int, int]):
        self._library, self._capability = library, capability
        self._library.sc_image.restype = ctypes.c_void_p
        self._programs: dict[int, Program] = {}
        self._next = itertools.count(1_000_000)  # modules of the driver API

    def __getitem__(self, image: int) -> Program:
        if image not in self._programs:
            data = read_image(self._library.sc_image(image))
            self._programs[image] = Program(extract_ptx(data, self._capability))
        return self._programs[image]

    def add(self, ptx: str) -> int:
        image = next(self._next)
        self._programs[image] = Program(ptx)
        return image


class _TritonCache:
    """PTX by the contents of the cubin that Triton's ptxas made of it."""

    def __init__(self) -> None:
        self._seen: set[Path] = set()
        self._ptx: dict[str, Path] = {}

    @staticmethod
    def _cubins() -> Iterator[Path]:
        """Of Triton's cache, and of those that torch.compile keeps for Triton."""
        root = os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton/cache"
        yield from Path(root).glob("*/*.cubin")
        if inductor := os.environ.get("TORCHINDUCTOR_CACHE_DIR"):
            yield from Path(inductor).glob("triton/*/*/*.cubin")

    def find(self, cubin: bytes) -> str | None:
        key = hashlib.sha256(cubin).hexdigest()
        if key not in self._ptx:
            for path in set(self._cubins()) - self._seen:
                self._seen.add(path)
                found = hashlib.sha256(path.read_bytes()).hexdigest()
                self._ptx[found] = path.with_suffix(".ptx")
        path = self._ptx.get(key)
        return path.read_text() if path and path.exists() else None


def _elf_size(address: int) -> int:
    """Bytes of a cubin: its section headers come last, or its program headers do."""
    header = ctypes.string_at(address, 64)
    ends = [0]
    for offset_at, size_at in ((0x20, 0x36), (0x28, 0x3A)):
        (offset,) = struct.unpack_from("<Q", header, offset_at)
        size, count = struct.unpack_from("<HH", header, size_at)
        ends.append(offset + size * count)
    return max(ends)


class Emulation(base.KernelState):
    """Launches of every library in the process. `launches` and `refused` list them."""

    def __init__(self, library: ctypes.CDLL, capability: tuple[int, int], reports: Reports):
        super().__init__(find_device(capability))
        self.options = LaunchOptions(racecheck=True, timeout=_ENDLESS)
        self.reports = reports
        self._library = library
        self.programs = _Programs(library, capability)
        self._triton = _TritonCache()
        self._prepared: dict[int, tuple[base.PreparedLaunch, Any]] = {}
        self._ids = itertools.count(1)
        answers = {
            "prepare_launch": self._prepare_launch,
            "run_launch": self._run_launch,
            "drop_launch": self._drop_launch,
            "kernel_attribute": self._kernel_attribute,
            "set_kernel_attribute": self._set_kernel_attribute,
            "resident_blocks": self._resident_blocks,
            "resident_clusters": self._resident_clusters,
            "device_attribute": self._device_attribute,
            "symbol": self._symbol,
            "load_module": self._load_module,
            "report": self._report,
        }
        types = dict(_Hooks._fields_)
        hooks = {name: types[name](self._guard(answer)) for name, answer in answers.items()}
        self._hooks = _Hooks(**hooks)
        library.sc_set_hooks(ctypes.byref(self._hooks))

    def _guard(self, answer: Callable[..., int | None]) -> Callable[..., int]:
        """Turn exceptions into cudaError_t, and keep them."""

        def guarded(*arguments: Any) -> int:
            try:
                return answer(*arguments) or 0
            except LaunchError as error:
                self.refused.append(error)
                self.reports.add("launch refused", str(error))
                return error.cuda_error
            except BaseException as error:
                if not isinstance(error, EmulatorError):
                    traceback.print_exc(file=sys.stderr)
                self.reports.add("kernel fault", f"{type(error).__name__}: {error}")
                return getattr(error, "cuda_error", _LAUNCH_FAILURE)

        return guarded

    def _key(self, image: int, name: bytes) -> tuple:
        """A kernel's attributes are set on one device at a time."""
        return self._library.sc_current_device(), image, name.decode()

    def _prepare_launch(self, image: int, name: bytes, *rest: Any) -> None:
        *shape, identity, addresses, address_count = rest
        try:
            prepared = self._prepare(image, name, *shape)
        except LaunchError as error:
            message = f"{name.decode()}: {error}"
            raise LaunchError(message, error.cuda_error) from None
        except EmulatorError as error:
            raise EmulatorError(f"kernel {name.decode()}: {error}") from None
        found = prepared.addresses
        words = (ctypes.c_uint64 * len(found))(*found)
        identity[0] = next(self._ids)
        addresses[0] = ctypes.cast(words, base.uint64_pointer)
        address_count[0] = len(found)
        self._prepared[identity[0]] = prepared, words

    def _run_launch(self, identity: int, ranges: Any, count: int) -> None:
        prepared, _ = self._prepared[identity]
        found = {(ranges[2 * i], ranges[2 * i + 1]) for i in range(count)}
        memory = [MemoryRange(f"tensor {i}", *pair) for i, pair in enumerate(sorted(found))]
        self.launches.append(prepared.run(memory, self.options))

    def _drop_launch(self, identity: int) -> None:
        self._prepared.pop(identity, None)

    def _load_module(self, data: int, image: Any) -> None:
        if ctypes.string_at(data, 4) != b"\x7fELF":  # PTX itself
            image[0] = self.programs.add(ctypes.string_at(data).decode())
            return
        ptx = self._triton.find(ctypes.string_at(data, _elf_size(data)))
        if ptx is None:
            raise EmulatorError(
                "cuModuleLoadData: machine code whose PTX is not in Triton's cache, such as NVRTC's"
            )
        image[0] = self.programs.add(ptx)

    def _report(self, kind: bytes, what: bytes) -> None:
        self.reports.add(kind.decode(), what.decode())
