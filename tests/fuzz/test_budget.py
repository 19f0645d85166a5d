"""The fuzzers' frame: same seed, same cases; a failure or a crash says how to repeat it."""

from __future__ import annotations

import itertools
import os
import random
import signal

import pytest

from fuzz import budget


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SECONDS", "SEED", "CASE"):
        monkeypatch.delenv(f"FASTDIFF_FUZZ_{name}", raising=False)


def _crash(numbers: random.Random) -> None:
    if numbers.random() < 0.5:
        os.kill(os.getpid(), signal.SIGSEGV)


def _hang(numbers: random.Random) -> None:
    signal.pause()


def test_same_seed_same_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    def first_draws(seed: str, name: str = "a") -> list[float]:
        monkeypatch.setenv("FASTDIFF_FUZZ_SEED", seed)
        return [budget.generator(name, number).random() for number in range(3)]

    first = first_draws("1")
    assert len(set(first)) == 3
    assert first_draws("1") == first
    assert first_draws("2") != first
    assert first_draws("1", "b") != first


def test_time_ends_the_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count()
    monkeypatch.setattr(budget.time, "monotonic", lambda: next(clock))
    assert budget.fuzz("nothing", lambda numbers: None, 10) == 11
    monkeypatch.setenv("FASTDIFF_FUZZ_SECONDS", "20")
    assert budget.fuzz("nothing", lambda numbers: None, 10) == 21


def test_failure_says_how_to_repeat_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTDIFF_FUZZ_SEED", "7")
    seen = []

    def fails_at_third(numbers: random.Random) -> None:
        seen.append(numbers.random())
        if len(seen) == 3:
            raise ValueError("wrong")

    with pytest.raises(
        AssertionError, match="FASTDIFF_FUZZ_SEED=7 FASTDIFF_FUZZ_CASE=2"
    ) as failure:
        budget.fuzz("third", fails_at_third, 60)
    assert "test_failure_says_how_to_repeat_it" in str(failure.value)
    assert isinstance(failure.value.__cause__, ValueError)
    # As it says: the same case alone.
    monkeypatch.setenv("FASTDIFF_FUZZ_CASE", "2")
    assert budget.fuzz("third", fails_at_third, 60) == 1
    assert seen[3] == seen[2]


def test_crash_says_how_to_repeat_it() -> None:
    case = next(n for n in range(100) if budget.generator("crash", n).random() < 0.5)
    with pytest.raises(AssertionError, match=f"of SIGSEGV; repeat: .*FASTDIFF_FUZZ_CASE={case} "):
        budget.fuzz_in_process("crash", _crash, 60)


def test_hang_says_how_to_repeat_it() -> None:
    with pytest.raises(AssertionError, match="a case hangs; repeat: FASTDIFF_FUZZ_SEED=0 "):
        budget.fuzz_in_process("hang", _hang, 0, hang_seconds=1)
