"""Machine instructions that a launch executes, by pipe, counted without a GPU.

    python -m benchmarks.audit.executed [--op group_norm_silu] [--arch sm_90 ...] [--backend cuda]
                                        [--dtypes bf16] [--layouts nchw channels_last] [--batch 16]

The kernels' PTX runs in the emulator of tests/ptx_emulator, which counts how often warps issue each
instruction; `expand` says what machine instructions (SASS) a PTX instruction becomes and which pipe
executes them. The same PTX goes through ptxas, which gives the registers, and `static_error`, how
far the expansion of the kernel's text is from the machine code: "SASS" in the table is the number
of machine instructions in the code over that of the expanded PTX. The machine code has unrolled
more, so that this is above 1 even where the executed counts are right; values of 0.9 to 1.3 are
usual.

Counts are warp instructions: lanes that idle while their warp works cost as much as others.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import importlib
import importlib.util
import math
import pathlib
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from benchmarks.audit import cubin, in_flight
from benchmarks.audit.expansion import GUARD, ISSUE, PIPES, expand, sass_pipe


def expanded(executed: Iterable[Any]) -> Counter[str]:
    """Machine instructions that warps issued, of the emulator's `LaunchResult.executed`."""
    total: Counter[str] = Counter()
    for run in executed:
        for instruction in run.instructions:
            for pipe, number in expand(instruction).items():
                total[pipe] += number * run.warps
    return total


# ---- the machine code ----


def sass(path: pathlib.Path, arch: str) -> list[tuple[str, str]]:
    """(opcode, operands) of the one kernel of a cubin, without the padding behind it."""
    command = [str(cubin.find_cuobjdump()), "-arch", arch, "-sass", str(path)]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return [line for line in in_flight.instructions(text) if line[0] != "NOP"]


@dataclass(frozen=True)
class Machine:
    """What ptxas makes of one kernel.

    `sass`: instructions in the code, by pipe and "issue"; `expansion`: what `expand` gives for its
    PTX.
    """

    registers: int
    spills: int
    in_flight: in_flight.InFlight
    sass: dict[str, float]
    expansion: dict[str, float]

    @property
    def static_error(self) -> float:
        """Instructions in the code over those that the expansion has."""
        return self.sass[ISSUE] / self.expansion[ISSUE]


def find_ptxas() -> list[pathlib.Path]:
    """Of the CUDA toolkit whose nvcc compiles the kernels, and those of Triton's wheel, which know
    newer PTX."""
    nvcc = tests_package("ptx_emulator").find_nvcc()
    candidates = [nvcc.with_name("ptxas")] if nvcc else []
    spec = importlib.util.find_spec("triton")
    if spec is not None and spec.submodule_search_locations:
        folder = pathlib.Path(spec.submodule_search_locations[0]) / "backends/nvidia/bin"
        candidates += [folder / "ptxas-blackwell", folder / "ptxas"]
    return [path for path in candidates if path.exists()]


def single_kernel(ptx: str, entry: str) -> str:
    """A module without its other kernels and without line numbers."""
    start = r"(?:\.visible |\.weak )?\.(?:entry|func)\b"
    parts = re.split(rf"(?m)^(?={start})", ptx)
    named = re.compile(rf"\.entry\s+{re.escape(entry)}\s*\(")
    kept = [p for p in parts if not re.match(r"(?:\.visible |\.weak )?\.entry\b", p)]
    body = next(p for p in parts if named.search(p[:4096]))
    text = "".join([*kept, body])
    return re.sub(r"(?m)^\s*\.(?:loc|file)\b.*\n", "", text).partition("\t.section")[0]


