"""The variational bound in bits per dimension, term by term (DDPM eq. 5, Math §6)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from fastdiff import ops
from fastdiff._models import (
    Model,
    dtype_of,
    evaluating,
    keys_of,
    progress_bar,
    sampling_form,
    select,
)
from fastdiff._types import check_ints, check_tensors
from fastdiff.diffusion.process import Process
from fastdiff.images import not_finite
from fastdiff.reference.philox import derived_keys
from fastdiff.reference.q_sample import pixels_from_uint8


@dataclass(frozen=True)
class BitsPerDim:
    """The bound on -log2 p(x0) / D of each sample, and what it is made of.

    Attributes
    ----------
    total : Tensor
        (B,) float64: prior + the sum of vb over timesteps.
    prior : Tensor
        (B,) float64: L_T = KL(q(x_T | x0) || N(0, I)).
    vb : Tensor
        (B, T): L_{t-1} at index t - 1, so L_0, the decoder's term, at index 0.
    x0_mse, eps_mse : Tensor
        (B, T): mean squared errors of the predicted x0 and eps, from the same x_t.
    """

    total: Tensor
    prior: Tensor
    vb: Tensor
    x0_mse: Tensor
    eps_mse: Tensor

    def rate_distortion(self) -> RateDistortion:
        """The rate-distortion curve of progressive coding, averaged over samples (DDPM §4.3)."""
        vb = self.vb.double().mean(0)
        # Index i: x_T .. x_{i+1} have been sent, that is L_T and the terms above i.
        sent = self.prior.mean() + vb.sum() - vb.cumsum(0)
        rate = torch.cat([self.total.mean()[None], sent])
        root = self.x0_mse.double().mean(0).sqrt()
        distortion = 127.5 * torch.cat([root.new_zeros(1), root])
        return RateDistortion(rate.flip(0), distortion.flip(0))


@dataclass(frozen=True)
class RateDistortion:
    """What is known of an image after so many bits (DDPM algorithms 3-4, figure 5, Math §7).

    Attributes
    ----------
    rate : Tensor
        (T + 1,) bits/dim sent, increasing: L_T, then one more term of the bound at a time. The last
        entry is the bound itself.
    distortion : Tensor
        (T + 1,) root mean squared error, on the scale of 0..255, of the x0 predicted from what was
        sent; 0 at the end, where the image is there without loss.
    """

    rate: Tensor
    distortion: Tensor

    def plot(self, path: str | Path | BinaryIO) -> None:
        """Draw distortion against rate, and both against the reverse process's time."""
        from matplotlib.figure import Figure

        rate, distortion = self.rate.cpu().numpy(), self.distortion.cpu().numpy()
        steps = range(len(rate))
        # Figure instead of pyplot: no display, no global state.
        figure = Figure(figsize=(11, 3.4), layout="constrained")
        for axes, (x, y, labels) in zip(
            figure.subplots(1, 3),
            (
                (steps, distortion, ("reverse step T - t", "distortion (RMSE, 0..255)")),
                (steps, rate, ("reverse step T - t", "rate (bits/dim)")),
                (rate, distortion, ("rate (bits/dim)", "distortion (RMSE, 0..255)")),
            ),
            strict=True,
        ):
            axes.plot(x, y)
            axes.set(xlabel=labels[0], ylabel=labels[1])
            axes.grid(alpha=0.3)
        figure.savefig(path, dpi=120)


@torch.no_grad()
def bits_per_dim(
    diffusion: Process,
    model: Model,
    x0: Tensor,
    seed: int | Tensor | None = None,
    *,
    clip_denoised: bool = True,
    max_batch: int = 128,
    model_kwargs: Mapping[str, Any] | None = None,
    progress: bool = True,
    strata: Tensor | None = None,
) -> BitsPerDim:
    """L_T + sum_{t>1} L_{t-1} + L_0 >= -log2 p(x0) / D of every sample (DDPM eq. 5, Math §6).

    Every term is the exact divergence at one x_t ~ q(x_t | x0), so the sum estimates the bound
    without bias. The B T pairs of sample and timestep are independent: they go through the model
    in one line, `max_batch` at a time. The noise of a pair is a function of the sample's key and
    t, so the result does not depend on `max_batch`.

    Parameters
    ----------
    x0
        (B, C, ...): uint8 levels, or pixels in [-1, 1] that hold levels 2 k / 255 - 1, because L_0
        is the probability of a level.
    seed
        An int, or int64 keys (B,), so that a sample keeps its noise when the data is split; None
        draws an int from torch's generator.
    clip_denoised
        Clip the predicted x0 to [-1, 1], as published bounds are computed.
    max_batch
        How many pairs the model sees at a time: what limits memory.
    model_kwargs
        Passed to the model; of tensors whose first dimension is B, the entries of the pairs.
    progress
        Show a bar on a terminal, if tqdm is installed.
    strata
        (K,) first timesteps, increasing from 0, of K ranges of timesteps: in each of them one
        timestep, drawn for every sample, stands for the range (`timestep_strata`). Totals stay
        without bias, and their spread over samples contains that of this choice. None: all T.

    Returns
    -------
    BitsPerDim
        On x0's device. NaN where the model's output is not finite. With strata a sample's terms are
        the same at all timesteps of a range.

    Raises
    ------
    ValueError
        max_batch below 1, seed or model output of the wrong shape, strata that are none.

    Examples
    --------
    >>> import torch, fastdiff
    >>> diffusion = fastdiff.GaussianDiffusion(fastdiff.NoiseSchedule.linear(100))
    >>> x0 = torch.randint(256, (2, 1, 8, 8), dtype=torch.uint8)
    >>> bits = diffusion.bits_per_dim(lambda x, t: torch.zeros_like(x), x0, seed=0, progress=False)
    >>> bits.vb.shape
    torch.Size([2, 100])
    """
    check_ints(1, max_batch=max_batch)
    check_tensors("bits_per_dim", x0=x0)
    num, steps, device = len(x0), diffusion.num_timesteps, x0.device
    keys = keys_of(seed, num, device)
    if x0.dtype == torch.uint8:
        x0 = pixels_from_uint8(x0)
    x0 = x0.to(torch.promote_types(x0.dtype, torch.float32))
    dtype, called = dtype_of(model) or x0.dtype, sampling_form(model)
    table = diffusion.bound_table(device)
    range_of = torch.arange(steps, device=device) if strata is None else _ranges(strata, steps)
    range_of = range_of.to(device)
    count = int(range_of[-1]) + 1
    times = _chosen_timesteps(keys, range_of, count)
    pairs = torch.arange(num * count, device=device)
    parts = []
    with evaluating(model), progress_bar(len(pairs), "bound", progress) as bar:
        for chunk in pairs.split(max_batch):
            sample = chunk // count
            t = times[sample, chunk % count]
            chosen, noise_keys = x0[sample], derived_keys(keys[sample], t)
            x_t = diffusion.q_sample(chosen, t, seed=noise_keys)
            output = called(
                x_t.to(dtype), diffusion.model_times(t), **select(model_kwargs, sample, num)
            )
            diffusion.split_output(output, x_t)
            terms = ops.vlb_terms(
                chosen,
                x_t,
                output,
                t,
                table,
                seed=noise_keys,
                prediction=diffusion.prediction,
                variance=diffusion.variance,
                clip=clip_denoised,
            )
            # Of an infinity the clip would make a pixel, and of that a bound.
            parts.append(torch.stack(terms).masked_fill_(not_finite(output), torch.nan))
            bar.update(len(chunk))
    shape = (3, num, count)
    terms = torch.cat(parts, 1).view(shape) if parts else x0.new_empty(shape)
    vb, x0_mse, eps_mse = terms[:, :, range_of]
    prior = diffusion.schedule.prior_kl(x0)
    return BitsPerDim(prior + vb.double().sum(1), prior, vb, x0_mse, eps_mse)


