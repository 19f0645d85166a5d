"""Checkpoints of the papers' own code: DDPM and DDIM in PyTorch, OpenAI's improved- and
guided-diffusion.

Only names differ from `fastdiff.nn.UNet`, and attention: q, k and v are 1x1 convolutions there, in
OpenAI's code one for all three with the heads outermost. Files are read with
``torch.load(weights_only=True)``: no code in them is ever run.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdiff.nn.config import UNetConfig
from fastdiff.nn.released import NEW_ATTENTION_ORDER, RELEASED, same_shapes

FORMATS = ("ddpm", "openai")

Names = Iterator[tuple[str, str, str]]
"""(their name, our name, what it is), without .weight and .bias."""


class UnknownCheckpointError(ValueError):
    """The tensors are not those of a U-Net of the named format and configuration."""


def load_into(
    unet: torch.nn.Module,
    source: str | os.PathLike[str] | Mapping[str, Tensor],
    *,
    new_attention_order: bool | None = None,
) -> None:
    """Give a `fastdiff.UNet` the weights of an original checkpoint. See `UNet.from_original`.

    Raises
    ------
    FileNotFoundError
    UnknownCheckpointError
        Neither format is recognized, names or shapes do not fit the configuration (the message
        lists the first ones), or the heads are not those of the released network of these shapes.
    """
    config, state = unet.config, _state_of(source)
    kind = _format_of(state)
    if kind == "ddpm":
        _load(unet, state, kind, _ddpm_names(config), False)
        return
    order = _attention_order(config, new_attention_order)
    _load(unet, state, kind, _openai_names(config), order)


def load_classifier_into(
    classifier: torch.nn.Module, source: str | os.PathLike[str] | Mapping[str, Tensor]
) -> None:
    """Give a `NoisyClassifier` the weights of one of guided-diffusion. See its `from_original`.

    Raises
    ------
    FileNotFoundError
    UnknownCheckpointError
        Names or shapes do not fit the configuration (the message lists the first ones), or it
        pools in another way.
    """
    state = _state_of(source)
    position = "out.2.positional_embedding"
    names = _openai_classifier_names(classifier.config, position in state)
    if (position in state) != (classifier.pool is not None):
        found = "attention" if position in state else "mean"
        raise UnknownCheckpointError(f'the checkpoint pools otherwise; use pool="{found}"')
    pool: dict[str, Tensor] = {}
    if position in state:
        pool["pool.positional_embedding"] = state.pop(position).detach().t().contiguous()
    order = _attention_order(classifier.config, None)
    _load(classifier, state, "guided-diffusion classifier's", names, order, pool)


def _attention_order(config: UNetConfig, given: bool | None) -> bool:
    """Whether q, k and v are in the new order, checked against what was released.

    Neither the heads nor the order can be read off the tensors: with wrong ones a checkpoint loads,
    and computes something else.
    """
    heads = [config.heads(width) for width in config.attention_widths]
    candidates = same_shapes(config)
    for name in candidates:
        released = RELEASED[name]
        order = name in NEW_ATTENTION_ORDER
        same_heads = heads == [released.heads(width) for width in released.attention_widths]
        if same_heads and given in (None, order):
            return order
    if not candidates:
        return bool(given)
    name = candidates[0]
    released = RELEASED[name]
    per_head = (
        f"num_heads={released.num_heads}"
        if released.num_head_channels is None
        else f"num_head_channels={released.num_head_channels}"
    )
    raise UnknownCheckpointError(
        f"the network has the shapes of the released {name}, which has {per_head} and "
        f"new_attention_order={name in NEW_ATTENTION_ORDER}, not {heads[-1]} heads at "
        f"{config.attention_widths[-1]} channels with new_attention_order={bool(given)}: its "
        f"weights would load and compute something else; use the configuration {name!r}"
    )


def _load(
    module: torch.nn.Module,
    state: Mapping[str, Tensor],
    kind: str,
    names: Names,
    new_attention_order: bool,
    others: Mapping[str, Tensor] | None = None,
) -> None:
    """Load what `names` maps, and `others` under our own names."""
    config = module.config
    converted: dict[str, Tensor] = dict(others or {})
    missing: list[str] = []
    used: set[str] = set()
    for theirs, ours, part in names:
        for suffix in ("weight", "bias"):
            name = f"{theirs}.{suffix}"
            if name not in state:
                if not (part == "embedding" and suffix == "bias"):
                    missing.append(name)
                continue
            used.add(name)
            tensors = _convert(state[name], ours, part, config, new_attention_order)
            converted |= {f"{key}.{suffix}": tensor for key, tensor in tensors.items()}
    unexpected = sorted(set(state) - used)
    wrong = [
        f"{name} {tuple(converted[name].shape)} for {tuple(p.shape)}"
        for name, p in module.state_dict().items()
        if name in converted and converted[name].shape != p.shape
    ]
    for problem, names in (("missing", missing), ("unexpected", unexpected), ("shape", wrong)):
        if names:
            raise UnknownCheckpointError(
                f"the {kind} checkpoint does not fit the configuration; {problem}: "
                f"{', '.join(names[:3])}{' ...' if len(names) > 3 else ''} ({len(names)} in all)"
            )
    module.load_state_dict(converted, assign=True)


def _state_of(source: str | os.PathLike[str] | Mapping[str, Tensor]) -> dict[str, Tensor]:
    state = source if isinstance(source, Mapping) else _read(Path(source))
    return {name.removeprefix("module."): tensor for name, tensor in state.items()}


def _read(path: Path) -> Mapping[str, Tensor]:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    return _state_dict(torch.load(path, map_location="cpu", weights_only=True), path)


def _state_dict(content: Any, path: Path) -> Mapping[str, Tensor]:
    """DDIM's code saves [model, optimizer, epoch, step, EMA]: the EMA is what it samples with."""
    if isinstance(content, (list, tuple)):
        candidates = [c for c in content if _is_state_dict(c)]
        if candidates:
            return candidates[-1]
    elif _is_state_dict(content):
        return content
    raise UnknownCheckpointError(f"{path}: expected a state dict, or a list that holds one")


