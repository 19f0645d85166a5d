"""Registers, spills, occupancy and memory accesses of every compiled GPU kernel.

    python -m benchmarks.audit.inspect_kernels [--arch sm_90 ...] [--kernel q_sample] [--json FILE]

Needs no GPU: reads the machine code of the CUDA library, and compiles the Triton kernels ahead of
time. Per thread: registers, bytes of stack and local memory, accesses to local memory (spills);
"global loads" such as "2x16 1x8" are two instructions of 16 bytes and one of 8 in the code, and
"30 float" in "instructions" are thirty of a class. --json has everything.
Occupancy assumes no dynamic shared memory.
"""

from __future__ import annotations

import argparse
import importlib.util
import pathlib
import sys
import tempfile
from dataclasses import asdict, replace

import fastdiff
from benchmarks import report
from benchmarks.audit import cubin, triton_aot
from benchmarks.audit.cubin import Kernel

ARCHS = ("sm_80", "sm_90", "sm_100")
TITLES = (
    *("kernel", "regs", "stack", "local", "shared", "spills", "occupancy"),
    *("global loads", "global stores", "instructions"),
)


def cuda_library() -> pathlib.Path | None:
    """The library with the CUDA kernels, if it was built."""
    path = pathlib.Path(fastdiff.__file__).parent / "_C_cuda.so"
    return path if path.exists() else None


def triton_kernel(name: str, arch: str) -> Kernel:
    """Compile one of `triton_aot.representative_calls` and inspect it."""
    launch = triton_aot.launch_of(triton_aot.representative_calls(arch)[name])
    compiled = triton_aot.compile_launch(launch, arch)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        (kernel,) = cubin.inspect(pathlib.Path(file.name), arch)
    metadata = compiled.metadata
    return replace(kernel, name=name, threads=32 * metadata.num_warps, shared=metadata.shared)


def widths(kernel: Kernel, kind: str) -> str:
    """Such as "2x16 1x8": widest first."""
    found = {width: n for (access, width), n in kernel.accesses.items() if access == kind}
    return " ".join(f"{found[width]}x{width}" for width in sorted(found, reverse=True)) or "-"


def instructions(kernel: Kernel) -> str:
    """Such as "120 integer 30 float": most first."""
    return " ".join(f"{number} {name}" for name, number in kernel.classes.most_common())


def print_kernels(title: str, kernels: list[Kernel]) -> None:
    print(f"\n{title}")
    rows = []
    for kernel in kernels:
        sizes = (kernel.registers, kernel.stack, kernel.local, kernel.shared, kernel.spills)
        occupancy = kernel.occupancy()
        rows.append(
            [
                kernel.name,
                *map(str, sizes),
                "-" if occupancy is None else f"{occupancy:.0%}",
                widths(kernel, "global load"),
                widths(kernel, "global store"),
                instructions(kernel),
            ]
        )
    longest = (max(map(len, column)) for column in zip(*rows, strict=True))
    table = report.Table(TITLES, widths=dict(zip(TITLES, longest, strict=False)))
    for row in rows:
        table.row(row)


def to_json(backend: str, kernel: Kernel) -> dict[str, object]:
    accesses = [
        {"kind": kind, "bytes": width, "instructions": n}
        for (kind, width), n in sorted(kernel.accesses.items())
    ]
    derived = {"spills": kernel.spills, "occupancy": kernel.occupancy()}
    counts = {"accesses": accesses, "classes": dict(kernel.classes)}  # asdict cannot copy Counters
    return asdict(kernel) | derived | counts | {"backend": backend}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.audit.inspect_kernels", description=__doc__.partition("\n")[0]
    )
    parser.add_argument(
        "--arch",
        nargs="+",
        metavar="ARCH",
        help="such as sm_90; default: all in the library, and "
        + ", ".join(ARCHS)
        + " for the Triton kernels",
    )
    parser.add_argument("--kernel", default="", metavar="TEXT", help="only names containing this")
    parser.add_argument("--backend", choices=("cuda", "triton"), help="default: both")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write everything here")
    options = parser.parse_args(argv)
    for arch in options.arch or ():
        if arch not in cubin.ARCHITECTURES:
            parser.error(f"--arch is {arch!r}, expected one of {', '.join(cubin.ARCHITECTURES)}")
    return options


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    if cubin.find_cuobjdump() is None:
        print("cuobjdump not found: install the CUDA toolkit or triton", file=sys.stderr)
        return 2
    document: list[dict[str, object]] = []

    if options.backend != "triton":
        library = cuda_library()
        if library is None:
            print("CUDA: the library was not built (no nvcc at install time)")
        else:
            built = cubin.architectures(library)
            for arch in options.arch or built:
                if arch not in built:
                    print(f"CUDA {arch}: not in the library, which has {', '.join(built)}")
                    continue
                kernels = cubin.inspect(library, arch, options.kernel)
                print_kernels(f"CUDA {arch}", kernels)
                document += [to_json("cuda", kernel) for kernel in kernels]

    if options.backend != "cuda":
        if importlib.util.find_spec("triton") is None:
            print("Triton: not installed")
        else:
            for arch in options.arch or ARCHS:
                calls = triton_aot.representative_calls(arch)
                names = [name for name in calls if options.kernel in name]
                kernels = [triton_kernel(name, arch) for name in names]
                print_kernels(f"Triton {arch}", kernels)
                document += [to_json("triton", kernel) for kernel in kernels]

    if options.json:
        options.json.write_text(report.to_json(document, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
