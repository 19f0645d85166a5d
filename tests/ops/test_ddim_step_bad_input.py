"""ddim_step: wrong arguments are refused, by the public function and by the raw operators."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from op_harness import available
from op_harness.sampler_step import table_for
from torch import Tensor

import fastdiff
from fastdiff import ops
from fastdiff.ops._sampler_step import Arguments
from fastdiff.reference.step_columns import PREDICTIONS

OP = "ddim_step"


def good() -> dict:
    x = torch.zeros(2, 3, 4)
    return {
        "x_t": x,
        "model_output": x,
        "step": torch.tensor([1, 2]),
        "table": table_for(OP),
        "noise": x,
    }


X = torch.zeros(2, 3, 4)
BAD_INPUT = [
    ({"x_t": X.int()}, TypeError, "x_t has dtype torch.int32"),
    ({"x_t": torch.zeros(2)}, ValueError, r"x_t has shape \(2,\)"),
    ({"model_output": X[:, :2]}, ValueError, r"model_output has shape \(2, 2, 4\), expected"),
    ({"model_output": X[:1]}, ValueError, r"model_output has shape \(1, 3, 4\)"),
    ({"model_output": X.long()}, TypeError, "model_output has dtype torch.int64"),
    ({"model_output": X.to("meta")}, ValueError, "model_output is on meta, expected cpu"),
    ({"uncond": X[..., :2]}, ValueError, r"uncond has shape \(2, 3, 2\)"),
    (
        {"uncond": torch.zeros(2, 6, 4)},
        ValueError,
        r"uncond has shape \(2, 6, 4\), expected \(2, 3",
    ),
    ({"uncond": X.to("meta")}, ValueError, "uncond is on meta"),
    ({"step": torch.tensor([1, 2, 3])}, ValueError, r"step has shape \(3,\).* expected \(2,\)"),
    ({"step": torch.tensor([1.0, 2.0])}, ValueError, "dtype torch.float32, expected"),
    ({"step": torch.tensor([1, 6])}, IndexError, "step has values from 1 to 6, expected 0 <= step"),
    ({"step": torch.tensor([-1, 0])}, IndexError, "step has values from -1 to 0"),
    ({"table": torch.zeros(6, 15)}, ValueError, r"table has shape \(6, 15\), expected \(S, 16\)"),
    ({"table": torch.zeros(6, 16).half()}, TypeError, "table has dtype torch.float16"),
    ({"seed": 3}, ValueError, "pass either noise or seed; both were given"),
    ({"noise": X[:, :2]}, ValueError, r"noise has shape \(2, 2, 4\), expected \(2, 3, 4\)"),
    ({"noise": X.long()}, TypeError, "noise has dtype torch.int64"),
    ({"noise": X.to("meta")}, ValueError, "noise is on meta, expected cpu"),
    ({"noise": None, "seed": torch.zeros(3, dtype=torch.int64)}, ValueError, "seed has shape"),
    ({"noise": None, "seed": torch.zeros(2)}, TypeError, "seed has dtype torch.float32"),
    ({"noise": None, "seed": "a"}, TypeError, "seed is 'a', expected an int"),
    ({"stream": 1.0}, TypeError, "stream is 1.0, expected an int"),
    ({"prediction": "noise"}, ValueError, "unknown prediction 'noise'; choose from eps, x0, v"),
    ({"uncond": X, "guidance_scale": -1.0}, ValueError, "guidance_scale is -1.0, expected"),
    ({"uncond": X, "guidance_scale": float("nan")}, ValueError, "guidance_scale is nan"),
    ({"uncond": X, "guidance_scale": float("inf")}, ValueError, "guidance_scale is inf"),
]


@pytest.mark.parametrize("backend", ["default", "reference"])
@pytest.mark.parametrize(("change", "error", "message"), BAD_INPUT)
def test_bad_input(change: dict, error: type, message: str, backend: str) -> None:
    chosen = fastdiff.use_backend("reference") if backend == "reference" else nullcontext()
    with chosen, pytest.raises(error, match=message):
        ops.ddim_step(**{**good(), **change})


@pytest.mark.parametrize("overload", ["default", "triton"])
@pytest.mark.parametrize(("change", "error", "message"), BAD_INPUT)
def test_raw_operator_refuses_bad_input(
    change: dict, error: type, message: str, overload: str
) -> None:
    """The bindings alone keep the kernels memory-safe: raw operators skip the Python checks."""
    implementation = "cpu" if overload == "default" else "triton-ptx"
    if (reason := available(implementation)) is not None:
        pytest.skip(reason)
    given = {**good(), "uncond": None, "guidance_scale": 1.0, "seed": None, "stream": 0, **change}
    prediction = given.get("prediction", "eps")
    keys = given["seed"] if isinstance(given["seed"], Tensor) else None
    arguments = Arguments(
        **{k: given[k] for k in ("x_t", "model_output", "step", "table", "uncond")},
        prediction=PREDICTIONS.index(prediction) if prediction in PREDICTIONS else 4,
        clip=True,
        flag=True,
        guidance_scale=given["guidance_scale"],
        noise=given["noise"],
        keys=keys,
        seed=None if keys is not None else given["seed"],
        stream=given["stream"],
        return_pred_x0=False,
    )
    if overload == "triton" and error is IndexError:
        pytest.skip("Triton kernels answer steps out of range with NaN")
    with pytest.raises((RuntimeError, NotImplementedError, TypeError, ValueError, IndexError)):
        getattr(torch.ops.fastdiff.ddim_step, overload)(*arguments)
