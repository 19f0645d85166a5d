"""What computes SiLU or a group normalization, whatever it is called.

Functions and classes of other projects are judged by what they compute: a trial on random numbers
must agree, and their code must name nothing but arithmetic, so that there is no other effect.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from types import BuiltinFunctionType, FunctionType

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as _torch_module

from fastdiff._backends import use_backend

SILU_CLASSES: dict[type, Callable] = {nn.SiLU: nn.SiLU.forward}
"""Classes whose forward is x sigmoid(x), with it; `learn_activation` adds look-alikes."""

_silu_functions: dict[Callable, bool] = {F.silu: True}
_group_norms = {F.group_norm, torch.group_norm}
_sigmoids = {torch.sigmoid, F.sigmoid}
_SILU_NAMES_WORDS = "torch th nn functional F sigmoid silu swish inplace mul mul_"
_SILU_NAMES = {*_SILU_NAMES_WORDS.split()}
_NORM_NAMES_WORDS = (
    "super forward torch th nn functional F group_norm float to type type_as dtype num_groups "
    "num_channels weight bias eps shape size view reshape flatten mean var sqrt rsqrt pow "
    "square keepdim unbiased contiguous view_as reshape_as dim ndim len"
)
_NORM_NAMES = {*_NORM_NAMES_WORDS.split()}


def is_watched(*modules: nn.Module) -> bool:
    """Whether a call of one of the modules does more than run its class's forward."""
    if (
        _torch_module._global_forward_hooks
        or _torch_module._global_forward_pre_hooks
        or _torch_module._global_backward_hooks
        or _torch_module._global_backward_pre_hooks
    ):
        return True
    for m in modules:  # a loop: this runs in every call, and a generator costs as much again
        if (
            m._forward_hooks
            or m._forward_pre_hooks
            or m._backward_hooks
            or m._backward_pre_hooks
            or "forward" in m.__dict__
        ):
            return True
    return False


def is_plain(cls: type) -> bool:
    """Whether torch's operators on a tensor of this class do what they do on any."""
    if cls is Tensor or cls is nn.Parameter:
        return True
    # The tensors of tracers such as torch.export.
    return issubclass(cls, Tensor) and cls.__module__.startswith("torch._subclasses.")


def is_silu(f: object) -> bool:
    """Whether f(x) is x sigmoid(x) and nothing else happens."""
    if isinstance(f, nn.Module):
        known = SILU_CLASSES.get(type(f))
        return known is not None and known is type(f).forward and not is_watched(f)
    if not isinstance(f, FunctionType):
        return False
    if f not in _silu_functions and not torch.compiler.is_compiling():
        _silu_functions[f] = _names_only(f, _SILU_NAMES) and _is_silu_on_numbers(f)
    return _silu_functions.get(f, False)


def is_sigmoid(f: object) -> bool:
    if isinstance(f, nn.Sigmoid):
        return type(f) is nn.Sigmoid and not is_watched(f)
    return isinstance(f, (FunctionType, BuiltinFunctionType)) and f in _sigmoids


def is_group_norm(f: object) -> bool:
    return isinstance(f, (FunctionType, BuiltinFunctionType)) and f in _group_norms


def learn_activation(m: nn.Module) -> None:
    """Add m's class to those of SiLU's behaviour if it has it, as improved-diffusion's own has."""
    cls = type(m)
    if cls in SILU_CLASSES or m._modules or m._parameters or m._buffers:
        return
    if cls.__module__.startswith("torch.") or cls.__call__ is not nn.Module.__call__:
        return
    # It names no setting that another instance has otherwise: a factor beta.
    if _names_only(cls.forward, _SILU_NAMES) and _is_silu_on_numbers(lambda x: cls.forward(m, x)):
        SILU_CLASSES[cls] = cls.forward


def _names_only(function: object, names: set[str]) -> bool:
    """Whether a function names nothing else: then it has no effect but its result."""
    code = getattr(function, "__code__", None)
    if code is None or not names.issuperset(code.co_names):
        return False
    return set(code.co_freevars) <= {"__class__"}


