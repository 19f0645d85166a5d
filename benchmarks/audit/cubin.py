"""What the compiler made of GPU kernels: resources and memory accesses, read from cubins.

Reads any file that NVIDIA's cuobjdump reads: a shared library with CUDA kernels, or one cubin.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import pathlib
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Architecture:
    """Limits of one multiprocessor (CUDA C++ Programming Guide, "Compute Capabilities")."""

    warps: int
    blocks: int
    shared_bytes: int
    registers: int = 65536


ARCHITECTURES = {
    "sm_80": Architecture(64, 32, 164 << 10),
    "sm_86": Architecture(48, 16, 100 << 10),
    "sm_89": Architecture(48, 24, 100 << 10),
    "sm_90": Architecture(64, 32, 228 << 10),
    "sm_100": Architecture(64, 32, 228 << 10),
    "sm_120": Architecture(48, 24, 100 << 10),
}
_RESERVED_SHARED = 1 << 10  # per block, by the driver, from compute capability 8.0 on
_REGISTER_UNIT = 256  # registers are handed out to a warp in this granularity


@dataclass(frozen=True)
class Kernel:
    """One kernel for one architecture.

    `accesses` counts load and store instructions by kind ("global load", "global store", "local
    load", "shared load", ...) and bytes per thread; `classes` all instructions by class ("float",
    "special", "integer", ...: `classify`). `threads` is the launch bound, if it has one; `shared`
    are the bytes per block that are known when it is compiled.
    """

    name: str
    arch: str
    registers: int
    stack: int
    local: int
    shared: int
    threads: int | None
    accesses: Counter[tuple[str, int]] = field(default_factory=Counter)
    classes: Counter[str] = field(default_factory=Counter)

    def count(self, kind: str, width: int | None = None) -> int:
        """Instructions of a kind, of all widths or of one."""
        return sum(
            number
            for (access, size), number in self.accesses.items()
            if access == kind and width in (None, size)
        )

    @property
    def spills(self) -> int:
        """Accesses to local memory: spilled registers, and arrays that are not in registers."""
        return self.count("local load") + self.count("local store")

    def occupancy(self) -> float | None:
        """Share of a multiprocessor's warps that can be resident, without dynamic shared memory."""
        limits = ARCHITECTURES.get(self.arch)
        if limits is None or self.threads is None:
            return None
        warps = -(-self.threads // 32)
        per_warp = -(-self.registers * 32 // _REGISTER_UNIT) * _REGISTER_UNIT
        blocks = min(
            limits.blocks,
            limits.warps // warps,
            limits.registers // per_warp // warps,
            limits.shared_bytes // (self.shared + _RESERVED_SHARED),
        )
        return blocks * warps / limits.warps


@functools.cache
def find_cuobjdump() -> pathlib.Path | None:
    """Of the CUDA toolkit (PATH, CUDA_HOME), or the one that Triton's wheel carries."""
    candidates = [shutil.which("cuobjdump")]
    if home := os.environ.get("CUDA_HOME"):
        candidates.append(os.path.join(home, "bin", "cuobjdump"))
    spec = importlib.util.find_spec("triton")
    if spec is not None and spec.submodule_search_locations:
        root = spec.submodule_search_locations[0]
        candidates.append(os.path.join(root, "backends", "nvidia", "bin", "cuobjdump"))
    return next((pathlib.Path(c) for c in candidates if c and os.path.exists(c)), None)


def _cuobjdump(*arguments: str) -> str:
    tool = find_cuobjdump()
    if tool is None:
        raise FileNotFoundError(
            "cuobjdump not found: it is in the CUDA toolkit (PATH, CUDA_HOME) and in triton's wheel"
        )
    command = [str(tool), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def architectures(path: pathlib.Path) -> list[str]:
    """The architectures a file has machine code for, such as sm_90, oldest first."""
    found = set(re.findall(r"\bsm_\d+[af]?\b", _cuobjdump("-lelf", str(path))))
    return sorted(found, key=lambda arch: int(re.sub(r"\D", "", arch)))


def demangle(names: Sequence[str]) -> list[str]:
    """C++ names without return type, parameters and the project's namespaces."""
    tool = shutil.which("c++filt")
    if tool is None or not names:
        return list(names)
    text = subprocess.run(
        [tool], input="\n".join(names), check=True, capture_output=True, text=True
    ).stdout
    return [_shorten(line) for line in text.splitlines()]


def _shorten(name: str) -> str:
    name = re.sub(r"^void ", "", name).partition("(")[0]
    name = re.sub(r"\b(?:fastdiff|cuda|\(anonymous namespace\))::", "", name)
    for long, short in (
        ("__nv_bfloat16", "bf16"),
        ("__half", "fp16"),
        ("unsigned char", "u8"),
        ("float", "fp32"),
    ):
        name = re.sub(rf"\b{long}\b", short, name)
    return name.replace(", ", ",")


def inspect(path: pathlib.Path, arch: str, name_contains: str = "") -> list[Kernel]:
    """The kernels of a library or cubin for one architecture, if their short name fits."""
    resources = _resources(_cuobjdump("-arch", arch, "-res-usage", str(path)))
    short = dict(zip(resources, demangle(list(resources)), strict=True))
    chosen = [name for name in resources if name_contains in short[name]]
    if not chosen:
        return []
    # All kernels at once: with -fun cuobjdump takes a second per kernel, without it three for all.
    code = parse_sass(_cuobjdump("-arch", arch, "-sass", str(path)))
    threads = _launch_bounds(_cuobjdump("-arch", arch, "-elf", str(path)))
    return [
        Kernel(
            short[name],
            arch,
            registers=resources[name]["REG"],
            stack=resources[name]["STACK"],
            local=resources[name]["LOCAL"],
            shared=_own_shared(resources[name]["SHARED"], arch),
            threads=threads.get(name),
            accesses=code[name].accesses,
            classes=code[name].classes,
        )
        for name in chosen
    ]


def _resources(text: str) -> dict[str, dict[str, int]]:
    """Function -> REG, STACK, SHARED, LOCAL."""
    found = re.findall(r"^ Function (\S+):\n\s+(REG:.*)$", text, re.MULTILINE)
    return {
        name: {key: int(value) for key, value in re.findall(r"\b([A-Z]+):(\d+)", line)}
        for name, line in found
    }


def _own_shared(listed: int, arch: str) -> int:
    """From sm_90 on the listed bytes include what the driver reserves."""
    reserved = _RESERVED_SHARED if int(re.sub(r"\D", "", arch)) >= 90 else 0
    return max(0, listed - reserved)


def _launch_bounds(elf: str) -> dict[str, int]:
    """Function -> threads per block of its __launch_bounds__."""
    bounds = {}
    for section in re.split(r"^\.nv\.info\.", elf, flags=re.MULTILINE)[1:]:
        value = re.search(r"EIATTR_MAX_THREADS\s+Format:\s*\w+\s+Value:\s*((?:0x\w+ )+)", section)
        if value:
            x, y, z = (int(number, 16) for number in value[1].split())
            bounds[section.split()[0]] = x * y * z
    return bounds


_FUNCTION = re.compile(r"^\s+Function : (\S+)")
# An instruction line: its offset in the function, a predicate or none, the opcode.
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)")
_KINDS = {
    "LDG": "global load",
    "STG": "global store",
    "LDGSTS": "global to shared copy",
    "UBLKCP": "bulk copy",
    "UTMALDG": "bulk copy",
    "UTMASTG": "bulk copy",
    "LDL": "local load",
    "STL": "local store",
    "LDS": "shared load",
    "STS": "shared store",
    "LD": "generic load",
    "ST": "generic store",
    "ATOM": "atomic",
    "ATOMG": "atomic",
    "ATOMS": "atomic",
    "RED": "atomic",
    "REDG": "atomic",
}
WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}


# Opcode -> class, the first that fits (NVIDIA, "CUDA Binary Utilities", instruction set reference).
_CLASSES = {
    "special": r"MUFU",  # reciprocal, root, exponential, logarithm, sine
    "conversion": r"F2F|F2I|I2F|F2FP|I2FP|FRND",
    "matrix": r"[HIDQ]G?MMA|LDSM|MOVM",
    "synchronization": r"BAR|MEMBAR|ERRBAR|CGAERRBAR|UCGABAR\w*|DEPBAR|SYNCS|NANOSLEEP|CCTL",
    "exchange": r"SHFL|VOTE\w*|C?REDUX|MATCH",
    "constant": r"U?LDCU?",
    "control": r"BR[AXEX]\w*|JM\w+|CALL|RET|EXIT|BS\w+|WARPSYNC|ENDCOLLECTIVE|NOP|YIELD|ACQBULK",
    "move": r"U?MOV\w*|U?SEL|C?S2U?R|R2UR|P2R|R2P|U?PRMT|U?PLOP3|UP2UR",
    "float": r"F(?!LO)\w+|[HD](ADD|MUL|FMA|MNMX|SETP?)2?",
    "integer": r"[UV]*I\w+|U?(LOP3|SHF|LEA|FLO|POPC|BREV|BMSK|SGXT)",
}


@functools.cache
def classify(opcode: str) -> str:
    """Class of a machine instruction: "memory", one of _CLASSES, or "other"."""
    if opcode in _KINDS:
        return "memory"
    fits = (name for name, pattern in _CLASSES.items() if re.fullmatch(pattern, opcode))
    return next(fits, "other")


@dataclass(frozen=True)
class Code:
    """The instructions of one function."""

    accesses: Counter[tuple[str, int]] = field(default_factory=Counter)
    classes: Counter[str] = field(default_factory=Counter)


def parse_sass(text: str) -> dict[str, Code]:
    """Function -> its memory instructions by kind and bytes per thread, and all by class.

    A kernel that several object files of a library have is listed several times, and counts once.
    """
    functions: dict[str, Code] = {}
    current = Code()
    for line in text.splitlines():
        if match := _FUNCTION.match(line):
            current = functions[match[1]] = Code()
        elif match := _INSTRUCTION.match(line):
            opcode, *modifiers = match[1].split(".")
            current.classes[classify(opcode)] += 1
            if kind := _KINDS.get(opcode):
                width = next((WIDTHS[m] for m in modifiers if m in WIDTHS), 4)
                current.accesses[kind, width] += 1
    return functions
