"""GroupNorm kernels of other packages: run as installed, on the software CUDA device.

    python -m benchmarks.speed_of_light.rivals --device sm_90 --out FILE.json [--only liger]
                                               [--case TEXT]

Each runs its own launcher, and its own Triton kernels run in the PTX emulator, a few blocks of each
launch. Nothing of theirs is copied: what is not installed is left out, with the reason.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import importlib.util
import json
import math
import os
import pathlib
import sys
import types
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.audit import executed

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Blocks of each launch that run, chosen at random: the last of a group may have less to do.
BLOCKS = 4


@dataclass(frozen=True)
class Case:
    """One call: `which` is forward or backward; `silu`: SiLU is part of it."""

    rival: str
    shape: tuple[int, ...]
    groups: int
    dtype: str
    layout: str = "nchw"
    which: str = "forward"

    @property
    def name(self) -> str:
        shape = "x".join(map(str, self.shape))
        return f"{self.rival} {self.which} {shape} g{self.groups} {self.dtype} {self.layout}"

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


class NotInstalledError(RuntimeError):
    """A rival cannot run here; the message says why."""


def _module_of(package: str, name: str, stubs: dict[str, dict[str, Any]]) -> Any:
    """A module of a package whose other parts need what is not here.

    The file runs as it is; `stubs` stand for modules that it imports.
    """
    try:
        path = importlib.metadata.distribution(package).locate_file(name)
    except importlib.metadata.PackageNotFoundError:
        raise NotInstalledError(f"{package} is not installed") from None
    if not pathlib.Path(path).exists():
        raise NotInstalledError(f"this version of {package} has no {name}")
    for stub, members in stubs.items():
        parts = stub.split(".")
        for end in range(1, len(parts) + 1):
            sys.modules.setdefault(".".join(parts[:end]), types.ModuleType(parts[end - 1]))
        vars(sys.modules[stub]).update(members)
    spec = importlib.util.spec_from_file_location(f"_rival_{pathlib.Path(name).stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _custom_op(*_: Any, **__: Any) -> Callable[[Any], Any]:
    """sglang's registration of an operator with torch, without the registration."""
    return lambda function: function


_SGLANG = "sglang/kernels/ops/diffusion/norm/"
_CUSTOM_OP = {"sglang.srt.utils.custom_op": {"register_custom_op": _custom_op}}

Call = Callable[[], Any]


def _sglang(x: Tensor, groups: int, which: str) -> Call:
    """GroupNorm + SiLU, one pass or three launches as its threshold says; NCHW, forward only."""
    module = _module_of("sglang", f"{_SGLANG}group_norm_silu_triton.py", _CUSTOM_OP)
    weight, bias = (torch.ones(x.shape[1], device=x.device, dtype=x.dtype) for _ in range(2))

    def call() -> Any:
        with torch.no_grad():
            return module.triton_group_norm_silu(x, weight, bias, groups, 1e-5)

    return call


def _sglang_one_pass(x: Tensor, groups: int, which: str) -> Call:
    """The same without its threshold: one block per group, as in the PR's comparison."""
    module = _module_of("sglang", f"{_SGLANG}group_norm_silu_triton.py", _CUSTOM_OP)
    weight, bias = (torch.ones(x.shape[1], device=x.device, dtype=x.dtype) for _ in range(2))
    return lambda: module._launch_one_pass(x, weight, bias, groups, 1e-5)


def _sglang_channels_last(x: Tensor, groups: int, which: str) -> Call:
    """GroupNorm + SiLU in two passes over a channels_last tensor; forward only."""
    module = _module_of("sglang", f"{_SGLANG}group_norm_silu_twopass_triton.py", {})
    weight, bias = (torch.ones(x.shape[1], device=x.device, dtype=x.dtype) for _ in range(2))

    def call() -> Any:
        with torch.no_grad():
            return module.group_norm_silu_4d(x, weight, bias, groups, 1e-5)

    return call


def _liger(x: Tensor, groups: int, which: str) -> Call:
    """GroupNorm without SiLU; it views the tensor as (batch, groups, rest)."""
    try:
        module = importlib.import_module("liger_kernel.ops.group_norm")
    except ModuleNotFoundError as error:
        raise NotInstalledError(f"liger-kernel: {error}") from None
    weight, bias = (torch.ones(x.shape[1], device=x.device, dtype=x.dtype) for _ in range(2))
    channels = x.shape[1]
    if which == "forward":
        return lambda: module.group_norm_forward(x, channels, groups, weight, bias, 1e-5)
    mean, rstd = torch.ones(2, x.shape[0], groups, device=x.device, dtype=x.dtype)
    grad = torch.empty_like(x)
    return lambda: module.group_norm_backward(grad, x, weight, bias, mean, rstd, channels, groups)


