"""group_norm_silu: wrong arguments are refused, by the public function and by the raw operators."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from op_harness import available
from op_harness.group_norm_silu import OPERANDS, Case, arguments

import fastdiff
from fastdiff import ops

BAD_INPUT = [
    ({"x": torch.zeros(2, 8, 3, 3, dtype=torch.int32)}, TypeError, "x has dtype torch.int32"),
    ({"x": torch.zeros(2, 8)}, ValueError, r"x has shape \(2, 8\), expected \(B, C"),
    ({"x": torch.zeros(2, 8, 1, 1, 1, 1)}, ValueError, "1 to 3 spatial dimensions"),
    ({"num_groups": 3}, ValueError, "num_groups is 3, expected a divisor of the 8 channels"),
    ({"num_groups": 0}, ValueError, "num_groups is 0"),
    ({"num_groups": 2.0}, TypeError, "num_groups is 2.0, expected an int"),
    ({"weight": torch.zeros(4)}, ValueError, r"weight has shape \(4,\), expected \(C,\) = \(8,\)"),
    ({"weight": torch.zeros(8).int()}, TypeError, "weight has dtype torch.int32"),
    ({"bias": torch.zeros(2, 8)}, ValueError, r"bias has shape \(2, 8\)"),
    ({"bias": torch.zeros(8, device="meta")}, ValueError, "bias is on meta, expected cpu"),
    ({"channel_bias": torch.zeros(8)}, ValueError, r"channel_bias has .* \(B, C\) = \(2, 8\)"),
    ({"channel_bias": torch.zeros(2, 8).long()}, TypeError, "channel_bias has dtype torch.int64"),
    ({"scale": torch.zeros(1, 8)}, ValueError, r"scale has shape \(1, 8\)"),
    ({"shift": torch.zeros(2, 8, 1, 1)}, ValueError, r"shift has shape \(2, 8, 1, 1\)"),
    ({"shift": torch.zeros(2, 8, device="meta")}, ValueError, "shift is on meta"),
    ({"eps": 0.0}, ValueError, "eps is 0.0, expected a positive number"),
    ({"eps": float("nan")}, ValueError, "eps is nan"),
    ({"eps": "1e-5"}, TypeError, "eps is '1e-5', expected a float"),
    ({"activation": "relu"}, ValueError, "unknown activation 'relu'; choose from silu, identity"),
]


@pytest.mark.parametrize("backend", ["default", "reference"])
@pytest.mark.parametrize(("change", "error", "message"), BAD_INPUT)
def test_bad_input(change: dict, error: type, message: str, backend: str) -> None:
    good = {"x": torch.zeros(2, 8, 3, 3), "num_groups": 2, "weight": None, "bias": None}
    chosen = fastdiff.use_backend("reference") if backend == "reference" else nullcontext()
    with chosen, pytest.raises(error, match=message):
        ops.group_norm_silu(**{**good, **change})


@pytest.mark.skipif(available("cpu") is not None, reason="the CPU library is not built")
@pytest.mark.parametrize(("change", "error", "message"), BAD_INPUT)
def test_raw_operator_refuses_bad_input(change: dict, error: type, message: str) -> None:
    """The bindings alone keep the kernels memory-safe: raw operators skip the Python checks."""
    args = arguments(Case()) | dict.fromkeys(OPERANDS)
    args |= {"x": torch.zeros(2, 8, 3, 3), "num_groups": 2}
    args |= {k: 2 if k == "activation" else v for k, v in change.items()}
    refused = (RuntimeError, NotImplementedError, TypeError)
    with pytest.raises(refused):
        torch.ops.fastdiff.group_norm_silu.default(*args.values())
    if "eps" in change:
        return
    del args["eps"]
    statistic = torch.ones(2, 2)
    needs = [False] * 5
    with pytest.raises(refused):
        torch.ops.fastdiff.group_norm_silu_backward.default(
            torch.zeros(2, 8, 3, 3),
            args.pop("x"),
            statistic,
            statistic,
            *args.values(),
            True,
            *needs,
        )


@pytest.mark.skipif(available("cpu") is not None, reason="the CPU library is not built")
@pytest.mark.parametrize(
    "change",
    [
        {"grad": torch.zeros(2, 8, 3)},
        {"grad": torch.zeros(2, 8, 3, 3, dtype=torch.int32)},
        {"mean": torch.ones(2, 4)},
        {"rstd": torch.ones(2, 2).double()},
        {"need_weight": True},
    ],
    ids=lambda change: next(iter(change)),
)
def test_raw_backward_refuses_bad_arguments(change: dict) -> None:
    args = {
        "grad": torch.zeros(2, 8, 3, 3),
        "x": torch.zeros(2, 8, 3, 3),
        "mean": torch.ones(2, 2),
        "rstd": torch.ones(2, 2),
        "num_groups": 2,
        **dict.fromkeys(OPERANDS),
        "activation": 0,
        "need_x": True,
        **{f"need_{name}": False for name in OPERANDS},
    }
    with pytest.raises(RuntimeError):
        torch.ops.fastdiff.group_norm_silu_backward.default(*(args | change).values())
