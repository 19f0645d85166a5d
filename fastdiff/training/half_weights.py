"""Half-precision copies of a network's weights, so that autocast has none to cast."""

from __future__ import annotations

import copy

import torch
from torch import nn


class HalfWeights:
    """A network that computes with half-precision copies of another one's weights.

    Autocast casts every weight of a convolution or linear map by itself, and each gradient back:
    two kernels for each of some 230 tensors of a U-Net, in every step. Here one copy of all serves
    a step, and one more brings all gradients back. What is computed is the same bit for bit: the
    same roundings of the same values, and gradients that are added up in float32.

    Parameters
    ----------
    network : torch.nn.Module
        Float32. Its weights stay the ones that are optimized, averaged and saved.
    dtype : torch.dtype
        That of autocast, under which `module` must be called.

    Attributes
    ----------
    module : torch.nn.Module
        Call this one. It shares everything but those weights with `network`.
    """

    def __init__(self, network: nn.Module, dtype: torch.dtype) -> None:
        self._weights = [
            parameter
            for module in network.modules()
            if isinstance(module, (nn.Conv2d, nn.Linear))
            for parameter in module.parameters(recurse=False)
        ]
        self._copies = [
            nn.Parameter(weight.detach().to(dtype), weight.requires_grad)
            for weight in self._weights
        ]
        # What deepcopy finds here it takes for its copy.
        copies = {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())}
        copies |= {id(w): c for w, c in zip(self._weights, self._copies, strict=True)}
        self.module = copy.deepcopy(network, copies)

    @torch.no_grad()
    def refresh(self) -> None:
        """Round the weights as they are now; before the first forward pass of a step."""
        torch._foreach_copy_(self._copies, self._weights)

    @torch.no_grad()
    def collect(self) -> None:
        """Add the gradients of a backward pass to those of the weights, in float32."""
        pairs = [
            (weight, half)
            for weight, half in zip(self._weights, self._copies, strict=True)
            if half.grad is not None
        ]
        if not pairs:
            return
        found = [torch.empty_like(weight) for weight, _ in pairs]
        torch._foreach_copy_(found, [half.grad for _, half in pairs])
        before = [weight.grad for weight, _ in pairs]
        if any(gradient is None for gradient in before):
            for (weight, _), gradient in zip(pairs, found, strict=True):
                weight.grad = gradient if weight.grad is None else weight.grad + gradient
        else:
            torch._foreach_add_(before, found)
        for _, half in pairs:
            half.grad = None
