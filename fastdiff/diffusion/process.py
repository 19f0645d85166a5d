"""What the losses and the bound know of a diffusion: its schedule, and what the network outputs."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdiff import ops
from fastdiff._types import check_name, check_tensors
from fastdiff.diffusion.schedules import NoiseSchedule
from fastdiff.diffusion.step_tables import LEARNED_VARIANCES, VARIANCES
from fastdiff.reference.step_columns import PREDICTIONS


class Process:
    """The forward process and the meaning of a model's output (Math §3-§5).

    Parameters
    ----------
    schedule, prediction, variance
        As `GaussianDiffusion` has them.

    Raises
    ------
    TypeError, ValueError
        No schedule, unknown names (listing the known ones), or eps-prediction on a schedule with
        zero terminal SNR.
    """

    def __init__(self, schedule: NoiseSchedule, prediction: str, variance: str) -> None:
        if not isinstance(schedule, NoiseSchedule):
            raise TypeError(f"schedule is {type(schedule).__name__}, expected a NoiseSchedule")
        for name, value, known in (
            ("prediction", prediction, PREDICTIONS),
            ("variance", variance, VARIANCES),
        ):
            check_name(name, value, known)
        if prediction == "eps" and schedule.has_zero_terminal_snr:
            raise ValueError(
                "prediction='eps' cannot recover x0 from a schedule with zero terminal SNR "
                "(abar_T = 0); use prediction='v' or 'x0', or leave the last timestep out with "
                "schedule.respace(range(T - 1))"
            )
        self.schedule = schedule
        self.prediction = prediction
        self.variance = variance
        self._identity_times = torch.equal(schedule.timesteps, torch.arange(schedule.num_timesteps))

    @property
    def num_timesteps(self) -> int:
        """T."""
        return self.schedule.num_timesteps

    @property
    def learns_variance(self) -> bool:
        """Whether the network has 2C output channels, the second half for the variance."""
        return self.variance in LEARNED_VARIANCES

    def q_sample(
        self,
        x0: Tensor,
        t: Tensor,
        noise: Tensor | None = None,
        seed: int | Tensor | None = None,
        *,
        stream: int = 0,
        flip: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) noise (DDPM eq. 4, Math §3).

        Arguments as in `fastdiff.ops.q_sample`. With neither noise nor seed, keys are drawn from
        torch's generator on x0's device, so that `torch.manual_seed` governs the noise.
        """
        check_tensors("q_sample", x0=x0, t=t)
        if noise is None and seed is None:
            seed = draw_keys(x0)
        tables = self.schedule.tables(x0.device)
        return ops.q_sample(
            x0,
            t,
            tables.sqrt_alpha_bar,
            tables.sqrt_one_minus_alpha_bar,
            noise,
            seed=seed,
            stream=stream,
            flip=flip,
            dtype=dtype,
        )

    def model_times(self, t: Tensor) -> Tensor:
        """What the network is fed for the schedule's indices t: other ones only if respaced."""
        return t if self._identity_times else self.schedule.tables(t.device).timesteps[t]

    def split_output(self, output: Tensor, x_t: Tensor) -> tuple[Tensor, Tensor | None]:
        """(prediction, variance channels or None), after checking the model's output channels."""
        channels = x_t.shape[1]
        factor = 2 if self.learns_variance else 1
        expected = (x_t.shape[0], factor * channels, *x_t.shape[2:])
        if not isinstance(output, Tensor):
            raise TypeError(f"the model returned {type(output).__name__}, expected a tensor")
        if tuple(output.shape) != expected:
            hint = ""
            if output.dim() > 1 and output.shape[1] == 2 * channels:
                hint = "; 2C channels go with variance='learned' or 'learned_range'"
            raise ValueError(
                f"the model returned shape {tuple(output.shape)}, expected {expected} for "
                f"variance={self.variance!r} and x_t of shape {tuple(x_t.shape)}{hint}"
            )
        if not self.learns_variance:
            return output, None
        return output[:, :channels], output[:, channels:]

    def bound_table(self, device: torch.device | str = "cpu") -> Tensor:
        """What `ops.vlb_terms` reads: the DDPM step table of all T timesteps, float32 (T, K)."""
        return self.schedule.on_device(_ddpm_table, device, self.variance)


def _ddpm_table(schedule: NoiseSchedule, device: torch.device, variance: str) -> Tensor:
    return schedule.ddpm_table(variance=variance, device=device)


def draw_keys(x0: Tensor) -> Tensor:
    """Keys (B,) from torch's generator on x0's device: reproducible, and nothing synchronizes."""
    return torch.randint(-(2**63), 2**63 - 1, (len(x0),), dtype=torch.int64, device=x0.device)
