"""Defines ops in the `fastdiff` namespace and registers what the C++ libraries do not.

Every op has one schema and two overloads. The default one runs the compiled kernels of the tensors'
device or, where that library is not built, what `default_without_kernels` names. `.triton` always
runs the Triton kernel. Ops are defined with `torch.library.Library` because a call costs half of
what it costs with `custom_op`.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch.autograd import forward_ad
from torch.overrides import has_torch_function_variadic

from fastdiff import _native
from fastdiff._backends import default_without_kernels
from fastdiff.reference import checks

# flexible_layout: kernels take any strides, and fake kernels give the strides of the results. So
# Inductor does not convert between its own layouts and those of eager mode around an op.
TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout)
# Kept alive for the process: dropping a Library undoes its registrations.
_library = torch.library.Library("fastdiff", "FRAGMENT")


def in_functorch_transform() -> bool:
    """Inside torch.func.grad, vmap and the like, which do not run kernels at the Autograd key."""
    return (
        not torch.compiler.is_compiling()
        and torch._C._functorch.peek_interpreter_stack() is not None
    )


def is_dtensor(x: torch.Tensor) -> bool:
    """Whether it is a torch.distributed.tensor.DTensor."""
    return type(x) is not torch.Tensor and type(x).__module__.startswith("torch.distributed.tensor")


def why_reference(x: torch.Tensor, *, has_jvp: bool = False) -> str | None:
    """Why calls with x run in plain PyTorch here, whatever their dtypes and shapes; or None.

    `has_jvp`: the op's node differentiates in forward mode too.
    """
    if is_dtensor(x):
        return "only the reference takes DTensors"
    if torch.compiler.is_compiling():
        return None
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "only the reference runs under torch.func's transforms"
    if forward_ad._current_level >= 0 and not has_jvp:
        return "only the reference differentiates in forward mode"
    # Of what torch.jit.trace records ONNX export and processes without fastdiff know only torch's.
    return "torch.jit.trace records the reference" if torch._C._is_tracing() else None


def _needs_grad(inputs: tuple[torch.Tensor | None, ...]) -> bool:
    for x in inputs:
        if x is not None and x.requires_grad:
            return True
    # Tangents of forward-mode differentiation, and functorch's wrapped tensors.
    return (
        forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None
    )


@contextlib.contextmanager
def recording() -> Iterator[None]:
    """Switch autograd on inside a kernel; the dispatcher calls kernels with its keys switched off.

    For backward ops whose reference kernel differentiates the reference of the forward op.
    """
    keys = torch._C.DispatchKey
    with torch._C._PreserveDispatchKeyGuard(), torch.enable_grad():
        for key in (keys.AutogradFunctionality, keys.ADInplaceOrView):
            torch._C._dispatch_tls_set_dispatch_key_excluded(key, False)
        yield


class Op(NamedTuple):
    """One op: its overloads, and what its public function needs to call them."""

    default: Callable
    triton: Callable
    arguments: Callable[..., Any]
    """Makes the op's `Arguments` from the arguments of its schema."""
    check: Callable | None
    """`check(arguments, check_range=...)` raises the clear error."""
    reference: Callable
    """`reference(arguments)`, in plain PyTorch; assumes arguments that passed the check."""
    autograd: Callable | None
    """`autograd(overload, *args)`: an overload's call with its autograd node."""
    cpp: Callable | None
    """Calls the default overload in C++; returns None where the node in Python has to record."""

    def call(
        self, backend: str, arguments: tuple, differentiable: tuple[torch.Tensor | None, ...]
    ) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """Run a public function's call on the selected backend.

        Parameters
        ----------
        arguments
            Those of the schema, in a plain tuple: a good call of a kernel needs no `Arguments`,
            which take 0.3 us to make.
        differentiable
            The tensor arguments that may need a gradient. If none does, the call skips the kernel
            at the Autograd key, which takes microseconds even when it has nothing to do. If one
            does, the call runs that kernel itself, without the dispatcher.
        """
        if backend == "reference":
            bundle = self.arguments(*arguments)
            self.check(bundle, check_range=True)
            return self.reference(bundle)
        overload = self.triton if backend == "triton" else self.default
        if torch.compiler.is_compiling():
            self.check(self.arguments(*arguments), check_range=False)
            return overload(*arguments)
        # The bindings of compiled kernels refuse what the check refuses. So the check runs only
        # after they did, for its message. Kernels in Python run the check themselves.
        if checks.DEBUG:
            self.check(self.arguments(*arguments), check_range=True)
        guard = None
        try:
            if (
                self.cpp is not None
                and overload is self.default
                and not has_torch_function_variadic(*differentiable)
                and (found := self.cpp(*arguments)) is not None
            ):
                return found
            if torch.is_grad_enabled() and _needs_grad(differentiable):
                return self.autograd(overload, *arguments)
            guard = torch._C._AutoDispatchBelowAutograd()
            return overload(*arguments)
        except (RuntimeError, TypeError, AttributeError, ValueError, IndexError):
            self.check(self.arguments(*arguments), check_range=True)
            raise
        finally:
            del guard


