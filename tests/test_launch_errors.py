"""Errors of CUDA calls reach the one they belong to, and no thread changes another's launch.

The project's launchers on the emulator's CUDA runtime; tests/gpu has what needs the binding too.
"""

from __future__ import annotations

import ctypes

import pytest
import torch
from op_harness import evaluate, implementation_params
from op_harness.cuda_ptx import launcher
from op_harness.group_norm_silu import SHAPES, Case, arguments

pytestmark = pytest.mark.parametrize("implementation", implementation_params("cuda-ptx"))

INVALID_DEVICE = 101
TABLE = torch.linspace(0.9, 0.1, 10)
STEPS = torch.rand(3, 16)
X = torch.randn(3, 2, 8, 8)
T = torch.tensor([1, 0, 2])
NOISE = {"noise": None, "keys": None, "seed": 0, "stream": 0}
STEP = NOISE | {
    "x_t": X,
    "model_output": X,
    "step": T,
    "table": STEPS,
    "prediction": 0,
    "clip": True,
    "uncond": None,
    "guidance_scale": 1.0,
    "return_pred_x0": False,
}
CALLS = {
    "q_sample": NOISE
    | {"x0": X, "t": T, "sqrt_alpha_bar": TABLE, "sqrt_one_minus_alpha_bar": TABLE}
    | {"flip": None, "dtype": None},
    "eps_loss": NOISE | {"prediction": X, "weight": None, "reduction": 1, "kind": 0},
    "group_norm_silu": None,  # from its own cases
    "ddim_step": STEP | {"use_clipped_model_output": False},
    "ddpm_step": STEP | {"learned_range": False},
    "vlb_terms": NOISE
    | {"x0": X, "x_t": X, "model_output": X, "t": T, "table": STEPS, "prediction": 0}
    | {"learned": False, "clip": True, "detach_mean": False},
}
DIFFERENTIABLE = {"eps_loss": "prediction", "group_norm_silu": "x", "vlb_terms": "model_output"}


@pytest.mark.parametrize("op", CALLS)
def test_an_error_of_other_code_is_not_reported_nor_taken_away(op, implementation):
    library = launcher.library(op, "sm_90")
    assert (
        library["cudaSetDevice"](ctypes.c_int(7)) == INVALID_DEVICE
    )  # nobody asks what came of it
    args = CALLS[op] or arguments(Case())
    gradients = (DIFFERENTIABLE[op],) if op in DIFFERENTIABLE else ()
    evaluate(op, implementation, args, gradients=gradients)
    assert library["cudaGetLastError"]() == INVALID_DEVICE


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_kernel_attributes_do_not_depend_on_the_launch(backward, implementation, monkeypatch):
    """They are of the kernel, so between one thread's call and its launch another may set them."""
    library = launcher.library("group_norm_silu", "sm_90")
    limits: dict[tuple, set[int]] = {}
    most = library._runtime.device.shared_per_block_optin
    for name, pixels in (("more", 40), ("less", 30), ("more again", 40)):
        monkeypatch.setitem(SHAPES, name, ((128, 16, pixels, pixels), 1))
        case = Case(shape=name, operands=())
        gradients = ("x",) if backward else ()
        evaluate("group_norm_silu", implementation, arguments(case), gradients=gradients)
        for kernel, value in library._runtime._max_dynamic_shared.items():
            limits.setdefault(kernel, set()).add(value)
    assert limits, "no launch needed more than 48 KB"
    for kernel, values in limits.items():
        assert len(values) == 1, f"{kernel}: {values}"
        assert min(values) > 0.9 * most
