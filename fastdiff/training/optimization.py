"""Optimizer, learning rate and loss scale; nothing here waits for the device."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastdiff.training.config import TrainConfig

# torch.amp.GradScaler's constants, but for the limits, which it lacks.
_INITIAL_SCALE = 2.0**16
_GROWTH_INTERVAL = 2000
_LARGEST_SCALE = 2.0**24
SMALLEST_SCALE = 1.0


def optimizer(config: TrainConfig, parameters: list[Tensor]) -> torch.optim.Adam:
    """Return AdamW (decoupled weight decay) or Adam (weight decay added to the gradient), fused."""
    kind = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[config.optimizer]
    return kind(
        parameters,
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        weight_decay=config.weight_decay,
        fused=True,
    )


def learning_rate(config: TrainConfig, step: int) -> float:
    """Linear warm-up, then constant or a cosine down to zero at the last step."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    if config.lr_schedule == "constant":
        return config.lr
    progress = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.lr * (1 + math.cos(math.pi * min(1.0, progress))) / 2


class LossScaler:
    """Keeps float16 gradients from vanishing: the loss is multiplied by a scale, gradients divided.

    The scale is halved after a step whose gradient is not finite and doubled after 2000 that were,
    within [1, 2^24]. It lives on the device. Not enabled, the scale is 1 and stays so.

    Parameters
    ----------
    device : torch.device
        Where gradients are.
    enabled : bool
        Whether the run computes in float16.

    Attributes
    ----------
    scale : Tensor
        float32, no dimensions.
    """

    def __init__(self, device: torch.device, enabled: bool) -> None:
        self.enabled = enabled
        self.scale = torch.full((), _INITIAL_SCALE if enabled else 1.0, device=device)
        self._finite_steps = torch.zeros((), device=device)

    @torch.no_grad()
    def unscale(self, parameters: list[Tensor]) -> None:
        """Divide the gradients by the scale."""
        if self.enabled:
            gradients = [p.grad for p in parameters if p.grad is not None]
            torch._foreach_mul_(gradients, 1 / self.scale)

    def update(self, finite: Tensor) -> None:
        """Adapt the scale to whether this step's gradient was finite (bool, no dimensions)."""
        if not self.enabled:
            return
        steps = torch.where(finite, self._finite_steps + 1, 0.0)
        grow = steps >= _GROWTH_INTERVAL
        scale = torch.where(finite, torch.where(grow, 2 * self.scale, self.scale), self.scale / 2)
        self.scale.copy_(scale.clamp(SMALLEST_SCALE, _LARGEST_SCALE))
        self._finite_steps.copy_(torch.where(grow, 0.0, steps))

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold to go on exactly."""
        if not self.enabled:
            return {}
        return {"scale": self.scale.clone(), "finite_steps": self._finite_steps.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict()`, as far as --amp is the same as in the run that saved it."""
        if self.enabled and state:
            self.scale.copy_(state["scale"])
            self._finite_steps.copy_(state["finite_steps"])
