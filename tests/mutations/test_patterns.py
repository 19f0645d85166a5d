"""Every planted bug still has a place: most are planted at night only."""

from __future__ import annotations

from pathlib import Path

import pytest

from . import test_planted_bugs, test_planted_host_bugs
from .mutant import Mutant

ROOT = Path(__file__).resolve().parents[2]
MUTANTS = [*test_planted_bugs.MUTANTS, *test_planted_host_bugs.MUTANTS]


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_what_a_bug_replaces_is_there_once(mutant: Mutant) -> None:
    assert (ROOT / mutant.file).read_text().count(mutant.old) == 1
    assert mutant.old != mutant.new
