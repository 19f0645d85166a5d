"""What an op's benchmark declares: cases, how a case becomes contenders, which it is timed on."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from benchmarks.shapes import (
    DEFAULT_IMAGES,
    DTYPES,
    IMAGE_SHAPES,
    LAYOUTS,
    QUICK_IMAGES,
    TINY_IMAGE,
)
from benchmarks.suite import COPIES, OURS, Contender, Workload, compiled, copies


@dataclass(frozen=True)
class Case:
    """One row of a table, before its tensors exist."""

    labels: Mapping[str, str]  # shape, dtype, layout, mode
    shape: tuple[int, ...]
    device: torch.device
    compiled: bool = False

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.labels["dtype"]]

    @property
    def memory_format(self) -> torch.memory_format:
        return LAYOUTS[self.labels["layout"]]

    @property
    def mode(self) -> str:
        return self.labels["mode"]


@dataclass(frozen=True)
class Op:
    """The benchmark of one op.

    Attributes
    ----------
    modes
        Ways to call the op, such as forward and forward with backward.
    workload
        The tensors and contenders of a case.
    shapes, default_shapes, quick_shapes, compiled_shapes
        Sizes by label; those that run without an option, those of --quick, and those for which
        torch.compile is worth its seconds.
    peers, cuda_peers
        Contenders from other libraries, if they are installed.
    tiny_modes, tiny_shape
        Modes whose time on a tiny tensor is the overhead of a call.
    grad
        Whether calls are timed with gradients enabled. Samplers disable them.
    """

    name: str
    modes: tuple[str, ...]
    workload: Callable[[Case], Workload]
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=lambda: IMAGE_SHAPES)
    default_shapes: tuple[str, ...] = DEFAULT_IMAGES
    quick_shapes: tuple[str, ...] = QUICK_IMAGES
    compiled_shapes: tuple[str, ...] = QUICK_IMAGES[:1]
    peers: tuple[str, ...] = ()
    cuda_peers: tuple[str, ...] = ()
    tiny_modes: tuple[str, ...] = ()
    tiny_shape: tuple[int, ...] = TINY_IMAGE
    grad: bool = True

    def tiny_cases(self, device: torch.device) -> Iterator[Case]:
        for mode in self.tiny_modes:
            labels = {"shape": "tiny", "dtype": "fp32", "layout": "nchw", "mode": mode}
            yield Case(labels, self.tiny_shape, device)


@dataclass(frozen=True)
class Spec:
    """One way to call an op on one set of tensors.

    Attributes
    ----------
    ours, eager
        The op, and the same thing in plain PyTorch; what they return is compared with `exact`.
    exact
        The float64 result (or results, flattened into one vector).
    tolerance
        Largest error allowed, relative to the largest exact value.
    bytes
        What a perfect kernel moves.
    largest
        The largest tensor, whose copy gives the machine's bandwidth.
    forward
        The part of `eager` that torch.compile gets, as its argument of that name; None: all of it.
        It does not trace `torch.autograd.grad`, and users take gradients outside as well.
    """

    ours: Callable[[], Tensor | tuple[Tensor, ...]]
    eager: Callable[..., Tensor]
    arguments: tuple
    exact: Tensor
    tolerance: float
    bytes: int
    largest: Tensor
    forward: Callable[..., Tensor] | None = None

    def compiled_eager(self) -> Callable[..., Tensor]:
        if self.forward is None:
            return compiled(self.eager)
        return functools.partial(self.eager, forward=compiled(self.forward))

    def error(self, result: Tensor | tuple[Tensor, ...]) -> str | None:
        """What is wrong with a contender's result or results. Written so that NaN fails."""
        if isinstance(result, tuple):
            result = torch.stack(result)
        result, exact = result.double().flatten(), self.exact.double().flatten()
        if result.shape != exact.shape:
            return f"result has {result.numel()} values, expected {exact.numel()}"
        worst = ((result - exact).abs().max() / exact.abs().max()).item()
        return None if worst <= self.tolerance else f"relative error {worst:.3g}"


def spec_workload(specify: Callable[[Case], Spec]) -> Callable[[Case], Workload]:
    """The contenders of a `Spec`: the op, eager PyTorch, its compiled form, and copies."""

    def workload(case: Case) -> Workload:
        spec = specify(case)
        contenders = {
            OURS: Contender(spec.ours, spec.error),
            "eager": Contender(lambda: spec.eager(*spec.arguments), spec.error),
        }
        if case.compiled:
            function = spec.compiled_eager()
            contenders["compile"] = Contender(lambda: function(*spec.arguments), spec.error)
        contenders |= copies(spec.largest)
        moved = dict.fromkeys(COPIES, 2 * spec.largest.nbytes)
        return Workload(case.labels, spec.bytes, contenders, moved)

    return workload
