"""`pytest --software-cuda`: the suite runs on the device, and what it reports fails a test."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

import pytest

from . import Settings, activate, device


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
    for argument in sys.argv[1:]:
        name, _, text = argument.partition("=")
        if name == "--software-cuda":
            _switch_on(text)


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
    return (yield from _watched())


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Fails a test during which the device reported a problem that nobody expected."""
    if device.active:
        device.emulation.launches.clear()
        device.emulation.refused.clear()
    return (yield from _watched())


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Iterator[None]:
    """What is freed with a fixture may still be in use."""
    return (yield from _watched(device.finish))


def _watched(afterwards: Callable[[], None] = lambda: None) -> Iterator[None]:
    if not device.active:
        return (yield)
    try:
        result = yield
        afterwards()
    except BaseException:
        device.take_problems()
        raise
    if problems := device.take_problems():
        pytest.fail("the software CUDA device reports:\n" + "\n".join(map(str, problems)))
    return result
