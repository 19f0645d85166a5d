"""`PatchReport`: what `patch` did, and what a forward pass made of it."""

from __future__ import annotations

import collections
import math
import weakref
from dataclasses import dataclass

import torch
from torch import nn

_ORDER = "channel_bias", "group_norm", "scale_shift", "silu"


class Place:
    """A fused normalization in the network."""

    def __init__(self, module: nn.Module, owner: str, steps: frozenset[str]) -> None:
        self._module, self.owner, self._steps = weakref.ref(module), owner, steps

    @property
    def ran(self) -> tuple[frozenset[str], tuple[int, ...], torch.dtype] | None:
        """What the op did, and to what shape and dtype, when it first ran in eager mode."""
        module = self._module()
        return None if module is None else module.__dict__.get("_fastdiff_ran")

    @property
    def steps(self) -> frozenset[str]:
        """What is fused into the normalization: as it ran, or as the source shows."""
        return self._steps if self.ran is None else self.ran[0]

    def __str__(self) -> str:
        return " + ".join(s for s in _ORDER if s == "group_norm" or s in self.steps)

    def bytes_saved(self) -> int:
        """Each step that is fused spares one read and one write of the image at least."""
        if self.ran is None:
            return 0
        steps, shape, dtype = self.ran
        return 2 * len(steps) * math.prod(shape) * dtype.itemsize


@dataclass(frozen=True)
class PatchReport:
    """What `patch` did: the state of every normalization after the call, by qualified name.

    Before the network has run, `replaced` is what its source shows: a sum may be a residual, a
    branch may never be taken. Afterwards it is what ran.
    """

    places: dict[str, Place]
    left: dict[str, str]
    """Why each other normalization was left alone."""
    reasons: dict[str, str]
    """Why a method could not be rewritten: its normalizations run as ops by themselves."""

    @property
    def replaced(self) -> dict[str, str]:
        """What each fused normalization computes, e.g. "channel_bias + group_norm + silu"."""
        return {name: str(place) for name, place in self.places.items()}

    @property
    def bytes_saved(self) -> int:
        """Reads and writes of images that a forward pass spares at least; 0 before one ran."""
        return sum(place.bytes_saved() for place in self.places.values())

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, PatchReport):
            return NotImplemented
        return (self.replaced, self.left, self.reasons) == (
            other.replaced,
            other.left,
            other.reasons,
        )

    __hash__ = None

    def __str__(self) -> str:
        """By class of block; `replaced` and `left` have the names."""
        lines = [f"{len(self.places)} replaced, {len(self.left)} left"]
        classes = collections.defaultdict(collections.Counter)
        for place in self.places.values():
            classes[place.owner][str(place)] += 1
        for owner, counts in classes.items():
            lines += [f"  {owner}: {n} x {what}" for what, n in counts.most_common()]
        if self.bytes_saved:
            lines.append(f"  a forward pass spares {self.bytes_saved / 2**20:.1f} MiB of accesses")
        elif self.places:
            lines.append("  call the network once and print this again: memory accesses spared")
        for method, reason in self.reasons.items():
            lines.append(
                f"  {method} is as it was, as {reason}: "
                'torch.compile(..., backend="fastdiff") sees what it does'
            )
        reasons = collections.Counter(self.left.values())
        lines += [f"  left, {n} x: {reason}" for reason, n in reasons.most_common()]
        return "\n".join(lines)