def _is_silu_on_numbers(f: Callable) -> bool:
    x = torch.linspace(-20, 20, 101, device="cpu", dtype=torch.float32)
    try:
        with _quietly():
            y = f(x.clone())
            return isinstance(y, Tensor) and torch.allclose(y, F.silu(x), rtol=1e-6, atol=1e-6)
    except Exception:  # whatever it is, it is not SiLU of one argument
        return False


class _quietly:
    """No gradients, no autocast, the reference backend: wherever the caller stands."""

    def __enter__(self) -> None:
        self._contexts = (
            torch.no_grad(),
            torch.autocast("cpu", enabled=False),
            use_backend("reference"),
        )
        for context in self._contexts:
            context.__enter__()

    def __exit__(self, *error: object) -> None:
        for context in reversed(self._contexts):
            context.__exit__(*error)


def looks_like_group_norm(m: nn.Module) -> bool:
    """A class of somebody's own with the parts of a group normalization."""
    return (
        not m._modules
        and isinstance(getattr(m, "num_groups", None), int)
        and isinstance(getattr(m, "eps", None), float)
    )


_verdicts: dict[tuple, str | None] = {}


def why_not_group_norm(m: nn.Module) -> str | None:
    """None for a class whose forward computes torch's group_norm of its num_groups, weight, bias
    and eps; else a reason. One trial serves all instances with the same settings."""
    cls = type(m)
    if cls.forward is nn.GroupNorm.forward:
        return None
    if not _names_only(cls.forward, _NORM_NAMES):
        others = {*getattr(cls.forward, "__code__", cls.__init__.__code__).co_names} - _NORM_NAMES
        return f"{cls.__name__} has a forward of its own, which names {', '.join(sorted(others))}"
    settings = {k: v for k, v in vars(m).items() if isinstance(v, (bool, int, float, str))}
    settings.pop("training", None)
    absent = tuple(getattr(m, name, None) is None for name in ("weight", "bias"))
    key = cls, cls.forward, tuple(sorted(settings.items())), absent
    if key not in _verdicts:
        same = all(_trials(m))
        _verdicts[key] = (
            None
            if same
            else (
                f"{cls.__name__} has a forward of its own, which computes something else than "
                "torch.nn.functional.group_norm"
            )
        )
    return _verdicts[key]


def _trials(m: nn.Module) -> Iterator[bool]:
    """Whether m and torch agree, in training and not, on two shapes, in float32 and bfloat16."""
    try:
        twin = copy.deepcopy(m).to_empty(device="cpu").float()
        sizes = [p.numel() for p in (twin.weight, twin.bias) if p is not None]
        channels = sizes[0] if sizes else 2 * twin.num_groups
        generator = torch.Generator().manual_seed(0)
        with _quietly():
            for p in twin.parameters():
                p.copy_(torch.randn(p.shape, generator=generator))
            for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.02)):
                for training in (False, True):
                    for shape in ((2, channels, 6), (3, channels, 2, 3)):
                        # Deviations near sqrt(eps): where eps is added shows.
                        x = torch.randn(shape, generator=generator) * (3 * twin.eps**0.5) + 0.01
                        yield _agree(twin.train(training), x.to(dtype), tolerance)
    except Exception:  # it does not take such an image: no group normalization
        yield False


def _agree(twin: nn.Module, x: Tensor, tolerance: float) -> bool:
    try:
        y = twin(x)
    except RuntimeError:  # parameters must have the dtype of x
        twin = copy.deepcopy(twin).to(x.dtype)
        y = twin(x)
    weight, bias = (None if p is None else p.float() for p in (twin.weight, twin.bias))
    expected = F.group_norm(x.float(), twin.num_groups, weight, bias, twin.eps)
    error = (y.float() - expected).abs().max()
    return y.dtype == x.dtype and bool(error <= tolerance * expected.abs().max())