def _is_state_dict(content: Any) -> bool:
    return (
        isinstance(content, Mapping)
        and bool(content)
        and all(isinstance(value, Tensor) for value in content.values())
    )


def _format_of(state: Mapping[str, Tensor]) -> str:
    for kind, name in (("ddpm", "temb.dense.0.weight"), ("openai", "time_embed.0.weight")):
        if name in state:
            return kind
    raise UnknownCheckpointError(
        "expected temb.dense.0.weight (DDPM and DDIM) or time_embed.0.weight (improved- and "
        f"guided-diffusion), found {', '.join(sorted(state)[:3])} ..."
    )


def _convert(
    tensor: Tensor, ours: str, part: str, config: UNetConfig, new_attention_order: bool
) -> dict[str, Tensor]:
    tensor = tensor.detach().clone()
    if part == "linear":  # a 1x1 convolution over one or two dimensions
        return {ours: tensor.flatten(1) if tensor.dim() > 1 else tensor}
    if part != "qkv":
        return {ours: tensor}
    tensor = tensor.flatten(1) if tensor.dim() > 1 else tensor
    if new_attention_order:  # q of all heads, then k, then v
        parts = tensor.chunk(3)
    else:  # q, k and v of the first head, then of the second ...
        num_heads = config.heads(len(tensor) // 3)
        if len(tensor) % (3 * num_heads):
            raise UnknownCheckpointError(
                f"the queries, keys and values for {ours} are {len(tensor)} channels, which are "
                f"not three times {num_heads} heads"
            )
        by_head = tensor.unflatten(0, (num_heads, 3, -1))
        parts = [by_head[:, i].flatten(0, 1) for i in range(3)]
    return {f"{ours}.to_{n}": p.contiguous() for n, p in zip("qkv", parts, strict=True)}


def _ddpm_names(config: UNetConfig) -> Names:
    def block(theirs: str, ours: str, shortcut: bool) -> Names:
        for name in ("norm1", "conv1", "norm2", "conv2"):
            yield f"{theirs}.{name}", f"{ours}.{name}", "same"
        yield f"{theirs}.temb_proj", f"{ours}.time_emb_proj", "same"
        if shortcut:
            yield f"{theirs}.nin_shortcut", f"{ours}.conv_shortcut", "same"

    def attention(theirs: str, ours: str) -> Names:
        yield f"{theirs}.norm", f"{ours}.group_norm", "same"
        for name in "qkv":
            yield f"{theirs}.{name}", f"{ours}.to_{name}", "linear"
        yield f"{theirs}.proj_out", f"{ours}.to_out.0", "linear"

    yield "temb.dense.0", "time_embedding.linear_1", "same"
    yield "temb.dense.1", "time_embedding.linear_2", "same"
    yield "conv_in", "conv_in", "same"
    levels = len(config.widths)
    for down, level, i, shortcut in _blocks(config):
        side, ours = ("down", f"down_blocks.{level}") if down else ("up", "")
        theirs = f"{side}.{level}"
        if not down:
            ours = f"up_blocks.{levels - 1 - level}"
        yield from block(f"{theirs}.block.{i}", f"{ours}.resnets.{i}", shortcut)
        if config.resolutions[level] in config.attention_resolutions:
            yield from attention(f"{theirs}.attn.{i}", f"{ours}.attentions.{i}")
    for level in range(levels - 1) if config.conv_resample and not config.resblock_updown else ():
        yield f"down.{level}.downsample.conv", f"down_blocks.{level}.downsamplers.0.conv", "same"
        up = f"up_blocks.{levels - 2 - level}.upsamplers.0.conv"
        yield f"up.{level + 1}.upsample.conv", up, "same"
    yield from block("mid.block_1", "mid_block.resnets.0", False)
    yield from attention("mid.attn_1", "mid_block.attentions.0")
    yield from block("mid.block_2", "mid_block.resnets.1", False)
    yield "norm_out", "conv_norm_out", "same"
    yield "conv_out", "conv_out", "same"


def _openai_names(config: UNetConfig) -> Names:
    yield from _openai_stem(config)
    levels = len(config.widths)
    position = {True: 1, False: 0}  # in input_blocks and output_blocks
    for down, level, i, shortcut in _blocks(config):
        place = ("down_blocks", level) if down else ("up_blocks", levels - 1 - level)
        ours = f"{place[0]}.{place[1]}"
        side = "input" if down else "output"
        theirs = f"{side}_blocks.{position[down]}"
        yield from _openai_block(f"{theirs}.0", f"{ours}.resnets.{i}", shortcut)
        has_attention = config.resolutions[level] in config.attention_resolutions
        if has_attention:
            yield from _openai_attention(f"{theirs}.1", f"{ours}.attentions.{i}")
        position[down] += 1
        if down and i == config.num_res_blocks - 1 and level < levels - 1:
            theirs = f"input_blocks.{position[down]}.0"
            yield from _openai_resample(config, f"{theirs}.op", theirs, f"{ours}.downsamplers.0")
            position[down] += 1
        if not down and i == config.num_res_blocks and level:
            theirs = f"{theirs}.{1 + has_attention}"
            yield from _openai_resample(config, f"{theirs}.conv", theirs, f"{ours}.upsamplers.0")
    yield "out.0", "conv_norm_out", "same"
    yield "out.2", "conv_out", "same"


def _openai_classifier_names(config: UNetConfig, pools_with_attention: bool) -> Names:
    """Those of the way down and the middle, and guided-diffusion's pooling."""
    for theirs, ours, part in _openai_names(config.replace(num_classes=None, null_class=False)):
        if not theirs.startswith(("output_blocks.", "out.")):
            yield theirs, ours, part
    yield "out.0", "norm_out", "same"
    if pools_with_attention:
        yield "out.2.qkv_proj", "pool.qkv", "linear"
        yield "out.2.c_proj", "linear_out", "linear"
    else:
        yield "out.3", "linear_out", "linear"


def _openai_stem(config: UNetConfig) -> Names:
    yield "time_embed.0", "time_embedding.linear_1", "same"
    yield "time_embed.2", "time_embedding.linear_2", "same"
    if config.num_classes is not None:
        yield "label_emb", "class_embedding", "embedding"
    yield "input_blocks.0.0", "conv_in", "same"
    yield from _openai_block("middle_block.0", "mid_block.resnets.0", False)
    yield from _openai_attention("middle_block.1", "mid_block.attentions.0")
    yield from _openai_block("middle_block.2", "mid_block.resnets.1", False)


def _openai_block(theirs: str, ours: str, shortcut: bool) -> Names:
    for a, b in (
        ("in_layers.0", "norm1"),
        ("in_layers.2", "conv1"),
        ("emb_layers.1", "time_emb_proj"),
        ("out_layers.0", "norm2"),
        ("out_layers.3", "conv2"),
    ):
        yield f"{theirs}.{a}", f"{ours}.{b}", "same"
    if shortcut:
        yield f"{theirs}.skip_connection", f"{ours}.conv_shortcut", "same"


def _openai_attention(theirs: str, ours: str) -> Names:
    yield f"{theirs}.norm", f"{ours}.group_norm", "same"
    yield f"{theirs}.qkv", ours, "qkv"
    yield f"{theirs}.proj_out", f"{ours}.to_out.0", "linear"


def _openai_resample(config: UNetConfig, conv: str, block: str, ours: str) -> Names:
    if config.resblock_updown:
        yield from _openai_block(block, ours, False)
    elif config.conv_resample:
        yield conv, f"{ours}.conv", "same"


def _blocks(config: UNetConfig) -> Iterator[tuple[bool, int, int, bool]]:
    """(on the way down?, level, number in the level, has a shortcut) of the residual blocks."""
    channels, skips = config.widths[0], [config.widths[0]]
    for level, width in enumerate(config.widths):
        for i in range(config.num_res_blocks):
            yield True, level, i, channels != width
            channels = width
            skips.append(channels)
        if level < len(config.widths) - 1:
            skips.append(channels)
    for level in reversed(range(len(config.widths))):
        for i in range(config.num_res_blocks + 1):
            yield False, level, i, channels + skips.pop() != config.widths[level]
            channels = config.widths[level]
