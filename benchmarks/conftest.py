"""`pytest benchmarks/`: the quick shapes of every op under pytest-benchmark."""

import pathlib

import pytest

import fastdiff

HERE = pathlib.Path(__file__).resolve().parent


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """One process: the project's default of a worker per core makes contenders share the cores."""
    places = [pathlib.Path(argument.partition("::")[0]).resolve() for argument in config.args]
    if places and all(HERE in (place, *place.parents) for place in places):
        config.option.numprocesses = 0
        config.option.dist = "no"


def pytest_report_header() -> str | None:
    """What is timed where nothing was compiled."""
    found = fastdiff.backends()["cpu"]
    if found.available:
        return None
    return (
        f"fastdiff's contenders are its plain PyTorch reference: no CPU kernels ({found.reason}); "
        "build them with: pip install -e ."
    )