def define(
    name: str,
    signature: str,
    arguments: Callable[..., Any],
    *,
    fake: Callable,
    autograd: Callable | None,
    reference: Callable,
    triton: Callable,
    check: Callable | None = None,
) -> Op:
    """Define `fastdiff::name` and `fastdiff::name.triton`.

    Parameters
    ----------
    signature
        The schema from its opening parenthesis on.
    arguments
        Makes one object of the schema's arguments: a NamedTuple, usually. `fake`, `reference`,
        `triton` and `check` take it.
    fake
        Shape, dtype and stride propagation.
    autograd
        `autograd(overload, *args)`, the kernel at the Autograd key, with the schema's arguments.
        None for an op whose output never needs a gradient.
    reference, triton
        Implementations, used where there is no compiled kernel.
    check
        `check(arguments, check_range=...)` raises the clear error; `Op.call` needs it.
    """
    fake_kernel = _kept_whole_by_inductor(f"fastdiff::{name}", fake, arguments)
    kernels = {
        "reference": _kernel(reference, arguments, check, check_range=True),
        # The range is not checked, as on a device: samples of timesteps out of range are NaN.
        "triton": _kernel(triton, arguments, check, check_range=False),
    }
    for overload in ("", ".triton"):
        qualified = f"{name}{overload}"
        _library.define(f"{qualified}{signature}", tags=TAGS)
        for key in ("CPU", "CUDA"):
            # Loading the compiled library, as fastdiff._backends does, registers its kernels.
            if overload or not _has_kernel(qualified, key):
                backend = "triton" if overload else default_without_kernels(key.lower())
                _library.impl(qualified, kernels[backend], key)
        torch.library.register_fake(f"fastdiff::{qualified}", fake_kernel, lib=_library)
    packet = getattr(torch.ops.fastdiff, name)
    overloads = [packet.default, packet.triton]
    # For torch.onnx.export; torch.compile and torch.export have tables of their own, and keep the
    # op. FakeTensor would use this instead of our fake kernel if there were none for meta tensors.
    torch._decomp.register_decomposition(overloads)(kernels["reference"])
    torch._decomp.register_decomposition(overloads, type="meta")(fake_kernel)
    cpp, _ = _native.dispatch()
    if autograd is not None:
        for qualified, overload in ((name, packet.default), (f"{name}.triton", packet.triton)):
            kernel = _autograd_kernel(name, autograd, overload)
            if cpp is None:
                _library.impl(qualified, kernel, "Autograd")
            else:
                cpp.register_autograd(qualified, kernel)
    return Op(*overloads, arguments, check, reference, autograd, getattr(cpp, name, None))


def _has_kernel(qualified: str, key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"fastdiff::{qualified}", key)


def _kernel(
    implementation: Callable, arguments: Callable, check: Callable | None, *, check_range: bool
) -> Callable:
    """An implementation in Python as a kernel; like a compiled one's binding it checks first."""

    def kernel(*args: object) -> object:
        bundle = arguments(*args)
        if check is not None:
            check(bundle, check_range=check_range)
        return implementation(bundle)

    return kernel


def _kept_whole_by_inductor(name: str, fake: Callable, arguments: Callable) -> Callable:
    """A fake kernel that tells Inductor, which always calls it first, not to decompose the op.

    With CI set in the environment Inductor fails for an op that has a decomposition, such as ours
    for ONNX, unless the op is in this list of Inductor's.
    """

    def kernel(*args: object, **kwargs: object) -> object:
        if inductor := sys.modules.get("torch._inductor.lowering"):
            inductor.FALLBACK_ALLOW_LIST.add(name)
        return fake(arguments(*args, **kwargs))

    return kernel


def joined_seed(arguments: Any) -> int | torch.Tensor | None:
    """An op's `keys` and `seed`, of which at most one is given, as a reference takes them."""
    return arguments.seed if arguments.keys is None else arguments.keys


def contiguous(x: torch.Tensor | None) -> torch.Tensor | None:
    """An optional argument as a Triton kernel reads it."""
    return None if x is None else x.contiguous()


def refuse_float64(op: str, *inputs: torch.Tensor | torch.dtype | None) -> None:
    """Raise on float64, which the Triton kernels do not compute in."""
    for x in inputs:
        if getattr(x, "dtype", x) is torch.float64:
            raise RuntimeError(f"{op}: there are no float64 Triton kernels")


def _autograd_kernel(name: str, autograd: Callable, overload: Callable) -> Callable:
    def kernel(*args: object, **kwargs: object) -> object:
        if in_functorch_transform():
            raise RuntimeError(
                f"torch.ops.fastdiff.{name} does not run under torch.func's transforms; use "
                f"fastdiff.ops.{name}, which does"
            )
        if not torch.is_grad_enabled() and forward_ad._current_level < 0:
            # No autograd, as in a compiled training step, whose own node calls the operators.
            with torch._C._AutoDispatchBelowAutograd():
                return overload(*args, **kwargs)
        return autograd(overload, *args, **kwargs)

    return kernel
