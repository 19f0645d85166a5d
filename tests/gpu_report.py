"""What `pytest -m gpu` ran on a device: numbers per op and backend, and why anything did not run.

The run fails if a test was skipped for a reason that `EXPLAINED` does not know. Unless a path or an
option narrowed it, it also fails if fewer tests of an op ran on a backend than the file
`expected_counts.json` says: a fixture or a mark that skips everything cannot go unseen.
"""

from __future__ import annotations

import collections
import json
import os
import pathlib
import platform
import re
from typing import Any

import pytest

EXPECTED = pathlib.Path(__file__).parent / "gpu" / "expected_counts.json"
OPS = (
    "q_sample",
    "philox_normal",
    "posterior_mean",
    "eps_loss",
    "ddim_step",
    "ddpm_step",
    "vlb_terms",
    "group_norm_silu",
)
BACKENDS = ("cuda", "triton")
# What may keep a test from running on a machine with a device.
EXPLAINED = (
    r"needs two CUDA devices",
    r"about the software CUDA device: .+",
    r"this device has no .+",
    r"not on the software CUDA device: .+",
)
_PROPERTY = "gpu test of"


class Tally:
    """Tests that ran, by (op or file, backend), and reasons of those that did not."""

    def __init__(self) -> None:
        self.ran: collections.Counter[tuple[str, str]] = collections.Counter()
        self.skipped: collections.Counter[str] = collections.Counter()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        found = dict(report.user_properties).get(_PROPERTY)
        if found is None:
            return
        if report.skipped and not hasattr(report, "wasxfail"):
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
            self.skipped[str(reason).removeprefix("Skipped: ")] += 1
        elif report.when == "call":
            self.ran[tuple(found)] += 1

    def unexplained(self, missing: dict[str, str]) -> list[str]:
        """Reasons that are not known, given why backends are `missing`."""
        known = [*EXPLAINED, *(re.escape(f"{name}: {why}") for name, why in missing.items())]
        return [
            f"{number} skipped without a reason that is known to explain it: {reason}"
            for reason, number in self.skipped.items()
            if not any(re.fullmatch(pattern, reason) for pattern in known)
        ]

    def too_few(self, expected: dict[str, dict[str, int]], missing: dict[str, str]) -> list[str]:
        """Where fewer tests ran than `expected` has by op and backend."""
        return [
            f"{self.ran[op, backend]} tests of {op} ran on {backend}, expected {least} or more"
            for op, numbers in expected.items()
            for backend, least in numbers.items()
            if backend not in missing and self.ran[op, backend] < least
        ]

    def table(self) -> list[str]:
        columns = [*BACKENDS, "other"]
        names = [*OPS, *sorted({op for op, _ in self.ran} - set(OPS))]
        lines = [f"{'tests that ran':<28}" + "".join(f"{c:>8}" for c in columns)]
        for name in names:
            numbers = [self.ran[name, column] for column in columns]
            lines.append(f"{name:<28}" + "".join(f"{n or '':>8}" for n in numbers))
        return lines


def selects_gpu(config: pytest.Config) -> bool:
    expression = config.option.markexpr or ""
    return "gpu" in expression and "not gpu" not in expression


def devices() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def missing_backends() -> dict[str, str]:
    """Why a backend of GPUs cannot be used here, by its name."""
    import fastdiff

    return {name: s.reason for name, s in fastdiff.backends().items() if name in BACKENDS and not s}


def subject(item: pytest.Item) -> tuple[str, str]:
    """The op (else the file) and the backend that a test is about."""
    parameters = getattr(getattr(item, "callspec", None), "params", {})
    stem = getattr(parameters.get("case"), "op", None) or item.path.stem.removeprefix("test_")
    op = next((name for name in OPS if stem.startswith(name)), stem)
    backend = parameters.get("implementation") or parameters.get("backend")
    return op, backend if backend in BACKENDS else "other"


_tally = pytest.StashKey[Tally]()
_problems = pytest.StashKey[list]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_tally] = Tally()
    config.pluginmanager.register(config.stash[_tally], "gpu tally")


@pytest.hookimpl(tryfirst=True, optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int | None:
    """`-n auto` with `-m gpu`: a process per device. More would share its memory and its time.

    Devices in software belong to a process each: as many as there are cores.
    """
    if not selects_gpu(config) or config.getoption("--software-cuda", None) is not None:
        return None
    return devices() if devices() > 1 else 0


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu"):
            item.user_properties.append((_PROPERTY, subject(item)))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Each process has a device of its own to start with."""
    worker = os.environ.get("PYTEST_XDIST_WORKER", "")
    if worker and item.get_closest_marker("gpu") and selects_gpu(item.config) and devices() > 1:
        import torch

        torch.cuda.set_device(int(worker.removeprefix("gw")) % devices())


def why_not_counted(config: pytest.Config) -> str | None:
    """Why the numbers of tests are not compared with `EXPECTED`: something narrows the run."""
    if config.args_source is not pytest.Config.ArgsSource.TESTPATHS:
        return "paths are given"
    names = ("keyword", "deselect", "collectonly", "lf", "maxfail")
    given = [name for name in names if getattr(config.option, name, False)]
    return f"{given[0]} is given" if given else None


def expected_counts(markexpr: str) -> dict[str, dict[str, int]]:
    """Least numbers of tests of a whole run, by op (or file) and backend.

    Raises
    ------
    KeyError
        There are none for this mark expression.
    """
    return json.loads(EXPECTED.read_text())[markexpr]


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    config = session.config
    if hasattr(config, "workerinput") or not selects_gpu(config) or not devices():
        return
    tally, missing = config.stash[_tally], missing_backends()
    problems = tally.unexplained(missing)
    if why_not_counted(config) is None:
        try:
            problems += tally.too_few(expected_counts(config.option.markexpr), missing)
        except KeyError as name:
            problems.append(f"{EXPECTED.name} has no numbers for -m {name}")
    config.stash[_problems] = problems
    if problems and session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """After `pytest -m gpu`: why nothing ran, or a report that can be pasted into an issue."""
    if not selects_gpu(config) or config.option.collectonly:
        return
    import torch

    import fastdiff

    write = terminalreporter.write_line
    if not devices():
        write("GPU tests skipped: no CUDA device is visible to torch " + torch.__version__)
        return
    counts = {k: len(terminalreporter.stats.get(k, ())) for k in ("passed", "failed", "skipped")}
    terminalreporter.section("fastdiff GPU report: paste it into an issue")
    for index in range(devices()):
        found = torch.cuda.get_device_properties(index)
        memory = found.total_memory / 2**30
        write(f"cuda:{index}: {found.name}, sm_{found.major}{found.minor}, {memory:.0f} GiB")
    write(
        f"torch {torch.__version__}, CUDA {torch.version.cuda}, Python {platform.python_version()}"
    )
    write(f"fastdiff {fastdiff.__version__}")
    for name, status in fastdiff.backends().items():
        write(f"  {name}: {'available' if status else status.reason}")
    write(", ".join(f"{number} {name}" for name, number in counts.items()))
    tally = config.stash[_tally]
    for line in tally.table():
        write(line)
    for reason, number in tally.skipped.items():
        write(f"{number} skipped: {reason}")
    for report in terminalreporter.stats.get("failed", ()):
        write(f"FAILED {report.nodeid}")
    if (why := why_not_counted(config)) is not None:
        write(f"numbers of tests not checked: {why}")
    for problem in config.stash.get(_problems, ()):
        write(f"FAILED {problem}")
    write("Beside it: the output of `python -m fastdiff.verify --device cuda`")
