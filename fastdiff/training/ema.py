"""An exponential moving average of a model's parameters."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from fastdiff.training.shards import local


class EMA:
    """Averaged copy of a model: p_ema <- d p_ema + (1 - d) p after every optimizer step.

    The decay is warmed up, d_n = min(decay, (1 + n) / (10 + n)) at update n (from 0), so that
    the average is not dominated by the random initial weights while the run is young. Only
    parameters are averaged; buffers are constants or counters and are copied.

    Parameters
    ----------
    model : torch.nn.Module
        The model being trained (unwrapped: neither compiled nor distributed).
    decay : float
        Final decay in [0, 1); 0 copies the parameters.

    Attributes
    ----------
    model : torch.nn.Module
        The averaged copy, in eval mode and without gradients: sample from this one.
    num_updates : int
        Updates so far; part of a checkpoint.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay: expected a number in [0, 1), got {decay}")
        self.decay = decay
        self.num_updates = 0
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self._of = model
        self._parameters: tuple[list[Tensor], list[Tensor]] | None = None

    def next_decay(self) -> float:
        """The decay of the next update."""
        return min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the model's parameters as they are now."""
        if self._parameters is None:
            # Collected once: walking the module tree costs as much as the update of a small model.
            # But not before: sharding the two modules replaces their parameters.
            self._parameters = local(self.model.parameters()), local(self._of.parameters())
            self._buffers = list(zip(self.model.buffers(), self._of.buffers(), strict=True))
        torch._foreach_lerp_(*self._parameters, 1 - self.next_decay())
        for average, current in self._buffers:
            average.copy_(current)
        self.num_updates += 1
