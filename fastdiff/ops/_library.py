"""Defines ops in the `fastdiff` namespace and registers what the C++ libraries do not.

Every op has one schema and up to two overloads: the default one, whose CPU and CUDA kernels are
the compiled ones where the libraries are built (else Triton's, else the reference), and `.triton`,
which always runs the Triton kernel. They are defined with `torch.library.Library` rather than
`custom_op` because a call costs half as much.
"""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch.autograd import forward_ad
from torch.overrides import has_torch_function_variadic

from fastdiff import _native
from fastdiff.ops import _checks

# flexible_layout: kernels take any strides and fakes tell those of the results, so Inductor need
# not convert between its own layouts and eager's around an op.
TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout)
# Kept alive for the process: dropping a Library undoes its registrations.
_library = torch.library.Library("fastdiff", "FRAGMENT")


def in_functorch_transform() -> bool:
    """Inside torch.func.grad, vmap and the like, which do not know kernels at the Autograd key."""
    return (
        not torch.compiler.is_compiling()
        and torch._C._functorch.peek_interpreter_stack() is not None
    )


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
    """Let autograd record inside a kernel, which the dispatcher calls with its keys switched off.

    For reference kernels of backward ops that differentiate the reference of the forward op.
    """
    keys = torch._C.DispatchKey
    with torch._C._PreserveDispatchKeyGuard(), torch.enable_grad():
        for key in (keys.AutogradFunctionality, keys.ADInplaceOrView):
            torch._C._dispatch_tls_set_dispatch_key_excluded(key, False)
        yield


class Op(NamedTuple):
    """The overloads of one op, its autograd kernel, and its public function's argument check.

    `cpp` calls the default overload in C++; it returns None if autograd has to record what only the
    Python kernel records.
    """

    default: Callable
    triton: Callable
    check: Callable | None
    autograd: Callable | None
    cpp: Callable | None

    def call(
        self, backend: str, arguments: tuple, differentiable: tuple[torch.Tensor | None, ...]
    ) -> torch.Tensor:
        """Run a public function's call on a backend with kernels, at the least cost.

        Parameters
        ----------
        differentiable
            The tensor arguments that may need a gradient. If none does, the call skips the Python
            kernel at the Autograd key, which costs microseconds even when it has nothing to do; if
            one does, it calls that kernel itself, which saves the way there through the dispatcher.
        """
        overload = self.triton if backend == "triton" else self.default
        if torch.compiler.is_compiling():
            self.check(*arguments, check_range=False)
            return overload(*arguments)
        # The bindings of compiled kernels refuse what the check refuses, so for them it runs only
        # after a refusal, for its message. Kernels in Python run it themselves.
        if _checks.DEBUG:
            self.check(*arguments, check_range=True)
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
        except (RuntimeError, TypeError, AttributeError):
            self.check(*arguments, check_range=True)
            raise
        finally:
            del guard


def define(
    name: str,
    signature: str,
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
    fake
        Shape, dtype and stride propagation.
    autograd
        `autograd(overload, *args)`, the kernel at the Autograd key; None for an op whose output
        never needs a gradient.
    reference, triton
        Implementations with the schema's arguments, used where no compiled kernel is.
    check
        `check(*arguments, check_range=...)` raises the clear error; needed for `Op.call`.
    """
    fake = _kept_whole_by_inductor(f"fastdiff::{name}", fake)
    reference = _checked(reference, check, check_range=True)
    # As on a device, where it would wait: samples of timesteps out of range are NaN.
    triton = _checked(triton, check, check_range=False)
    for overload in ("", ".triton"):
        _library.define(f"{name}{overload}{signature}", tags=TAGS)
        qualified = f"{name}{overload}"
        kernels = {"CPU": triton, "CUDA": triton}
        if not overload:
            kernels = _default_kernels(qualified, reference, triton)
        for key, kernel in kernels.items():
            _library.impl(qualified, kernel, key)
        torch.library.register_fake(f"fastdiff::{qualified}", fake, lib=_library)
    packet = getattr(torch.ops.fastdiff, name)
    # What torch.onnx.export makes of the op; torch.compile and torch.export have tables of their
    # own and leave it whole. FakeTensor looks for a decomposition before it looks for our fake,
    # unless there is one for meta tensors.
    torch._decomp.register_decomposition([packet.default, packet.triton])(reference)
    torch._decomp.register_decomposition([packet.default, packet.triton], type="meta")(fake)
    cpp, _ = _native.dispatch()
    op = Op(packet.default, packet.triton, check, autograd, getattr(cpp, name, None))
    if autograd is not None:
        for qualified, overload in ((name, op.default), (f"{name}.triton", op.triton)):
            kernel = _bind(name, autograd, overload)
            if cpp is None:
                _library.impl(qualified, kernel, "Autograd")
            else:
                cpp.register_autograd(qualified, kernel)
    return op


def _kept_whole_by_inductor(name: str, fake: Callable) -> Callable:
    """A fake that tells Inductor, which always calls it first, to call the op as it is.

    With CI set in the environment Inductor fails for an op that has a decomposition, such as ours
    for ONNX, but for those it lists here.
    """

    def kernel(*args: object, **kwargs: object) -> object:
        if inductor := sys.modules.get("torch._inductor.lowering"):
            inductor.FALLBACK_ALLOW_LIST.add(name)
        return fake(*args, **kwargs)

    return kernel


def refuse_float64(op: str, *inputs: torch.Tensor | torch.dtype | None) -> None:
    """For Triton kernels, which compute in float32."""
    for x in inputs:
        if torch.float64 in (x, getattr(x, "dtype", None)):
            raise RuntimeError(f"{op}: there are no float64 Triton kernels")


def _checked(implementation: Callable, check: Callable | None, *, check_range: bool) -> Callable:
    """An implementation in Python as a kernel, which refuses what a compiled one's binding does."""
    if check is None:
        return implementation

    def kernel(*arguments: object) -> object:
        check(*arguments, check_range=check_range)
        return implementation(*arguments)

    return kernel


def _bind(name: str, autograd: Callable, op: Callable) -> Callable:
    def autograd_kernel(*args: object, **kwargs: object) -> object:
        if in_functorch_transform():
            raise RuntimeError(
                f"torch.ops.fastdiff.{name} does not run under torch.func's transforms; use "
                f"fastdiff.ops.{name}, which does"
            )
        if not torch.is_grad_enabled() and forward_ad._current_level < 0:
            # Nobody records: as in a compiled training step, which calls the operators from a
            # Function of its own.
            with torch._C._AutoDispatchBelowAutograd():
                return op(*args, **kwargs)
        return autograd(op, *args, **kwargs)

    return autograd_kernel


def _default_kernels(name: str, reference: Callable, triton: Callable) -> dict[str, Callable]:
    """Python kernels of the defined op for the device keys that no compiled library serves."""

    def is_compiled(key: str) -> bool:
        _native.load(key.lower())
        return torch._C._dispatch_has_kernel_for_dispatch_key(f"fastdiff::{name}", key)

    kernels = {}
    if not is_compiled("CPU"):
        kernels["CPU"] = reference
    if not is_compiled("CUDA"):
        has_triton = importlib.util.find_spec("triton") is not None
        kernels["CUDA"] = triton if has_triton else reference
    return kernels
