"""Settings for the whole suite."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:
    # One core per worker: threads of several workers on the same cores only wait for each other.
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["MKL_NUM_THREADS"] = "1"
