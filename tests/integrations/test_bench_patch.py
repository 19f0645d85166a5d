"""bench_patch compares before it times."""

import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # benchmarks/ is not installed

from benchmarks import bench_patch


def test_benchmark_times_only_what_is_right():
    labels = {"network": "vae", "layout": "nchw", "dtype": "fp32", "mode": "training"}
    work = bench_patch.workload(labels, 1, torch.device("cpu"), compiled=False, tiny=True)
    results = {side: contender.run() for side, contender in work.contenders.items()}
    for side, contender in work.contenders.items():
        assert contender.error(results[side]) is None
        assert contender.error(1.01 * results[side]) is not None
