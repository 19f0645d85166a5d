"""`torchrun -m fastdiff.train` on two devices trains what one device trains."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from gpu.needs import GPU, two_devices
from gpu.software import on_software_device
from gpu.test_commands import FLAGS, losses, metrics, tolerance

pytestmark = [*GPU, two_devices, pytest.mark.slow]

TESTS = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(
    "flags", [("--exact",), (), ("--amp", "bf16", "--channels-last", "--grad-accum", "2")], ids=str
)
def test_training(flags: tuple[str, ...], tmp_path: Path) -> None:
    script = [str(TESTS / "gpu/train_over_gloo.py"), *FLAGS, *flags, "--device", "cuda"]
    script += ["--gloo"] if on_software_device() else []
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    launchers = {"one": [sys.executable], "two": [*torchrun, "--nproc-per-node", "2"]}
    paths = [str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    for name, launcher in launchers.items():
        command = [*launcher, *script, "--out", str(tmp_path / name)]
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False, timeout=1500
        )
        assert done.returncode == 0, done.stderr[-4000:]
    assert len(metrics(tmp_path / "two")) == 4
    np.testing.assert_allclose(
        losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=tolerance(flags or ("bf16",))
    )
