"""Inpainting with resampling around any sampler (RePaint, Lugmayr et al. 2022, Math §7)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastdiff._models import Model
from fastdiff._types import check_ints, check_tensors, check_type
from fastdiff.samplers.base import Run, Sampler

# Streams of the noise that inpainting adds to the inner sampler's, which counts from 1.
_KNOWN, _JUMP = 1 << 40, 1 << 41


class Inpainting(Sampler):
    """After every step of `sampler`: x_s <- mask q_sample(known, s) + (1 - mask) x_s (Math §7).

    RePaint's resampling (arXiv 2201.09865, alg. 1 and app. B): whenever `jump_length` steps have
    been taken, the state is noised back by q(x_t | x_s) and they are taken again, `resamples` times
    in all, so that the filled-in part has time to agree with the known one.

    Parameters
    ----------
    sampler
        What takes the steps: DDPM (as in RePaint), DDIM, ... It must not be multistep if there are
        jumps.
    known
        (B, C, ...) or one sample (1, C, ...): the image whose known part is kept.
    mask
        Broadcastable to `known`: 1 (or True) where the pixels are known.
    jump_length
        Steps per jump.
    resamples
        How often each group of steps is taken; 1: no jumps.

    Raises
    ------
    ValueError
        Shapes that do not fit, numbers below 1, a multistep sampler with jumps.

    Examples
    --------
    >>> import torch, fastdiff
    >>> diffusion = fastdiff.GaussianDiffusion(fastdiff.NoiseSchedule.linear(100))
    >>> known, mask = torch.zeros(1, 1, 8, 8), torch.ones(8, 8)
    >>> mask[:, 4:] = 0
    >>> ddpm = fastdiff.samplers.DDPM(diffusion, 10)
    >>> sampler = fastdiff.samplers.Inpainting(ddpm, known, mask, jump_length=5, resamples=2)
    >>> images = sampler.sample(lambda x, t: torch.zeros_like(x), (2, 1, 8, 8), progress=False)
    """

    wraps_another = True

    def __init__(
        self,
        sampler: Sampler,
        known: Tensor,
        mask: Tensor,
        *,
        jump_length: int = 10,
        resamples: int = 1,
    ) -> None:
        check_ints(1, jump_length=jump_length, resamples=resamples)
        check_type("Inpainting", Sampler, sampler=sampler)
        check_tensors("Inpainting", known=known, mask=mask)
        if resamples > 1 and sampler.multistep:
            raise ValueError(
                f"resamples is {resamples}, but {type(sampler).__name__} remembers earlier steps, "
                "which a jump makes wrong; use resamples=1 or a one-step sampler such as DDPM"
            )
        if known.dim() < 2 or not known.is_floating_point():
            raise ValueError(
                f"known has shape {tuple(known.shape)} and dtype {known.dtype}, expected "
                "(B, C, ...) of a floating-point dtype with pixels in [-1, 1]"
            )
        try:
            torch.broadcast_to(mask, known.shape)
        except RuntimeError:
            raise ValueError(
                f"mask has shape {tuple(mask.shape)}, expected one that broadcasts to known, "
                f"{tuple(known.shape)}"
            ) from None
        super().__init__(
            sampler.diffusion, None, sampler.indices, clip_denoised=sampler.clip_denoised
        )
        self.sampler = sampler
        self.multistep = sampler.multistep
        self.known = known
        self.mask = mask
        # Down by jump_length rows, up again, `resamples` times over; then the next group.
        self._visits: list[int] = []
        for start in range(self.steps - 1, -1, -jump_length):
            end = max(start - jump_length, -1)
            self._visits += list(range(start, end, -1)) * resamples

    def sample(
        self, model: Model, shape: Sequence[int] | None = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        """As `Sampler.sample`; the shape is `known`'s if neither it nor x_T is given."""
        x_T = kwargs.get("x_T", args[1] if len(args) > 1 else None)
        given = shape if x_T is None else x_T.shape
        given = self.known.shape if given is None else tuple(given)
        if given[1:] != self.known.shape[1:] or self.known.shape[0] not in (1, given[0]):
            raise ValueError(
                f"samples of shape {tuple(given)} do not fit known of shape "
                f"{tuple(self.known.shape)}"
            )
        return super().sample(model, None if x_T is not None else given, *args, **kwargs)

    def _table(self) -> Tensor:
        return self.sampler._table()

    def _order(self) -> Sequence[int]:
        return self._visits

    def _step(self, run: Run, x: Tensor, row: int, stream: int) -> tuple[Tensor, Tensor | None]:
        x, pred_x0 = self.sampler._step(run, x, row, stream)
        x = self._keep_known(run, x, row - 1, _KNOWN + stream)
        upcoming = self._visits[stream] if stream < len(self._visits) else -1
        if upcoming != row - 1:
            x = self._noise_back(run, x, row - 1, upcoming, _JUMP + stream)
        return x, pred_x0

    def _keep_known(self, run: Run, x: Tensor, level: int, stream: int) -> Tensor:
        """The known pixels, noised to the level of row `level`; -1 is clean data."""
        known = self.known.to(x.device, x.dtype).expand_as(x)
        if level >= 0:
            times = torch.full((len(x),), int(self.indices[level]), device=x.device)
            known = self.diffusion.q_sample(known, times, run.noise(x, stream).to(x.dtype))
        mask = self.mask.to(x.device, x.dtype)
        return mask * known + (1 - mask) * x

    def _noise_back(self, run: Run, x: Tensor, level: int, target: int, stream: int) -> Tensor:
        """q(x_t | x_s) = N(sqrt(abar_t / abar_s) x_s, (1 - abar_t / abar_s) I) (Math §3)."""
        log_alpha_bars = self.diffusion.schedule.log_alpha_bars[self.indices]
        start = log_alpha_bars[level] if level >= 0 else 0.0
        log_ratio = log_alpha_bars[target] - start
        keep = float((0.5 * log_ratio).exp())
        scale = float((-torch.expm1(log_ratio)).sqrt())
        return (keep * x + scale * run.noise(x, stream)).to(x.dtype)
