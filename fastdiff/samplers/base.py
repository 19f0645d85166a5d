"""What every sampler shares: the loop, the noise, the device, guidance, progress."""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastdiff import ops
from fastdiff._models import Model, device_of, dtype_of, evaluating
from fastdiff.gaussian import GaussianDiffusion
from fastdiff.guidance import Guidance
from fastdiff.reference.layout import memory_format_of
from fastdiff.samplers.spacing import Spacing, spaced_indices

Callback = Callable[[int, int, Tensor, Tensor], None]
"""callback(step, t, x_t, pred_x0): step counts from 0, x_t is the state that pred_x0 comes from."""


@dataclass
class Run:
    """One call of `Sampler.sample` or `encode`: all that a step needs, on the device up front."""

    evaluate: Callable[[Tensor, int], tuple[Tensor, Tensor | None, float]]
    """(x_t, row) -> (output, uncond or None, guidance scale)."""
    table: Tensor
    """Step table (S, K)."""
    rows: Tensor
    """(S, B): rows[i] is the `step` argument that picks row i for every sample."""
    keys: Tensor | None
    """(B,) noise keys; None where no step draws noise."""

    def noise(self, x: Tensor, stream: int) -> Tensor:
        """The standard normals of step number `stream`, in x's memory format."""
        return ops.philox_normal(
            x.shape,
            self.keys,
            stream=stream,
            device=x.device,
            memory_format=memory_format_of(x),
        )


