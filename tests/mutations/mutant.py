"""A bug that is planted in a copy of the project, and the tests that must catch it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from .project_copy import ProjectCopy


@dataclass(frozen=True)
class Mutant:
    """`old` becomes `new` in `file`; `tests` (arguments of pytest) must fail, saying `message`."""

    bug: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    message: str
    quick: bool = False
    build: bool = False  # the CPU library, in the copy
    seconds: float = 600  # that the tests may take, compilers included

    def __str__(self) -> str:
        return self.bug


def mutants(every: Sequence[Mutant]) -> Any:
    """The parameter `mutant`: those that are not quick are slow tests."""
    marked = [
        pytest.param(m, marks=[] if m.quick else [pytest.mark.slow], id=str(m)) for m in every
    ]
    return pytest.mark.parametrize("mutant", marked)


def assert_caught(project: ProjectCopy, mutant: Mutant) -> None:
    project.replace(mutant.file, mutant.old, mutant.new)
    try:
        if mutant.build:
            project.build_cpu()
        own_kernels = mutant.file.startswith("csrc")
        outcome = project.run(*mutant.tests, timeout=mutant.seconds, own_kernels=own_kernels)
    finally:
        project.restore(mutant.file)
        if mutant.build:
            project.restore_libraries()
    assert outcome.failed, f"nothing failed (exit code {outcome.code}):\n{outcome.output[-3000:]}"
    assert mutant.message in outcome.output, outcome.output[-3000:]
