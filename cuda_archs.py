"""The GPU architectures that setup.py compiles for: what TORCH_CUDA_ARCH_LIST may say."""

from __future__ import annotations

import pathlib
import re
import subprocess

DEFAULT = ("7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0")
# Those of torch.utils.cpp_extension, in small letters.
NAMES = {
    "kepler": "3.5+PTX",
    "kepler+tesla": "3.7",
    "maxwell": "5.0;5.2+PTX",
    "maxwell+tegra": "5.3",
    "pascal": "6.0;6.1+PTX",
    "volta": "7.0+PTX",
    "volta+tegra": "7.2",
    "turing": "7.5+PTX",
    "ampere": "8.0;8.6+PTX",
    "ampere+tegra": "8.7",
    "ada": "8.9+PTX",
    "hopper": "9.0+PTX",
    "blackwell": "10.0;10.3;12.0;12.1+PTX",
    "blackwell+tegra": "11.0",
    "rubin": "10.7+PTX",
}


def known_to(nvcc: pathlib.Path) -> list[str]:
    """Such as "8.0", in order."""
    listed = subprocess.run(
        [nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True
    ).stdout
    return sorted((_dotted(n) for n in re.findall(r"compute_(\d+)\b", listed)), key=_order)


def choose(chosen: str, known: list[str]) -> list[str]:
    """Entries such as "8.0" or "9.0+PTX" for the variable's text; empty: the default.

    A number, also with a or f behind it, a name of NAMES, each also with +PTX; All, Common and
    native (or Auto): the GPUs of this machine. Names stand for those of their architectures that
    nvcc knows.
    """
    with_ptx: dict[str, bool] = {}
    for entry in [e for e in re.split(r"[;,\s]+", chosen) if e] or ["common"]:
        expanded = _expand(entry, known)
        if not expanded:
            raise SystemExit(f"fastdiff: this nvcc knows none of TORCH_CUDA_ARCH_LIST={entry}")
        for arch in expanded:
            number = arch.removesuffix("+PTX")
            with_ptx[number] = with_ptx.get(number, False) or arch != number
    return [f"{n}+PTX" if with_ptx[n] else n for n in sorted(with_ptx, key=_order)]


def gencode(archs: list[str]) -> list[str]:
    """nvcc's options for such entries."""
    flags = []
    for arch in archs:
        number = arch.removesuffix("+PTX").replace(".", "")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if arch.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def _dotted(number: str) -> str:
    return re.sub(r"^(\d+)(\d[af]?)$", r"\1.\2", number)


def _order(arch: str) -> tuple[int, int, str]:
    major, _, minor = arch.partition(".")
    return int(major), int(minor[0]), minor[1:]


def _expand(entry: str, known: list[str]) -> list[str]:
    name, ptx = entry.lower(), False
    if name not in NAMES and name.endswith("+ptx"):
        name, ptx = name.removesuffix("+ptx"), True
    if name == "all":
        found = list(known)
    elif name == "common":
        found, ptx = [a for a in DEFAULT if a in known], True
    elif name in ("native", "auto"):
        found, ptx = _native(known), True
    elif name in NAMES:
        listed = NAMES[name].split(";")
        found = [a for a in listed if a.removesuffix("+PTX") in known]
        ptx |= NAMES[name].endswith("+PTX")
    elif re.fullmatch(r"\d+\.\d[af]?|\d{2,3}[af]?", name):
        number = name if "." in name else _dotted(name)
        if number.rstrip("af") not in known:
            raise SystemExit(
                f"fastdiff: TORCH_CUDA_ARCH_LIST has {entry!r}; this nvcc knows {', '.join(known)}"
            )
        found = [number]
    else:
        raise SystemExit(
            f"fastdiff: TORCH_CUDA_ARCH_LIST has {entry!r}; expected such as 8.0, 9.0+PTX, Ampere, "
            "All, Common or native"
        )
    if found and ptx and not found[-1].endswith("+PTX"):
        found[-1] += "+PTX"
    return found


def _native(known: list[str]) -> list[str]:
    import torch

    visible = [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
    if not visible:
        raise SystemExit("fastdiff: TORCH_CUDA_ARCH_LIST=native, but torch sees no GPU here")
    # Of a GPU that is newer than nvcc, the newest that nvcc knows.
    newest = _order(known[-1])[:2]
    return [f"{major}.{minor}" for major, minor in sorted({min(c, newest) for c in visible})]
