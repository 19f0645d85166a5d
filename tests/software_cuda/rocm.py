"""Makes torch say what it says on a build for ROCm, for code that asks it in Python."""

from __future__ import annotations

from typing import Any

import torch

ARCHITECTURE = "gfx942"  # an MI300: torch gives its compute capability as 9.4
CAPABILITY = (9, 4)


class _Properties:
    """Those of the device, with the capability and the name of ROCm's."""

    major, minor = CAPABILITY
    gcnArchName = ARCHITECTURE
    warp_size = 64

    def __init__(self, found: Any):
        self._found = found

    def __getattr__(self, name: str) -> Any:
        return getattr(self._found, name)


def look_like_rocm() -> None:
    torch.version.hip, torch.version.cuda = "6.4.0", None
    find = torch.cuda.get_device_properties

    def get_device_properties(device: Any = None) -> _Properties:
        return _Properties(find(device))

    torch.cuda.get_device_properties = get_device_properties
    torch.cuda.get_device_capability = lambda device=None: CAPABILITY
