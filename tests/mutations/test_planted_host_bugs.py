"""Bugs between Python and a kernel, planted one at a time: the GPU suite must catch each.

It runs on the software CUDA device. Most of these bugs give right numbers on a machine with one
idle device. `pytest -m slow tests/mutations` plants them all; the default run two.
"""

from __future__ import annotations

import pytest
import torch

from .mutant import Mutant, assert_caught, mutants
from .project_copy import ProjectCopy

STREAMS = "tests/gpu/test_streams_and_devices.py"
PLANS = "tests/gpu/test_group_norm_silu_plans.py"
GRAPHS = "tests/gpu/test_cuda_graphs.py"
COMMANDS = "tests/gpu/test_commands.py"
BINDING = "csrc/bindings/cuda.cpp"
COMPILES = 1500.0  # seconds for a C++ file of torch's headers on a busy machine


def gpu(*tests: str, devices: int = 1) -> tuple[str, ...]:
    return f"--software-cuda=devices={devices}", "-m", "gpu", *tests


MUTANTS = [
    Mutant(
        "work on the default stream in place of the current one",
        BINDING,
        "launcher(&args, static_cast<cudaStream_t>(stream))",
        "launcher(&args, static_cast<cudaStream_t>(nullptr))",
        gpu(STREAMS, "-k", "current_stream and q_sample and cuda"),
        "foreign stream",
        seconds=COMPILES,
    ),
    Mutant(
        "the current stream of another device",
        BINDING,
        "aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream)",
        "aoti_torch_get_current_cuda_stream(0, &stream)",
        gpu(STREAMS, "-k", "current_stream and q_sample and cuda", devices=2),
        "foreign stream",
        seconds=COMPILES,
    ),
    Mutant(
        "a missing device guard",
        "csrc/bindings/q_sample.h",
        "  const typename Device::Guard guard(x0);\n",
        "",
        gpu(STREAMS, "-k", "device_of_its_inputs and q_sample and cuda", devices=2),
        "CUDA error",
        seconds=COMPILES,
    ),
    Mutant(
        "a missing copy of a tensor that is not contiguous",
        "csrc/bindings/tensors.h",
        "  return in_format(*keys, false);",
        "  return *keys;",
        gpu("tests/ops/test_philox_normal.py", "-k", "strided_keys and cuda and not ptx"),
        "assert",
        seconds=COMPILES,
    ),
    Mutant(
        "swapped arguments of a launcher",
        "csrc/bindings/q_sample.h",
        "args.sqrt_alpha_bar = a_ready",
        "args.sqrt_alpha_bar = b_ready",
        gpu("tests/ops/test_q_sample.py", "-k", "test_forward and cuda and not ptx and odd"),
        "error exceeds the bound",
        seconds=COMPILES,
    ),
    Mutant(
        "a kernel attribute that is set on one device only",
        "csrc/cuda/group_norm_silu_launch.cuh",
        "done.insert({kernel, attribute, device});",
        "for (int other = 0; other < 8; ++other) done.insert({kernel, attribute, other});",
        gpu(PLANS, "-k", "each_device", devices=2),
        "launch refused",
        seconds=COMPILES,
    ),
    Mutant(
        "a kernel on a stream of its own, whose inputs are freed before it has run",
        "triton_kernels/_launch.py",
        '    if device.type == "cuda" and device.index != torch.cuda.current_device():\n'
        "        with torch.cuda.device(device):\n",
        '    if device.type == "cuda":\n'
        "        side = torch.cuda.Stream(device)\n"
        "        side.wait_stream(torch.cuda.current_stream(device))\n"
        "        with torch.cuda.device(device), torch.cuda.stream(side):\n",
        (
            "--software-cuda=lazy",
            *("-m", "gpu", "tests/ops/test_q_sample.py", "-k", "test_forward and triton and odd"),
        ),
        "freed in use",
    ),
    Mutant(
        "a pinned buffer that is filled again before its copy has run",
        "fastdiff/training/data.py",
        "            return images.pin_memory(), None if labels is None else labels.pin_memory()\n",
        "            self.pinned = getattr(self, 'pinned', {})\n"
        "            kind = tuple(images.shape), images.dtype\n"
        "            held = torch.empty_like(images, pin_memory=True)\n"
        "            held = self.pinned.setdefault(kind, held)\n"
        "            labels = None if labels is None else labels.pin_memory()\n"
        "            return held.copy_(images), labels\n",
        ("--software-cuda=lazy", "-m", "gpu", COMMANDS, "-k", "test_training and fp32"),
        "Not equal to tolerance",
    ),
    Mutant(
        "a value read by the host in the loop of a sampler",
        "fastdiff/samplers/base.py",
        "                x_next, pred_x0 = step(run, x, row, k + 1)\n",
        "                x_next, pred_x0 = step(run, x, row, k + 1)\n"
        "                x_next.mean().item()\n",
        gpu("tests/samplers/test_base.py", "-k", "never_waits"),
        "synchronizing CUDA operation",
        quick=True,
    ),
    Mutant(
        "a graph that captures a value of the host",
        "fastdiff/nn/embedding.py",
        "    angles = t[:, None] * frequencies  #",
        "    math.calls = getattr(math, 'calls', 0) + 1\n"
        "    angles = t[:, None] * frequencies + math.calls  #",
        gpu(GRAPHS, "-k", "sampler_loop and cuda"),
        "Tensor-likes are not close",
    ),
    Mutant(
        "a fixture that skips every test, as an available backend has no reason",
        "tests/gpu/conftest.py",
        "if not (status := fastdiff.backends()[request.param]):",
        "if (status := fastdiff.backends()[request.param]).reason is not None:",
        gpu(STREAMS, "-k", "noise_is"),
        "skipped without a reason that is known to explain it",
        quick=True,
    ),
]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> ProjectCopy:
    return ProjectCopy(tmp_path_factory.mktemp("project"))


@pytest.mark.skipif(torch.version.cuda is None, reason="this torch is built without CUDA")
@mutants(MUTANTS)
def test_planted_bug_is_caught(project: ProjectCopy, mutant: Mutant) -> None:
    assert_caught(project, mutant)
