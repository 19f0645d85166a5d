"""`pytest --software-cuda`: the suite runs on the device, and what it reports fails a test."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator

import pytest

from . import Settings, activate, device

_PROBLEMS = pytest.StashKey[list]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--software-cuda",
        nargs="?",
        const="sm_90",
        metavar="DEVICE",
        help='torch\'s "cuda" device in software (tests/software_cuda/README.md): such as sm_90, '
        "the default, or sm_80,devices=2,memory=4,lazy",
    )
    # Now, as a conftest.py of a folder that is named on the command line may import torch before
    # pytest has parsed its options.
    arguments = [*sys.argv[1:], "-"]
    for argument, following in itertools.pairwise(arguments):
        name, is_given, value = argument.partition("=")
        if name == "--software-cuda":
            # As argparse reads it: the next word, if that is no option.
            _switch_on(value if is_given or following.startswith("-") else following)


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """For options that come from elsewhere, such as PYTEST_ADDOPTS."""
    if (text := config.getoption("--software-cuda")) is not None:
        _switch_on(text)


def _switch_on(text: str) -> None:
    try:
        activate(Settings.parse(text))
    except ValueError as error:
        raise pytest.UsageError(str(error)) from None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Iterator[None]:
    """Fixtures may use the device too."""
    return (yield from _watched(item))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    if device.active:
        device.emulation.launches.clear()
        device.emulation.refused.clear()
    return (yield from _watched(item))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Iterator[None]:
    """What is freed with a fixture may still be in use."""
    return (yield from _watched(item, device.finish))


def _watched(item: pytest.Item, afterwards: Callable[[], None] = lambda: None) -> Iterator[None]:
    if not device.active:
        return (yield)
    try:
        return (yield)
    finally:
        try:
            afterwards()
        finally:
            item.stash[_PROBLEMS] = device.take_problems()


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[pytest.TestReport]:
    """Fails a test during which the device reported a problem that nobody expected.

    Also one that was skipped then, or was expected to fail.
    """
    report = yield
    if problems := item.stash.get(_PROBLEMS, []):
        item.stash[_PROBLEMS] = []
        text = "the software CUDA device reports:\n" + "\n".join(map(str, problems))
        if report.failed:
            report.sections.append(("software CUDA device", text))
        else:
            report.outcome, report.longrepr = "failed", text
            vars(report).pop("wasxfail", None)
    return report
