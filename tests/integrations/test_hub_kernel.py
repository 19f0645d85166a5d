"""The build as a kernel repository, loaded by Hugging Face's `kernels` where no fastdiff is."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import pytest

import fastdiff
from fastdiff import _native
from fastdiff.integrations import hub_kernel
from fastdiff.training.errors import UserError

pytest.importorskip("kernels")
needs_libraries = pytest.mark.skipif(_native.load("cpu") is not None, reason="pure Python")

PROGRAM = """
import importlib.abc, pathlib, sys, torch

class NoOther(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        assert name != "fastdiff", "the installed fastdiff was imported"

sys.meta_path.insert(0, NoOther())
import kernels
fastdiff = kernels.get_local_kernel(pathlib.Path(sys.argv[1]), backend=sys.argv[2])
assert sys.modules["fastdiff"].__file__.startswith(sys.argv[1])
x = torch.randn(2, 8, 5, 7, generator=torch.Generator().manual_seed(0), requires_grad=True)
assert fastdiff.default_backend("cpu") == "cpu", fastdiff.backends()
y = fastdiff.ops.group_norm_silu(x, 4, None, None)
expected = torch.nn.functional.silu(torch.nn.functional.group_norm(x, 4))
torch.testing.assert_close(y, expected)
(grad,) = torch.autograd.grad(y.square().sum(), x)
(wanted,) = torch.autograd.grad(expected.square().sum(), x)
torch.testing.assert_close(grad, wanted, rtol=1e-4, atol=1e-5)
print(fastdiff.__name__, "loaded")
"""


@needs_libraries
def test_kernels_loads_every_variant(tmp_path: pathlib.Path) -> None:
    variants = hub_kernel.export(tmp_path)
    backends = {"cpu": "cpu"}
    if _native.build_info().cuda_version:
        backends["cu"] = "cuda"
    assert len(variants) == len(backends)
    import torch

    if torch.version.cuda is None:
        backends.pop("cu", None)  # `kernels` offers a CUDA variant to a torch with CUDA only
    for backend in backends.values():
        command = [sys.executable, "-c", PROGRAM, str(tmp_path), backend]
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        environment["HF_HUB_OFFLINE"] = "1"
        run = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert run.returncode == 0, run.stderr
        assert "loaded" in run.stdout


@needs_libraries
def test_refusals(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub_kernel.export(tmp_path)
    with pytest.raises(UserError, match=r"exists; expected a folder without it"):
        hub_kernel.export(tmp_path)
    # Another fastdiff in the process: one line, not two libraries with the same operators.
    (loader,) = tmp_path.glob("build/*-cpu-*/__init__.py")
    other = loader.read_text().replace(f'!= "{fastdiff.__version__}"', '!= "0.0.9"')
    with pytest.raises(ImportError, match="A process can hold one"):
        exec(compile(other, str(loader), "exec"), {"__file__": str(loader)})
    monkeypatch.setattr(_native, "build_info", lambda: None)
    with pytest.raises(UserError, match="no compiled kernels to export: pure Python"):
        hub_kernel.export(tmp_path / "other")
