"""Guidance: how a sampler asks a model for its output (Math §7).

A guidance is called in place of the model. `ClassifierFree` and `ClassifierGuidance` steer towards
a condition; `DynamicThresholding` wraps either, or the model alone.
"""

from __future__ import annotations

import inspect
import numbers
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from fastdiff._types import check_name
from fastdiff.diffusion.parameterizations import conversion, convert
from fastdiff.diffusion.schedules import NoiseSchedule
from fastdiff.reference.q_sample import per_sample
from fastdiff.reference.step_columns import guide

if TYPE_CHECKING:
    from fastdiff.diffusion.gaussian import GaussianDiffusion

Outputs = tuple[Tensor, Tensor | None, float]


class Guidance(Protocol):
    """What `Sampler.sample(guidance=...)` accepts.

    It may also have `check(model, model_kwargs)`, called once per run and raising ValueError if the
    model cannot be guided; and `mean_shift(x_t, t)` (see `ClassifierGuidance`).
    """

    def __call__(
        self, model: Callable[..., Tensor], x_t: Tensor, t: Tensor, model_kwargs: Mapping[str, Any]
    ) -> Outputs:
        """(output, uncond, scale): the sampler step combines them inside its kernel.

        The step uses uncond + scale (output - uncond), or output alone where uncond is None.
        """
        ...


@dataclass(frozen=True)
class ClassifierFree:
    """eps^ = eps_uncond + scale (eps_cond - eps_uncond) (CFG eq. 6, Math §7).

    Two model calls per step: one with `model_kwargs`, one with `uncond_kwargs` put over them.

    Parameters
    ----------
    scale
        0: unconditional and 1: conditional, with one call each; above 1: guided.
    uncond_kwargs
        The model arguments that mean "no condition", e.g. `{"y": null_labels}`.
    rescale
        phi of Lin et al. 2023 (arXiv 2305.08891, eqs. 15-16), 0 to 1: how far the guided output is
        scaled back to the standard deviation of the conditional one, per sample. It counteracts
        the overexposure of large scales; they use 0.7.

    Raises
    ------
    TypeError, ValueError
        scale that is no number, uncond_kwargs that is no mapping, rescale outside [0, 1]; and when
        sampling, a model that takes no condition, or no condition to guide towards.

    Examples
    --------
    >>> import torch, fastdiff
    >>> labels, null = torch.tensor([3, 7]), torch.tensor([10, 10])
    >>> guidance = fastdiff.ClassifierFree(4.0, {"y": null})
    >>> # sampler.sample(model, (2, 1, 8, 8), guidance=guidance, model_kwargs={"y": labels})
    """

    scale: float
    uncond_kwargs: Mapping[str, Any]
    rescale: float = 0.0

    def __post_init__(self) -> None:
        if not isinstance(self.scale, (numbers.Real, Tensor)):
            raise TypeError(f"scale is {type(self.scale).__name__}, expected a number")
        if not isinstance(self.uncond_kwargs, Mapping):
            raise TypeError(
                f"uncond_kwargs is {type(self.uncond_kwargs).__name__}, expected a mapping of "
                "model arguments"
            )
        if not 0 <= self.rescale <= 1:
            raise ValueError(f"rescale is {self.rescale}, expected 0 (off) to 1")

    def check(self, model: Callable[..., Tensor], model_kwargs: Mapping[str, Any]) -> None:
        """Raise ValueError unless the model is conditional and a condition is given."""
        names = ", ".join(self.uncond_kwargs) or "nothing"
        missing = [name for name in self.uncond_kwargs if name not in model_kwargs]
        if missing or not self.uncond_kwargs:
            raise ValueError(
                f"classifier-free guidance replaces {names} in model_kwargs, which has "
                f"{', '.join(model_kwargs) or 'nothing'}: pass the condition as model_kwargs and "
                "what stands for none as uncond_kwargs, both under the same names"
            )
        kind = type(model).__name__
        config = getattr(model, "config", None)
        if getattr(config, "num_classes", 0) is None:
            raise ValueError(
                f"classifier-free guidance needs a conditional model, this {kind} was built "
                "without classes (num_classes=None)"
            )
        refused = [name for name in self.uncond_kwargs if not _accepts(model, name)]
        if refused:
            raise ValueError(
                f"classifier-free guidance needs a conditional model, this {kind} takes no "
                f"argument {', '.join(refused)}"
            )

    def __call__(
        self, model: Callable[..., Tensor], x_t: Tensor, t: Tensor, model_kwargs: Mapping[str, Any]
    ) -> Outputs:
        if self.scale == 0:
            return model(x_t, t, **{**model_kwargs, **self.uncond_kwargs}), None, 1.0
        cond = model(x_t, t, **model_kwargs)
        if self.scale == 1:
            return cond, None, 1.0
        uncond = model(x_t, t, **{**model_kwargs, **self.uncond_kwargs})
        if self.rescale == 0:
            return cond, uncond, float(self.scale)
        return self._rescaled(cond, uncond, x_t.shape[1]), None, 1.0

    def _rescaled(self, cond: Tensor, uncond: Tensor, channels: int) -> Tensor:
        """The guided output times phi std(cond)/std(guided) + 1 - phi; variances stay cond's."""
        prediction = cond[:, :channels].float()
        guided = guide(prediction, uncond[:, :channels].float(), self.scale)
        spread = guided.flatten(1).std(1).clamp(min=torch.finfo(torch.float32).tiny)
        factor = self.rescale * prediction.flatten(1).std(1) / spread + 1 - self.rescale
        guided = guided * factor.reshape(-1, *[1] * (cond.dim() - 1))
        return torch.cat([guided.to(cond.dtype), cond[:, channels:]], 1)


