"""Kernels that a sampler step and a training step launch, counted on the device in software.

    python -m tests.software_cuda python -m benchmarks.launches [--preset NAME] [--json FILE]

A launch is a kernel of fastdiff or an operator of torch that has one. Operators that are several
kernels on a GPU count as such: a convolution with a bias two, because torch adds the bias that it
does not give to cuDNN by a second kernel; its backward pass two, and three with a bias. Attention
counts as one, fused, in either direction. What a library launches beyond that (transposes of
cuDNN, the parts of a reduction) is not visible here. The device in software shows no times.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import pathlib
import sys
import tempfile
import unittest.mock
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import fastdiff
from fastdiff.nn import UNet
from fastdiff.nn.presets import preset_config
from fastdiff.samplers import DDIM
from fastdiff.training import RunFolder, TrainConfig, Trainer
from fastdiff.training.data import ArrayDataset


@dataclass(frozen=True)
class Launches:
    """Of one step."""

    kernels: int  # fastdiff's
    operators: int  # torch's
    within: int  # further kernels of these operators: biases, and the parts of backward passes

    @property
    def total(self) -> int:
        return self.kernels + self.operators + self.within


class _Attention(torch.autograd.Function):
    """Attention whose own operators are not counted: on a GPU it is one kernel."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, counter: _Counter) -> Tensor:
        ctx.counter = counter
        with counter.one_operator(), torch.enable_grad():
            ctx.inputs = [x.detach().requires_grad_() for x in (q, k, v)]
            ctx.output = counter.attention(*ctx.inputs)
        return ctx.output.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        with ctx.counter.one_operator():
            return *torch.autograd.grad(ctx.output, ctx.inputs, grad), None


class _Counter:
    """Counts between `start` and `stop`; the device in software must be active."""

    attention = staticmethod(F.scaled_dot_product_attention)
    _conv2d = staticmethod(F.conv2d)

    def __init__(self) -> None:
        from software_cuda import device

        self._device = device
        self.start()

    def start(self) -> None:
        self._convolutions: list[bool] = []
        self._hidden = 0
        self._before = self._now()

    def stop(self, trains: bool) -> Launches:
        operators = self._now()
        kernels = operators.pop("fastdiff") - self._before.pop("fastdiff")
        found = sum((operators - self._before).values()) - self._hidden
        within = sum(self._convolutions)
        if trains:
            within += sum(1 + with_bias for with_bias in self._convolutions)
        return Launches(kernels, found, within)

    def _now(self) -> Counter:
        torch.cuda.synchronize()
        counts = Counter(self._device.operator_calls())
        counts["fastdiff"] = self._device.counts().launches
        return counts

    @contextlib.contextmanager
    def one_operator(self) -> Iterator[None]:
        before = sum(self._device.operator_calls().values())
        yield
        self._hidden += sum(self._device.operator_calls().values()) - before - 1

    @contextlib.contextmanager
    def watching(self) -> Iterator[_Counter]:
        def conv2d(x: Tensor, weight: Tensor, bias: Tensor | None = None, *rest: Any) -> Tensor:
            self._convolutions.append(bias is not None)
            return self._conv2d(x, weight, bias, *rest)

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if torch.is_autocast_enabled("cuda"):
                q, k, v = (x.to(torch.get_autocast_dtype("cuda")) for x in (q, k, v))
            return _Attention.apply(q, k, v, self)

        with (
            unittest.mock.patch.object(F, "conv2d", conv2d),
            unittest.mock.patch.object(F, "scaled_dot_product_attention", attend),
        ):
            yield self


class _Marking(torch.nn.Module):
    """The model, which says when it is called."""

    def __init__(self, model: torch.nn.Module, called: Callable[[], None]) -> None:
        super().__init__()
        self.model, self.called = model, called

    def forward(self, *arguments: Any) -> Tensor:
        self.called()
        return self.model(*arguments)


def sampler_step(preset: str, merged: bool, **to: Any) -> Launches:
    """Of DDIM, one image: from the second call of the network to the third."""
    unet = UNet.from_preset(preset).eval().requires_grad_(False).to("cuda", **to)
    unet.set_merged(merged)
    config = unet.config
    found: list[Launches] = []
    with _Counter().watching() as counter:

        def called() -> None:
            found.append(counter.stop(trains=False))
            counter.start()

        DDIM(fastdiff.GaussianDiffusion(fastdiff.NoiseSchedule.linear(1000)), 3).sample(
            _Marking(unet, called),
            (1, config.in_channels, config.sample_size, config.sample_size),
            progress=False,
        )
    return found[-1]


def training_step(preset: str, **settings: Any) -> Launches:
    """Of the second step of the trainer, two images."""
    config = preset_config(preset)
    shape = (2, config.sample_size, config.sample_size, config.in_channels)
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))
    settings = {"preset": preset, "batch_size": 2, "steps": 10, "flip": True, **settings}
    with tempfile.TemporaryDirectory() as folder:
        train = TrainConfig(out=folder, schedule="linear", **settings)
        dataset = ArrayDataset(pixels.numpy(), np.zeros(2, np.int64), ("all",))
        trainer = Trainer(train, dataset, RunFolder(train.run_folder), torch.device("cuda"))
        trainer._train_step(pixels.pin_memory(), None)
        with _Counter().watching() as counter:
            trainer._train_step(pixels.pin_memory(), None)
            return counter.stop(trains=True)


AMP = {"amp": "bf16", "channels_last": True}
ROWS: dict[str, Callable[[str], Launches]] = {
    "sampler step, float32": lambda p: sampler_step(p, True),
    "sampler step, float32, set_merged(False)": lambda p: sampler_step(p, False),
    "sampler step, bfloat16 weights, channels_last": lambda p: sampler_step(
        p, True, dtype=torch.bfloat16, memory_format=torch.channels_last
    ),
    "training step, --exact": lambda p: training_step(p, exact=True),
    "training step, --amp bf16 --channels-last": lambda p: training_step(p, **AMP),
}


def main(argv: list[str] | None = None) -> int:
    """Print a table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.launches", description=__doc__.partition("\n\n")[0]
    )
    parser.add_argument("--preset", default="ddpm_cifar10")
    parser.add_argument("--only", default="", help="rows whose names begin like this")
    parser.add_argument("--json", type=pathlib.Path, help="file for the counts")
    options = parser.parse_args(argv)
    if not (torch.cuda.is_available() and "software" in torch.cuda.get_device_name()):
        parser.error("run it as: python -m tests.software_cuda python -m benchmarks.launches")
    print(f"{options.preset}, launches of one step:\n")
    print("| | fastdiff's kernels | torch operators | further kernels in them | launches |")
    print("|---|---|---|---|---|")
    found = {}
    for name, count in ROWS.items():
        if not name.startswith(options.only):
            continue
        launches = found[name] = count(options.preset)
        numbers = launches.kernels, launches.operators, launches.within, launches.total
        print(f"| {name} | {' | '.join(map(str, numbers))} |", flush=True)
    if options.json:
        options.json.write_text(json.dumps({k: asdict(v) for k, v in found.items()}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
