"""Counts of the project's own kernels on every device, kept in a file.

A launch is counted again only if its PTX or its geometry has changed. Devices that run the same
code differ in the plan that the launchers choose, which follows their multiprocessors, shared
memory and clusters.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import pathlib
import unittest.mock
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from benchmarks.audit import executed, traffic_cases
from benchmarks.audit.executed import Launch
from benchmarks.roofline import DEVICES, Gpu
from benchmarks.shapes import group_norm_sites
from benchmarks.speed_of_light.cases import SITES

# The code that is counted: that of the oldest architecture where newer ones have no more. H200 runs
# what H100 runs. A T4 has longer conversions of bfloat16 than the code counted for it.
COUNTED = {"A100": "sm_80", "RTX 4090": "sm_80", "T4": "sm_80", "H100": "sm_90", "B200": "sm_100"}
ELEMENTWISE = "sm_90"  # these kernels have one code for all, and their grids ask nothing
# At least so many blocks of each launch run, and whole clusters.
BLOCKS = 4


@dataclasses.dataclass(frozen=True)
class Row:
    """The launches of one call on one device; `elements`: of x, in the whole batch."""

    op: str
    mode: str
    shape: str
    dtype: str
    layout: str
    backend: str
    device: str
    elements: float
    launches: tuple[Launch, ...]
    keys: tuple[str, ...]  # of the launches, in the file

    def to_json(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "launches"}


def rows_of(document: Mapping[str, Any]) -> list[Row]:
    """The rows of a file."""
    known = {key: Launch(**fields) for key, fields in document["launches"].items()}
    return [
        Row(
            **{**fields, "keys": tuple(fields["keys"])},
            launches=tuple(map(known.get, fields["keys"])),
        )
        for fields in document["rows"]
    ]


class Memory:
    """Launches that were counted, by what determines their counts."""

    def __init__(self, known: dict[str, dict[str, Any]]):
        self._known: dict[str, dict[str, Any]] = known
        self.used: dict[str, dict[str, Any]] = {}

    def launch(self, key: str) -> Launch:
        return Launch(**self._known[key])

    @contextlib.contextmanager
    def counting(self, call: traffic_cases.Call) -> Iterator[list[str]]:
        """Inside, launches run only if they are not known; yields the list of their keys."""
        emulator = executed.tests_package("ptx_emulator.launch")
        runtime = executed.tests_package("ptx_emulator.cuda_runtime.runtime")
        run: Callable[..., Any] = emulator.launch
        found: list[str] = []

        def remembered(program: Any, function: Any, packed: Any, shape: Any, options: Any) -> Any:
            what = (program.ptx, function.name, *vars(shape).values(), vars(call)["labels"])
            what += (call.mode.removesuffix(", backward"), call.scale)
            key = hashlib.sha256(repr(what).encode()).hexdigest()[:16]
            if key not in self._known:
                result = run(program, function, packed, shape, options)
                launch = executed.describe(result, call.tensor_bytes, call.scale)
                self._known[key] = dataclasses.asdict(launch)
            self.used[key] = self._known[key]
            found.append(key)
            return emulator.LaunchResult(
                function.name, shape.grid, shape.block, 0, 0, math.prod(shape.grid), 0.0, 0.0
            )

        with (
            unittest.mock.patch.object(emulator, "launch", remembered),
            unittest.mock.patch.object(runtime, "launch", remembered),
        ):
            yield found


def emulated_device(gpu: Gpu) -> Any:
    """The emulator's description of a device, as one that runs the code counted for it."""
    devices = executed.tests_package("ptx_emulator.devices")
    number = int(COUNTED[gpu.name].removeprefix("sm_"))
    return devices.Device(
        gpu.name,
        divmod(number, 10),
        gpu.shared_bytes,
        32 * gpu.warps,
        gpu.blocks,
        gpu.multiprocessors,
        reserved_shared_per_block=gpu.reserved_shared,
        max_cluster_blocks=gpu.cluster,
    )