@dataclass(frozen=True)
class ClassifierGuidance:
    """eps^ = eps - scale sqrt(1 - abar_t) grad log p(y | x_t), or mu + scale Sigma grad (Math §7).

    The classifier must have been trained on noisy images: `fastdiff.nn.NoisyClassifier`.

    Parameters
    ----------
    classifier
        `classifier(x_t, t) -> logits (B, K)`, differentiable in x_t.
    y
        int64 (B,), the classes asked for.
    scale
        s; 0: no guidance.
    diffusion
        The one that is sampled: it knows sqrt(1 - abar_t) and what the model predicts.
    form
        "eps" (CG algorithm 2, any sampler) or "mean" (CG algorithm 1, DDPM only).

    Raises
    ------
    ValueError
        Unknown form, y of the wrong shape; form="mean" with another sampler than DDPM.
    """

    classifier: Callable[[Tensor, Tensor], Tensor]
    y: Tensor
    scale: float
    diffusion: GaussianDiffusion
    form: str = "eps"

    def __post_init__(self) -> None:
        check_name("form", self.form, ("eps", "mean"))
        if self.y.dim() != 1 or self.y.dtype != torch.int64:
            raise ValueError(
                f"y has shape {tuple(self.y.shape)} and dtype {self.y.dtype}, expected classes "
                "(B,) of dtype torch.int64"
            )

    @property
    def mean_shift(self) -> Callable[[Tensor, Tensor], Tensor] | None:
        """(x_t, t) -> scale grad log p(y | x_t), to be added Sigma times to the mean."""
        return self._scaled_gradient if self.form == "mean" else None

    def __call__(
        self, model: Callable[..., Tensor], x_t: Tensor, t: Tensor, model_kwargs: Mapping[str, Any]
    ) -> Outputs:
        output = model(x_t, t, **model_kwargs)
        if self.form == "mean" or self.scale == 0:
            return output, None, 1.0
        # Every prediction is A x_t + B eps; eps changes by -sqrt(1 - abar) scale grad.
        schedule = self.diffusion.schedule
        shift = schedule.on_device(_output_per_gradient, x_t.device, self.diffusion.prediction)
        index = _index_of(schedule, t)
        change = per_sample(shift, index, x_t.float()) * self._scaled_gradient(x_t, t)
        channels = x_t.shape[1]
        prediction = (output[:, :channels].float() + change).to(output.dtype)
        return torch.cat([prediction, output[:, channels:]], 1), None, 1.0

    def _scaled_gradient(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Scale times grad_x log p(y | x), float32."""
        if len(self.y) != len(x_t):
            raise ValueError(f"y has {len(self.y)} classes, expected {len(x_t)}, one per sample")
        with torch.enable_grad():
            x = x_t.detach().requires_grad_()
            log_probs = self.classifier(x, t).float().log_softmax(1)
            chosen = log_probs.gather(1, self.y.to(x.device)[:, None]).sum()
            (gradient,) = torch.autograd.grad(chosen, x)
        return self.scale * gradient.float()


@dataclass(frozen=True)
class DynamicThresholding:
    """x0 <- clip(x0, -r, r) / r with r = max(1, percentile of |x0|) (Imagen, app. A, Math §7).

    Large guidance scales drive predicted pixels out of [-1, 1]; clipping saturates them, this keeps
    their contrast. r is that of each sample. Works with every prediction and any sampler, whose own
    clipping then has nothing left to do.

    Parameters
    ----------
    diffusion
        The one that is sampled.
    percentile
        In (0, 1]; Imagen's is 0.995.
    guidance
        What makes the output; None: the model alone.

    Examples
    --------
    >>> import torch, fastdiff
    >>> diffusion = fastdiff.GaussianDiffusion(fastdiff.NoiseSchedule.linear(100))
    >>> guidance = fastdiff.ClassifierFree(8.0, {"y": torch.tensor([10])})
    >>> guidance = fastdiff.DynamicThresholding(diffusion, 0.995, guidance)
    """

    diffusion: GaussianDiffusion
    percentile: float = 0.995
    guidance: Guidance | None = None

    def __post_init__(self) -> None:
        if not 0 < self.percentile <= 1:
            raise ValueError(f"percentile is {self.percentile}, expected a number in (0, 1]")

    @property
    def mean_shift(self) -> Callable[[Tensor, Tensor], Tensor] | None:
        """That of the guidance inside."""
        return getattr(self.guidance, "mean_shift", None)

    def check(self, model: Callable[..., Tensor], model_kwargs: Mapping[str, Any]) -> None:
        """That of the guidance inside."""
        if hasattr(self.guidance, "check"):
            self.guidance.check(model, model_kwargs)

    def __call__(
        self, model: Callable[..., Tensor], x_t: Tensor, t: Tensor, model_kwargs: Mapping[str, Any]
    ) -> Outputs:
        if self.guidance is None:
            output, uncond, scale = model(x_t, t, **model_kwargs), None, 1.0
        else:
            output, uncond, scale = self.guidance(model, x_t, t, model_kwargs)
        channels = x_t.shape[1]
        prediction = output[:, :channels].float()
        if uncond is not None:
            prediction = guide(prediction, uncond[:, :channels].float(), scale)
        schedule, kind = self.diffusion.schedule, self.diffusion.prediction
        index, x = _index_of(schedule, t), x_t.float()
        x0 = convert(schedule, kind, "x0", prediction, x, index)
        limit = x0.flatten(1).abs().quantile(self.percentile, dim=1).clamp(min=1)
        limit = limit.reshape(-1, *[1] * (x0.dim() - 1))
        changed = convert(schedule, "x0", kind, x0.clamp(-limit, limit) / limit, x, index)
        # Where nothing is thresholded the output stays what it was, to the last bit.
        prediction = torch.where(limit > 1, changed, prediction).to(output.dtype)
        return torch.cat([prediction, output[:, channels:]], 1), None, 1.0


def check_guidance(
    guidance: Guidance | None,
    model: Callable[..., Tensor],
    model_kwargs: Mapping[str, Any],
    sampler: str,
    takes_mean_shift: bool,
) -> Callable[[Tensor, Tensor], Tensor] | None:
    """The guidance's mean shift, if it has one and the sampler can apply it; None without.

    Raises
    ------
    ValueError
        A model that cannot be guided, or a sampler that cannot shift its mean.
    """
    if guidance is None:
        return None
    if hasattr(guidance, "check"):
        guidance.check(model, model_kwargs)
    shift = getattr(guidance, "mean_shift", None)
    if shift is not None and not takes_mean_shift:
        raise ValueError(
            f"guidance with form='mean' shifts the mean of DDPM's steps, {sampler} has none; use "
            "form='eps'"
        )
    return shift


def _accepts(model: Callable[..., Tensor], name: str) -> bool:
    """Whether the model can be called with an argument `name`."""
    try:
        parameters = inspect.signature(
            model.forward if isinstance(model, nn.Module) else model
        ).parameters
    except ValueError:  # a builtin without a signature
        return True
    variadic = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    return variadic or name in parameters


def _index_of(schedule: NoiseSchedule, t: Tensor) -> Tensor:
    """The schedule's own index of what a sampler feeds the network."""
    times = schedule.tables(t.device).timesteps
    return torch.searchsorted(times, t)


def _output_per_gradient(schedule: NoiseSchedule, device: torch.device, prediction: str) -> Tensor:
    """-sqrt(1 - abar_t) d prediction / d eps, float32 (T,)."""
    _, per_eps = conversion(schedule, "eps", prediction)
    return (-schedule.sqrt_one_minus_alpha_bars * per_eps).to(device, torch.float32)
