"""Random calls of the ops, public and raw: right or refused, and never a crash."""

from __future__ import annotations

import pytest

from fuzz import budget
from fuzz.op_cases import one_call


@pytest.mark.cpu_kernels
def test_ops_cpu() -> None:
    assert budget.fuzz_in_process("ops", one_call, 20) > 20