def _apart(call: traffic_cases.Call) -> traffic_cases.Call:
    """With a gradient that is no other tensor, so that bytes of both count."""
    given = call.grad_output
    if given is None or given.ndim < 2:
        return call
    grad = torch.zeros(given.numel(), dtype=given.dtype).as_strided(given.shape, given.stride())
    return dataclasses.replace(call, grad_output=grad)


def count(memory: Memory, call: traffic_cases.Call, backend: str, gpu: Gpu, arch: str) -> Row:
    call = _apart(call)
    launcher = executed.tests_package("op_harness.cuda_ptx.launcher")
    with contextlib.ExitStack() as stack:
        if backend == "cuda" and call.op == "group_norm_silu":
            library = launcher.library(call.op, arch)
            stack.enter_context(library.device(emulated_device(gpu)))
        found = stack.enter_context(memory.counting(call))
        result = executed.emulate(call, backend, arch, last_blocks=BLOCKS)
    keys = tuple(found[result.forward_launches if call.gradients else 0 :])
    return Row(
        *(call.op, call.mode, *call.labels.values(), backend, gpu.name),
        executed.elements(call),
        tuple(map(memory.launch, keys)),
        keys,
    )


def _sites() -> list[tuple[Any, int]]:
    found = []
    for network, channels, side, batch in SITES:
        sites = [s for s in group_norm_sites(network) if (s.channels, s.height) == (channels, side)]
        found.append((max(sites, key=lambda s: (s.activation == "silu", s.count)), batch))
    return found


def rows(memory: Memory, progress: Callable[[str], None] = print) -> Iterator[Row]:
    """Everything on the page but the other packages."""
    by_name = {gpu.name: gpu for gpu in DEVICES}
    for name in ("H100", "A100", "B200", "RTX 4090", "T4"):
        gpu, arch = by_name[name], COUNTED[name]
        for layout in traffic_cases.LAYOUTS:
            for call in traffic_cases.group_norm_calls("bf16", layout, "sm_90", _sites()):
                progress(f"{name} {call.mode} {' '.join(call.labels.values())}")
                row = count(memory, call, "cuda", gpu, arch)
                yield row
                if name == "H100":
                    yield dataclasses.replace(row, device="H200")
    for layout in traffic_cases.LAYOUTS:
        for call in traffic_cases.image_calls("bf16", layout, ("ddpm_256",)):
            if layout == "channels_last" and "seed" not in call.mode:
                continue
            progress(f"{call.op} {call.mode} {' '.join(call.labels.values())}")
            row = count(memory, call, "cuda", by_name["H100"], ELEMENTWISE)
            yield from (dataclasses.replace(row, device=gpu.name) for gpu in DEVICES)


def read(path: pathlib.Path) -> dict[str, Any]:
    """{"rows", "launches", "rivals"}; empty if there is no file."""
    if not path.exists():
        return {"rows": [], "launches": {}, "rivals": {}}
    return json.loads(path.read_text())


def update(path: pathlib.Path, progress: Callable[[str], None] = print) -> None:
    """Count what has changed and write the file, after every call so that it can be cut off."""
    document = read(path)
    memory, found = Memory(dict(document["launches"])), []
    for row in rows(memory, progress):
        found.append(row.to_json())
        write(path, document | {"launches": document["launches"] | memory.used})
    write(path, document | {"rows": found, "launches": memory.used})


def write(path: pathlib.Path, document: Mapping[str, Any]) -> None:
    """One row and one launch a line."""

    def short(value: Any) -> Any:
        if isinstance(value, float):
            return float(f"{value:.6g}")
        if isinstance(value, dict):
            return {k: short(v) for k, v in value.items()}
        if isinstance(value, (list, tuple)):
            return [short(v) for v in value]
        return value

    def lines(value: Any) -> str:
        if isinstance(value, dict):
            items = [f"{json.dumps(k)}: {json.dumps(short(v))}" for k, v in sorted(value.items())]
            return "{\n" + ",\n".join(items) + "\n}"
        return "[\n" + ",\n".join(json.dumps(short(v)) for v in value) + "\n]"

    parts = [f"{json.dumps(name)}: {lines(value)}" for name, value in document.items()]
    path.write_text("{\n" + ",\n".join(parts) + "\n}\n")
