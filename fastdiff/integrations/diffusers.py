"""diffusers' DDPM and DDIM schedulers on the fused ops: drop-in, by changing one import.

    from fastdiff.integrations.diffusers import DDIMScheduler, DDPMScheduler

`add_noise`, `get_velocity` and `step` are one kernel each instead of 7, 7 and 12 or more; the
configuration and the files are diffusers' own, and so are the numbers but for their rounding: steps
of DDPM are nearer to float64 (their coefficients are made in float64, diffusers' in float32). What
the kernels do not do (dynamic thresholding, clipping to another range than [-1, 1], float64,
variance_type="learned", or one that they do not know) runs in diffusers' code. `step` waits for the
device at most once per `set_timesteps`, not once per step.

Where diffusers is wrong these schedulers are right, unless their attribute `bug_compatible` is set:

- DDIM takes t - T//S for the previous timestep, which is not the one that comes next with
  "linspace" spacing, and with "trailing" where S does not divide T (Math §7);
- add_noise and get_velocity round abar to the samples' dtype before they take 1 - abar: in bfloat16
  that adds no noise at all at the first timesteps (Math §1);
- DDPM adds noise in the last step where that is not at t = 0 ("trailing", or steps_offset > 0);
- DDPM's variance_type="fixed_large_log" takes the square root of a logarithm: NaN.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastdiff.diffusion.schedules import NoiseSchedule
from fastdiff.ops import ddim_step, ddpm_step, q_sample

try:
    import diffusers
    from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
    from diffusers.schedulers.scheduling_ddpm import DDPMSchedulerOutput
    from diffusers.utils.torch_utils import randn_tensor
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "fastdiff.integrations.diffusers needs diffusers: pip install 'fastdiff[diffusers]'"
    ) from error

__all__ = ["DDIMScheduler", "DDPMScheduler"]

_PREDICTIONS = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _stamp(tensor: Tensor) -> tuple[Tensor, int | None]:
    """Equal for the same tensor unchanged since; tensors of inference mode count no changes."""
    return tensor, None if tensor.is_inference() else tensor._version


def _same(stamps: tuple, others: tuple) -> bool:
    return all(a[0] is b[0] and a[1] == b[1] for a, b in zip(stamps, others, strict=True))


@dataclass
class _Process:
    """What a step needs to know about the chosen timesteps, worked out once per set_timesteps."""

    stamps: tuple
    timesteps: list[int]
    """In the order of execution, on the host."""
    alpha_bars: Tensor | None
    """(S,) float64 abar of each table row: row 0 is the last timestep. None: not a proper
    descending sequence, which only diffusers' code can make sense of."""
    final: float
    """abar after the last step."""
    tables: dict[tuple, tuple[Tensor, Tensor]] = field(default_factory=dict)
    fallback: diffusers.DDIMScheduler | None = None

    def __post_init__(self) -> None:
        a = self.alpha_bars
        self.has_no_signal = [] if a is None else (a == 0).tolist()
        """Whether abar is 0, by row (zero terminal SNR): eps says nothing about x0 there."""
        self.ends_noisier = a is not None and self.final != 1 and self.final <= float(a[0])
        """Whether the last step does not denoise, which no table row can express."""

    def row(self, timestep: int) -> int | None:
        """Table row of a timestep, None if it is not one of those chosen."""
        if self.alpha_bars is None or timestep not in self.timesteps:
            return None
        return len(self.timesteps) - 1 - self.timesteps.index(timestep)

    def table(self, build, device: torch.device, *key: Any) -> tuple[Tensor, Tensor]:
        """(S, K) step table and (S,) row numbers on the device, uploaded once."""
        entry = self.tables.get((device, *key))
        if entry is None:
            table = build(self.alpha_bars, *key).to(device)
            entry = table, torch.arange(len(self.timesteps), device=device)
            self.tables[(device, *key)] = entry
        return entry


def _schedule(alpha_bars: Tensor) -> NoiseSchedule:
    """The process that has these abar (S,), which decrease from below 1."""
    before = torch.cat([alpha_bars.new_ones(1), alpha_bars[:-1]])
    return NoiseSchedule((before - alpha_bars) / before)


