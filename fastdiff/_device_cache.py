"""Constants of a diffusion process on the devices that use them."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TypeVar

import torch

Value = TypeVar("Value")


class DeviceCache:
    """Remembers what was built for a device: one upload per process, no host sync per call."""

    def __init__(self) -> None:
        self._values: dict[tuple[Hashable, torch.device], object] = {}

    def get(
        self,
        key: Hashable,
        device: torch.device | str,
        build: Callable[[torch.device], Value],
    ) -> Value:
        """`build(device)`, called at most once per (key, device)."""
        device = torch.device(device)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        if (key, device) not in self._values:
            # A table first needed inside inference mode must still serve training later.
            with torch.inference_mode(False):
                self._values[key, device] = build(device)
        return self._values[key, device]
