"""How often Triton compiles: few kernels for all layers of a network, none for another batch."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # benchmarks/ is not installed

from benchmarks.audit.triton_aot import Launch, recorded_launches
from fastdiff.triton_kernels import _launch, eps_loss, q_sample
from fastdiff.triton_kernels import group_norm_silu as norms

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
# Of the 51 normalizations of ddpm_cifar10: channels, height, with the time's bias, with SiLU.
LAYERS = [
    *((128, size, bias, True) for size, bias in ((32, False), (32, True), (16, False))),
    *((256, size, bias, True) for size in (16, 8, 4) for bias in (False, True)),
    *((512, size, False, True) for size in (4, 8, 16)),
    *((channels, size, False, True) for channels, size in ((384, 16), (384, 32), (256, 32))),
    *((256, size, False, False) for size in (16, 4)),  # in front of attention
]


def variant(launch: Launch) -> tuple[str, str, str]:
    """What Triton keeps a compiled kernel for: see JITFunction.run."""
    kernel = launch.kernel
    backend = make_backend(GPUTarget("cuda", 90, 32))
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    _, specialization, options = bind(*launch.arguments, **launch.options)
    return kernel.fn.__name__, str(specialization), str(sorted(options.items()))


def training_step(batch: int, dtype: torch.dtype, layout: str) -> set[tuple[str, str, str]]:
    """The variants of a step's Triton kernels."""

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        x = torch.empty(shape, dtype=dtype, device="meta")
        return x.to(memory_format=FORMATS[layout]) if len(shape) == 4 else x

    channels_last = layout == "channels_last"
    images, keys = (batch, 3, 32, 32), empty(batch, dtype=torch.int64)
    noisy, output = empty(*images), empty(*images)
    table, each = empty(1000), empty(batch)
    flip = empty(batch, dtype=torch.bool)
    with recorded_launches() as launches:
        pixels = empty(*images, dtype=torch.uint8)
        q_sample.q_sample(
            noisy, pixels, keys, table, table, None, keys, None, 0, flip, channels_last
        )
        eps_loss.eps_loss(each, output, None, keys, None, 0, None, 1.0, 0, channels_last)
        eps_loss.eps_loss_backward(
            output, None, each, output, None, keys, None, 0, None, 1.0, 0, channels_last
        )
        for channels, size, with_bias, silu in LAYERS:
            x = empty(batch, channels, size, size, dtype=dtype)
            weight, statistics = empty(channels), empty(batch, 32)
            bias = empty(batch, channels, dtype=dtype) if with_bias else None
            small = weight, weight, bias, None, None
            call = (1 - silu, channels_last)
            norms.group_norm_silu(
                x, statistics, statistics, x, 32, *small[:2], 1e-6, *small[2:], *call
            )
            norms.group_norm_silu_backward(
                x, *small, x, x, statistics, statistics, 32, *small, *call
            )
    return {variant(launch) for launch in launches}


@pytest.mark.parametrize("max_blocks", [1, 8])
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_training_step_compiles_few_kernels(dtype, layout, max_blocks) -> None:
    """At most 20 for all normalizations, which were 38, and four for noising and loss."""
    with (
        mock.patch.object(_launch, "max_blocks", return_value=max_blocks),
        mock.patch.object(_launch, "holds_pairs", return_value=True),
    ):
        whole = training_step(128, dtype, layout)
        found = [name.startswith("group_norm_silu") for name, *_ in whole]
        assert 10 < sum(found) <= 20, sorted(whole)
        assert 3 <= len(found) - sum(found) <= 4, sorted(whole)
        # A part of a batch, and what is left of the images for the last one.
        for batch in (64, 32, 37, 2):
            assert training_step(batch, dtype, layout) <= whole, batch


@pytest.mark.parametrize(("terminal", "seconds", "lines"), [(1, 0.5, 1), (1, 0, 0), (0, 0.5, 0)])
def test_a_terminal_is_told_that_kernels_are_compiled(
    terminal, seconds, lines, monkeypatch, capsys
) -> None:
    """Once, and only while somebody waits."""
    monkeypatch.setattr(_launch, "_known", set())
    monkeypatch.setattr(_launch, "_told", type(_launch._told)())
    monkeypatch.setattr(_launch, "_run", lambda *_: time.sleep(seconds))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: bool(terminal))
    for kernel in ("one", "another", "one"):
        launch: Any = _launch.launch
        launch(kernel, 1, torch.device("cpu"))
    assert capsys.readouterr().err.count("compiling Triton kernels ...\n") == lines
