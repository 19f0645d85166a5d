"""``python -m fastdiff.verify``: check this machine's kernels against plain PyTorch in float64.

Every op, backend, dtype and layout, forward and gradients, then the noise, a training step and a
sampler. Prints the worst case of each; exit code 1 if one is outside its bound.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch

import fastdiff
from fastdiff import _backends as _backend_module
from fastdiff import _cli, info
from fastdiff.training.errors import UserError
from fastdiff.verification import CASES, PARITY, Row, verify_case
from fastdiff.verification.cases import LAYOUTS

PROGRAM = "python -m fastdiff.verify"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FAILED = 1


def main(argv: list[str]) -> int:
    """Verify as ``argv`` says; return the exit code."""
    arguments = _parse(argv)
    device = _device(arguments.device)
    backends = _backends(arguments.backend, device)
    started = time.perf_counter()
    rows = list(verify_ops(backends, device, arguments.op))
    parity = list(verify_parity(backends, device)) if arguments.op is None else []
    seconds = time.perf_counter() - started
    failed = sum(not row.passed for row in rows) + sum(not p["passed"] for p in parity)
    if arguments.json:
        report = {
            "machine": info.collect(),
            "device": str(device),
            "seconds": seconds,
            "rows": [_strict(row.to_dict()) for row in rows],
            "parity": [_strict(p) for p in parity],
            "failed": failed,
        }
        print(json.dumps(report, indent=2, allow_nan=False))
    else:
        print(_table(rows, every=arguments.all))
        print(_parity_table(parity))
        checks = len(rows) + len(parity)
        verdict = "all within their bounds" if failed == 0 else f"{failed} OUTSIDE THEIR BOUNDS"
        print(f"{checks} results on {_device_name(device)} in {seconds:.0f} s: {verdict}")
    return FAILED if failed else 0


def verify_ops(
    backends: Sequence[str], device: torch.device, op: str | None = None
) -> Iterator[Row]:
    """The rows of every case of `op` (None: of all ops)."""
    for case in CASES:
        if op in (None, case.op):
            for backend in backends:
                for dtype in DTYPES:
                    for layout in LAYOUTS:
                        yield from verify_case(case, backend, dtype, layout, device)


def verify_parity(backends: Sequence[str], device: torch.device) -> Iterator[dict[str, Any]]:
    """Noise, training step and sampler on each backend."""
    for name, check in PARITY.items():
        for backend in backends:
            error, bound = check(backend, device)
            yield {
                "check": name,
                "backend": backend,
                "error": error,
                "bound": bound,
                "passed": error <= bound,
            }


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description=__doc__.partition(": ")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        exit_on_error=False,
    )
    names = tuple(dict.fromkeys(case.op for case in CASES))
    parser.add_argument("--device", default=None, help="cpu or cuda; default: cuda if there is")
    parser.add_argument(
        "--backend",
        choices=_backend_module.BACKENDS,
        help="only this one; default: every backend that the device has",
    )
    parser.add_argument("--op", choices=names, help="only this op; default: all, and the parity")
    parser.add_argument("--all", action="store_true", help="print every result, not the worst ones")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    try:
        return parser.parse_args(argv)
    except argparse.ArgumentError as error:
        raise UserError(f"{error.argument_name}: {error.message}") from error


def _device(name: str | None) -> torch.device:
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name}: no such device; give cpu, cuda or cuda:1") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device {name}: no CUDA device is visible here; give cpu")
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {name}: fastdiff has kernels for cpu and cuda only")
    return device


def _backends(name: str | None, device: torch.device) -> list[str]:
    """The backends to check on `device`; "reference" is checked too: it is float32 there."""
    there = [
        backend
        for backend, status in fastdiff.backends().items()
        if status and (backend == "reference" or device.type in _homes(backend))
    ]
    if name is None:
        return there
    if name not in there:
        reason = fastdiff.backends()[name].reason or f"it does not run on {device.type} tensors"
        raise UserError(f"--backend {name}: not available on {device}: {reason}")
    return [name]


def _homes(backend: str) -> tuple[str, ...]:
    if backend == "triton":
        return ("cpu",) if _backend_module.triton_interpreted() else ("cuda",)
    return (backend,)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def _strict(values: dict[str, Any]) -> dict[str, Any]:
    """Infinity and NaN, of which JSON knows nothing, as strings."""
    return {
        name: str(value) if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in values.items()
    }


def _table(rows: Sequence[Row], every: bool) -> str:
    """Every row, or of each op, backend and dtype the one that comes nearest to its bound."""
    shown = rows
    if not every:
        worst: dict[tuple[str, str, str], Row] = {}
        for row in rows:
            key = row.op, row.backend, row.dtype
            if key not in worst or row.share > worst[key].share:
                worst[key] = row
        shown = list(worst.values())
    lines = [
        f"{'op':<16} {'backend':<10} {'dtype':<6} {'max error':>10} {'relative':>10} "
        f"{'of bound':>9}  worst case"
    ]
    for row in shown:
        mark = "" if row.passed else "  FAILED"
        lines.append(
            f"{row.op:<16} {row.backend:<10} {row.dtype:<6} {row.error:>10.2e} "
            f"{row.relative:>10.2e} {row.share:>9.3f}  {row.result} ({row.variant}, "
            f"{row.layout}){mark}"
        )
    return "\n".join(lines)


def _parity_table(parity: Sequence[dict[str, Any]]) -> str:
    lines = [
        f"{p['check']:<16} {p['backend']:<10} {'fp32':<6} {p['error']:>10.2e} {'':>10} "
        f"{p['error'] / p['bound']:>9.3f}{'' if p['passed'] else '  FAILED'}"
        for p in parity
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    _cli.run(PROGRAM, main)
