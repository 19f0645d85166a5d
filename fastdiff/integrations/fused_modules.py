"""What `patch` turns modules into: same object, attributes and state dict, another class.

A module gets a subclass of its own class with the same name, so `isinstance`, hooks, `deepcopy`,
`.to()`, wrappers and checkpoints go on as before, and giving the class back undoes it. Only the
owner of a normalization fuses it with what follows, inside its own methods: called by anybody else
it computes what it did before. While somebody watches a module that a fused op would skip (hooks,
a forward set on the instance), or another module took its place, the original code runs.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import FunctionType

import torch
from torch import Tensor, nn

from fastdiff.integrations import deferred
from fastdiff.integrations.deferred import Norm, is_image, normalized
from fastdiff.integrations.recognition import is_plain
from fastdiff.integrations.rewriting import rewritten
from fastdiff.integrations.sources import methods_of, names_in_code

_group_norm_forward = nn.GroupNorm.forward


class Fused:
    """Base of the mixins. Their methods return NotImplemented where the original has to run."""

    # Of a class that `fused_class` made: its arguments. Names that no network uses.
    _fastdiff_mixin = _fastdiff_original = _fastdiff_norms = None

    def __init_subclass__(cls, **kwargs: object) -> None:
        """Ends here: projects that register their subclasses by name shall not see ours."""

    def __reduce_ex__(self, protocol: int):
        original = self._fastdiff_original
        if original.__reduce_ex__ is not object.__reduce_ex__:
            return super().__reduce_ex__(protocol)
        if original.__reduce__ is not object.__reduce__:
            return super().__reduce_ex__(protocol)
        # The class is made at run time, so a pickle names what it is made of.
        _, _, *state = super().__reduce_ex__(protocol)
        return _new, (self._fastdiff_mixin, self._fastdiff_original, self._fastdiff_norms), *state

    @classmethod
    def _fastdiff_methods(cls, original: type, norms: frozenset[str]) -> dict[str, Callable]:
        """What runs in place of methods of `original`, by name."""
        return {"forward": cls.forward}


_classes: dict[tuple, type] = {}


def fused_class(mixin: type, original: type, norms: frozenset[str] = frozenset()) -> type:
    """The subclass of `original` whose methods are the mixin's where these apply.

    It is `original` by name: wrappers, device maps, configurations and tracers look for names.
    """
    key = mixin, original, norms
    if key not in _classes or not _is_current(_classes[key]):
        _classes[key] = _make_class(*key)
    return _classes[key]


def _is_current(cls: type) -> bool:
    """Whether the methods that it replaces are still those of the original."""
    return all(
        getattr(cls._fastdiff_original, name) is f for name, f in cls._fastdiff_replaced.items()
    )


def _make_class(mixin: type, original: type, norms: frozenset[str]) -> type:
    methods = {
        name: _guarded(original, name, function)
        for name, function in mixin._fastdiff_methods(original, norms).items()
    }
    attributes = {
        **{k: getattr(original, k) for k in ("__module__", "__qualname__", "__doc__")},
        "__annotations__": dict(getattr(original, "__annotations__", {})),  # TorchScript reads them
        "_fastdiff_mixin": mixin,
        "_fastdiff_original": original,
        "_fastdiff_norms": norms,
        "_fastdiff_replaced": {name: getattr(original, name) for name in methods},
    }
    return type(original.__name__, (mixin, original), attributes | methods)


def _guarded(original: type, name: str, fused: Callable) -> Callable:
    """The method of a fused class: `fused`, unless the original has to run.

    That is so if `original` got another method since (some projects replace a class's forward),
    in torch.jit.trace, on which ONNX export may stand, and for a bound method that was kept while
    its module was unpatched.
    """
    seen, is_tracing, base = getattr(original, name), torch.jit.is_tracing, Fused

    def method(self, *args, **kwargs):
        current = getattr(original, name)
        if current is seen and not is_tracing() and isinstance(self, base):
            result = fused(self, *args, **kwargs)
            if result is not NotImplemented:
                return result
        return current(self, *args, **kwargs)

    # With the original's globals, torch.jit.script, which reads the source behind __wrapped__,
    # compiles the original.
    innermost = inspect.unwrap(seen)
    method = FunctionType(method.__code__, innermost.__globals__, name, None, method.__closure__)
    return functools.update_wrapper(method, seen)


def _new(mixin: type, original: type, norms: frozenset[str] = frozenset()) -> nn.Module:
    cls = fused_class(mixin, original, norms)
    return cls.__new__(cls)


class FusedGroupNorm(Fused):
    """A group normalization: torch's, or a class of somebody's own that computes the same."""

    def forward(self, input: Tensor) -> Tensor:
        norm = self._fastdiff_parameters(input)
        return NotImplemented if norm is None else normalized(input, norm)

    def _fastdiff_parameters(self, x: object) -> Norm | None:
        """For a call with x; None where the op does not compute what the original does."""
        if not is_image(x) or not self._fastdiff_is_original():
            return None
        parameters = self._parameters
        if "weight" in parameters:  # past nn.Module.__getattr__, 0.4 us each
            weight, bias = parameters["weight"], parameters["bias"]
        else:  # parametrized, or a replica of DataParallel
            weight, bias = self.weight, self.bias
        if weight is not None and not is_plain(type(weight)):
            return None
        return Norm(self, self._fastdiff_groups(x), weight, bias, self.eps)

    def _fastdiff_groups(self, x: Tensor) -> int:
        return self.num_groups

    def _fastdiff_is_original(self) -> bool:
        """Whether nobody replaced a forward of the class, to count calls say."""
        return (
            self._fastdiff_replaced["forward"] is self._fastdiff_original.forward
            and nn.GroupNorm.forward is _group_norm_forward
        )


class FusedInstanceNorm(FusedGroupNorm):
    """An instance normalization without running statistics: each channel is a group."""

    def _fastdiff_parameters(self, x: object) -> Norm | None:
        dims = {"InstanceNorm1d": 3, "InstanceNorm2d": 4, "InstanceNorm3d": 5}
        expected = next(dims[c.__name__] for c in type(self).__mro__ if c.__name__ in dims)
        if not is_image(x) or x.dim() != expected or x.shape[1] != self.num_features:
            return None
        # Of one pixel torch says that there is nothing to normalize.
        if self.running_mean is not None or x.shape[2:].numel() == 1:
            return None
        return super()._fastdiff_parameters(x)

    def _fastdiff_groups(self, x: Tensor) -> int:
        return self.num_features


class FusedLayerNorm(FusedGroupNorm):
    """A layer normalization of whole images without parameters: one group."""

    def _fastdiff_parameters(self, x: object) -> Norm | None:
        if not is_image(x) or tuple(x.shape[1:]) != tuple(self.normalized_shape):
            return None
        return super()._fastdiff_parameters(x)

    def _fastdiff_groups(self, x: Tensor) -> int:
        return 1


class FusedSequential(Fused):
    """A Sequential in which a normalization and the SiLU behind it are one op."""

    def forward(self, input: Tensor) -> Tensor:
        return deferred.sequential(self, input)


@functools.cache
def has_functional_norms(cls: type) -> bool:
    """Whether a method calls F.group_norm."""
    return any("group_norm" in names_in_code(f) for f in methods_of(cls).values())


class FusedOwner(Fused):
    """A module whose methods call normalizations, rewritten where something fuses with them."""

    @classmethod
    def _fastdiff_methods(cls, original: type, norms: frozenset[str]) -> dict[str, Callable]:
        return {
            name: new
            for name, function in methods_of(original).items()
            if (new := rewritten(function, norms).function) is not None
        }
