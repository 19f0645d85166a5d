"""Backend choice: defaults, overrides, and errors instead of silent fallbacks."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from op_harness.inputs import tables

import fastdiff
from fastdiff import ops


def _call(**arguments: object) -> torch.Tensor:
    a, b = tables()
    defaults = {"x0": torch.ones(2, 3), "t": torch.tensor([1, 2]), "seed": 0}
    merged = {**defaults, "sqrt_alpha_bar": a, "sqrt_one_minus_alpha_bar": b, **arguments}
    return ops.q_sample(**merged)


def _run(program: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_backends_say_why_one_is_missing() -> None:
    status = fastdiff.backends()
    assert list(status) == ["reference", "cpu", "cuda", "triton"]
    assert status["reference"].available
    assert all(bool(s) != bool(s.reason) for s in status.values())


def test_use_backend_nests_and_restores() -> None:
    before = fastdiff.default_backend("cpu")
    with fastdiff.use_backend("reference"):
        first = _call()
        with fastdiff.use_backend("reference"):
            assert torch.equal(first, _call())
    assert fastdiff.default_backend("cpu") == before
    torch.testing.assert_close(_call(), first)


def test_unknown_backend_lists_the_names() -> None:
    with (
        pytest.raises(ValueError, match="'gpu'; choose from reference, cpu, cuda, triton"),
        fastdiff.use_backend("gpu"),
    ):
        pass


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_missing_backend_says_why() -> None:
    with (
        pytest.raises(RuntimeError, match=r"backend 'cuda' is not available: .+"),
        fastdiff.use_backend("cuda"),
    ):
        pass


@pytest.mark.skipif(not fastdiff.backends()["cpu"], reason="the CPU library is not built")
def test_forced_backend_never_falls_back() -> None:
    a, b = (x.double() for x in tables())
    doubles = {"sqrt_alpha_bar": a, "sqrt_one_minus_alpha_bar": b}
    assert _call(**doubles).dtype == torch.float32  # the default choice takes the reference
    with fastdiff.use_backend("cpu"):
        _call()
        with pytest.raises(RuntimeError, match="'cpu' was asked for, but only the reference takes"):
            _call(**doubles)


PROGRAM = """
import torch
from fastdiff import ops
print(ops.philox_normal((1, 4), seed=0)[0].tolist())
"""


def test_environment_variable() -> None:
    chosen = _run(PROGRAM, FASTDIFF_BACKEND="reference")
    assert chosen.returncode == 0, chosen.stderr
    default = ops.philox_normal((1, 4), seed=0)[0]
    torch.testing.assert_close(torch.tensor(json.loads(chosen.stdout)), default)
    wrong = _run(PROGRAM, FASTDIFF_BACKEND="gpu")
    assert "FASTDIFF_BACKEND: unknown backend 'gpu'" in wrong.stderr
    # Importing, and asking what is wrong, work all the same.
    info = _run("import runpy; runpy.run_module('fastdiff.info', run_name='x')",
                FASTDIFF_BACKEND="gpu")  # fmt: skip
    assert info.returncode == 0, info.stderr


def test_triton_backend_runs_interpreted_on_the_cpu() -> None:
    pytest.importorskip("triton")
    run = _run(PROGRAM, FASTDIFF_BACKEND="triton", TRITON_INTERPRET="1")
    assert run.returncode == 0, run.stderr
    torch.testing.assert_close(
        torch.tensor(json.loads(run.stdout)), ops.philox_normal((1, 4), seed=0)[0]
    )


def test_debug_mode_checks_timesteps() -> None:
    """FASTDIFF_DEBUG=1 runs the full checks before every call."""
    program = """
import torch, fastdiff
table = torch.ones(10)
fastdiff.ops.q_sample(torch.ones(1, 2), torch.tensor([10]), table, table, seed=0)
"""
    run = _run(program, FASTDIFF_DEBUG="1")
    assert "IndexError: q_sample: t has values from 10 to 10" in run.stderr


def test_info_prints_a_table_and_json() -> None:
    from fastdiff import info

    facts = info.collect()
    assert facts["versions"]["fastdiff"] == fastdiff.__version__
    assert set(facts["backends"]) == set(fastdiff.backends())
    assert json.loads(json.dumps(facts)) == facts
    table = info._table(facts)
    for name, status in fastdiff.backends().items():
        assert name in table
        assert status.reason in table
