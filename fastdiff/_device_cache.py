"""Constants of a diffusion process on the devices that use them."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch

Value = TypeVar("Value")


class DeviceCache:
    """Remembers what was built for a device: one upload per process, no host sync per call.

    Every value is an attribute, because torch.compile reads (and guards) attributes one by one as
    they are used; of a dictionary it would keep the state before a value was built.
    """

    def __init__(self, owner: object) -> None:
        self._owner = owner

    def get(self, build: Callable[..., Value], device: torch.device | str, *key: Any) -> Value:
        """`build(owner, device, *key)`, called at most once per build, device and key.

        `build` is a function of a module. torch.compile traces the reading, not the building.
        """
        return getattr(self, self._fill(build, device, *key))

    def _fill(self, build: Callable[..., Any], device: torch.device | str, *key: Any) -> str:
        """The attribute that holds the value, built if need be."""
        device = torch.device(device)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        name = "/".join((build.__name__, str(device), *map(str, key)))
        if not hasattr(self, name):
            # What is first needed inside inference mode, FakeTensorMode or a torch.func transform
            # must serve plain eager calls later. They all belong to a thread; another has none.
            with ThreadPoolExecutor(max_workers=1) as thread:
                setattr(self, name, thread.submit(build, self._owner, device, *key).result())
        return name


def is_plain_eager() -> bool:
    """Whether what runs on a GPU now is run once, for real: not traced, transformed or captured."""
    return (
        not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and not torch.jit.is_tracing()
        and not torch.cuda.is_current_stream_capturing()
    )


# torch.compile then calls it while tracing instead of tracing into it, so that compiling works
# before any eager call. torch.compiler.assume_constant_result does just this, but imports
# torch._dynamo, and with it triton, whenever fastdiff is imported.
DeviceCache._fill._dynamo_marked_constant = True