def _ddpm_table(alpha_bars: Tensor, variance: str) -> Tensor:
    return _schedule(alpha_bars).ddpm_table(variance=variance)


def _ddim_table(alpha_bars: Tensor, eta: float, final: float) -> Tensor:
    """Steps that end at abar = `final`; where that is noisier than row 0, row 0 is void."""
    if final == 1 or final <= alpha_bars[0]:
        return _schedule(alpha_bars).ddim_table(eta=eta)
    return _schedule(torch.cat([alpha_bars.new_tensor([final]), alpha_bars])).ddim_table(eta=eta)[
        1:
    ]


class _FusedScheduler:
    """What both schedulers share. Goes before diffusers' class in the bases."""

    bug_compatible: bool = False
    """Reproduce diffusers' results where they are wrong (see the module's docstring). DDPM's steps
    then run in diffusers' code, and their float32 sums are the published ones."""

    def __new__(cls, *args: Any, **kwargs: Any):
        scheduler = super().__new__(cls)
        # A pipeline writes the module of its scheduler into model_index.json. Its files stay
        # loadable without fastdiff.
        scheduler.__module__ = cls._theirs.__module__
        return scheduler

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) noise (DDPM eq. 4), `ops.q_sample`.

        Arguments and result as in diffusers; coefficients are float32 in every dtype.
        """
        t = self._timesteps_per_sample(original_samples, noise, timesteps)
        if t is None:
            return super().add_noise(original_samples, noise, timesteps)
        signal, noise_scale, _ = self._tables(original_samples.device)
        dtype = torch.promote_types(original_samples.dtype, noise.dtype)
        return q_sample(original_samples, t, signal, noise_scale, noise, dtype=dtype)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """v = sqrt(abar_t) noise - sqrt(1 - abar_t) x0 (Math §5), `ops.q_sample`.

        Arguments and result as in diffusers; coefficients are float32 in every dtype.
        """
        t = self._timesteps_per_sample(sample, noise, timesteps)
        if t is None:
            return super().get_velocity(sample, noise, timesteps)
        signal, _, minus_noise_scale = self._tables(sample.device)
        dtype = torch.promote_types(sample.dtype, noise.dtype)
        return q_sample(noise, t, signal, minus_noise_scale, sample, dtype=dtype)

    def _timesteps_per_sample(self, x0: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor | None:
        """(B,) int64 on the samples' device, or None where the op does not apply."""
        floating = x0.is_floating_point() and noise.is_floating_point()
        if not floating or x0.shape != noise.shape or not x0.dim() or noise.device != x0.device:
            return None
        rounded_table = x0.dtype not in (torch.float32, torch.float64)
        if timesteps.is_floating_point() or (self.bug_compatible and rounded_table):
            return None
        t = timesteps.to(x0.device, torch.int64).flatten()
        if t.numel() == 1:
            t = t.expand(x0.shape[0])
        return t if t.shape == x0.shape[:1] else None

    def _tables(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """sqrt(abar), sqrt(1 - abar) and -sqrt(1 - abar), (T,) float32 on the device."""
        stamps = (_stamp(self.alphas_cumprod),)
        cached = self.__dict__.get("_fastdiff_tables")
        if cached is None or not _same(cached[0], stamps):
            cached = self._fastdiff_tables = (stamps, {})
        tables = cached[1].get(device)
        if tables is None:
            abar = self.alphas_cumprod.to(device, torch.float64)
            noise_scale = (1 - abar).sqrt().float()
            tables = cached[1][device] = (abar.sqrt().float(), noise_scale, -noise_scale)
        return tables

    def _process(self) -> _Process:
        """The chosen timesteps, read from the device again only if they are others now."""
        final = getattr(self, self._final)
        stamps = _stamp(self.timesteps), _stamp(self.alphas_cumprod), _stamp(final)
        process = self.__dict__.get("_fastdiff_process")
        if process is None or not _same(process.stamps, stamps):
            timesteps = self.timesteps.tolist()
            rows = torch.tensor(timesteps[::-1], dtype=torch.int64)
            alpha_bars = None
            if len(rows) and rows[0] >= 0 and rows[-1] < len(self.alphas_cumprod):
                alpha_bars = self.alphas_cumprod.cpu().double()[rows]
                if not (alpha_bars < torch.cat([torch.ones(1), alpha_bars[:-1]])).all():
                    alpha_bars = None
            process = self._fastdiff_process = _Process(stamps, timesteps, alpha_bars, float(final))
        return process

    def _host_timestep(self, process: _Process, timestep: int | Tensor) -> int:
        """The timestep as an int: of one that comes from `for t in scheduler.timesteps`, a view,
        the position says which it is, so that nothing waits for the device."""
        own = self.timesteps
        if (
            isinstance(timestep, Tensor)
            and timestep.device == own.device
            and timestep.dtype == own.dtype
            and timestep.untyped_storage().data_ptr() == own.untyped_storage().data_ptr()
        ):
            position = (timestep.storage_offset() - own.storage_offset()) // own.stride(0)
            return process.timesteps[position]
        return int(timestep)

    def _is_fusable(self, model_output: Tensor, sample: Tensor) -> bool:
        """The one predicate of what the step kernels compute as diffusers does."""
        config = self.config
        if config.thresholding or (config.clip_sample and config.clip_sample_range != 1):
            return False
        if config.prediction_type not in _PREDICTIONS or sample.dim() < 2:
            return False
        return (
            sample.dtype in _DTYPES
            and model_output.dtype == sample.dtype
            and model_output.device == sample.device
        )

    def _is_infinite(self, process: _Process, row: int) -> bool:
        return self.config.prediction_type == "epsilon" and process.has_no_signal[row]


class DDPMScheduler(_FusedScheduler, diffusers.DDPMScheduler):
    """`diffusers.DDPMScheduler` with `step`, `add_noise` and `get_velocity` as fused ops.

    Examples
    --------
    >>> import torch
    >>> from fastdiff.integrations.diffusers import DDPMScheduler
    >>> scheduler = DDPMScheduler(num_train_timesteps=1000)
    >>> x0, noise = torch.zeros(2, 3, 8, 8), torch.randn(2, 3, 8, 8)
    >>> x_t = scheduler.add_noise(x0, noise, torch.tensor([10, 500]))
    >>> scheduler.set_timesteps(50)
    >>> x_s = scheduler.step(noise, scheduler.timesteps[0], x_t).prev_sample
    """

    _theirs = diffusers.DDPMScheduler
    _final = "one"

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> DDPMSchedulerOutput | tuple[Tensor, Tensor]:
        """One ancestral step (DDPM algorithm 2), `ops.ddpm_step`; arguments as in diffusers."""
        process = self._process()
        t = self._host_timestep(process, timestep)
        row = process.row(t)
        learned = self._has_variance(model_output, sample)
        if row is None or not self._can_fuse(process, row, model_output, sample, learned):
            return super().step(model_output, t, sample, generator, return_dict)
        # Noise is drawn just when diffusers draws it, so that a generator serves both alike.
        noise = sample
        if row:
            noise = randn_tensor(
                sample.shape, generator=generator, device=sample.device, dtype=sample.dtype
            )
        table, rows = process.table(_ddpm_table, sample.device, self._variance_name())
        prev_sample, x0 = ddpm_step(
            sample,
            model_output,
            rows[row].expand(sample.shape[0]),
            table,
            prediction=_PREDICTIONS[self.config.prediction_type],
            learned_range=learned,
            clip=self.config.clip_sample,
            noise=noise,
            return_pred_x0=True,
        )
        if not return_dict:
            return prev_sample, x0
        return DDPMSchedulerOutput(prev_sample=prev_sample, pred_original_sample=x0)

    def _has_variance(self, model_output: Tensor, sample: Tensor) -> bool:
        return (
            self.variance_type in ("learned", "learned_range")
            and sample.dim() > 1
            and model_output.shape[1] == 2 * sample.shape[1]
        )

    def _variance_name(self) -> str:
        # The square root of a variance is the same by way of its logarithm.
        return self.variance_type.removesuffix("_log")

    def _can_fuse(self, process, row, model_output, sample, learned) -> bool:
        if not self._is_fusable(model_output, sample) or self._is_infinite(process, row):
            return False
        # Of a variance with another name diffusers makes something too.
        if self._variance_name() not in ("fixed_small", "fixed_large", "learned_range"):
            return False
        if learned != (self.variance_type == "learned_range"):
            return False
        if not learned and model_output.shape != sample.shape:
            return False
        if self.config.variance_type != self.variance_type:
            return False
        return not self.bug_compatible

    def _get_variance(self, t, predicted_variance=None, variance_type=None):
        """diffusers', for the steps that run in its code, with what is wrong in it put right."""
        kind = variance_type or self.config.variance_type
        if self.bug_compatible:
            return super()._get_variance(t, predicted_variance, variance_type)
        if t > 0 and self.previous_timestep(t) < 0:  # the last step: no noise
            return torch.tensor(-torch.inf if kind == "learned_range" else 0.0)
        if kind == "fixed_large_log":
            kind = "fixed_large"
        return super()._get_variance(t, predicted_variance, kind)


class DDIMScheduler(_FusedScheduler, diffusers.DDIMScheduler):
    """`diffusers.DDIMScheduler` with `step`, `add_noise` and `get_velocity` as fused ops.

    The output of a learned-variance network, with twice the channels, is taken too.

    `diffusers.DDIMPipeline` converts every scheduler that it is made with to diffusers' own; set it
    afterwards: ``pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)``.
    """

    _theirs = diffusers.DDIMScheduler
    _final = "final_alpha_cumprod"

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: torch.Generator | list[torch.Generator] | None = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> DDIMSchedulerOutput | tuple[Tensor, Tensor]:
        """One DDIM step (DDIM eq. 12), `ops.ddim_step`; arguments as in diffusers."""
        options = {
            "eta": eta,
            "use_clipped_model_output": use_clipped_model_output,
            "generator": generator,
            "variance_noise": variance_noise,
            "return_dict": return_dict,
        }
        process = self._process()
        t = self._host_timestep(process, timestep)
        row = process.row(t)
        if self.bug_compatible or self.num_inference_steps is None or row is None:
            return super().step(model_output, t, sample, **options)
        if not self._can_fuse(process, row, model_output, sample, eta):
            return self._respaced(process).step(model_output, row, sample, **options)
        if eta > 0 and variance_noise is None:
            variance_noise = randn_tensor(
                sample.shape, generator=generator, device=sample.device, dtype=sample.dtype
            )
        elif eta > 0 and generator is not None:
            raise ValueError("pass either generator or variance_noise; both were given")
        table, rows = process.table(_ddim_table, sample.device, float(eta), process.final)
        prev_sample, x0 = ddim_step(
            sample,
            model_output,
            rows[row].expand(sample.shape[0]),
            table,
            prediction=_PREDICTIONS[self.config.prediction_type],
            clip=self.config.clip_sample,
            use_clipped_model_output=use_clipped_model_output,
            noise=variance_noise if eta > 0 else None,
            return_pred_x0=True,
        )
        if not return_dict:
            return prev_sample, x0
        return DDIMSchedulerOutput(prev_sample=prev_sample, pred_original_sample=x0)

    def _can_fuse(self, process, row, model_output, sample, eta) -> bool:
        if not self._is_fusable(model_output, sample) or self._is_infinite(process, row):
            return False
        if row == 0 and process.ends_noisier:
            return False
        channels = sample.shape[1]
        is_number = isinstance(eta, (int, float)) and 0 <= eta <= 1
        return is_number and tuple(model_output.shape) in (
            tuple(sample.shape),
            (sample.shape[0], 2 * channels, *sample.shape[2:]),
        )

    def _respaced(self, process: _Process) -> diffusers.DDIMScheduler:
        """diffusers' own code on the chosen timesteps alone, where t - T//S is t - 1 and right."""
        if process.fallback is None:
            num = len(process.timesteps)
            scheduler = diffusers.DDIMScheduler.from_config(
                self.config,
                num_train_timesteps=num,
                trained_betas=[0.5] * num,  # their products are replaced
                rescale_betas_zero_snr=False,
            )
            scheduler.alphas_cumprod = process.alpha_bars.float()
            scheduler.final_alpha_cumprod = torch.tensor(process.final)
            scheduler.num_inference_steps = num
            process.fallback = scheduler
        return process.fallback
