"""`python -m fastdiff.verify`: passes here, and fails where something is wrong."""

from __future__ import annotations

import json

import pytest
import torch

import fastdiff
from fastdiff import ops, verify
from fastdiff.training.errors import UserError
from fastdiff.verification import CASES, PARITY


def report(capsys, *argv: str) -> tuple[int, dict]:
    code = verify.main(["--device", "cpu", "--json", *argv])
    return code, json.loads(capsys.readouterr().out)


def test_every_public_op_has_a_case() -> None:
    # Integers; posterior_mean's mean; plain PyTorch and what it returns.
    without_kernels = {"sample_keys", "posterior_mean_variance"}
    without_kernels |= {"group_norm_statistics", "GroupNormStatistics"}
    assert {case.op for case in CASES} == set(ops.__all__) - without_kernels


def test_this_machine_passes(capsys) -> None:
    code, found = report(capsys)
    backends = {row["backend"] for row in found["rows"]}
    assert backends == {"reference"} | ({"cpu"} if fastdiff.backends()["cpu"] else set())
    assert [row for row in found["rows"] if not row["passed"]] == []
    assert [check for check in found["parity"] if not check["passed"]] == []
    assert code == 0
    assert found["failed"] == 0
    # Gradients were checked too, in every dtype.
    gradients = {(r["dtype"], r["result"]) for r in found["rows"] if r["op"] == "q_sample"}
    assert {(d, r) for d in ("fp32", "bf16", "fp16") for r in ("output", "d x0")} <= gradients


class Wrong(torch.autograd.Function):
    """The identity, with a value or a gradient that is off by some part in 10^5."""

    @staticmethod
    def forward(ctx, x, value, gradient):
        ctx.gradient = gradient
        return x * value

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.gradient, None, None


@pytest.mark.parametrize(("value", "gradient", "result"), [(1 + 1e-5, 1, "output"), (1, 1.01, "d")])
def test_a_wrong_kernel_fails(monkeypatch, capsys, value, gradient, result) -> None:
    right = ops.q_sample

    def wrong(*args, **kwargs):
        x_t = right(*args, **kwargs)
        # Only the reference of the comparison is in float64.
        return x_t if x_t.dtype == torch.float64 else Wrong.apply(x_t, value, gradient)

    monkeypatch.setattr(ops, "q_sample", wrong)
    code, found = report(capsys, "--op", "q_sample", "--backend", "reference")
    assert code == 1
    failed = [row for row in found["rows"] if not row["passed"]]
    assert {row["result"].split()[0] for row in failed} == {result}


def test_a_wrong_word_of_noise_fails(monkeypatch) -> None:
    right = ops.philox_normal

    def wrong(*args, **kwargs):
        noise = right(*args, **kwargs)
        noise[1, 2, 3, 4] += 0.01
        return noise

    monkeypatch.setattr(ops, "philox_normal", wrong)
    error, bound = PARITY["noise words"]("reference", torch.device("cpu"))
    assert error > bound


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--device", "cuda"], "no CUDA device is visible"),
        (["--device", "abacus"], "no such device"),
        (["--device", "meta"], "kernels for cpu and cuda only"),
        (["--op", "conv"], "choose from 'q_sample'"),
        (["--device", "cpu", "--backend", "cuda"], "not available on cpu"),
    ],
)
def test_bad_input(monkeypatch, argv, message) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=message):
        verify.main(argv)


def test_json_has_no_numbers_that_json_does_not_know():
    values = {"error": float("inf"), "relative": float("nan"), "share": 0.5, "op": "q_sample"}
    assert json.loads(json.dumps(verify._strict(values), allow_nan=False)) == {
        **values,
        "error": "inf",
        "relative": "nan",
    }