@torch.no_grad()
def timestep_strata(
    diffusion: Process,
    model: Model,
    x0: Tensor,
    num: int = 100,
    seed: int | Tensor | None = None,
    *,
    max_batch: int = 128,
    model_kwargs: Mapping[str, Any] | None = None,
) -> Tensor:
    """First timesteps of `num` ranges over which the bound's terms add up to about the same.

    An estimate of a sum of T terms from one of each range has least variance if ranges are short
    where terms are large (importance sampling, as IDDPM eq. 18 does for training): the terms of a
    few samples at 32 timesteps say where. The decoder's term, t = 1, is a range of its own.

    Parameters
    ----------
    x0, model_kwargs
        As for `bits_per_dim`; of the samples the first 8 are used.
    num
        K >= 2. No more than T are made.
    seed
        Of the noise.

    Returns
    -------
    Tensor
        (K,) int64 on the CPU: `strata` of `bits_per_dim`.
    """
    if num < 2:
        raise ValueError(f"num is {num}, expected 2 or more")
    steps, some = diffusion.num_timesteps, min(8, len(x0))
    if num >= steps or not some:
        return torch.arange(min(steps, num) if some else 1)
    # Terms vary over orders of magnitude with log t, so nodes are even in that.
    nodes = torch.logspace(0, math.log10(steps), 33).round().long().unique().clamp(max=steps) - 1
    kwargs = select(model_kwargs, torch.arange(some, device=x0.device), len(x0))
    found = bits_per_dim(
        diffusion,
        model,
        x0[:some],
        seed=seed if not isinstance(seed, Tensor) else seed[:some],
        max_batch=max_batch,
        model_kwargs=kwargs,
        progress=False,
        strata=nodes,
    )
    size = found.vb.double().square().mean(0).sqrt().cpu()
    # A third of them evenly: where a few samples show little there may still be something, and
    # errors of x0, for the rate-distortion curve, are wanted everywhere.
    density = size[1:] / size[1:].sum() + 0.5 / (steps - 1)
    position = density.cumsum(0) / density.sum() * (num - 1)
    # The range of timesteps 1, 2, ...: non-decreasing, made to begin a new one where it must.
    range_of = torch.cat([torch.zeros(1), 1 + position.floor().clamp(max=num - 2)])
    begins = torch.cat([torch.tensor([True]), range_of[1:] > range_of[:-1]])
    return begins.nonzero()[:, 0]


def _ranges(strata: Tensor, steps: int) -> Tensor:
    """(T,) which range a timestep belongs to."""
    rising = strata.dim() == 1 and len(strata) > 0 and bool((strata[1:] > strata[:-1]).all())
    if not rising or int(strata[0]) != 0 or int(strata[-1]) >= steps:
        raise ValueError(f"strata must rise from 0 to at most {steps - 1}, got {strata.tolist()}")
    begins = torch.zeros(steps, dtype=torch.int64)
    begins[strata.cpu()] = 1
    return begins.cumsum(0) - 1


def _chosen_timesteps(keys: Tensor, range_of: Tensor, count: int) -> Tensor:
    """(B, K) one timestep of each range for every sample, a function of its key."""
    steps = len(range_of)
    size = torch.bincount(range_of, minlength=count)
    first = size.cumsum(0) - size
    number = steps + torch.arange(count, device=keys.device)  # those below T are the noise's
    each = derived_keys(keys.repeat_interleave(count), number.repeat(len(keys)))
    uniform = (each & 0xFFFFFF).double().view(len(keys), count) * 2.0**-24
    return first + (uniform * size).long()
