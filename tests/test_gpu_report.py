"""A gpu test that does not run fails the run: plants what kept them from running, and looks."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
from types import SimpleNamespace

import gpu_report
import pytest
from gpu_report import Tally

TESTS = pathlib.Path(gpu_report.__file__).parent
CONFTEST = """
import gpu_report
gpu_report.devices = lambda: 1
gpu_report.missing_backends = lambda: {missing}
gpu_report.EXPECTED = gpu_report.pathlib.Path(r"{expected}")
gpu_report.pytest_terminal_summary = None
from gpu_report import *
"""
SUITE = """
import pytest
pytestmark = pytest.mark.gpu

class Status:
    reason = ""

@pytest.fixture(params=["cuda", "triton"])
def backend(request):
    if {condition}:
        pytest.skip(f"{{request.param}}: {{Status.reason or 'too old'}}")
    return request.param

def test_q_sample(backend):
    pass
"""


@pytest.fixture
def run(tmp_path: pathlib.Path):
    """The exit code of `pytest -m gpu` on a suite of two tests, and what it printed."""

    def call(condition: str, missing: dict | None = None, expected: int = 1, *options: str):
        counts = {"gpu": {"q_sample": {"cuda": expected, "triton": expected}}}
        (tmp_path / "counts.json").write_text(json.dumps(counts))
        settings = CONFTEST.format(missing=missing or {}, expected=tmp_path / "counts.json")
        (tmp_path / "conftest.py").write_text(settings)
        (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\ntestpaths = .\n")
        (tmp_path / "test_q_sample.py").write_text(SUITE.format(condition=condition))
        paths = [str(TESTS), os.environ.get("PYTHONPATH", "")]
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-m", "gpu", "-n", "auto", "-q", *options],
            cwd=tmp_path, env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        return done.returncode, done.stdout + done.stderr

    return call


def test_what_runs_passes(run) -> None:
    code, printed = run("False")
    assert code == 0, printed
    assert "2 passed" in printed


def test_a_fixture_that_skips_everything_fails_the_run(run) -> None:
    """As this suite's fixture did: an available backend has the reason "", which is not None."""
    code, printed = run("Status.reason is not None")
    assert code == 1, printed
    assert "2 skipped" in printed


def test_a_backend_that_is_not_there_may_be_skipped(run) -> None:
    code, printed = run("request.param == 'triton'", {"triton": "too old"})
    assert code == 0, printed
    code, printed = run("request.param == 'triton'", {"triton": "not built"})
    assert code == 1, printed


def test_fewer_tests_than_expected_fail_a_whole_run(run) -> None:
    assert run("False", None, 2)[0] == 1
    assert run("False", None, 2, "-k", "q_sample")[0] == 0
    assert run("False", None, 2, "test_q_sample.py")[0] == 0
    # Spelled otherwise, it has no numbers to compare with.
    assert run("False", None, 1, "-m", "gpu and not other")[0] == 1
    assert run("False", None, 1, "-m", "gpu and not other", "test_q_sample.py")[0] == 0


def report(op: str, backend: str, *, skipped: str | None = None, when: str = "call") -> object:
    return SimpleNamespace(
        user_properties=[(gpu_report._PROPERTY, (op, backend))],
        skipped=skipped is not None,
        longrepr=("file", 1, f"Skipped: {skipped}"),
        when="setup" if skipped else when,
    )


def test_the_tally() -> None:
    tally = Tally()
    for when in ("setup", "call", "teardown"):
        tally.pytest_runtest_logreport(report("q_sample", "cuda", when=when))
    tally.pytest_runtest_logreport(report("q_sample", "triton", skipped="triton: too old"))
    tally.pytest_runtest_logreport(report("streams", "cuda", skipped="needs two CUDA devices"))
    assert tally.ran == {("q_sample", "cuda"): 1}
    assert tally.unexplained({"triton": "too old"}) == []
    (problem,) = tally.unexplained({})
    assert "triton: too old" in problem
    expected = {"q_sample": {"cuda": 1, "triton": 1}}
    assert tally.too_few(expected, {"triton": "too old"}) == []
    assert tally.too_few(expected, {}) == ["0 tests of q_sample ran on triton, expected 1 or more"]
    assert any(line.split() == ["q_sample", "1"] for line in tally.table())


def test_every_op_is_expected_on_both_backends() -> None:
    """In the quick set and in all of it; the committed numbers are lower bounds.

    So is every file of tests/gpu that any device can run.
    """
    counts = json.loads(gpu_report.EXPECTED.read_text())
    assert set(counts) == {"gpu", "gpu and not slow"}
    for expected in counts.values():
        assert set(expected) > set(gpu_report.OPS)
        for name, numbers in expected.items():
            assert min(numbers.values()) > 0
            if name in gpu_report.OPS:
                assert set(numbers) == set(gpu_report.BACKENDS)
        files = {
            path.stem.removeprefix("test_") for path in gpu_report.EXPECTED.parent.glob("test_*")
        }
        software_only, of_ops, slow = (
            {"launch_errors"},
            {"group_norm_silu_plans", "empty_batches"},
            {"two_devices"},
        )
        assert files - software_only - of_ops - slow <= set(expected)
