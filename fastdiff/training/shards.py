"""FSDP2: each process keeps a part of every weight, gradient, average and optimizer state.

Modules hold whole tensors as `DTensor`s. What works element by element (optimizer, averages, loss
scale) is given this process's parts, plain tensors on the same memory; what leaves the process
(checkpoints, samples) is gathered first. Every function takes unsharded tensors too.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

if TYPE_CHECKING:
    from fastdiff.nn import UNet


def shard(unet: nn.Module, device: torch.device) -> None:
    """Share the parameters of a U-Net out to all processes, in place.

    They are whole only while a module computes. Residual blocks and attentions are the units: the
    levels around them hand lists of skips on, which FSDP would copy.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from fastdiff.nn.attention import SelfAttention
    from fastdiff.nn.blocks import ResnetBlock

    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for module in unet.modules():
        if isinstance(module, (ResnetBlock, SelfAttention)):
            fully_shard(module, mesh=mesh)
    fully_shard(unet, mesh=mesh)


def is_sharded(tensor: Tensor) -> bool:
    """Whether this is a DTensor (asked without importing it)."""
    return hasattr(tensor, "full_tensor")


@torch.no_grad()
def local(tensors: Iterable[Tensor]) -> list[Tensor]:
    """This process's parts, on the same memory; unsharded tensors as they are."""
    return [t.to_local() if is_sharded(t) else t for t in tensors]


def move_gradients(parameters: list[Tensor], parts: list[Tensor]) -> None:
    """Give the gradients of sharded parameters to their parts."""
    for parameter, part in zip(parameters, parts, strict=True):
        if is_sharded(parameter) and parameter.grad is not None:
            part.grad, parameter.grad = parameter.grad.to_local(), None


def norm(gradients: list[Tensor], sharded: bool) -> Tensor:
    """The norm of all gradients as one vector, wherever its parts are; nothing is read."""
    total = torch.nn.utils.get_total_norm(gradients)
    if sharded:
        total = total.square()
        dist.all_reduce(total)
        total = total.sqrt()
    return total


@torch.no_grad()
def gather(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Whole tensors, on the CPU where they had been sharded; all processes must call it."""
    return {n: t.full_tensor().cpu() if is_sharded(t) else t for n, t in tensors.items()}


def whole(unet: UNet, device: torch.device) -> UNet:
    """An unsharded copy for sampling; all processes must call it."""
    from fastdiff.nn import UNet

    copy = UNet(unet.config)
    copy.load_state_dict(gather(unet.state_dict()))
    return copy.eval().requires_grad_(False).to(device)


@torch.no_grad()
def load(module: nn.Module, state: dict[str, Tensor]) -> None:
    """`module.load_state_dict(state)` from whole tensors."""
    sharded = {n: p for n, p in module.named_parameters() if is_sharded(p) and n in state}
    for name, parameter in sharded.items():
        parameter.to_local().copy_(_part(state[name], parameter))
    rest = {name: tensor for name, tensor in state.items() if name not in sharded}
    missing, unexpected = module.load_state_dict(rest, strict=False)
    wrong = [*unexpected, *(name for name in missing if name not in sharded)]
    if wrong:
        raise RuntimeError(f"state and module differ in {', '.join(wrong)}")


def gather_optimizer(optimizer: torch.optim.Optimizer, parameters: list[Tensor]) -> dict[str, Any]:
    """The optimizer's state of whole parameters; all processes must call it."""
    state = optimizer.state_dict()
    entries = {
        index: {name: _gathered(value, parameters[index]) for name, value in entry.items()}
        for index, entry in state["state"].items()
    }
    return {**state, "state": entries}


def scatter_optimizer(state: dict[str, Any], parameters: list[Tensor]) -> dict[str, Any]:
    """What `gather_optimizer` gave, cut to this process's parts.

    In the memory format of the parameters, which another --channels-last has changed: the fused
    optimizers walk through both as if they had the same.
    """
    entries = {
        index: {
            name: torch.empty_like(part).copy_(_part(value, whole)) if value.dim() else value
            for name, value in state["state"][index].items()
        }
        for index, (part, whole) in enumerate(zip(local(parameters), parameters, strict=True))
        if index in state["state"]
    }
    return {**state, "state": entries}


def _gathered(value: Tensor, parameter: Tensor) -> Tensor:
    """A part of optimizer state as a whole; what is no part of any (the step) as it is."""
    if not (is_sharded(parameter) and value.dim()):
        return value
    from torch.distributed.tensor import DTensor

    mesh, placements = parameter.device_mesh, parameter.placements
    shape, stride = parameter.shape, parameter.stride()
    value = DTensor.from_local(value, mesh, placements, shape=shape, stride=stride)
    return value.full_tensor().cpu()


def _part(value: Tensor, parameter: Tensor) -> Tensor:
    """This process's rows of a whole: as `torch.chunk` deals them out, maybe none."""
    if not is_sharded(parameter):
        return value
    chunks = value.chunk(parameter.device_mesh.size())
    rank = parameter.device_mesh.get_local_rank()
    return chunks[rank] if rank < len(chunks) else value[:0]
