"""Exactly solvable data distributions: the optimal network in closed form (Math §10).

They need no training, so they tell a sampler's own error from a network's.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from fastdiff._types import check_name
from fastdiff.diffusion.schedules import NoiseSchedule
from fastdiff.reference.step_columns import PREDICTIONS


class MixtureDenoiser(nn.Module):
    """The optimal prediction E[. | x_t] for x0 ~ sum_k w_k N(m_k, S_k) (Math §10).

    q(x_t) = sum_k w_k N(sqrt(abar_t) m_k, abar_t S_k + (1 - abar_t) I), hence the score, and
    eps(x_t, t) = -sqrt(1 - abar_t) grad log q(x_t). Computed in float64 from the schedule's float64
    tables, returned in x_t's dtype.

    Parameters
    ----------
    weights
        (K,) positive; normalized.
    means
        (K, *data_shape).
    covariances
        (K, *data_shape) diagonals, or (K, D, D) with D the number of elements of a sample.
    schedule
        The forward process.
    prediction
        What `forward` returns: "eps", "x0", "v" or "mean".
    """

    def __init__(
        self,
        weights: Tensor,
        means: Tensor,
        covariances: Tensor,
        schedule: NoiseSchedule,
        prediction: str = "eps",
    ) -> None:
        super().__init__()
        check_name("prediction", prediction, PREDICTIONS)
        weights, means, covariances = (
            torch.as_tensor(x).detach().double() for x in (weights, means, covariances)
        )
        if means.dim() < 2 or tuple(weights.shape) != means.shape[:1]:
            raise ValueError(
                f"weights has shape {tuple(weights.shape)} and means {tuple(means.shape)}, "
                "expected (K,) and (K, *data_shape)"
            )
        if not bool((weights > 0).all()):
            raise ValueError(f"weights must be positive, got {weights.tolist()}")
        self.prediction = prediction
        self.data_shape = means.shape[1:]
        num, dim = len(means), self.data_shape.numel()
        if covariances.shape == means.shape:
            variances, axes = covariances.reshape(num, dim), None
        elif tuple(covariances.shape) == (num, dim, dim):
            variances, axes = torch.linalg.eigh(covariances)
        else:
            raise ValueError(
                f"covariances has shape {tuple(covariances.shape)}, expected "
                f"{tuple(means.shape)} (diagonals) or {(num, dim, dim)}"
            )
        # A covariance of low rank may come out of eigh a rounding error below zero.
        if float(variances.min()) < -1e-10 * max(1.0, float(variances.max())):
            raise ValueError(f"covariances must not have negative variances, got {variances.min()}")
        self.register_buffer("log_weights", (weights / weights.sum()).log())
        self.register_buffer("means", means.reshape(num, dim))
        self.register_buffer("variances", variances.clamp(min=0))
        self.register_buffer("axes", axes)
        betas = torch.stack(
            [
                schedule.sqrt_alpha_bars,
                schedule.one_minus_alpha_bars,
                schedule.posterior_mean_coef_x0,
                schedule.posterior_mean_coef_x_t,
            ]
        )
        self.register_buffer("tables", betas.detach())
        times = torch.full((int(schedule.timesteps[-1]) + 1,), -1)
        times[schedule.timesteps] = torch.arange(len(schedule))
        # From what a sampler feeds the network to the schedule's own index.
        self.register_buffer("index_of_time", times)

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        """The optimal prediction at x_t (B, *data_shape), t (B,) int64; shape and dtype of x_t."""
        x, a, noise, c0, c1 = self._inputs(x_t, t)
        if self.prediction == "eps":
            out = -noise.sqrt() * self._score(x, a, noise)
        else:
            x0 = self._expected_x0(x, a, noise)
            if self.prediction == "x0":
                out = x0
            elif self.prediction == "mean":
                out = c0 * x0 + c1 * x
            else:
                out = -a * noise.sqrt() * self._score(x, a, noise) - noise.sqrt() * x0
        return out.reshape(x_t.shape).to(x_t.dtype)

    def score(self, x_t: Tensor, t: Tensor) -> Tensor:
        """grad log q(x_t); shape and dtype of x_t."""
        x, a, noise, *_ = self._inputs(x_t, t)
        return self._score(x, a, noise).reshape(x_t.shape).to(x_t.dtype)

    def log_prob(self, x_t: Tensor, t: Tensor) -> Tensor:
        """log q(x_t) in nats, (B,) float64."""
        x, a, noise, *_ = self._inputs(x_t, t)
        return self._component_log_probs(x, a, noise).logsumexp(1)

    def sample_x0(self, num: int, generator: torch.Generator | None = None) -> Tensor:
        """Exact samples of the data, (num, *data_shape) float64, on the buffers' device."""
        device = self.means.device
        k = torch.multinomial(self.log_weights.exp(), num, replacement=True, generator=generator)
        normal = torch.randn(
            num, self.means.shape[1], dtype=torch.float64, generator=generator, device=device
        )
        deviation = normal * self.variances[k].sqrt()
        if self.axes is not None:
            deviation = torch.einsum("bij,bj->bi", self.axes[k], deviation)
        return (self.means[k] + deviation).reshape(num, *self.data_shape)

    def _inputs(self, x_t: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        if x_t.shape[1:] != self.data_shape:
            raise ValueError(
                f"x_t has shape {tuple(x_t.shape)}, expected (B, "
                f"{', '.join(map(str, self.data_shape))})"
            )
        tables = self.tables[:, self.index_of_time[t]]
        return x_t.flatten(1).double(), *tables[:, :, None]

    def _rotate(self, deviations: Tensor, back: bool = False) -> Tensor:
        """(B, K, D) into the eigenbases of the covariances, or back."""
        if self.axes is None:
            return deviations
        return torch.einsum("kij,bkj->bki" if back else "kij,bki->bkj", self.axes, deviations)

    def _deviations(self, x: Tensor, a: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """x - sqrt(abar) m_k and q(x_t)'s variances, in component k's eigenbasis, (B, K, D)."""
        deviations = self._rotate(x[:, None] - a[:, None] * self.means)
        variances = a[:, None] ** 2 * self.variances + noise[:, None]
        return deviations, variances

    def _component_log_probs(self, x: Tensor, a: Tensor, noise: Tensor) -> Tensor:
        deviations, variances = self._deviations(x, a, noise)
        log_density = deviations.square() / variances + variances.log() + math.log(2 * math.pi)
        return self.log_weights - 0.5 * log_density.sum(-1)

    def _responsibilities(self, x: Tensor, a: Tensor, noise: Tensor) -> Tensor:
        if len(self.means) == 1:
            return torch.ones_like(x[:, None, :1])
        return self._component_log_probs(x, a, noise).softmax(1)[:, :, None]

    def _score(self, x: Tensor, a: Tensor, noise: Tensor) -> Tensor:
        deviations, variances = self._deviations(x, a, noise)
        scores = self._rotate(-deviations / variances, back=True)
        return (self._responsibilities(x, a, noise) * scores).sum(1)

    def _expected_x0(self, x: Tensor, a: Tensor, noise: Tensor) -> Tensor:
        # Not from eps: that divides by sqrt(abar), which may be 0.
        deviations, variances = self._deviations(x, a, noise)
        gain = a[:, None] * self.variances / variances
        x0 = self.means + self._rotate(gain * deviations, back=True)
        return (self._responsibilities(x, a, noise) * x0).sum(1)


class GaussianDenoiser(MixtureDenoiser):
    """The optimal prediction for x0 ~ N(mean, covariance), and the exact ODE map (Math §10).

    Parameters
    ----------
    mean
        data_shape.
    covariance
        data_shape (a diagonal), or (D, D).
    schedule, prediction
        As in `MixtureDenoiser`.
    """

    def __init__(
        self, mean: Tensor, covariance: Tensor, schedule: NoiseSchedule, prediction: str = "eps"
    ) -> None:
        mean, covariance = torch.as_tensor(mean), torch.as_tensor(covariance)
        super().__init__(torch.ones(1), mean[None], covariance[None], schedule, prediction)

    def decode(self, x_t: Tensor, t: Tensor) -> Tensor:
        """The x0 that the probability flow carries x_t to: DDIM's limit of many steps.

        In the covariance's eigenbasis every coordinate keeps its number of standard deviations:
        x0 = m + sqrt(lambda / (abar lambda + 1 - abar)) (x_t - sqrt(abar) m).
        """
        return self._transport(x_t, t, self.variances, self.means)

    def flow(self, x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """The x_s to which the probability flow carries x_t, for s before or after t (Math §10).

        In the covariance's eigenbasis every coordinate keeps its number of standard deviations, so
        `flow` to the last timestep is the exact encoder; `decode` is the flow to clean data.
        """
        a, noise = self.tables[:2, self.index_of_time[s]][:, :, None, None]
        return self._transport(x_t, t, a**2 * self.variances + noise, a * self.means)

    def _transport(self, x_t: Tensor, t: Tensor, variances_s: Tensor, means_s: Tensor) -> Tensor:
        x, a, noise, *_ = self._inputs(x_t, t)
        deviations, variances = self._deviations(x, a, noise)
        moved = self._rotate((variances_s / variances).sqrt() * deviations, back=True)
        return (means_s + moved)[:, 0].reshape(x_t.shape).to(x_t.dtype)
