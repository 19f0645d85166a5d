"""What samplers and bounds need to know about a model, which may be any callable."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.reference import checks
from fastdiff.reference.philox import sample_keys

Model = Callable[..., Tensor]
"""Any callable `model(x_t, t, **model_kwargs)` with t the 0-based int64 index (B,)."""


def device_of(model: Model) -> torch.device:
    """Where a module's first parameter or buffer lives; the CPU for any other callable."""
    if isinstance(model, nn.Module):
        for tensor in (*model.parameters(), *model.buffers()):
            return tensor.device
    return torch.device("cpu")


def dtype_of(model: Model) -> torch.dtype | None:
    """What a module computes in: its first floating-point parameter's dtype. None: anything."""
    if isinstance(model, nn.Module):
        for parameter in model.parameters():
            if parameter.is_floating_point():
                return parameter.dtype
    return None


def sampling_form(model: Model) -> Model:
    """What to call in the model's place without gradients: what its `sampling_form()` gives.

    Asked of the class, as wrappers of modules pass on attributes of what they wrap.
    """
    form = getattr(type(model), "sampling_form", None)
    return model if form is None else form(model)


def memory_format_of_weights(model: Model) -> torch.memory_format:
    """channels_last if a module's convolutions are, else contiguous."""
    if isinstance(model, nn.Module):
        for weight in model.parameters():
            if weight.dim() == 4 and not weight.is_contiguous():
                dense = weight.is_contiguous(memory_format=torch.channels_last)
                return torch.channels_last if dense else torch.contiguous_format
    return torch.contiguous_format


@contextlib.contextmanager
def evaluating(model: Model) -> Iterator[None]:
    """Eval mode inside; every submodule's own training flag is restored after."""
    if not isinstance(model, nn.Module):
        yield
        return
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def keys_of(seed: int | Tensor | None, num: int, device: torch.device) -> Tensor:
    """int64 keys (num,) of an int or of given keys; None draws an int from torch's generator."""
    if seed is None:
        seed = int(torch.randint(2**63 - 1, ()))
    if not isinstance(seed, Tensor):
        return sample_keys(checks.as_int64("sampling", "seed", seed), num, device=device)
    if seed.dtype != torch.int64 or tuple(seed.shape) != (num,):
        raise ValueError(
            f"seed has shape {tuple(seed.shape)} and dtype {seed.dtype}, expected an int or int64 "
            f"keys ({num},)"
        )
    return seed.to(device)


def select(kwargs: Mapping[str, Any] | None, rows: Tensor, num: int) -> dict[str, Any]:
    """`kwargs` for the samples `rows`: their entries of every tensor with `num` of them."""
    return {
        name: value[rows] if isinstance(value, Tensor) and value.shape[:1] == (num,) else value
        for name, value in (kwargs or {}).items()
    }


def progress_bar(total: int, what: str, show: bool) -> Any:
    """A tqdm bar on a terminal; elsewhere, without tqdm or not to `show`, one that is mute."""
    if show and sys.stderr.isatty() and importlib.util.find_spec("tqdm") is not None:
        from tqdm import tqdm

        return tqdm(total=total, desc=what, leave=False, unit_scale=True)
    return _Mute()


class _Mute(contextlib.nullcontext):
    def __enter__(self) -> _Mute:
        return self

    def update(self, num: int) -> None:
        """Nothing is shown."""
