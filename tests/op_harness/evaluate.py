"""The implementations of an op behind one function."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import multiprocessing
import os
import shutil
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

import fastdiff

IMPLEMENTATIONS = (
    "reference",
    "cpu",
    "triton-interpreted",
    "triton-ptx",
    "cuda-ptx",
    "cuda",
    "triton",
)
ON_GPU = ("cuda", "triton")


@dataclass
class Result:
    """What one implementation computed; `launches` are the emulator's, with byte counts.

    The first `forward_launches` of them are the forward pass.
    """

    outputs: tuple[Tensor, ...]
    gradients: dict[str, Tensor] = field(default_factory=dict)
    launches: list[Any] = field(default_factory=list)
    forward_launches: int = 0


@functools.cache
def available(implementation: str) -> str | None:
    """Why an implementation cannot run here, or None."""
    if implementation == "cpu":
        return fastdiff.backends()["cpu"].reason or None
    if implementation in ON_GPU:
        return fastdiff.backends()[implementation].reason or None
    if implementation.startswith("triton") and importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if implementation == "cuda-ptx" and shutil.which("nvcc") is None:
        return "nvcc is not on the PATH"
    if implementation.endswith("-ptx") and shutil.which("g++") is None:
        return "the PTX emulator needs g++"
    return None


def implementation_params(*names: str) -> list[Any]:
    """pytest parameters: all implementations (or those named), skipped where they cannot run."""
    params = []
    for name in names or IMPLEMENTATIONS:
        marks = [pytest.mark.gpu] if name in ON_GPU else []
        if name == "triton":  # nearly every case compiles kernels of its own
            marks.append(pytest.mark.slow)
        if (reason := available(name)) is not None:
            marks.append(pytest.mark.skip(reason=f"{name}: {reason}"))
        params.append(pytest.param(name, marks=marks))
    return params


def case_params(cases: Sequence[Any], *pair: str) -> list[Any]:
    """(case, implementation) for all `cases`, dataclasses, as pytest parameters.

    Each case compiles Triton kernels of its own, which takes seconds: the default run has as few as
    show every value of every field, and every combination of the two fields in `pair`. Interpreted
    they all run.
    """
    compiled = _covering(cases, pair)
    return [
        pytest.param(
            case,
            *param.values,
            marks=[*param.marks]
            + [pytest.mark.slow] * (param.values == ("triton-ptx",) and case not in compiled),
            id=f"{case}-{param.values[0]}",
        )
        for case in cases
        for param in implementation_params()
    ]


def _covering(cases: Sequence[Any], pair: tuple[str, ...]) -> list[Any]:
    """Cases that together have all values, taken greedily: the one with most that are new."""

    def features(case: Any) -> set[tuple]:
        values = dataclasses.asdict(case)
        return {*values.items(), (pair, tuple(values[name] for name in pair))}

    chosen: list[Any] = []
    left = set().union(*map(features, cases))
    while left:
        chosen.append(max(cases, key=lambda case: len(features(case) & left)))
        left -= features(chosen[-1])
    return chosen


def evaluate(
    op: str,
    implementation: str,
    arguments: dict[str, Any],
    *,
    gradients: tuple[str, ...] = (),
    grad_output: Tensor | tuple[Tensor, ...] | None = None,
    **emulator: Any,
) -> Result:
    """Run `op` with the raw operator's `arguments`; differentiate the names in `gradients`.

    `grad_output` is that of the first output, or a tuple for the first outputs.

    Fresh memory holds NaN, so that an element nobody wrote shows. The emulator checks every access
    and looks for races; `emulator` takes more of its options (count, seed) and `arch`.
    """
    if implementation == "triton-interpreted":
        future = _interpreter_process().submit(
            _evaluate_here, op, "triton", arguments, gradients, grad_output
        )
        return future.result()
    if implementation == "triton-ptx":
        from .triton_ptx import emulated_launches

        with emulated_launches(**emulator) as launches:
            result = _evaluate_here(op, "triton", arguments, gradients, grad_output, launches)
        result.launches = launches
        return result
    if implementation == "cuda-ptx":
        from .cuda_ptx.launcher import emulated_launches

        with emulated_launches(op.rstrip("_"), **emulator) as launches:
            result = _evaluate_here(op, "cuda-ptx", arguments, gradients, grad_output, launches)
        result.launches = launches
        return result
    if implementation in ON_GPU:
        moved = {k: on_gpu(v) if isinstance(v, Tensor) else v for k, v in arguments.items()}
        grad_output = None if grad_output is None else on_gpu(grad_output)
        overload = "triton" if implementation == "triton" else "default"
        result = _evaluate_here(op, overload, moved, gradients, grad_output)
        result.outputs = tuple(x.cpu() for x in result.outputs)
        result.gradients = {k: v.cpu() for k, v in result.gradients.items()}
        return result
    overload = "reference" if implementation == "reference" else "default"
    return _evaluate_here(op, overload, arguments, gradients, grad_output)


def on_gpu(x: Tensor) -> Tensor:
    """x on the current CUDA device, as it lies in memory: `x.cuda()` would pack slices, expanded
    dimensions and odd addresses into a new dense tensor."""
    whole = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage())
    return whole.cuda().as_strided(x.shape, x.stride(), x.storage_offset())


def _overload(op: str, name: str) -> Any:
    if name in ("default", "triton"):
        return getattr(getattr(torch.ops.fastdiff, op), name)
    stem = op.rstrip("_")
    definition = importlib.import_module(f"fastdiff.ops.{stem}")._op
    if name == "reference":
        return lambda *arguments: definition.reference(definition.arguments(*arguments))
    cuda_ptx = importlib.import_module(f".cuda_ptx.{stem}", __package__)
    launcher = getattr(cuda_ptx, op)
    if definition.autograd is None:
        return launcher
    backward = getattr(cuda_ptx, f"{op}_backward", None)
    options = {} if backward is None else {"backward": backward}
    return functools.partial(definition.autograd, launcher, **options)


def _evaluate_here(
    op: str,
    overload: str,
    arguments: dict[str, Any],
    gradients: tuple[str, ...],
    grad_output: Tensor | tuple[Tensor, ...] | None,
    launches: Sequence[Any] = (),
) -> Result:
    arguments = dict(arguments)
    for name in gradients:
        arguments[name] = arguments[name].detach().requires_grad_()
    with _nan_filled_memory():
        returned = _overload(op, overload)(*arguments.values())
        if returned is None:  # an op that fills its first argument
            returned = next(iter(arguments.values()))
        outputs = returned if isinstance(returned, tuple) else (returned,)
        forward_launches = len(launches)
        grads: tuple[Tensor, ...] = ()
        if gradients:
            inputs = [arguments[name] for name in gradients]
            given = grad_output if isinstance(grad_output, tuple) else (grad_output,)
            grads = torch.autograd.grad(outputs[: len(given)], inputs, given)
    named = dict(zip(gradients, grads, strict=True))
    return Result(tuple(x.detach() for x in outputs), named, forward_launches=forward_launches)


class _nan_filled_memory:
    """torch.empty gives NaN (torch's own switch for finding reads of uninitialized memory)."""

    def __enter__(self) -> None:
        self._previous = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(True, warn_only=True)

    def __exit__(self, *_: object) -> None:
        torch.use_deterministic_algorithms(self._previous)


def _interpret() -> None:
    # Triton reads it when a kernel is decorated, so it has to be set before any import of triton.
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)


@functools.cache
def _interpreter_process() -> ProcessPoolExecutor:
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(1, mp_context=context, initializer=_interpret)
