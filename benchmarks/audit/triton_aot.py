"""Triton kernels compiled ahead of time, for GPUs that need not be present.

The project's own launchers run on tensors without data (the meta device) up to the launch; what
they would launch is compiled with the specialization that Triton's own binder chooses. So the
kernels inspected are those that users get.
"""

from __future__ import annotations

import contextlib
import functools
import unittest.mock
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

SHAPE = (16, 4, 64, 64)  # numel per sample divides by 16, as in every published U-Net


@dataclass(frozen=True)
class Launch:
    """One launch that a launcher asked for."""

    kernel: Any
    arguments: tuple[Any, ...]
    options: dict[str, Any]


@contextlib.contextmanager
def recorded_launches() -> Iterator[list[Launch]]:
    """Inside, Triton launches are noted instead of run."""
    from fastdiff.triton_kernels import _launch

    launches: list[Launch] = []

    def record(
        kernel: Any,
        programs: int,
        device: torch.device,
        *arguments: Any,
        num_warps: int = 4,
        num_ctas: int = 1,
        **meta: Any,
    ) -> None:
        options = {"num_warps": num_warps, "num_ctas": num_ctas}
        launches.append(Launch(kernel, arguments, meta | options))

    original, _launch.launch = _launch.launch, record
    try:
        yield launches
    finally:
        _launch.launch = original