@functools.cache
def machine(ptx: str, entry: str) -> Machine:
    """One kernel of a module, assembled for the architecture that the module names.

    Raises
    ------
    RuntimeError
        No ptxas is here, or none that takes the module.
    """
    emulator = tests_package("ptx_emulator")
    text = single_kernel(ptx, entry)
    arch = re.search(r"(?m)^\s*\.target\s+(sm_\w+)", text)[1]
    key = hashlib.sha256(text.encode()).hexdigest()[:24]

    def assemble(target: pathlib.Path) -> None:
        source = target.with_suffix(".ptx")
        source.write_text(text)
        said = "ptxas not found: it comes with the CUDA toolkit's nvcc and with triton"
        for ptxas in find_ptxas():
            command = [str(ptxas), f"-arch={arch}", str(source), "-o", str(target)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode == 0:
                return
            said = (done.stderr or done.stdout).strip()[:2000]
        raise RuntimeError(said)

    target = emulator.cache.cache_directory() / f"cubin-{key}.cubin"
    path = emulator.cache.build_once(target, assemble)
    (kernel,) = cubin.inspect(path, arch)
    counts: Counter[str] = Counter()
    code = sass(path, arch)
    for opcode, _ in code:
        counts[ISSUE] += 1
        counts[sass_pipe(opcode)] += 1
    body = emulator.parser.parse_body(emulator.parser.parse_module(text).functions[entry].body)
    expansion: Counter[str] = Counter()
    for statement in body:
        if isinstance(statement, emulator.parser.InstructionText):
            for pipe, number in expand(statement.text).items():
                expansion[pipe] += number
    under_way = in_flight.in_flight(code)
    return Machine(kernel.registers, kernel.spills, under_way, dict(counts), dict(expansion))


def tests_package(name: str) -> Any:
    """A package of tests/, which is not installed."""
    folder = str(pathlib.Path(__file__).resolve().parents[2] / "tests")
    if folder not in sys.path:
        sys.path.insert(0, folder)
    return importlib.import_module(name)


# ---- launches ----


@dataclass(frozen=True)
class Launch:
    """One launch with the counts of its whole grid.

    Attributes
    ----------
    kernel
        The short name.
    threads, shared
        Per block; bytes of shared memory, static and dynamic.
    executed
        Instructions that warps issue, by pipe and "issue".
    barriers
        Block and cluster barriers that one block passes.
    moved
        Bytes to and from memory if caches keep small arrays only; `read` of them are loads.
    block_loads, block_unique
        Bytes that one block reads from global memory, and different ones of them.
    in_flight, copies
        Bytes that a thread asks for before it waits; whether it has asynchronous copies.
    static_error
        See `Machine`.
    """

    kernel: str
    blocks: int
    threads: int
    cluster: int
    shared: int
    registers: int
    spills: int
    executed: dict[str, float]
    moved: float
    read: float
    block_loads: float
    block_unique: float
    in_flight: int
    copies: bool
    barriers: float
    static_error: float


_BARRIER = re.compile(r"(bar\.(cta\.)?sync|barrier\.(cta\.)?sync|barrier\.cluster\.wait)")


def describe(result: Any, large: int, scale: float = 1.0) -> Launch:
    """Of the emulator's result of a launch with `profile` and `count`.

    `large`: see `moved`. `scale`: blocks of the call per block of the launch, which may be one for
    fewer samples.
    """
    code = machine(result.ptx, result.entry)
    blocks = math.prod(result.grid)
    of_grid = scale * blocks / result.blocks
    warps_per_block = -(-math.prod(result.block) // 32)
    barriers = sum(
        run.warps
        for run in result.executed
        for text in run.instructions
        if _BARRIER.match(GUARD.sub("", text.strip()))
    )
    counters, bytes_moved = result.counters, moved(result, large) * scale
    return Launch(
        kernel=short_name(result.entry),
        blocks=max(1, round(blocks * scale)),
        threads=math.prod(result.block),
        cluster=math.prod(result.cluster) if result.cluster else 1,
        shared=result.static_shared_bytes + result.dynamic_shared_bytes,
        registers=code.registers,
        spills=code.spills,
        executed={k: v * of_grid for k, v in expanded(result.executed).items()},
        moved=bytes_moved,
        read=max(0.0, bytes_moved - counters.global_store_bytes * of_grid),
        block_loads=counters.global_load_bytes / result.blocks,
        block_unique=counters.unique_load_bytes / result.blocks,
        in_flight=code.in_flight.bytes,
        copies=code.in_flight.copies,
        barriers=barriers / warps_per_block / result.blocks,
        static_error=code.static_error,
    )


def moved(result: Any, large: int) -> float:
    """Bytes to and from memory of a launch's blocks that ran, as those of all of them.

    As `op_harness.traffic` has it: of arrays below `large` bytes each byte is read once.
    """
    all_blocks = math.prod(result.grid) / result.blocks
    total = 0.0
    for array in result.counters.arrays:
        loaded = array.load_requests.bytes * all_blocks
        if array.size < large:
            loaded = min(array.size, array.unique_loaded_bytes * all_blocks)
        total += loaded + array.stored_bytes * all_blocks
    return total


def short_name(entry: str) -> str:
    """Such as group_norm_silu_fwd<bf16,true,8>."""
    (name,) = cubin.demangle([entry])
    return re.sub(r"_kernel\b", "", name)


def emulate(call: Any, backend: str, arch: str, last_blocks: int | None = None) -> Any:
    """Run a `traffic_cases.Call` in the emulator, or of each launch only so many blocks."""
    return tests_package("op_harness").evaluate(
        call.op,
        f"{backend}-ptx",
        call.arguments,
        gradients=call.gradients,
        grad_output=call.grad_output,
        arch=arch,
        count=True,
        profile=True,
        racecheck=False,
        last_blocks=last_blocks,
    )


def launches(call: Any, backend: str, arch: str, last_blocks: int | None = None) -> list[Launch]:
    """What the launches of a call execute; of a call with gradients those of its backward pass."""
    result = emulate(call, backend, arch, last_blocks)
    done = result.launches[result.forward_launches if call.gradients else 0 :]
    return [describe(r, call.tensor_bytes, call.scale) for r in done]


def elements(call: Any) -> float:
    """Of the image or activation, in the whole batch."""
    tensor = next(v for v in call.arguments.values() if getattr(v, "ndim", 0) == 4)
    return tensor.numel() * call.scale


# ---- the command ----


def table(rows: Iterable[tuple[str, Any, list[Launch]]]) -> Iterator[str]:
    titles = ("call", "kernel", "grid", "block", "cluster", "shared", "regs", "spills", "barriers")
    titles += ("per element", *PIPES, "SASS")
    yield " | ".join(titles)
    for label, call, found in rows:
        for launch in found:
            per = {k: 32 * v / elements(call) for k, v in launch.executed.items()}
            cells = (label, launch.kernel, launch.blocks, launch.threads, launch.cluster)
            cells += (launch.shared, launch.registers, launch.spills, f"{launch.barriers:.0f}")
            numbers = [f"{per.get(name, 0.0):.1f}" for name in (ISSUE, *PIPES)]
            yield " | ".join([*map(str, cells), *numbers, f"{launch.static_error:.2f}"])


def calls(options: argparse.Namespace, arch: str) -> Iterator[Any]:
    from benchmarks.audit import traffic_cases
    from benchmarks.shapes import group_norm_sites

    chosen = []
    for size in options.sizes:
        channels, side = map(int, size.split("x"))
        sites = (s for s in group_norm_sites("ddpm_cifar10") if s.channels == channels)
        chosen.append(max((s for s in sites if s.height == side), key=lambda s: s.count))
    for dtype in options.dtypes:
        for layout in options.layouts:
            if options.op == "group_norm_silu":
                sites = [(site, options.batch) for site in chosen]
                yield from traffic_cases.group_norm_calls(dtype, layout, arch, sites)
                continue
            for call in traffic_cases.image_calls(dtype, layout, ("ddpm_cifar10",)):
                if call.op == options.op:
                    yield call


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.audit.executed", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--op", default="group_norm_silu", help="default: %(default)s")
    parser.add_argument("--arch", nargs="+", default=["sm_90"], help="such as sm_80")
    parser.add_argument("--backend", nargs="+", default=["cuda"], choices=("cuda", "triton"))
    parser.add_argument("--dtypes", nargs="+", default=["bf16"], help="fp32, bf16, fp16")
    parser.add_argument("--layouts", nargs="+", default=["nchw", "channels_last"])
    sizes = ["128x32", "256x16", "256x8"]
    parser.add_argument("--sizes", nargs="+", default=sizes, help="channels x side of a layer")
    parser.add_argument("--batch", type=int, default=16, help="of a layer")
    options = parser.parse_args(argv)
    rows = (
        (f"{arch} {backend} {call.mode} {' '.join(call.labels.values())}", call, found)
        for arch in options.arch
        for backend in options.backend
        for call in calls(options, arch)
        for found in [launches(call, backend, arch, last_blocks=16)]
    )
    for line in table(rows):
        print(line, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
