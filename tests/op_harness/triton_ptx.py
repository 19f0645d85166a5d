"""Triton's launchers on the CPU: `_launch.launch` compiles to PTX and asks the emulator."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Iterator
from typing import Any

import ptx_emulator
import pytest
import torch
from torch import Tensor

from fastdiff.triton_kernels import _launch

_TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float64: "fp64",
    torch.uint8: "u8",
    torch.int64: "i64",
    torch.bool: "i1",
}


def compile_kernel(
    kernel: Any,
    capability: int,
    options: dict[str, int],
    arguments: dict[str, Any],
    constants: set[str],
) -> Any:
    """Compile as Triton's own launcher would for these arguments (its specialization rules)."""
    attributes: list[tuple] = []
    constexprs: list[tuple] = []

    def kind(path: tuple[int, ...], value: Any, specialize: bool) -> Any:
        """The type of an argument, or those of what a tuple holds."""
        if isinstance(value, tuple):
            kinds = [kind((*path, k), member, specialize) for k, member in enumerate(value)]
            return type(value)(*kinds) if hasattr(value, "_fields") else tuple(kinds)
        is_tensor = isinstance(value, Tensor)
        if value is None or (not is_tensor and value == 1 and specialize):
            constexprs.append((path, value))
            return "constexpr"
        if is_tensor:
            divisible = value.data_ptr() % 16 == 0
        else:
            divisible = isinstance(value, int) and specialize and value % 16 == 0
        if divisible:
            attributes.append((path, (("tt.divisibility", 16),)))
        if is_tensor:
            return f"*{_TYPES[value.dtype]}"
        if isinstance(value, float):
            return "fp32"
        return "i32" if -(2**31) <= value < 2**31 else "i64"

    signature = []
    skipped = kernel.do_not_specialize or ()
    for index, (name, value) in enumerate(arguments.items()):
        if name in constants:
            constexprs.append(((index,), value))
            signature.append((name, "constexpr"))
        else:
            specialize = name not in skipped and index not in skipped
            signature.append((name, kind((index,), value, specialize)))
    return _compile(
        kernel,
        capability,
        tuple(options.items()),
        tuple(signature),
        tuple(constexprs),
        tuple(attributes),
    )


def run_time_values(kind: Any, value: Any) -> Iterator[Any]:
    """What of an argument the compiled kernel takes."""
    if isinstance(kind, tuple):
        for member_kind, member in zip(kind, value, strict=True):
            yield from run_time_values(member_kind, member)
    elif kind != "constexpr":
        yield value


@functools.cache
def _compile(
    kernel: Any,
    capability: int,
    options: tuple,
    signature: tuple,
    constexprs: tuple,
    attributes: tuple,
) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(
        fn=kernel,
        signature=dict(signature),
        constexprs=dict(constexprs),
        attrs={key: [list(entry) for entry in value] for key, value in attributes},
    )
    target = GPUTarget("cuda", capability, 32)
    return triton.compile(source, target=target, options=dict(options))


@contextlib.contextmanager
def emulated_launches(
    arch: str = "sm_90", racecheck: bool = True, **options: Any
) -> Iterator[list[Any]]:
    """Inside, Triton launches run in the emulator. Yields the list of their results."""
    import triton

    results: list[Any] = []
    capability = int(arch.removeprefix("sm_"))

    def launch(
        kernel: Any,
        programs: int,
        device: torch.device,
        *args: Any,
        num_warps: int = 4,
        num_ctas: int = 1,
        **meta: Any,
    ) -> None:
        chosen = {"num_warps": num_warps, "num_ctas": num_ctas}
        bound = inspect.signature(kernel.fn).bind(*args, **meta).arguments
        compiled = compile_kernel(kernel, capability, chosen, bound, set(meta))
        kinds = compiled.src.signature
        runtime = [value for name in kinds for value in run_time_values(kinds[name], bound[name])]
        results.append(
            ptx_emulator.run_triton(compiled, runtime, programs, racecheck=racecheck, **options)
        )

    def max_blocks(device: torch.device) -> int:
        clusters = capability >= 90 and _launch.compiles_clusters(triton.__version__)
        return _launch.CLUSTER_BLOCKS if clusters else 1

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_launch, "launch", launch)
        patch.setattr(_launch, "max_blocks", max_blocks)
        yield results
