"""Diffusion of discrete data (DDIM appendix A; multinomial diffusion; Math §8)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff import ops
from fastdiff._models import Model, device_of, evaluating, keys_of, progress_bar
from fastdiff._types import check_ints, check_name, check_tensors, checked_shape
from fastdiff.diffusion.schedules import NoiseSchedule
from fastdiff.images import not_finite
from fastdiff.reference.checks import shown
from fastdiff.samplers.spacing import Spacing, spaced_indices

LOSSES = ("kl", "cross_entropy", "hybrid")

CategoricalCallback = Callable[[int, int, Tensor, Tensor], None]
"""callback(step, t, x_t, probs): classes (B, ...) and the predicted distribution of x0."""


class CategoricalDiffusion:
    """q(x_t | x0) = Cat(abar_t x0 + (1 - abar_t) 1/K) for data of K classes (Math §8).

    Data are int64 classes (B, ...) in 0..K-1. The network is `model(x, t, **model_kwargs)` with x
    one-hot, float32 (B, K, ...), and returns logits (B, K, ...) of x0: a `fastdiff.UNet` with
    in_channels=K fits. Where the posterior needs x0, the predicted distribution is put in.

    Parameters
    ----------
    schedule
        abar; it should end near 0 (cosine does), for x_T is drawn uniformly.
    num_classes
        K >= 2.
    sigma
        The non-Markovian posterior q(x_s | x_t, x0) = Cat(sigma x_t + (abar_s - sigma abar_t) x0 +
        ((1 - abar_s) - (1 - abar_t) sigma) 1/K) (DDIM eq. 19) of each step:

        - None: not that family, but the Markov chain's own posterior by Bayes' rule (multinomial
          diffusion, Hoogeboom et al. 2021): ancestral sampling.
        - a number c in 0..1: sigma_t = c (1 - abar_s) / (1 - abar_t). c = 1, DDIM's analogue, is
          the largest that leaves all weights >= 0: x_s is then x_t or x0, nothing is drawn anew.
        - a tensor (T,): sigma_t for the steps t -> t - 1 of the full sequence.
    loss
        "kl": KL(q(x_s | x_t, x0) || p(x_s | x_t)), the bound's terms, in nats per element;
        "cross_entropy": -log p(x0 | x_t); "hybrid": kl + 0.01 cross_entropy, whose gradient does
        not vanish at small t.

    Raises
    ------
    ValueError
        Unknown loss, fewer than 2 classes, or a sigma outside what leaves every weight >= 0.

    Examples
    --------
    >>> import torch, fastdiff
    >>> diffusion = fastdiff.CategoricalDiffusion(fastdiff.NoiseSchedule.cosine(100), 2)
    >>> x0 = torch.randint(2, (4, 8, 8))
    >>> def model(x, t): return 3 * x
    >>> loss = diffusion.training_losses(model, x0, torch.randint(100, (4,)), seed=0)["loss"]
    >>> diffusion.sample(model, (2, 8, 8), steps=10, progress=False).shape
    torch.Size([2, 8, 8])
    """

    def __init__(
        self,
        schedule: NoiseSchedule,
        num_classes: int,
        sigma: float | Tensor | None = None,
        loss: str = "hybrid",
    ) -> None:
        if not isinstance(schedule, NoiseSchedule):
            raise TypeError(f"schedule is {type(schedule).__name__}, expected a NoiseSchedule")
        check_ints(2, num_classes=num_classes)
        check_name("loss", loss, LOSSES)
        self.schedule = schedule
        self.num_classes = num_classes
        self.loss = loss
        self.sigma = _validated_sigma(sigma, schedule)

    # ---------------------------------------------------------------- forward process

    def q_probs(self, x0: Tensor, t: Tensor) -> Tensor:
        """q(x_t | x0), (B, K, ...) float32, for classes x0 (B, ...) and timesteps t (B,)."""
        check_tensors("q_probs", x0=x0, t=t)
        one_hot = self.one_hot(x0)
        at = self._coefficients(t, t, one_hot)
        return at["abar_t"] * one_hot + at["noise_t"] / self.num_classes

    def q_sample(
        self, x0: Tensor, t: Tensor, seed: int | Tensor | None = None, *, stream: int = 0
    ) -> Tensor:
        """x_t ~ q(x_t | x0), classes (B, ...); seed and stream as in `ops.philox_normal`."""
        return draw(self.q_probs(x0, t), _seed(seed, x0), stream)

    def one_hot(self, x: Tensor) -> Tensor:
        """Classes (B, ...) as float32 (B, K, ...)."""
        check_tensors("one_hot", x=x)
        if x.dtype != torch.int64:
            raise TypeError(f"classes have dtype {x.dtype}, expected torch.int64")
        return F.one_hot(x, self.num_classes).movedim(-1, 1).float()

    # ---------------------------------------------------------------- reverse process

    def q_posterior(self, x0: Tensor, x_t: Tensor, t: Tensor, s: Tensor | None = None) -> Tensor:
        """q(x_s | x_t, x0), (B, K, ...), for s < t: DDIM eq. 19, or Bayes' rule if sigma is None.

        Parameters
        ----------
        x0
            A distribution over classes (B, K, ...): one-hot data, or the network's prediction.
        x_t
            Classes (B, ...).
        t, s
            (B,) int64 timesteps; s = -1 stands for clean data. Default: s = t - 1.
        """
        check_tensors("q_posterior", x0=x0, x_t=x_t, t=t)
        s = t - 1 if s is None else s
        at = self._coefficients(t, s, x0)
        xt = self.one_hot(x_t)
        if self.sigma is not None:
            sigma = at["sigma"]
            rest = (at["noise_s"] - at["noise_t"] * sigma).clamp(min=0) / self.num_classes
            return sigma * xt + (at["abar_s"] - sigma * at["abar_t"]) * x0 + rest
        # sum over x0 of q(x_t | x_s) q(x_s | x0) / q(x_t | x0) times its weight.
        K = self.num_classes
        forward = at["alpha"] * xt + at["beta"] / K
        weight = x0 / (at["abar_t"] * xt + at["noise_t"] / K)
        backward = at["abar_s"] * weight + at["noise_s"] / K * weight.sum(1, keepdim=True)
        return forward * backward

    def p_probs(
        self,
        model: Model,
        x_t: Tensor,
        t: Tensor,
        s: Tensor | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """p(x_s | x_t) and the predicted distribution of x0, each (B, K, ...) float32."""
        check_tensors("p_probs", x_t=x_t, t=t)
        times = self.schedule.tables(t.device).timesteps[t]
        one_hot = self.one_hot(x_t)
        logits = model(one_hot, times, **(model_kwargs or {}))
        if logits.shape != one_hot.shape:
            raise ValueError(
                f"the model returned shape {tuple(logits.shape)}, expected logits of shape "
                f"{tuple(one_hot.shape)}"
            )
        pred_x0 = logits.float().softmax(1)
        return self.q_posterior(pred_x0, x_t, t, s), pred_x0

    # ---------------------------------------------------------------- training

    def training_losses(
        self,
        model: Model,
        x0: Tensor,
        t: Tensor,
        seed: int | Tensor | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        *,
        stream: int = 0,
    ) -> dict[str, Tensor]:
        """Per-sample losses (B,) at x_t ~ q(x_t | x0), in nats per element of x0 (Math §8).

        At t = 0 the posterior is x0 itself and the KL is -log p(x0 | x_t), the bound's L_0; the sum
        of "kl" over t is the bound, up to L_T.

        Returns
        -------
        dict
            "loss" as `loss` says, "kl" and "cross_entropy".
        """
        x_t = self.q_sample(x0, t, seed, stream=stream)
        predicted, pred_x0 = self.p_probs(model, x_t, t, model_kwargs=model_kwargs)
        target = self.one_hot(x0)
        true = self.q_posterior(target, x_t, t)
        tiny = torch.finfo(torch.float32).tiny
        kl = true * (true.clamp(min=tiny).log() - predicted.clamp(min=tiny).log())
        parts = {
            "kl": kl.sum(1).flatten(1).mean(1),
            "cross_entropy": -(target * pred_x0.clamp(min=tiny).log()).sum(1).flatten(1).mean(1),
        }
        if self.loss == "hybrid":
            parts["loss"] = parts["kl"] + 0.01 * parts["cross_entropy"]
        else:
            parts["loss"] = parts[self.loss]
        return parts

    # ---------------------------------------------------------------- sampling

    @torch.no_grad()
    def sample(
        self,
        model: Model,
        shape: Sequence[int],
        steps: int | None = None,
        spacing: Spacing = "trailing",
        seed: int | Tensor = 0,
        x_T: Tensor | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        progress: bool = True,
        callback: CategoricalCallback | None = None,
        *,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Classes (B, ...) from uniform noise, over S of the T timesteps (DDIM app. A).

        Sample k depends on (seed, k) alone, as in `Sampler.sample`.

        Parameters
        ----------
        shape
            (B, ...), without the class axis.
        steps, spacing
            See `spaced_indices`; all timesteps by default.
        x_T
            Starting classes (B, ...) instead of uniform ones.

        Raises
        ------
        ValueError
            S > T, or a subsequence with a sigma per timestep of the full sequence.
        RuntimeError
            The model has predicted probabilities that are not finite, of which no class follows.
        """
        indices = spaced_indices(self.schedule, steps, spacing)
        if isinstance(self.sigma, Tensor) and len(indices) < len(self.schedule):
            raise ValueError(
                f"sigma was given for each of the {len(self.schedule)} timesteps, but "
                f"{len(indices)} are visited; give sigma as a number, a share of the largest one"
            )
        device = device_of(model) if device is None else torch.device(device)
        shape = checked_shape(shape)
        batch = shape[0]
        keys = keys_of(seed, batch, device)
        if x_T is None:
            flat = torch.full((batch, self.num_classes, *shape[1:]), 1 / self.num_classes)
            x = draw(flat.to(device), keys, 0)
        else:
            check_tensors("sample", x_T=x_T)
            x = x_T.to(device)
        times = [-1, *indices.tolist()]
        rows = range(len(indices), 0, -1)
        bad = torch.zeros(batch, dtype=torch.bool, device=device)
        with evaluating(model), progress_bar(len(rows), "sampling", progress) as bar:
            for k, row in enumerate(rows):
                t, s = (torch.full((batch,), times[i], device=device) for i in (row, row - 1))
                probs, pred_x0 = self.p_probs(model, x, t, s, model_kwargs)
                if callback is not None:
                    callback(k, int(self.schedule.timesteps[times[row]]), x, pred_x0)
                x = draw(probs, keys, k + 1)
                bad.logical_or_(not_finite(probs))
                bar.update(1)
        if found := int(bad.sum()):
            raise RuntimeError(
                f"the model's predictions for {found} of {batch} samples are not finite"
            )
        return x

    # ---------------------------------------------------------------- coefficients

    def _coefficients(self, t: Tensor, s: Tensor, like: Tensor) -> dict[str, Tensor]:
        """abar and 1 - abar at t and s, alpha = abar_t / abar_s, beta = 1 - alpha, and sigma."""
        schedule = self.schedule
        table = schedule.on_device(_log_alpha_bars, t.device)
        log_t, log_s = table[t], table[s.clamp(min=0)].masked_fill(s < 0, 0.0)
        values = {
            "abar_t": log_t.exp(),
            "noise_t": -torch.expm1(log_t),
            "abar_s": log_s.exp(),
            "noise_s": -torch.expm1(log_s),
            "alpha": (log_t - log_s).exp(),
            "beta": -torch.expm1(log_t - log_s),
        }
        if isinstance(self.sigma, Tensor):
            values["sigma"] = self.sigma.to(t.device)[t]
        elif self.sigma is not None:
            values["sigma"] = self.sigma * values["noise_s"] / values["noise_t"]
        shape = (-1, *[1] * (like.dim() - 1))
        return {name: value.float().reshape(shape) for name, value in values.items()}

    def __repr__(self) -> str:
        return (
            f"CategoricalDiffusion({self.schedule!r}, num_classes={self.num_classes}, "
            f"sigma={self.sigma!r}, loss={self.loss!r})"
        )


