"""`tiled_decode`: an autoencoder's decoder tile by tile, equal to the whole."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastdiff._progress import progress as progress_bar
from fastdiff.ops.group_norm_silu import group_norm_silu
from fastdiff.ops.group_norm_statistics import GroupNormStatistics, group_norm_statistics


class _Tile(NamedTuple):
    """A part of the latents with a margin around it, [top, bottom) and [left, right)."""

    rows: tuple[int, int]
    columns: tuple[int, int]
    padded_rows: tuple[int, int]
    padded_columns: tuple[int, int]

    def cut(self, latents: Tensor) -> Tensor:
        """The part with its margin."""
        return latents[..., slice(*self.padded_rows), slice(*self.padded_columns)]

    def inner(self, h: Tensor) -> Tensor:
        """What a decoder made of the part, without what it made of the margin."""
        scale = h.shape[2] // (self.padded_rows[1] - self.padded_rows[0])
        sides = ((self.rows, self.padded_rows), (self.columns, self.padded_columns))
        rows, columns = (slice((a - pad) * scale, (b - pad) * scale) for (a, b), (pad, _) in sides)
        return h[..., rows, columns]


class _NormalizationReached(Exception):
    """Ends a pass at the normalization whose statistics are being collected."""


@torch.no_grad()
def tiled_decode(
    vae: nn.Module, latents: Tensor, tile: int = 64, *, progress: bool = True
) -> Tensor:
    """``vae.decode(latents).sample`` in the memory of a tile, and equal to it but for rounding.

    Others' tiling normalizes every tile with statistics of its own, which changes the picture and
    leaves seams to be blended over. Here every group normalization has those of the whole image:
    they are collected normalization by normalization over all tiles (`ops.group_norm_statistics`),
    each pass with the ones found before. Tiles have a margin as wide as the convolutions see.

    That is as many passes as there are normalizations behind the middle block, of half the decoder
    on average, and the margins: for Stable Diffusion's decoder (25 of them) and tiles of 64 latents
    it takes some thirty times as long as decoding at once, and its memory depends on the size of
    the tile, the latents and the picture. The middle block, whose attention sees everything, works
    on the whole latents.

    Parameters
    ----------
    vae
        diffusers' AutoencoderKL, patched or not; eval mode.
    latents
        (B, C, H, W), as ``vae.decode`` takes them (divided by the scaling factor).
    tile
        Height and width of a tile, in latents.
    progress
        Show a progress bar.

    Returns
    -------
    Tensor
        (B, 3, 8 H, 8 W) for a decoder of four levels, on the device of the latents.

    Raises
    ------
    TypeError
        Not an autoencoder with such a decoder.
    ValueError
        Latents or tile of another form, or a decoder with attention behind its middle block.

    Examples
    --------
    >>> import torch, fastdiff
    >>> from diffusers import AutoencoderKL
    >>> vae = AutoencoderKL(block_out_channels=(32, 32), norm_num_groups=8,
    ...     down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2)
    >>> latents = torch.randn(1, 4, 24, 24)
    >>> image = fastdiff.tiled_decode(vae.eval(), latents, tile=12, progress=False)
    >>> whole = vae.decode(latents).sample
    >>> bool((image - whole).abs().max() < 1e-5 * whole.abs().max())
    True
    """
    decoder = getattr(vae, "decoder", None)
    parts = ("conv_in", "mid_block", "up_blocks", "conv_norm_out", "conv_act", "conv_out")
    if not isinstance(decoder, nn.Module) or not all(hasattr(decoder, p) for p in parts):
        raise TypeError(
            f"tiled_decode: vae is {type(vae).__name__}, expected diffusers' AutoencoderKL or one "
            "with a decoder of its parts"
        )
    if not isinstance(latents, Tensor) or latents.dim() != 4:
        shape = tuple(latents.shape) if isinstance(latents, Tensor) else type(latents).__name__
        raise ValueError(f"tiled_decode: latents is {shape}, expected a tensor (B, C, H, W)")
    if isinstance(tile, bool) or not isinstance(tile, int) or tile < 1:
        raise ValueError(f"tiled_decode: tile is {tile!r}, expected a positive int")
    attentions = [n for n, m in decoder.up_blocks.named_modules() if "ttention" in type(m).__name__]
    if attentions:
        raise ValueError(
            f"tiled_decode: up_blocks.{attentions[0]} is an attention, which sees more than a tile"
        )
    post_quant_conv = getattr(vae, "post_quant_conv", None)
    h = latents if post_quant_conv is None else post_quant_conv(latents)
    h = decoder.mid_block(decoder.conv_in(h), None)
    h = h.to(next(decoder.up_blocks.parameters()).dtype)

    def tail(h: Tensor) -> Tensor:
        for block in decoder.up_blocks:
            h = block(h, None)
        return decoder.conv_out(decoder.conv_act(decoder.conv_norm_out(h)))

    tiles = list(_tiles(h.shape[2], h.shape[3], tile, _margin(decoder)))
    norms = [m for m in decoder.up_blocks.modules() if isinstance(m, nn.GroupNorm)]
    norms.append(decoder.conv_norm_out)
    statistics: dict[nn.Module, tuple[Tensor, Tensor]] = {}
    if len(tiles) == 1:
        return tail(h)
    passes = (len(norms) + 1) * len(tiles)
    with (
        _normalizing(norms, statistics) as collect,
        progress_bar(passes, "tile", show=progress) as bar,
    ):
        for _ in norms:
            found: GroupNormStatistics | None = None
            for part in tiles:
                collect(part, found)
                try:
                    tail(part.cut(h))
                except _NormalizationReached as reached:
                    norm, found = reached.args
                bar.update()
            statistics[norm] = found.mean_rstd(norm.eps)
        image: Tensor | None = None
        for part in tiles:
            y = part.inner(tail(part.cut(h)))
            if image is None:
                scale = y.shape[2] // (part.rows[1] - part.rows[0])
                size = h.shape[2] * scale, h.shape[3] * scale
                image = y.new_empty((*y.shape[:2], *size))
            (top, bottom), (left, right) = part.rows, part.columns
            image[..., top * scale : bottom * scale, left * scale : right * scale] = y
            bar.update()
    return image


@contextlib.contextmanager
def _normalizing(
    norms: list[nn.Module],
    statistics: dict[nn.Module, tuple[Tensor, Tensor]],
) -> Iterator[Callable[[_Tile, GroupNormStatistics | None], None]]:
    """Inside, normalizations use the statistics that are known, and the first other one collects.

    What it yields says of which tile, and what was found before.
    """
    state: tuple[_Tile, GroupNormStatistics | None]

    def collect(part: _Tile, found: GroupNormStatistics | None) -> None:
        nonlocal state
        state = part, found

    def forward_of(norm: nn.Module) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            if norm in statistics:
                mean, rstd = statistics[norm]
                return group_norm_silu(
                    x, norm.num_groups, norm.weight, norm.bias, activation="identity",
                    mean=mean, rstd=rstd,
                )  # fmt: skip
            part, found = state
            found = group_norm_statistics(part.inner(x), norm.num_groups, before=found)
            raise _NormalizationReached(norm, found)

        return forward

    for norm in norms:
        norm.forward = forward_of(norm)  # which patched owners see, too
    try:
        yield collect
    finally:
        for norm in norms:
            del norm.forward


def _margin(decoder: nn.Module) -> int:
    """How far the convolutions behind the middle block see, in latents."""
    seen, scale = 0.0, 1
    for block in decoder.up_blocks:
        upsamplers = set(getattr(block, "upsamplers", None) or ())
        after = {m for upsampler in upsamplers for m in upsampler.modules()}
        for m in block.modules():
            if isinstance(m, nn.Conv2d) and m not in after:
                seen += (max(m.kernel_size) // 2) / scale
        if upsamplers:
            scale *= 2
        seen += sum(max(m.kernel_size) // 2 for m in after if isinstance(m, nn.Conv2d)) / scale
    return int(seen + max(decoder.conv_out.kernel_size) // 2 / scale) + 2


def _tiles(height: int, width: int, tile: int, margin: int) -> Iterator[_Tile]:
    def spans(length: int) -> list[tuple[tuple[int, int], tuple[int, int]]]:
        starts = range(0, length, tile)
        inner = [(a, min(a + tile, length)) for a in starts]
        return [((a, b), (max(0, a - margin), min(length, b + margin))) for a, b in inner]

    for rows, padded_rows in spans(height):
        for columns, padded_columns in spans(width):
            yield _Tile(rows, columns, padded_rows, padded_columns)
