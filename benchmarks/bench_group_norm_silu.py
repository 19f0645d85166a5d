"""group_norm_silu, forward and forward + backward, against eager PyTorch, compiled, and peers.

Shapes: every normalization of ddpm_cifar10, ddpm_256 and the digits model, and two of a latent VAE.
The others compute silu(group_norm(x)). GB/s counts the bytes a perfect kernel moves when a group
stays in a cache: forward reads x and writes y; backward reads x and the gradient again and writes
the gradient of x.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.op_table import Case, Op
from benchmarks.suite import COPIES, OURS, Contender, Workload, compiled, copies
from fastdiff import UNet, ops, reference
from fastdiff.nn import GroupNormSiLU

PASSES = ("forward", "fwd+bwd")
BATCHES = {"ddpm_cifar10": (1, 16, 128), "ddpm_256": (1, 4), "digits": (1, 64)}

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

# Samples of a workload that the gate compares with the float64 reference.
CHECKED_ELEMENTS = 1 << 22


def normalizations(preset: str) -> list[tuple[int, int, int]]:
    """(channels, size, groups) of every normalization behind which SiLU stands, each once."""
    with torch.device("meta"):
        unet = UNet.from_preset(preset)
    found: dict[tuple[int, int, int], None] = {}

    def remember(module: GroupNormSiLU, arguments: tuple[Tensor, ...]) -> None:
        x = arguments[0]
        if module.activation == "silu":
            found[x.shape[1], x.shape[2], module.num_groups] = None

    for module in unet.modules():
        if isinstance(module, GroupNormSiLU):
            module.register_forward_pre_hook(remember)
    size, channels = unet.config.sample_size, unet.config.in_channels
    x_t = torch.empty(1, channels, size, size, device="meta")
    unet(x_t, torch.zeros(1, dtype=torch.int64, device="meta"))
    return sorted(found, key=lambda site: (-site[1], site[0]))


def shapes() -> dict[str, tuple[tuple[int, int, int, int], int]]:
    """Name to (shape, groups)."""
    named = {}
    for preset, batches in BATCHES.items():
        for batch in batches:
            for channels, size, groups in normalizations(preset):
                name = f"{preset} b{batch} {channels}x{size}x{size}"
                named[name] = (batch, channels, size, size), groups
    for channels, size in ((512, 64), (128, 512)):
        named[f"vae b1 {channels}x{size}x{size}"] = (1, channels, size, size), 32
    return named


class Inputs:
    """The tensors of one workload, and what a right result is."""

    def __init__(
        self,
        shape: tuple[int, ...],
        groups: int,
        dtype: torch.dtype,
        memory_format: torch.memory_format,
        backward: bool,
        device: torch.device,
    ) -> None:
        generator = torch.Generator().manual_seed(0)

        def randn(*size: int) -> Tensor:
            return torch.randn(size, generator=generator).to(device, dtype)

        self.groups, self.backward = groups, backward
        self.x = randn(*shape).contiguous(memory_format=memory_format)
        self.grad = randn(*shape).contiguous(memory_format=memory_format)
        self.weight, self.bias = randn(shape[1]), randn(shape[1])
        for tensor in (self.x, self.weight, self.bias):
            tensor.requires_grad_(backward)
        self.bytes = (5 if backward else 2) * self.x.nbytes

    def call(self, function: Callable[..., Tensor]) -> Callable[[], tuple[Tensor, ...]]:
        x, weight, bias = self.x, self.weight, self.bias

        def forward() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return (function(x, self.groups, weight, bias),)

        def both() -> tuple[Tensor, ...]:
            y = function(x, self.groups, weight, bias)
            return (y.detach(), *torch.autograd.grad(y, (x, weight, bias), self.grad))

        return both if self.backward else forward

    def error(self, result: tuple[Tensor, ...]) -> str | None:
        """Some samples against float64, in relative norm; sums over the batch only for finiteness.

        Six roundings to the dtype: eager rounds between its steps.
        """
        count = max(1, min(len(self.x), CHECKED_ELEMENTS // self.x[0].numel()))
        x, weight, bias = (
            t.detach().double().requires_grad_() for t in (self.x[:count], self.weight, self.bias)
        )
        expected = [reference.group_norm_silu(x, self.groups, weight, bias)]
        if self.backward:
            grad = self.grad[:count].double()
            expected += torch.autograd.grad(expected[0], (x, weight, bias), grad)
        limit = 6 * torch.finfo(self.x.dtype).eps / 2 + 64 * 2**-24
        whole_batch = count == len(self.x)
        for name, actual, right in zip(
            ("y", "grad_x", "grad_weight", "grad_bias"), result, expected, strict=False
        ):
            if not whole_batch and name in ("grad_weight", "grad_bias"):
                if not actual.isfinite().all():
                    return f"{name} is not finite"
                continue
            actual = actual[:count] if name in ("y", "grad_x") else actual
            worst = ((actual.double() - right).norm() / right.norm()).item()
            if not worst <= limit:  # so that NaN fails
                return f"{name} is off by {worst:.2g}, allowed {limit:.2g}"
        return None


def eager(x: Tensor, groups: int, weight: Tensor, bias: Tensor) -> Tensor:
    return F.silu(F.group_norm(x, groups, weight, bias))


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
    """What is not ours is PyTorch itself or a peer: where that is inaccurate, it is reported."""
    groups = SHAPES.get(case.labels["shape"], (None, TINY_GROUPS))[1]
    backward = case.mode != PASSES[0]
    inputs = Inputs(case.shape, groups, case.dtype, case.memory_format, backward, case.device)
    others = {"eager": eager}
    if case.compiled:
        others["compile"] = compiled(eager)
    others |= dict(peers(case))
    contenders = {OURS: Contender(inputs.call(ops.group_norm_silu), inputs.error)}
    for name, function in others.items():
        contenders[name] = Contender(inputs.call(function), inputs.error, peer=True)
    contenders |= copies(inputs.x)
    moved = dict.fromkeys(COPIES, 2 * inputs.x.nbytes)
    return Workload(case.labels, inputs.bytes, contenders, moved)


SHAPES = shapes()
OP = Op(
    "group_norm_silu",
    PASSES,
    workload,
    shapes={name: shape for name, (shape, _) in SHAPES.items()},
    default_shapes=DEFAULT_SHAPES,
    quick_shapes=QUICK_SHAPES,
    compiled_shapes=COMPILED_SHAPES,
    cuda_peers=("liger", "apex"),
    tiny_modes=("forward",),
    tiny_shape=TINY,
)
