"""A model's evaluation as a CUDA graph: one launch in place of hundreds."""

from __future__ import annotations

import contextlib
import itertools
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from fastdiff._backends import forced_backend

Outputs = tuple[Tensor, Tensor | None, float]
Evaluation = Callable[[Tensor, Tensor, Mapping[str, Any]], Outputs]
"""(x_t, t, model_kwargs) -> (output, uncond or None, guidance scale)."""

# Evaluations before the capture: libraries choose their algorithms and allocate their workspaces.
_WARM_UP = 3


class GraphedEvaluation:
    """Captures an evaluation once for each kind of inputs, and replays it.

    Inputs are of one kind if they have the same structure, shapes, strides and dtypes, and the same
    values where they are no tensors. What is no input (weights, tensors that a guidance holds) is
    read where it lay at the capture: new values in the same memory are seen.

    Where there is no memory for a graph, or the model does something that cannot be captured, such
    as reading a value on the host, a warning says so and the model runs without one.

    Parameters
    ----------
    evaluate : Evaluation
        Called under ``torch.no_grad``.
    device : torch.device
        A CUDA device.
    """

    def __init__(self, evaluate: Evaluation, device: torch.device) -> None:
        self.evaluate = evaluate
        self.device = device
        self._replays: dict[tuple, Evaluation] = {}

    def __call__(self, x: Tensor, t: Tensor, kwargs: Mapping[str, Any]) -> Outputs:
        leaves, structure = tree_flatten((x, t, dict(kwargs)))
        kind = structure, tuple(map(_kind, leaves))
        if kind not in self._replays:
            self._replays[kind] = self._capture(leaves, structure)
        return self._replays[kind](x, t, kwargs)

    def _capture(self, leaves: list[Any], structure: Any) -> Evaluation:
        inputs = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        arguments = tree_unflatten(inputs, structure)
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(self.device)
        current = torch.cuda.current_stream(self.device)
        warm = False
        try:
            # A capture that fails leaves its stream the current one: the outer block takes it back.
            with torch.cuda.device(self.device), torch.cuda.stream(current):
                stream.wait_stream(current)
                with torch.cuda.stream(stream):
                    for _ in range(_WARM_UP):
                        self.evaluate(*arguments)
                current.wait_stream(stream)
                warm = True
                with torch.cuda.graph(graph, stream=stream):
                    output, uncond, scale = self.evaluate(*arguments)
        except RuntimeError as error:
            full = isinstance(error, torch.OutOfMemoryError)
            if not (warm or full):  # the model's own
                raise
            reason = "there is not enough memory for it" if full else str(error).partition("\n")[0]
            _warn(reason)
            # Or torch's allocator goes on as in a capture.
            with contextlib.suppress(AttributeError, RuntimeError):
                torch._C._cuda_endAllocateToPool(current.device_index, graph.pool())
            return self.evaluate

        def replay(x: Tensor, t: Tensor, kwargs: Mapping[str, Any]) -> Outputs:
            for held, given in zip(inputs, tree_flatten((x, t, dict(kwargs)))[0], strict=True):
                if isinstance(held, Tensor):
                    held.copy_(given)
            graph.replay()
            # The next replay overwrites what this one has written.
            return output.clone(), None if uncond is None else uncond.clone(), scale

        return replay


class GraphCache:
    """The graphs of a sampler's last model and guidance: another one takes their place."""

    def __init__(self) -> None:
        self._identity: tuple[Any, ...] = ()
        self._evaluation: GraphedEvaluation | None = None

    def get(
        self, model: Any, guidance: Any, device: torch.device, evaluate: Evaluation
    ) -> GraphedEvaluation:
        """What `evaluate` does; with the graphs of the last call, if that was of the same model."""
        identity = id(model), id(guidance), device, _addresses(model), _surroundings()
        if identity != self._identity:
            # The evaluation keeps model and guidance, so that their ids stay theirs.
            self._identity, self._evaluation = identity, GraphedEvaluation(evaluate, device)
        return self._evaluation


def _kind(leaf: Any) -> tuple:
    if isinstance(leaf, Tensor):
        return tuple(leaf.shape), leaf.stride(), leaf.dtype, leaf.device
    return type(leaf), repr(leaf)


def _addresses(model: Any) -> tuple[int, ...]:
    """Where a module's weights lie: elsewhere after `.to`, where a graph would not look."""
    if not isinstance(model, nn.Module):
        return ()
    return tuple(x.data_ptr() for x in itertools.chain(model.parameters(), model.buffers()))


def _surroundings() -> tuple[Any, ...]:
    """What decides outside of the model how it computes."""
    autocast = torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda")
    return autocast, forced_backend()


def _warn(reason: str) -> None:
    warnings.warn(f"no CUDA graph of the model: {reason}; it runs without one", stacklevel=2)
