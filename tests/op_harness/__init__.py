"""Runs one op through all its implementations, on a machine without a GPU too.

    reference            fastdiff.reference, plain PyTorch
    cpu                  the C++ library
    triton-interpreted   the Triton kernel in Triton's interpreter, in a process of its own
    triton-ptx           the Triton kernel, compiled to PTX, executed by ptx_emulator
    cuda-ptx             csrc/cuda, launchers and kernels, executed by ptx_emulator
    cuda, triton         the real thing (`pytest -m gpu`)

`evaluate(op, implementation, arguments)` takes the arguments of the raw operator's schema by name
and returns the outputs and, on request, the gradients.
"""

from .cpp_calls import cpp_calls
from .evaluate import (
    IMPLEMENTATIONS,
    ON_GPU,
    Result,
    available,
    case_params,
    evaluate,
    implementation_params,
    on_gpu,
)
from .tolerance import assert_close, unit_roundoff

__all__ = [
    "IMPLEMENTATIONS",
    "ON_GPU",
    "Result",
    "assert_close",
    "available",
    "case_params",
    "cpp_calls",
    "evaluate",
    "implementation_params",
    "on_gpu",
    "unit_roundoff",
]
