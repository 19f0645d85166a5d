"""`fastdiff._dispatch` for tests: skipped where it cannot be, an error where it should be."""

from __future__ import annotations

import types

import pytest
import torch

from fastdiff import _native


def cpp_calls() -> types.ModuleType:
    build = _native.build_info()
    if build is None:
        pytest.skip("no native build")
    if build.torch_version != torch.__version__:
        pytest.skip(f"built with torch {build.torch_version}, this is {torch.__version__}")
    module, reason = _native.dispatch()
    assert module is not None, reason
    return module
