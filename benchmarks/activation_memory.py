"""Bytes that a training step of a U-Net keeps for its backward pass.

    python -m benchmarks.activation_memory [--preset ddpm_cifar10] [--batch 8]

Every tensor that autograd saves is counted once, by a saved-tensors hook; parameters are not.
Settings: "eager" normalizes with torch.nn.functional.group_norm and silu, "fused" with
ops.group_norm_silu, "recompute" normalizes again in the backward pass.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff import UNet
from fastdiff.nn import GroupNormSiLU

SETTINGS = ("eager", "fused", "recompute")


def eager_group_norm_silu(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float = 1e-5,
    channel_bias: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    activation: str = "silu",
    *,
    dropout_p: float = 0.0,
    **_keys: object,
) -> Tensor:
    """What everybody writes."""
    expand = (..., *[None] * (x.dim() - 2))
    if channel_bias is not None:
        x = x + channel_bias[expand]
    h = F.group_norm(x, num_groups, weight, bias, eps)
    if scale is not None:
        h = h * (1 + scale[expand])
    if shift is not None:
        h = h + shift[expand]
    h = F.silu(h) if activation == "silu" else h
    return F.dropout(h, dropout_p) if dropout_p else h


def eager_residual_group_norm_silu(
    x: Tensor, residual: Tensor, *arguments: object, sum_bias: Tensor | None, activation: str
) -> tuple[Tensor, Tensor]:
    """The same behind a residual connection's sum."""
    summed = x + residual
    if sum_bias is not None:
        summed = summed + sum_bias[:, None, None]
    return summed, eager_group_norm_silu(summed, *arguments, activation=activation)


@contextmanager
def _setting(unet: UNet, name: str) -> Iterator[None]:
    unet.set_recompute(name == "recompute")
    functions = {
        "group_norm_silu": eager_group_norm_silu,
        "residual_group_norm_silu": eager_residual_group_norm_silu,
    }
    # The module, whose functions of these names GroupNormSiLU calls.
    module = sys.modules[GroupNormSiLU.__module__]
    with mock.patch.multiple(module, **functions) if name == "eager" else nullcontext():
        yield
    unet.set_recompute(False)


def saved_bytes(unet: UNet, setting: str, batch: int) -> int:
    """Bytes that a forward pass in training mode leaves for the backward pass."""
    parameters = {p.untyped_storage().data_ptr() for p in unet.parameters()}
    storages: dict[int, tuple[int, Tensor]] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in parameters:
            # The tensor is kept, so that no other one gets its address.
            storages[storage.data_ptr()] = storage.nbytes(), x.detach()
        return x

    size, channels = unet.config.sample_size, unet.config.in_channels
    x_t = torch.randn(batch, channels, size, size)
    t = torch.zeros(batch, dtype=torch.int64)
    unet.train()
    with (
        _setting(unet, setting),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x),
    ):
        unet(x_t, t)
    return sum(nbytes for nbytes, _ in storages.values())


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.activation_memory", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--preset", default="ddpm_cifar10")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--dropout", type=float, help="default: the preset's")
    options = parser.parse_args(argv)
    overrides = {} if options.dropout is None else {"dropout": options.dropout}
    unet = UNet.from_preset(options.preset, **overrides)
    counted = {name: saved_bytes(unet, name, options.batch) for name in SETTINGS}
    print(f"{options.preset}, batch {options.batch}, dropout {unet.config.dropout}, float32")
    for name, total in counted.items():
        share = total / counted["eager"]
        print(f"  {name:10} {total / 2**20:9.1f} MiB  {share:6.1%} of eager")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