def _flag_gems(x: Tensor, groups: int, which: str) -> Call:
    """GroupNorm without SiLU."""
    os.environ.setdefault("GEMS_VENDOR", "nvidia")
    try:
        module = importlib.import_module("flag_gems.ops.groupnorm")
    except Exception as error:
        raise NotInstalledError(f"flag-gems: {type(error).__name__}: {error}") from None
    weight, bias = (torch.ones(x.shape[1], device=x.device, dtype=x.dtype) for _ in range(2))
    batch, channels = x.shape[:2]
    pixels = math.prod(x.shape[2:])
    if which == "forward":
        return lambda: module.group_norm(x, weight, bias, batch, channels, pixels, groups, 1e-5)
    mean, rstd = torch.ones(2, batch, groups, device=x.device)
    grad, mask = torch.empty_like(x), (True, True, True)
    return lambda: module.group_norm_backward(
        grad, x, mean, rstd, weight, batch, channels, pixels, groups, mask
    )


def _inductor(x: Tensor, groups: int, which: str) -> Call:
    """What torch.compile makes of silu(group_norm(x))."""
    weight, bias = (torch.ones(x.shape[1], device=x.device, dtype=x.dtype) for _ in range(2))

    def function(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.silu(F.group_norm(x, groups, weight, bias))

    compiled = torch.compile(function, dynamic=False)
    if which == "forward":

        def forward() -> Any:
            with torch.no_grad():
                return compiled(x, weight, bias)

        return forward
    inputs = [t.requires_grad_() for t in (x, weight, bias)]
    y = compiled(*inputs)
    grad = torch.empty_like(x)
    return lambda: torch.autograd.grad(y, inputs, grad, retain_graph=True)


RIVALS: dict[str, Callable[[Tensor, int, str], Call]] = {
    "sglang": _sglang,
    "sglang one pass": _sglang_one_pass,
    "sglang channels_last": _sglang_channels_last,
    "liger": _liger,
    "flag-gems": _flag_gems,
    "inductor": _inductor,
}


def run(case: Case) -> dict[str, Any]:
    """The launches of one call, and how many kernels of torch's own it starts besides."""
    from ptx_emulator.launch import LaunchOptions
    from software_cuda import device

    dtype = DTYPES[case.dtype]
    x = torch.empty(case.shape, dtype=dtype, device="cuda")
    if case.layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    device.emulation.options = LaunchOptions(last_blocks=1)
    call = RIVALS[case.rival](x, case.groups, case.which)
    call()  # compiles, and fills caches
    torch.cuda.synchronize()
    device.launches.clear()
    before = device.counts()
    device.emulation.options = LaunchOptions(1, count=True, profile=True, last_blocks=BLOCKS)
    call()
    torch.cuda.synchronize()
    after = device.counts()
    launches = [executed.describe(r, x.nbytes // 2) for r in device.launches]
    operators = after.operators - before.operators
    return {"launches": [asdict(launch) for launch in launches], "operators": operators}


def _become(arch: str) -> None:
    """Start again on the software CUDA device, which has to be there before torch is imported.

    `python -m tests.software_cuda` would build the project's kernels too.
    """
    settings = executed.tests_package("software_cuda.settings").Settings.parse(arch)
    settings.write(os.environ)
    startup = pathlib.Path(__file__).resolve().parents[2] / "tests/software_cuda/startup"
    os.environ["PYTHONPATH"] = os.pathsep.join([str(startup), os.environ.get("PYTHONPATH", "")])
    os.execv(sys.executable, [sys.executable, "-m", __spec__.name, *sys.argv[1:]])


def main(argv: list[str] | None = None) -> int:
    from benchmarks.speed_of_light.cases import RIVAL_CASES

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=("sm_80", "sm_90", "sm_100"), default="sm_90")
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--only", nargs="+", default=list(RIVALS))
    parser.add_argument("--case", default="", help="only names containing this")
    options = parser.parse_args(argv)
    arch = options.device
    if "SOFTWARE_CUDA" not in os.environ:
        _become(arch)
    known = json.loads(options.out.read_text()) if options.out.exists() else {}
    for wanted, case in RIVAL_CASES:
        if wanted != arch or case.rival not in options.only or options.case not in case.name:
            continue
        key = f"{arch} {case.name}"
        if key in known and "launches" in known[key]:
            continue
        try:
            known[key] = run(case)
        except NotInstalledError as reason:
            known[key] = {"reason": str(reason)}
        except Exception as error:  # of the rival's own code: the table names it
            known[key] = {"reason": f"{type(error).__name__}: {str(error).strip()[:300]}"}
        print(key, known[key].get("reason", f"{len(known[key].get('launches', ()))} launches"))
        sys.stdout.flush()
        options.out.write_text(json.dumps(known))
    return 0


if __name__ == "__main__":
    sys.exit(main())
