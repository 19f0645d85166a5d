"""Entry points for pytest-benchmark: `pytest benchmarks/ -k "q_sample and nchw"`.

Each contender of a quick case is a benchmark, grouped by case; a wrong result fails it instead.
pytest-benchmark times contenders one after the other, so that a slow moment of the machine meets
only one of them: `python -m benchmarks` interleaves them and is what to quote.
"""

from __future__ import annotations

import pytest
import torch

from benchmarks import command
from benchmarks.op_table import Case, Op

OPTIONS = command.parse(["--quick", "--compile", "none", "--device", "cpu"])
CASES = [
    pytest.param(op, case, id=f"{op.name}-{'-'.join(case.labels.values()).replace(' ', '_')}")
    for op in command.OPS.values()
    for case in command.cases(op, OPTIONS)
]


@pytest.mark.parametrize("contender", ["fastdiff", "eager", "diffusers"])
@pytest.mark.parametrize(("op", "case"), CASES)
def test_op(benchmark, op: Op, case: Case, contender: str) -> None:
    contenders = op.workload(case).contenders
    if contender not in contenders:
        pytest.skip(f"{contender} does not do this, or is not installed")
    chosen = contenders[contender]
    benchmark.group = f"{op.name} {' '.join(case.labels.values())}"
    with torch.set_grad_enabled(op.grad):
        error = chosen.error(chosen.run())
        if error is not None and chosen.peer:
            pytest.skip(f"{contender} is wrong here: {error}")
        assert error is None, error
        benchmark(chosen.run)
