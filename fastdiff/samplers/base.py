"""What every sampler shares: the loop, the noise, the device, guidance, progress."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastdiff import ops
from fastdiff._models import (
    Model,
    device_of,
    dtype_of,
    evaluating,
    keys_of,
    memory_format_of_weights,
    progress_bar,
    sampling_form,
)
from fastdiff._types import check_tensors, check_type, checked_shape
from fastdiff.diffusion.gaussian import GaussianDiffusion
from fastdiff.diffusion.guidance import Guidance, check_guidance
from fastdiff.reference.layout import memory_format_of
from fastdiff.reference.step_columns import StepColumn
from fastdiff.samplers.cuda_graph import GraphCache, Outputs
from fastdiff.samplers.spacing import SPACINGS, Spacing, spaced_indices

Callback = Callable[[int, int, Tensor, Tensor], None]
"""callback(step, t, x_t, pred_x0): step counts from 0, x_t is the state that pred_x0 comes from."""


@dataclass
class Run:
    """One call of `Sampler.sample` or `encode`: all that a step needs, on the device up front."""

    evaluate: Callable[[Tensor, int], tuple[Tensor, Tensor | None, float]]
    """(x_t, row) -> (output, uncond or None, guidance scale), at the row's TIMESTEP."""
    table: Tensor
    """Step table (R, K): one row per step, and more where a step is made of several updates."""
    rows: Tensor
    """(R, B): rows[i] is the `step` argument that picks row i for every sample."""
    keys: Tensor | None
    """(B,) noise keys; None where no step draws noise."""
    mean_shift: Callable[[Tensor, int], Tensor] | None = None
    """(x_t, row) -> what guidance adds to the mean, in units of the variance; see `guidance`."""
    memory: dict[str, Tensor] = field(default_factory=dict)
    """What is remembered of the steps before: by multistep samplers, and for self-conditioning."""
    wants_x0: bool = False
    """Whether somebody reads the predicted x0, which is one more tensor to write in every step."""

    def note(self, prediction: Tensor, like: Tensor) -> None:
        """Remember, as a NaN, of which samples the model has predicted what is not finite."""
        if prediction.numel():
            dtype = torch.promote_types(prediction.dtype, like.dtype)
            dims = tuple(range(1, prediction.dim()))
            largest = torch.linalg.vector_norm(prediction, torch.inf, dims, dtype=dtype)
            before = self.memory.get("zero_or_nan")  # (B,)
            before = torch.zeros_like(largest) if before is None else before
            self.memory["zero_or_nan"] = torch.add(before, largest, alpha=0)  # 0 inf is NaN

    def spoiled(self, x: Tensor) -> Tensor:
        """x with NaN in these samples, where clipping has made pixels of infinities."""
        if (zero_or_nan := self.memory.get("zero_or_nan")) is None:
            return x
        return x + zero_or_nan.to(x.dtype).reshape(-1, *[1] * (x.dim() - 1))

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
    """Turns noise into data with a trained model, one step per visited timestep (Math §7).

    Parameters
    ----------
    diffusion
        The process that the model was trained on.
    steps, spacing
        Which timesteps are visited; see `spaced_indices`.
    clip_denoised
        Clip the predicted x0 to [-1, 1] in every step: right for images.
    """

    deterministic = False
    """Whether x_T alone decides the sample; then `encode` and `decode` exist."""
    default_steps: int | None = None
    """S of a named spacing if none is given; None: all timesteps."""
    wraps_another = False
    """Whether it is made of another sampler instead of a process."""
    finite_noise_level = False
    """Whether the first visited timestep needs a finite noise level, so a non-zero SNR."""
    takes_mean_shift = False
    """Whether guidance may shift the mean of the step (CG algorithm 1)."""
    multistep = False
    """Whether a step needs the x0 that the one before predicted."""
    use_clipped_model_output = True
    """After clipping, recompute eps from the clipped x0 (else keep the model's)."""

    def __init__(
        self,
        diffusion: GaussianDiffusion,
        steps: int | None = None,
        spacing: Spacing = "leading",
        *,
        clip_denoised: bool = True,
    ) -> None:
        if steps is None and isinstance(spacing, str) and spacing in SPACINGS:
            steps = self.default_steps
        check_type(type(self).__name__, GaussianDiffusion, diffusion=diffusion)
        self.diffusion = diffusion
        self.clip_denoised = clip_denoised
        self._graphs = GraphCache()
        self.indices = spaced_indices(diffusion.schedule, steps, spacing)
        """(S,) indices of the schedule, increasing; they are visited from the last to the first."""
        if self.finite_noise_level:
            self._require_finite_noise_level()

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
        """Step table (R, K) on the CPU; its first S rows are the steps."""

    @abstractmethod
    def _step(self, run: Run, x: Tensor, row: int, stream: int) -> tuple[Tensor, Tensor | None]:
        """(x_s, pred_x0) from the state of table row `row`; `stream` numbers its noise.

        pred_x0 may be None unless `run.wants_x0`.
        """

    def _order(self) -> Sequence[int]:
        """Rows in the order they are executed."""
        return range(self.steps - 1, -1, -1)

    def _update(
        self,
        run: Run,
        x: Tensor,
        outputs: tuple[Tensor, Tensor | None, float],
        row: int,
        *,
        stream: int | None = None,
        extra: Tensor | None = None,
        clip: bool | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """COEF_X0 x0 + COEF_X_T x + COEF_EPS eps + SIGMA z by one table row, and x0 (`StepColumn`).

        z is the noise of `stream`, or any tensor `extra`, whose coefficient is COEF_EXTRA: so a
        step of several terms is one call.
        """
        output, uncond, scale = outputs
        found = ops.ddim_step(
            x,
            output,
            run.rows[row],
            run.table,
            prediction=self.diffusion.prediction,
            clip=self.clip_denoised if clip is None else clip,
            use_clipped_model_output=self.use_clipped_model_output,
            uncond=uncond,
            guidance_scale=scale,
            noise=extra,
            seed=None if stream is None else run.keys,
            stream=stream or 0,
            return_pred_x0=run.wants_x0,
        )
        return found if run.wants_x0 else (found, None)

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
        cuda_graph: bool = False,
    ) -> Tensor:
        """Samples x_0.

        Sample k has its own noise, a function of (seed, k, step number): the result does not depend
        on the batch size. To split a batch, pass slices of `ops.sample_keys(seed, B)` as seed.
        A module in training mode is put into eval mode meanwhile and restored afterwards.

        Parameters
        ----------
        model
            Any callable `model(x_t, t, **model_kwargs)`. A module with parameters is given x_t in
            their dtype. Of a `fastdiff.UNet` on a CPU the inference form is called
            (`UNet.for_inference`), unless `unet.use_inference_form` is False.
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
        cuda_graph
            Capture the model's evaluation (with its guidance) in a CUDA graph and replay it in
            every step: one launch in place of hundreds, which is what small batches wait for. The
            sampler keeps the graph, and its memory, for calls with the same model, guidance object
            and shapes. The model must do the same work in every step and not read values on the
            host; where it cannot be captured, a warning says so and it runs as without.

        Returns
        -------
        Tensor
            (B, C, ...), in [-1, 1] for a model of images. NaN in every sample for which the model
            has predicted a number that is not finite, in any step: clipping would make an infinity
            a pixel.

        Raises
        ------
        ValueError
            Neither shape nor x_T, or ones that do not go together; cuda_graph on another device.
        """
        x, keys = self._start(model, shape, seed, x_T, device, dtype)
        run = self._run(model, x, self._table(), keys, guidance, model_kwargs, cuda_graph)
        return self._loop(
            model, run, x, self._order(), self._step, self.timesteps, progress, callback
        )

    def decode(self, model: Model, x_T: Tensor, **options: Any) -> Tensor:
        """`sample(model, x_T=x_T)` of a deterministic sampler: what `encode` is inverted by."""
        self._require_deterministic("decode")
        check_tensors("decode", x_T=x_T)
        return self.sample(model, x_T=x_T, **options)

    @torch.no_grad()
    def encode(
        self,
        model: Model,
        x0: Tensor,
        guidance: Guidance | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        progress: bool = True,
        callback: Callback | None = None,
    ) -> Tensor:
        """x_T from which `decode(model, x_T)` reconstructs x0 (DDIM eqs. 13-14, §5.4, Math §7).

        The same ODE run forward over the same timesteps, without clipping; the reconstruction error
        falls with S. For the closest one, decode with `clip_denoised=False` too.

        Parameters
        ----------
        x0
            (B, C, ...), pixels in [-1, 1].
        callback
            Called as `callback(step, t, x_t, pred_x0)` with the t at which the model was evaluated.

        Returns
        -------
        Tensor
            x_T, shape and dtype of x0.

        Raises
        ------
        ValueError
            A sampler that adds noise: only an ODE can be run backwards.
        """
        self._require_deterministic("encode")
        check_tensors("encode", x0=x0)
        if not x0.is_floating_point() or x0.dim() < 2:
            raise ValueError(
                f"x0 has shape {tuple(x0.shape)} and dtype {x0.dtype}, expected (B, C, ...) of a "
                "floating-point dtype with pixels in [-1, 1]"
            )
        table = self._encode_table()
        run = self._run(model, x0, table, None, guidance, model_kwargs)
        times = table[: self.steps, StepColumn.TIMESTEP].long()
        order = range(self.steps)
        return self._loop(
            model, run, x0.detach(), order, self._encode_step, times, progress, callback
        )

    def _encode_table(self) -> Tensor:
        """Step table of `encode`, executed from row 0 up; deterministic samplers have one."""
        raise NotImplementedError

    def _encode_step(
        self, run: Run, x: Tensor, row: int, stream: int
    ) -> tuple[Tensor, Tensor | None]:
        return self._update(run, x, run.evaluate(x, row), row, clip=False)

    def _require_deterministic(self, what: str) -> None:
        if not self.deterministic:
            raise ValueError(
                f"{what} needs a deterministic sampler, this one {self._randomness()}; use "
                f"DDIM(..., eta=0.0), {_names(lambda c: c.deterministic is True)}"
            )

    def _require_finite_noise_level(self) -> None:
        schedule, last = self.diffusion.schedule, int(self.indices[-1])
        if last == schedule.num_timesteps - 1 and schedule.has_zero_terminal_snr:
            raise ValueError(
                f"{type(self).__name__} starts at a finite noise level, but timestep {last} of "
                "this schedule has zero SNR (abar = 0); leave it out of spacing, or use "
                f"{_names(lambda c: not c.finite_noise_level)}"
            )

    def _randomness(self) -> str:
        """Where the noise of the sampler comes from, for error messages."""
        return f"is {type(self).__name__}, which adds noise in every step"

    def _loop(
        self,
        model: Model,
        run: Run,
        x: Tensor,
        rows: Sequence[int],
        step: Callable[[Run, Tensor, int, int], tuple[Tensor, Tensor | None]],
        timesteps: Tensor,
        progress: bool,
        callback: Callback | None,
    ) -> Tensor:
        times = timesteps.tolist()
        run.wants_x0 = self.multistep or self.diffusion.self_conditioning or callback is not None
        with evaluating(model), progress_bar(len(rows), "sampling", progress) as bar:
            for k, row in enumerate(rows):
                x_next, pred_x0 = step(run, x, row, k + 1)
                if self.diffusion.self_conditioning:
                    run.memory["x_self_cond"] = pred_x0
                if callback is not None:
                    callback(k, times[row], x, run.spoiled(pred_x0))
                x = x_next
                bar.update(1)
        return run.spoiled(x)

    def _start(
        self,
        model: Model,
        shape: Sequence[int] | None,
        seed: int | Tensor | None,
        x_T: Tensor | None,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> tuple[Tensor, Tensor]:
        """x_T on its device, the given one or stream 0 of the noise, and the noise's keys."""
        if x_T is not None:
            check_tensors("sample", x_T=x_T)
            if shape is not None and tuple(shape) != tuple(x_T.shape):
                raise ValueError(
                    f"x_T has shape {tuple(x_T.shape)}, expected {tuple(shape)} as shape"
                )
            x = x_T.detach().to(device=device, dtype=dtype)
            return x, keys_of(seed, len(x), x.device)
        if shape is None:
            raise ValueError("pass shape (B, C, ...) or x_T; neither was given")
        shape = checked_shape(shape)
        if len(shape) < 2:
            raise ValueError(f"shape is {shape}, expected (B, C, ...)")
        if device is None:
            device = device_of(model)
        keys = keys_of(seed, shape[0], torch.device(device))
        # Or a channels_last model would copy its input and output in every step.
        layout = memory_format_of_weights(model) if len(shape) == 4 else torch.contiguous_format
        x = ops.philox_normal(shape, keys, device=device, memory_format=layout)
        return x.to(dtype or torch.float32), keys

    def _run(
        self,
        model: Model,
        x: Tensor,
        table: Tensor,
        keys: Tensor | None,
        guidance: Guidance | None,
        model_kwargs: Mapping[str, Any] | None,
        cuda_graph: bool = False,
    ) -> Run:
        """Upload all that depends on the step: the loop then never waits for the device."""
        batch, device = x.shape[0], x.device
        kwargs = dict(model_kwargs or {})
        shift = check_guidance(guidance, model, kwargs, type(self).__name__, self.takes_mean_shift)
        times = table[:, StepColumn.TIMESTEP].long().to(device)
        times = times[:, None].repeat(1, batch)
        model_dtype, called = dtype_of(model), sampling_form(model)
        memory: dict[str, Tensor] = {}

        def outputs(x: Tensor, t: Tensor, kwargs: Mapping[str, Any]) -> Outputs:
            if guidance is None:
                return called(x, t, **kwargs), None, 1.0
            return guidance(called, x, t, kwargs)

        if cuda_graph:
            if device.type != "cuda":
                raise ValueError(f"cuda_graph=True needs a CUDA device, the state is on {device}")
            outputs = self._graphs.get(model, guidance, device, outputs)

        def evaluate(x_t: Tensor, row: int) -> Outputs:
            x = x_t.to(model_dtype or x_t.dtype)
            if "x_self_cond" in memory:
                kwargs["x_self_cond"] = memory["x_self_cond"].to(x.dtype)
            output, uncond, scale = outputs(x, times[row], kwargs)
            for part in (output, uncond):
                if part is not None:
                    self.diffusion.split_output(part, x)
                    run.note(part, x_t)
            return output, uncond, scale

        rows = torch.arange(len(table), device=device)[:, None].repeat(1, batch)
        mean_shift = None if shift is None else lambda x, row: shift(x, times[row])
        run = Run(evaluate, table.to(device), rows, keys, mean_shift, memory)
        return run


def _names(wanted: Callable[[type[Sampler]], bool]) -> str:
    """Those of fastdiff's samplers that are `wanted`, for error messages: A, B or C."""

    def below(parent: type[Sampler]) -> Iterator[type[Sampler]]:
        for child in parent.__subclasses__():
            yield child
            yield from below(child)

    found = [
        c.__name__
        for c in below(Sampler)
        if c.__module__.startswith(__package__)
        and not (inspect.isabstract(c) or c.wraps_another)
        and wanted(c)
    ]
    return " or ".join(filter(None, (", ".join(found[:-1]), found[-1])))
