"""group_norm_silu in the tables of `python -m benchmarks`, and its peers on CUDA."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import bench_group_norm_silu as bench
from benchmarks.op_table import Case, Op
from benchmarks.suite import COPIES, OURS, Contender, Workload, copies

# Every network, the batch sizes at which the kernels divide the work in different ways, and the
# smallest and largest layers.
DEFAULT_SHAPES = (
    "ddpm_cifar10 b1 128x32x32",
    "ddpm_cifar10 b1 256x16x16",
    "ddpm_cifar10 b1 512x4x4",
    "ddpm_cifar10 b16 128x32x32",
    "ddpm_cifar10 b16 256x8x8",
    "ddpm_cifar10 b128 256x16x16",
    "ddpm_cifar10 b128 256x4x4",
    "ddpm_256 b1 128x256x256",
    "ddpm_256 b1 512x64x64",
    "ddpm_256 b1 512x8x8",
    "digits b64 64x4x4",
    "vae b1 512x64x64",
    "vae b1 128x512x512",
)
QUICK_SHAPES = ("ddpm_cifar10 b1 256x16x16", "ddpm_cifar10 b16 128x32x32")
COMPILED_SHAPES = (*QUICK_SHAPES, "ddpm_cifar10 b1 512x4x4", "vae b1 512x64x64")
TINY = (2, 16, 4, 4)
TINY_GROUPS = 4


def liger(x: Tensor, groups: int, weight: Tensor, bias: Tensor) -> Tensor:
    from liger_kernel.ops.group_norm import LigerGroupNormFunction

    return F.silu(LigerGroupNormFunction.apply(x, weight, bias, x.shape[1], groups, 1e-5))


def apex(x: Tensor, groups: int, weight: Tensor, bias: Tensor) -> Tensor:
    from apex.contrib.group_norm import GroupNorm

    layer = GroupNorm(groups, x.shape[1], eps=1e-5, affine=True, act="silu")
    layer.weight, layer.bias = torch.nn.Parameter(weight), torch.nn.Parameter(bias)
    return layer(x)


def peers(case: Case) -> Iterator[tuple[str, Callable[..., Tensor]]]:
    """What is installed and can take the input: both need CUDA, apex also channels_last."""
    if case.device.type != "cuda":
        return
    if importlib.util.find_spec("liger_kernel") is not None:
        yield "liger", liger
    if case.labels["layout"] == "channels_last" and importlib.util.find_spec("apex") is not None:
        yield "apex", apex


def workload(case: Case) -> Workload:
    labels = {**case.labels, "pass": case.mode}
    groups = SHAPES.get(case.labels["shape"], (None, TINY_GROUPS))[1]
    made = bench.workload(labels, case.shape, groups, case.device, case.compiled)
    # What the others call is PyTorch itself: where that is inaccurate, it is reported.
    contenders = {
        name: replace(contender, peer=name != OURS) for name, contender in made.contenders.items()
    }
    backward = case.mode != "forward"
    inputs = bench.Inputs(case.shape, groups, case.dtype, case.memory_format, backward, case.device)
    for name, function in peers(case):
        contenders[name] = Contender(inputs.call(function), inputs.error, peer=True)
    contenders |= copies(inputs.x)
    moved = dict.fromkeys(COPIES, 2 * inputs.x.nbytes)
    return Workload(case.labels, made.bytes, contenders, {**made.own_bytes, **moved})


SHAPES = bench.shapes()
OP = Op(
    "group_norm_silu",
    bench.PASSES,
    workload,
    shapes={name: shape for name, (shape, _) in SHAPES.items()},
    default_shapes=DEFAULT_SHAPES,
    quick_shapes=QUICK_SHAPES,
    compiled_shapes=COMPILED_SHAPES,
    cuda_peers=("liger", "apex"),
    tiny_modes=("forward",),
    tiny_shape=TINY,
)
