"""Where there is no memory left, every compiled op raises what torch itself raises, in its words.

On the CPU that is RuntimeError with the number of bytes; tests/test_gpu_faults.py has the same on a
CUDA device, where it is torch.OutOfMemoryError.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastdiff import ops

pytestmark = pytest.mark.cpu_kernels

PIXELS = 1 << 45  # 128 TB of float32, more than an address space
TABLE = torch.ones(10)
STEPS = torch.rand(3, 16)
T = torch.tensor([1])
WORDS = rf"you tried to allocate {PIXELS * 4} bytes"


def huge(*, grad: bool = False, dtype: torch.dtype = torch.float32) -> Tensor:
    """One value that stands for all pixels."""
    x = torch.zeros((), dtype=dtype, requires_grad=grad)
    return x.expand(1, 1, PIXELS, 1)


NOISE = (None, None, 0, 0)
CALLS: dict[str, Callable[[], object]] = {
    "q_sample": lambda: ops.q_sample(huge(), T, TABLE, TABLE, seed=0),
    "q_sample converted": lambda: ops.q_sample(
        huge(dtype=torch.float16), T, TABLE, TABLE, seed=0, dtype=torch.float32
    ),
    "q_sample raw": lambda: torch.ops.fastdiff.q_sample(
        huge(), T, TABLE, TABLE, *NOISE, None, None
    ),
    "eps_loss": lambda: ops.eps_loss(huge(), seed=0),
    "eps_loss recorded": lambda: ops.eps_loss(huge(grad=True), seed=0),
    "eps_loss raw": lambda: torch.ops.fastdiff.eps_loss(huge(), *NOISE, None, 1, 0),
    "eps_loss_backward raw": lambda: torch.ops.fastdiff.eps_loss_backward(
        torch.ones(()), huge(), *NOISE, None, 1, 0, True, False
    ),
    "group_norm_silu": lambda: ops.group_norm_silu(huge(), 1, None, None),
    "group_norm_silu recorded": lambda: ops.group_norm_silu(huge(grad=True), 1, None, None),
    "group_norm_silu_backward raw": lambda: torch.ops.fastdiff.group_norm_silu_backward(
        *(huge(), huge(), torch.zeros(1, 1), torch.ones(1, 1), 1, *[None] * 5, 0, True),
        *[False] * 5,
    ),
    "ddim_step": lambda: torch.ops.fastdiff.ddim_step(
        huge(), huge(), T, STEPS, 0, True, False, None, 1.0, *NOISE, False
    ),
    "ddpm_step": lambda: torch.ops.fastdiff.ddpm_step(
        huge(), huge(), T, STEPS, 0, True, False, None, 1.0, *NOISE, False
    ),
    "vlb_terms raw": lambda: torch.ops.fastdiff.vlb_terms(
        huge(), huge(), huge(), T, STEPS, *NOISE, 0, False, True, False
    ),
    "philox_normal": lambda: ops.philox_normal((1, PIXELS), seed=0),
    "posterior_mean": lambda: ops.posterior_mean(huge(), huge(), T, TABLE, TABLE),
}


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("call", CALLS)
def test_torch_says_how_much_was_asked_for(call, mode):
    with mode(), pytest.raises(RuntimeError, match=WORDS):
        CALLS[call]()


def test_an_op_works_again_afterwards():
    with pytest.raises(RuntimeError, match="you tried to allocate"):
        CALLS["q_sample"]()
    x = torch.ones(1, 4)
    assert torch.equal(ops.q_sample(x, T, TABLE, TABLE, noise=x), 2 * x)