class Sampler(ABC):
    """Turns noise into data with a trained model, one step per visited timestep (SPEC §7).

    Parameters
    ----------
    diffusion
        The process that the model was trained on.
    steps, spacing
        Which timesteps are visited; see `spaced_indices`.
    clip_denoised
        Clip the predicted x0 to [-1, 1] in every step: right for images.
    """

    def __init__(
        self,
        diffusion: GaussianDiffusion,
        steps: int | None = None,
        spacing: Spacing = "leading",
        *,
        clip_denoised: bool = True,
    ) -> None:
        self.diffusion = diffusion
        self.clip_denoised = clip_denoised
        self.indices = spaced_indices(diffusion.schedule, steps, spacing)
        """(S,) indices of the schedule, increasing; they are visited from the last to the first."""

    @property
    def steps(self) -> int:
        """S."""
        return len(self.indices)

    @property
    def timesteps(self) -> Tensor:
        """(S,) what the model is fed, increasing; differs from `indices` on a respaced schedule."""
        return self.diffusion.schedule.timesteps[self.indices]

    @abstractmethod
    def _table(self) -> Tensor:
        """Step table (S, K) on the CPU."""

    @abstractmethod
    def _step(self, run: Run, x: Tensor, row: int, stream: int) -> tuple[Tensor, Tensor]:
        """(x_s, pred_x0) from the state of table row `row`; `stream` numbers its noise."""

    @torch.no_grad()
    def sample(
        self,
        model: Model,
        shape: Sequence[int] | None = None,
        seed: int | Tensor | None = 0,
        x_T: Tensor | None = None,
        guidance: Guidance | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        progress: bool = True,
        callback: Callback | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Samples x_0.

        Sample k has its own noise, a function of (seed, k, step number): the result does not depend
        on the batch size. To split a batch, pass slices of `ops.sample_keys(seed, B)` as seed.
        A module in training mode is put into eval mode meanwhile and restored afterwards.

        Parameters
        ----------
        model
            Any callable `model(x_t, t, **model_kwargs)`. A module with parameters is given x_t in
            their dtype.
        shape
            (B, C, ...); may be left out if x_T is given.
        seed
            An int, or int64 keys (B,); None draws an int from torch's CPU generator. x_T is stream
            0 of the noise, step k = 1..S is stream k.
        x_T
            Starting state instead of fresh noise.
        guidance
            For example `ClassifierFree(4.0, {"y": null_labels})`.
        progress
            Show a bar on a terminal, if tqdm is installed.
        callback
            Called as `callback(step, t, x_t, pred_x0)` after every step.
        device, dtype
            Of the state. Default: those of x_T, else the model's device and float32; this also for
            a half-precision model, because a bfloat16 state is as coarse as an image's 256 levels.

        Returns
        -------
        Tensor
            (B, C, ...), in [-1, 1] for a model of images.
        """
        if seed is None:
            seed = int(torch.randint(2**63 - 1, ()))
        x = self._start(model, shape, seed, x_T, device, dtype)
        run = self._run(model, x, self._table(), self.indices, seed, guidance, model_kwargs)
        rows = range(self.steps - 1, -1, -1)
        return self._loop(model, run, x, rows, self._step, self.timesteps, progress, callback)

    def _loop(
        self,
        model: Model,
        run: Run,
        x: Tensor,
        rows: Sequence[int],
        step: Callable[[Run, Tensor, int, int], tuple[Tensor, Tensor]],
        timesteps: Tensor,
        progress: bool,
        callback: Callback | None,
    ) -> Tensor:
        times = timesteps.tolist()
        with evaluating(model):
            for k, row in enumerate(_progress(rows, progress)):
                x_next, pred_x0 = step(run, x, row, k + 1)
                if callback is not None:
                    callback(k, times[row], x, pred_x0)
                x = x_next
        return x

    def _start(
        self,
        model: Model,
        shape: Sequence[int] | None,
        seed: int | Tensor,
        x_T: Tensor | None,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> Tensor:
        """x_T on its device: the given one, or stream 0 of the noise."""
        if x_T is not None:
            if shape is not None and tuple(shape) != tuple(x_T.shape):
                raise ValueError(
                    f"x_T has shape {tuple(x_T.shape)}, expected {tuple(shape)} as shape"
                )
            return x_T.detach().to(device=device, dtype=dtype)
        if shape is None:
            raise ValueError("pass shape (B, C, ...) or x_T; neither was given")
        shape = tuple(shape)
        if len(shape) < 2:
            raise ValueError(f"shape is {shape}, expected (B, C, ...)")
        if device is None:
            device = device_of(model)
        if isinstance(seed, Tensor):
            seed = seed.to(device)
        return ops.philox_normal(shape, seed, device=device).to(dtype or torch.float32)

    def _run(
        self,
        model: Model,
        x: Tensor,
        table: Tensor,
        indices: Tensor,
        seed: int | Tensor | None,
        guidance: Guidance | None,
        model_kwargs: Mapping[str, Any] | None,
    ) -> Run:
        """Upload all that depends on the step: the loop then never waits for the device."""
        batch, device = x.shape[0], x.device
        kwargs = dict(model_kwargs or {})
        times = self.diffusion.schedule.timesteps[indices].to(device)
        times = times[:, None].repeat(1, batch)
        model_dtype = dtype_of(model)

        def evaluate(x: Tensor, row: int) -> tuple[Tensor, Tensor | None, float]:
            x = x.to(model_dtype or x.dtype)
            if guidance is None:
                output, uncond, scale = model(x, times[row], **kwargs), None, 1.0
            else:
                output, uncond, scale = guidance(model, x, times[row], kwargs)
            self.diffusion.split_output(output, x)
            if uncond is not None:
                self.diffusion.split_output(uncond, x)
            return output, uncond, scale

        if seed is None:
            keys = None
        elif isinstance(seed, Tensor):
            keys = seed.to(device)
        else:
            keys = ops.sample_keys(seed, batch, device=device)
        rows = torch.arange(len(indices), device=device)[:, None].repeat(1, batch)
        return Run(evaluate, table.to(device), rows, keys)


def _progress(rows: Sequence[int], show: bool) -> Iterable[int]:
    if show and importlib.util.find_spec("tqdm") is not None:
        from tqdm import tqdm

        return tqdm(rows, desc="sampling", leave=False, disable=None)
    return rows
