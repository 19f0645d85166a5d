"""eps_loss: wrong arguments are refused, by the public function and by the raw operators."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from op_harness import available
from torch import Tensor

import fastdiff
from fastdiff import ops, reference

BAD_INPUT = [
    ({"prediction": torch.zeros(2, 3, dtype=torch.int32)}, TypeError, "prediction has dtype"),
    ({"prediction": torch.tensor(1.0)}, ValueError, r"prediction has shape \(\)"),
    ({"noise": None}, ValueError, "pass either noise or seed; neither was given"),
    ({"seed": 3}, ValueError, "pass either noise or seed; both was given"),
    ({"noise": torch.zeros(2, 4)}, ValueError, r"noise has shape \(2, 4\), expected \(2, 3\)"),
    ({"noise": torch.zeros(2, 3, dtype=torch.int64)}, TypeError, "noise has dtype torch.int64"),
    ({"noise": torch.zeros(2, 3, device="meta")}, ValueError, "noise is on meta, expected cpu"),
    ({"noise": None, "seed": torch.zeros(3, dtype=torch.int64)}, ValueError, "seed has shape"),
    ({"noise": None, "seed": torch.zeros(2)}, TypeError, "seed has dtype torch.float32"),
    ({"weight": torch.zeros(3)}, ValueError, r"weight has shape \(3,\), expected \(2,\)"),
    ({"weight": torch.zeros(2).half()}, TypeError, "weight has dtype torch.float16"),
    ({"weight": torch.zeros(2, device="meta")}, ValueError, "weight is on meta"),
    ({"reduction": "batchmean"}, ValueError, "unknown reduction 'batchmean'; choose from none"),
    ({"kind": "l2"}, ValueError, "unknown kind 'l2'; choose from mse, l1, huber"),
    ({"stream": 1.0}, TypeError, "stream is 1.0, expected an int"),
]


@pytest.mark.parametrize("backend", ["default", "reference"])
@pytest.mark.parametrize(("change", "error", "message"), BAD_INPUT)
def test_bad_input(change: dict, error: type, message: str, backend: str) -> None:
    good = {"prediction": torch.zeros(2, 3), "noise": torch.zeros(2, 3)}
    chosen = fastdiff.use_backend("reference") if backend == "reference" else nullcontext()
    with chosen, pytest.raises(error, match=message):
        ops.eps_loss(**{**good, **change})


@pytest.mark.skipif(available("cpu") is not None, reason="the CPU library is not built")
@pytest.mark.parametrize(("change", "error", "message"), BAD_INPUT)
def test_raw_operator_refuses_bad_input(change: dict, error: type, message: str) -> None:
    """The bindings alone keep the kernels memory-safe: raw operators skip the Python checks."""
    args = {
        "prediction": torch.zeros(2, 3),
        "noise": torch.zeros(2, 3),
        "keys": None,
        "seed": None,
        "stream": 0,
        "weight": None,
        "reduction": 0,
        "kind": 0,
    }
    args.update({k: 3 if k in ("reduction", "kind") else v for k, v in change.items()})
    if isinstance(args["seed"], Tensor):
        args["seed"], args["keys"] = None, args["seed"]
    refused = (RuntimeError, NotImplementedError, TypeError)
    with pytest.raises(refused):
        torch.ops.fastdiff.eps_loss.default(*args.values())
    backward = (torch.ones(2), *args.values(), True, False)
    with pytest.raises(refused):
        torch.ops.fastdiff.eps_loss_backward.default(*backward)


@pytest.mark.skipif(available("cpu") is not None, reason="the CPU library is not built")
def test_raw_operator_refuses_keys_beside_a_seed() -> None:
    x, keys = torch.zeros(2, 3), reference.sample_keys(0, 2)
    with pytest.raises(RuntimeError, match="pass one of noise, keys and seed"):
        torch.ops.fastdiff.eps_loss(x, None, keys, 1, 0, None, 0, 0)


@pytest.mark.skipif(available("cpu") is not None, reason="the CPU library is not built")
@pytest.mark.parametrize("grad", [torch.ones(3), torch.ones(()), torch.ones(2).half()])
def test_raw_backward_refuses_bad_gradients(grad: Tensor) -> None:
    x = torch.zeros(2, 3)
    with pytest.raises(RuntimeError):
        torch.ops.fastdiff.eps_loss_backward(grad, x, x, None, None, 0, None, 0, 0, True, True)
