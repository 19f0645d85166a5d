"""Settings for the whole suite, and what `pytest -m gpu` says at its end."""

import os
import platform

if "PYTEST_XDIST_WORKER" in os.environ:
    # One core per worker: threads of several workers on the same cores only wait for each other.
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["MKL_NUM_THREADS"] = "1"


def pytest_runtest_setup(item) -> None:
    if item.get_closest_marker("cpu_kernels") is None:
        return
    import pytest

    import fastdiff

    if not (status := fastdiff.backends()["cpu"]):
        pytest.skip(f"about the compiled CPU kernels: {status.reason}")


def pytest_terminal_summary(terminalreporter, config) -> None:
    """After `pytest -m gpu`: why nothing ran, or a report that can be pasted into an issue."""
    if "gpu" not in config.option.markexpr or "not gpu" in config.option.markexpr:
        return
    import torch

    import fastdiff

    write = terminalreporter.write_line
    if not torch.cuda.is_available():
        write("GPU tests skipped: no CUDA device is visible to torch " + torch.__version__)
        return
    counts = {k: len(terminalreporter.stats.get(k, ())) for k in ("passed", "failed", "skipped")}
    terminalreporter.section("fastdiff GPU report: paste it into an issue")
    for index in range(torch.cuda.device_count()):
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
    for report in terminalreporter.stats.get("failed", ()):
        write(f"FAILED {report.nodeid}")
    write("Beside it: the output of `python -m fastdiff.verify --device cuda`")