def compile_launch(launch: Launch, arch: str) -> Any:
    """The compiled kernel (`.asm["cubin"]`, `.metadata`) of a launch, for an `arch` like sm_90.

    Or like gfx942, for AMD's GPUs (`.asm["hsaco"]`).
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend
    from triton.runtime.jit import create_function_from_signature

    kernel = launch.kernel
    if arch.startswith("gfx"):
        target = GPUTarget("hip", arch, 64 if arch.startswith("gfx9") else 32)
    else:
        target = GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    backend = make_backend(target)
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = bind(*launch.arguments, **launch.options)
    options, signature, constants, attributes = kernel._pack_args(
        backend, launch.options, bound, specialization, options
    )
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=target, options=options.__dict__)


def _empty(dtype: torch.dtype, channels_last: bool = False, shape: tuple = SHAPE) -> Tensor:
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=dtype, device="meta").to(memory_format=memory_format)


def _q_sample(
    out: torch.dtype,
    x0: torch.dtype | None = None,
    noise: torch.dtype | None = None,
    seed: int | None = None,
    channels_last: bool = False,
    flip: bool = False,
) -> None:
    from fastdiff.triton_kernels.q_sample import q_sample

    table = _empty(torch.float32, shape=(1000,))
    q_sample(
        _empty(out, channels_last),
        _empty(x0 or out, channels_last),
        _empty(torch.int64, shape=SHAPE[:1]),
        table,
        table,
        None if noise is None else _empty(noise, channels_last),
        None,
        seed,
        0,
        _empty(torch.bool, shape=SHAPE[:1]) if flip else None,
        channels_last,
    )


def _philox_normal(out: torch.dtype, channels_last: bool = False) -> None:
    from fastdiff.triton_kernels.philox_normal import philox_normal

    philox_normal(_empty(out, channels_last), None, 0, 0, channels_last)


def _eps_loss(dtype: torch.dtype, seed: int | None = None, channels_last: bool = False) -> None:
    from fastdiff.triton_kernels.eps_loss import eps_loss

    prediction = _empty(dtype, channels_last)
    noise = prediction if seed is None else None
    out = _empty(torch.float32, shape=())
    eps_loss(out, prediction, noise, None, seed, 0, None, 1.0, 0, channels_last)


def _eps_loss_of_digits(dtype: torch.dtype, mean: bool = False) -> None:
    """Losses of samples that one program holds, or their mean."""
    from fastdiff.triton_kernels.eps_loss import eps_loss

    prediction, weight = _empty(dtype, shape=(64, 1, 8, 8)), _empty(torch.float32, shape=(64,))
    out = _empty(torch.float32, shape=()) if mean else weight
    eps_loss(out, prediction, prediction, None, None, 0, weight, 1.0, 0, False)


def _eps_loss_backward(
    dtype: torch.dtype, seed: int | None = None, channels_last: bool = False
) -> None:
    from fastdiff.triton_kernels.eps_loss import eps_loss_backward

    prediction = _empty(dtype, channels_last)
    noise = prediction if seed is None else None
    grad, weight = (_empty(torch.float32, shape=SHAPE[:1]) for _ in range(2))
    eps_loss_backward(
        prediction, None, grad, prediction, noise, None, seed, 0, weight, 1.0, 0, channels_last
    )


def _sampler_step(
    dtype: torch.dtype,
    output: torch.dtype | None = None,
    seed: int | None = None,
    channels_last: bool = False,
    learned: bool = False,
) -> None:
    """A guided ddim_step, or a ddpm_step with learned variance."""
    from fastdiff.triton_kernels.sampler_step import sampler_step

    x = _empty(dtype, channels_last)
    channels = SHAPE[1] * (1 + learned)
    model_output = _empty(output or dtype, channels_last, (SHAPE[0], channels, *SHAPE[2:]))
    sampler_step(
        x,
        None,
        x,
        model_output,
        None if learned else model_output,
        None,
        _empty(torch.int64, shape=SHAPE[:1]),
        _empty(torch.float32, shape=(50, 16)),
        0,
        True,
        learned,
        True,
        3.0,
        None,
        seed,
        0,
        channels_last,
    )


def _group_norm_silu(
    dtype: torch.dtype,
    shape: tuple[int, ...],
    channels_last: bool = False,
    backward: bool = False,
    max_blocks: int = 1,
    pairs: bool = True,
    form: str = "",
) -> None:
    """`form`: "dropout", or "residual" with a bias of the sum, or neither."""
    from fastdiff.reference.dropout import Dropout
    from fastdiff.triton_kernels import _launch
    from fastdiff.triton_kernels import group_norm_silu as kernels

    x, operand = _empty(dtype, channels_last, shape), _empty(torch.float32, shape=shape[1:2])
    statistics = _empty(torch.float32, shape=(shape[0], 32))
    small = (operand, operand, None, None, None)
    forward: dict[str, Any] = {}
    gradients: dict[str, Any] = {}
    if form == "dropout":
        forward = gradients = {"dropout": Dropout(26, None, 0, 0)}
    elif form == "residual":
        forward = {"residual": x, "sum_bias": operand, "summed": x}
        gradients = {"grad_sum": x, "grad_sum_bias": operand}
    with (
        unittest.mock.patch.object(_launch, "max_blocks", return_value=max_blocks),
        unittest.mock.patch.object(_launch, "holds_pairs", return_value=pairs),
    ):
        if backward:
            kernels.group_norm_silu_backward(
                x, *small, x, x, statistics, statistics, 32, *small, 0, channels_last, **gradients
            )
        else:
            kernels.group_norm_silu(
                x, statistics, statistics, x, 32, *small[:2], 1e-5, *small[2:], 0, channels_last,
                **forward,
            )  # fmt: skip


def _vlb_terms(
    dtype: torch.dtype,
    seed: int | None = None,
    channels_last: bool = False,
    learned: bool = False,
    backward: bool = False,
) -> None:
    from fastdiff.triton_kernels import vlb_terms as kernels

    x = _empty(dtype, channels_last)
    shape = (SHAPE[0], 2 * SHAPE[1], *SHAPE[2:]) if learned else SHAPE
    output = _empty(dtype, channels_last, shape)
    results = _empty(torch.float32, shape=(3, SHAPE[0]))
    inputs = (
        x,
        x,
        output,
        _empty(torch.int64, shape=SHAPE[:1]),
        _empty(torch.float32, shape=(1000, 16)),
        x if seed is None else None,
        None,
        seed,
        0,
        0,
        learned,
        True,
        False,
        channels_last,
    )
    if backward:
        kernels.vlb_terms_backward(output, results, *inputs)
    else:
        kernels.vlb_terms(results, *inputs)


def _largest_group(pairs: bool, channels_last: bool, backward: bool) -> tuple[int, int, int]:
    """A layer whose groups take all registers that one block of group_norm_silu has for them."""
    if not backward:
        return (512, 64, 64) if pairs else (256, 64, 64)
    return (256, 64, 64) if pairs and not channels_last else (512, 32, 32)


def representative_calls(arch: str) -> dict[str, Callable[[], None]]:
    """Launcher calls by name: each public use of a kernel in the dtypes and layouts that matter."""
    number = int(arch.removeprefix("sm_")) if arch.startswith("sm_") else 0
    clusters, pairs = number >= 90, 0 < number < 100  # as _launch.py has it: none of AMD's
    calls: dict[str, Callable[[], None]] = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        for layout, channels_last in (("nchw", False), ("channels_last", True)):
            given = functools.partial(_q_sample, dtype, noise=dtype, channels_last=channels_last)
            seed = functools.partial(_q_sample, dtype, seed=0, channels_last=channels_last)
            normal = functools.partial(_philox_normal, dtype, channels_last=channels_last)
            calls[f"q_sample {name} {layout} given"] = given
            calls[f"q_sample {name} {layout} seed"] = seed
            calls[f"philox_normal {name} {layout}"] = normal
            for op, loss in (("eps_loss", _eps_loss), ("eps_loss_backward", _eps_loss_backward)):
                call = functools.partial(loss, dtype, channels_last=channels_last)
                calls[f"{op} {name} {layout} given"] = call
                calls[f"{op} {name} {layout} seed"] = functools.partial(call, seed=0)
            step = functools.partial(_sampler_step, dtype, channels_last=channels_last)
            calls[f"ddim_step {name} {layout} guided"] = step
            calls[f"ddim_step {name} {layout} guided seed"] = functools.partial(step, seed=0)
            for op, backward in (("group_norm_silu", False), ("group_norm_silu_backward", True)):
                call = functools.partial(
                    _group_norm_silu,
                    dtype,
                    channels_last=channels_last,
                    backward=backward,
                    pairs=pairs,
                )
                for case, size in (("one pass", 32), ("split", 256)):
                    calls[f"{op} {name} {layout} {case}"] = functools.partial(
                        call, (1, 128, size, size)
                    )
                for form in ("dropout", "residual"):
                    calls[f"{op} {name} {layout} one pass {form}"] = functools.partial(
                        call, (1, 128, 32, 32), form=form
                    )
                in_pairs = pairs and name == "bf16"
                largest = _largest_group(in_pairs, channels_last, backward)
                calls[f"{op} {name} {layout} largest"] = functools.partial(call, (1, *largest))
                if in_pairs:
                    for form in ("dropout", "residual"):
                        calls[f"{op} {name} {layout} largest {form}"] = functools.partial(
                            call, (1, *largest), form=form
                        )
                if clusters:
                    calls[f"{op} {name} {layout} cluster"] = functools.partial(
                        call, (1, 512, 64, 64), max_blocks=8
                    )
                if clusters and in_pairs and not channels_last:
                    calls[f"{op} {name} {layout} largest cluster"] = functools.partial(
                        call, (1, 128 if backward else 256, 256, 256), max_blocks=8
                    )
            for op, backward in (("vlb_terms", False), ("vlb_terms_backward", True)):
                call = functools.partial(
                    _vlb_terms, dtype, channels_last=channels_last, backward=backward
                )
                calls[f"{op} {name} {layout} given"] = call
                learned = functools.partial(call, seed=0, learned=True)
                calls[f"{op} {name} {layout} seed learned"] = learned
        calls[f"ddpm_step {name} nchw learned seed"] = functools.partial(
            _sampler_step, dtype, seed=0, learned=True
        )
        digits = functools.partial(_eps_loss_of_digits, dtype)
        calls[f"eps_loss {name} nchw given digits"] = digits
        calls[f"eps_loss {name} nchw given digits mean"] = functools.partial(digits, mean=True)
        pixels = functools.partial(_q_sample, dtype, torch.uint8, seed=0)
        calls[f"q_sample {name} nchw uint8 seed"] = pixels
        calls[f"q_sample {name} nchw uint8 seed flip"] = functools.partial(pixels, flip=True)
    mixed = functools.partial(_sampler_step, torch.float32, torch.bfloat16)
    calls["ddim_step fp32 nchw guided bf16 output"] = mixed
    return calls


def launch_of(call: Callable[[], None]) -> Launch:
    """The launch of a launcher call that reads its tensors; a second one adds up partial sums."""
    with recorded_launches() as launches:
        call()
    return launches[0]
