"""The lines that count as reachable with a device only."""

from __future__ import annotations

import textwrap

import pytest

from software_cuda.device_lines import device_lines

SOURCE = """
    def run(x, device, backend):
        if device.type == "cuda":
            a = 1  # device
        else:
            a = 2
        for _ in range(3):
            if not x.is_cuda or backend:
                continue
            a += 1  # device
        if x.is_cuda and a:
            with a:
                a.b()  # device
        if x.is_cuda or a:
            a = 3
        if torch.version.hip is not None:
            a = 4  # device
        elif torch.version.cuda is None:
            a = 5
        if device.type == "cuda" and not torch.cuda.is_available():
            raise a
        name = torch.cuda.get_device_name() if x.is_cuda else "cpu"
        number = torch.cuda.device_count()
        if device.type == "cpu":
            return _both()
        torch.cuda.synchronize()  # device
        return _helper()  # device

    def _helper():
        return _deeper()  # device

    def _deeper():
        try:
            return 1  # device
        except KeyError:
            return _both()  # device

    def _both():
        return 2

    def run_triton():
        def inner():  # device
            return _kernel[(1,)]()  # device
        return inner  # device

    @triton.jit
    def _kernel():
        pass
"""


def test_what_needs_a_device():
    source = textwrap.dedent(SOURCE).strip()
    marked = [n for n, line in enumerate(source.splitlines(), 1) if line.endswith("# device")]
    found = device_lines("fastdiff/some.py", source)
    blocks = {n for n in found if source.splitlines()[n - 1].strip() in ("with a:", "try:")}
    assert sorted(found - blocks) == marked


@pytest.mark.parametrize("file", ["triton_kernels/q.py", "fastdiff/_gpus.py"])
def test_whole_files(file):
    source = "x = 1\ndef f():\n    if x.is_cpu:\n        return 1\n    return 2\n"
    assert device_lines(file, source) == {3, 5}
