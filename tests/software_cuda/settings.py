"""The device to be: chosen once, kept in environment variables, so that child processes have it."""

from __future__ import annotations

import os
from dataclasses import dataclass

GIB = 1 << 30
SWITCH = "SOFTWARE_CUDA"
_CAPABILITIES = {"75": (7, 5), "80": (8, 0), "86": (8, 6), "89": (8, 9), "90": (9, 0)}
_CAPABILITIES |= {"100": (10, 0), "120": (12, 0)}


@dataclass(frozen=True)
class Settings:
    """What `SOFTWARE_CUDA` says, such as "sm_80,devices=2,memory=4,lazy".

    capability: the devices' compute capability.
    devices: how many there are. A kernel may touch memory of its own device only.
    memory: bytes of each, at most.
    lazy: work runs only when something waits for it, instead of when it is enqueued.
    rocm: torch looks like a build for ROCm on a gfx942. Kernels cannot run then.
    """

    capability: tuple[int, int] = (9, 0)
    devices: int = 1
    memory: int = 80 * GIB
    lazy: bool = False
    rocm: bool = False

    @staticmethod
    def parse(text: str) -> Settings:
        """Raises ValueError that names the word that is wrong."""
        chosen: dict = {}
        for word in filter(None, map(str.strip, text.split(","))):
            name, _, value = word.partition("=")
            if name.startswith("sm_") and name[3:] in _CAPABILITIES and not value:
                setting = "capability", _CAPABILITIES[name[3:]]
            elif name == "devices" and value.isascii() and value.isdigit() and 1 <= int(value) <= 8:
                setting = "devices", int(value)
            elif name == "memory" and (size := _bytes_of(value)):
                setting = "memory", size
            elif word in ("lazy", "eager"):
                setting = "lazy", word == "lazy"
            elif word == "rocm":
                setting = "rocm", True
            elif word == "1":
                continue
            else:
                known = ", ".join(f"sm_{number}" for number in _CAPABILITIES)
                raise ValueError(
                    f"software CUDA device: {word!r} is none of {known}, devices=N, memory=GIB, "
                    "lazy, eager, rocm"
                )
            if setting[0] in chosen:
                raise ValueError(f"software CUDA device: {word!r} comes after another {setting[0]}")
            chosen[setting[0]] = setting[1]
        return Settings(**chosen)

    @property
    def arch(self) -> str:
        major, minor = self.capability
        return f"sm_{major}{minor}"

    def write(self, environment: dict[str, str]) -> None:
        """The variables that the C++ libraries and child processes read."""
        words = [self.arch, f"devices={self.devices}", f"memory={self.memory / GIB}"]
        words += [name for name in ("lazy", "rocm") if getattr(self, name)]
        environment[SWITCH] = ",".join(words)
        environment["SOFTWARE_CUDA_DEVICES"] = str(self.devices)
        environment["SOFTWARE_CUDA_MEMORY"] = str(self.memory)
        environment["SOFTWARE_CUDA_MODE"] = "lazy" if self.lazy else "eager"


def _bytes_of(gib: str) -> int:
    """0 for what is no size."""
    try:
        size = float(gib) * GIB
    except ValueError:
        return 0
    return int(size) if 1 <= size < 1 << 50 else 0


def chosen() -> Settings | None:
    """What the environment asks for, if it asks for the device at all."""
    text = os.environ.get(SWITCH)
    return None if text in (None, "", "0") else Settings.parse(text)
