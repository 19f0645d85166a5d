"""The cache of compiled kernels: shared by processes, complete or absent, built once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ..cache import build_once, cache_directory
from ..compile import host_compiler
from ..errors import CompileError
from ..nvcc import compile_ptx
from .support import needs_nvcc

TESTS = Path(__file__).parents[2]
PROGRAM = """
import numpy as np
from ptx_emulator import run
ptx = '''.version 8.0
.target sm_80
.address_size 64
.visible .entry k(.param .u64 p) {
.reg .b64 %rd<1>; ld.param.u64 %rd0, [p]; st.global.u32 [%rd0], 7; ret; }'''
out = np.zeros(1, np.uint32)
run(ptx, "k", [out], 1, 1)
assert out[0] == 7
"""


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PTX_EMULATOR_CACHE", str(tmp_path / "cache"))
    return cache_directory()


def test_processes_share_what_one_of_them_compiles(cache, tmp_path):
    log, compiler = tmp_path / "log", tmp_path / "compiler"
    compiler.write_text(f'#!/bin/sh\necho "$@" >> {log}\nexec {host_compiler()} "$@"\n')
    compiler.chmod(0o755)
    environment = {**os.environ, "CXX": str(compiler), "PYTHONPATH": str(TESTS)}
    command = [sys.executable, "-c", PROGRAM]
    processes = [subprocess.Popen(command, env=environment) for _ in range(3)]
    assert [process.wait() for process in processes] == [0, 0, 0]
    assert len(log.read_text().splitlines()) == 3  # the runtime, its header, the kernel
    assert len(list(cache.glob("kernel-*.so"))) == 1
    assert not list(cache.glob("building-*"))


def test_failed_builds_leave_nothing(cache):
    def fail(path):
        path.write_text("half of it")
        raise CompileError("no")

    with pytest.raises(CompileError):
        build_once(cache / "result", fail)
    assert not (cache / "result").exists()
    assert not list(cache.glob("building-*"))
    assert build_once(cache / "result", lambda path: path.write_text("all")).read_text() == "all"


@needs_nvcc
def test_ptx_is_compiled_again_when_a_header_changes(cache, tmp_path):
    header, source = tmp_path / "value.cuh", tmp_path / "value.cu"
    source.write_text(
        '#include "value.cuh"\nextern "C" __global__ void k(int* x) { *x = VALUE; }\n'
    )
    for value in (4711, 4712):
        header.write_text(f"#define VALUE {value}\n")
        for _ in range(2):
            assert str(value) in compile_ptx(source)
    assert len(list(cache.glob("nvcc-*.ptx"))) == 2
