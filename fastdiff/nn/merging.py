"""Maps of one input as one map: fewer and larger kernels for the same function.

On a GPU a network of this size is hundreds of small kernels, and with small batches the host is
slower in launching them than the GPU in running them. Of a U-Net's parameters some meet the same
input, or are added to the same output:

- all blocks project the same time embedding: one linear map with stacked weights;
- the bias of a block's first convolution is added right before the second normalization, which
  adds a bias per channel itself: the time's projection, or with "scale_shift" this bias alone;
- the biases of the second convolution and of the shortcut meet in the block's output, where the
  normalization that follows adds them, if one does; and in channels_last a 1x1 convolution is a
  linear map, whose bias costs no kernel;
- queries, keys and values of an attention: one linear map.

cuDNN's convolutions get their bias from a second kernel, so every one that goes saves a launch.
Results differ by rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class BlockInputs(NamedTuple):
    """What a residual block takes instead of the time embedding if maps are merged."""

    time: Tensor
    """(B, C or 2C): the block's projection of the time embedding; with the bias of `conv1`, if it
    is added to the channels."""
    bias: Tensor | None
    """(C,): of `conv2` and `conv_shortcut`, if there is a convolution there."""


class QKV(NamedTuple):
    """Weight (3C, C) and bias (3C,) of an attention's queries, keys and values."""

    weight: Tensor
    bias: Tensor


class Merged:
    """The merged parameters of one forward pass, in the order in which the blocks ask for them.

    Of the network's `ResnetBlock`s and `SelfAttention`s, in the order in which they are called.
    """

    def __init__(
        self, resnets: Sequence[nn.Module], attentions: Sequence[nn.Module], temb: Tensor
    ) -> None:
        blocks, attentions = _merge(resnets, attentions, temb)
        self._blocks, self._attentions = iter(blocks), iter(attentions)

    def block(self) -> BlockInputs:
        """Of the next residual block."""
        return next(self._blocks)

    def attention(self) -> QKV:
        """Of the next attention."""
        return next(self._attentions)


def mergeable(modules: Iterable[nn.Module]) -> bool:
    """Whether these maps are nothing but their weights: no other class, no hook, not sharded."""
    return all(
        type(module) in (nn.Linear, nn.Conv2d)
        and type(module.weight) is nn.Parameter
        and module.bias is not None
        and not module._forward_hooks
        and not module._forward_pre_hooks
        and not module._backward_hooks
        and not module._backward_pre_hooks
        for module in modules
    )


def merged_maps(resnets: Sequence[nn.Module], attentions: Sequence[nn.Module]) -> list[nn.Module]:
    """Those that a merged forward pass does not call."""
    maps: list[nn.Module] = []
    for resnet in resnets:
        maps += [resnet.conv1, resnet.conv2, resnet.time_emb_proj]
        if isinstance(resnet.conv_shortcut, nn.Conv2d):
            maps.append(resnet.conv_shortcut)
    for attention in attentions:
        maps += attention.projections()
    return maps


def _merge(
    resnets: Sequence[nn.Module], attentions: Sequence[nn.Module], temb: Tensor
) -> tuple[list[BlockInputs], list[QKV]]:
    """Three kernels whatever the number of blocks: one stacks parameters, two add biases up."""
    projections = [resnet.time_emb_proj for resnet in resnets]
    with_shortcut = [r for r in resnets if isinstance(r.conv_shortcut, nn.Conv2d)]
    # Of biases that are added to one output: those of `first` and those of `second`.
    first = [r.conv2.bias for r in with_shortcut]
    second = [r.conv_shortcut.bias for r in with_shortcut]
    stacked = [[projection.weight for projection in projections]]
    stacked += [[linear.weight for linear in a.projections()] for a in attentions]
    stacked += [[linear.bias for linear in a.projections()] for a in attentions]
    if resnets[0].scale_shift:
        stacked += [[projection.bias for projection in projections]]
    else:
        first += [projection.bias for projection in projections]
        second += [resnet.conv1.bias for resnet in resnets]

    sizes = [sum(tensor.numel() for tensor in part) for part in stacked]
    everything = torch.cat([tensor.flatten() for part in stacked for tensor in part])
    time_weight, *rest = everything.split(sizes)
    sums: list[Tensor] = []
    if first:
        total = torch.cat(first + second).view(2, -1).sum(0)
        alone = [len(bias) for bias in first[: len(with_shortcut)]]
        sums = list(total.split(alone + _rest(first, len(with_shortcut))))
    time_bias = rest.pop() if resnets[0].scale_shift else sums.pop()
    outputs = [projection.weight.shape[0] for projection in projections]
    time_weight = time_weight.view(-1, temb.shape[1])
    times = F.linear(temb, time_weight, time_bias).split(outputs, dim=1)

    biases = iter(sums)
    blocks = [
        BlockInputs(time, next(biases) if isinstance(r.conv_shortcut, nn.Conv2d) else None)
        for r, time in zip(resnets, times, strict=True)
    ]
    weights, vectors = rest[: len(attentions)], rest[len(attentions) :]
    qkv = [
        QKV(weight.view(len(vector), -1), vector)
        for weight, vector in zip(weights, vectors, strict=True)
    ]
    return blocks, qkv


def _rest(parts: list[Tensor], start: int) -> list[int]:
    """The number of elements from part `start` on, if there are any."""
    size = sum(len(part) for part in parts[start:])
    return [size] if size else []


def without_bias(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """The convolution of x, its bias left out."""
    return conv._conv_forward(x, conv.weight, None)


def with_common_bias(
    shortcut: nn.Conv2d, conv2: nn.Conv2d, bias: Tensor, x: Tensor
) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """Both convolutions, one of them with `bias` in place of their own two; `shortcut` is 1x1.

    In half precision and channels_last that is the shortcut, as a linear map of pixels. In float32
    torch would compute that without TF32, unlike a convolution.
    """
    if x.dtype.itemsize == 2 and x.is_contiguous(memory_format=torch.channels_last):
        return partial(_linear, shortcut.weight, bias), partial(without_bias, conv2)
    return (
        partial(without_bias, shortcut),
        lambda h: conv2._conv_forward(h, conv2.weight, bias),
    )


def _linear(weight: Tensor, bias: Tensor, x: Tensor) -> Tensor:
    return F.linear(x.permute(0, 2, 3, 1), weight.flatten(1), bias).permute(0, 3, 1, 2)
