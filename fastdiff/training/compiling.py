"""How the trainer compiles its U-Net."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fastdiff.nn.attention import SelfAttention
from fastdiff.nn.blocks import Downsample, ResnetBlock, Upsample

_REGIONS = (ResnetBlock, SelfAttention, Downsample, Upsample)


def compiled(network: nn.Module, *, regional: bool, **options: Any) -> nn.Module:
    """Compile a U-Net as a whole, or each of its blocks by itself.

    The backward pass of what is compiled in one piece hands over all gradients at its end. So under
    DistributedDataParallel a whole network's are averaged only when there is nothing left to
    compute meanwhile; those of a block while the blocks before it are still computing. Between
    blocks nothing is fused.

    Parameters
    ----------
    regional : bool
        Block by block, in place: names of parameters stay.
    **options
        Of torch.compile.
    """
    if not regional:
        return torch.compile(network, **options)
    regions = [module for module in network.modules() if isinstance(module, _REGIONS)]
    # Blocks of the same sizes share what is compiled; of other sizes each needs its own.
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, 2 * len(regions))
    for module in regions:
        module.compile(dynamic=False, **options)
    return network
