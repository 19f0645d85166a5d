"""How a new run computes on a GPU if nobody says how."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import shutil
from collections.abc import Callable, Iterator

import torch

from fastdiff.training.config import TrainConfig

# Compiling takes a minute or two, in which a GPU does some thousand steps of a small network.
_STEPS_WORTH_COMPILING = 5000


def fast(config: TrainConfig, device: str, steps: int, sharded: bool) -> TrainConfig:
    """The defaults ``config`` as they become on ``device``, the value of --device.

    On a GPU bfloat16, where it has it (compute capability 8.0), channels_last, and torch.compile
    for a run of enough steps and where it can work: it needs Triton and a C compiler, and does not
    go with --fsdp.
    """
    if not _is_cuda(device) or not _has_bfloat16(device):
        return config
    compiles = (
        not sharded
        and steps >= _STEPS_WORTH_COMPILING
        and importlib.util.find_spec("triton") is not None
        and any(map(shutil.which, ("cc", "gcc", "clang")))
    )
    return dataclasses.replace(config, amp="bf16", channels_last=True, compile=compiles)


def exact(config: TrainConfig) -> TrainConfig:
    """The same run in float32, contiguous and not compiled."""
    return dataclasses.replace(config, amp="off", channels_last=False, compile=False)


def say_what_was_chosen(
    config: TrainConfig, device: torch.device, say: Callable[[str], None]
) -> None:
    """One line about how a run on a GPU computes."""
    if device.type != "cuda":
        return
    computes = {"off": "float32", "bf16": "bfloat16 (autocast)", "fp16": "float16 (autocast)"}
    parts = [
        computes[config.amp],
        "channels_last" if config.channels_last else "contiguous",
        "compiled (which the first step waits for)" if config.compile else "not compiled",
    ]
    way_out = "" if config.exact else "; --exact: float32, contiguous, not compiled"
    say(f"computing in {', '.join(parts)}{way_out}")


@contextlib.contextmanager
def fastest_convolutions(config: TrainConfig, device: torch.device) -> Iterator[None]:
    """Inside, cuDNN tries its algorithms on every new shape and keeps the fastest.

    Shapes of a run do not change. Not with --exact: which one is the fastest can change from run to
    run, and with it the rounding.
    """
    flags = torch.backends.cudnn
    before = flags.benchmark
    if device.type == "cuda" and not config.exact:
        flags.benchmark = True
    try:
        yield
    finally:
        flags.benchmark = before


def _is_cuda(device: str) -> bool:
    if device == "auto":
        return torch.cuda.is_available()
    return device.partition(":")[0] == "cuda" and torch.cuda.is_available()


def _has_bfloat16(device: str) -> bool:
    _, _, index = device.partition(":")
    known = index.isdecimal() and int(index) < torch.cuda.device_count()
    return torch.cuda.get_device_capability(int(index) if known else 0) >= (8, 0)
