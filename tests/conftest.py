"""Settings for the whole suite."""

import os

pytest_plugins = ["gpu_report", "software_cuda.pytest_plugin"]

if "PYTEST_XDIST_WORKER" in os.environ:
    # One core per worker: threads of several workers on the same cores only wait for each other.
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["MKL_NUM_THREADS"] = "1"
# As where other people's tests run: Inductor then fails where it only warns elsewhere.
os.environ["CI"] = "true"


def pytest_runtest_setup(item) -> None:
    if item.get_closest_marker("cpu_kernels") is None:
        return
    import pytest

    import fastdiff

    if not (status := fastdiff.backends()["cpu"]):
        pytest.skip(f"about the compiled CPU kernels: {status.reason}")