def draw(probs: Tensor, seed: int | Tensor, stream: int) -> Tensor:
    """One class per element from probabilities (B, K, ...): int64 (B, ...).

    By inverting the distribution function at u = Phi(n), n the Philox normal of the element: what
    is drawn is a function of (seed, sample, stream, element), like all noise here (Math §9).
    """
    shape = (probs.shape[0], *probs.shape[2:])
    normal = ops.philox_normal(shape, seed, stream=stream, device=probs.device)
    uniform = torch.special.ndtr(normal)[:, None]
    cumulative = probs.cumsum(1)
    # The last class takes what rounding leaves of the sum.
    return (cumulative[:, :-1] <= uniform * cumulative[:, -1:]).sum(1)


def _validated_sigma(
    sigma: float | Tensor | None, schedule: NoiseSchedule
) -> float | Tensor | None:
    if sigma is None:
        return None
    if not isinstance(sigma, Tensor):
        if not 0 <= sigma <= 1:
            raise ValueError(
                f"sigma is {shown(sigma)}, expected 0..1, a share of the largest value "
                "(1 - abar_s) / (1 - abar_t): beyond it the weight of the uniform part is negative"
            )
        return float(sigma)
    if tuple(sigma.shape) != (len(schedule),):
        raise ValueError(
            f"sigma has shape {tuple(sigma.shape)}, expected ({len(schedule)},), one per timestep"
        )
    sigma = sigma.detach().double().cpu()
    limit = schedule.one_minus_alpha_bars_prev / schedule.one_minus_alpha_bars
    # Float32 values of the limit itself are not too large.
    bad = ~((sigma >= 0) & (sigma <= limit * (1 + 1e-6)))
    if bool(bad.any()):
        i = int(bad.nonzero()[0])
        raise ValueError(
            f"sigma[{i}] is {float(sigma[i]):.6g}, expected 0..{float(limit[i]):.6g} = (1 - "
            "abar_s) / (1 - abar_t): beyond it the weight of the uniform part is negative"
        )
    return sigma.clone()


def _log_alpha_bars(schedule: NoiseSchedule, device: torch.device) -> Tensor:
    """float64 (T,): differences of these are exact where differences of abar would cancel."""
    return schedule.log_alpha_bars.detach().to(device)


def _seed(seed: int | Tensor | None, x0: Tensor) -> int | Tensor:
    """The seed, or keys from torch's generator, as in `GaussianDiffusion`."""
    if seed is not None:
        return seed
    return torch.randint(-(2**63), 2**63 - 1, (len(x0),), dtype=torch.int64, device=x0.device)
