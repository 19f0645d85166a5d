"""`eps_loss`: the error of a predicted noise, with the noise given or made again in the kernel."""

from __future__ import annotations

from torch import Tensor

from fastdiff._backends import select_backend
from fastdiff.ops import _checks
from fastdiff.ops._eps_loss import _check, _op, _reference, _unsupported
from fastdiff.reference.eps_loss import LOSS_KINDS, REDUCTIONS


def eps_loss(
    prediction: Tensor,
    noise: Tensor | None = None,
    *,
    seed: int | Tensor | None = None,
    stream: int = 0,
    weight: Tensor | None = None,
    reduction: str = "mean",
    kind: str = "mse",
) -> Tensor:
    """w_k mean_e l(prediction[k, e] - noise[k, e]) per sample, or its mean (DDPM eq. 14, SPEC §6).

    l(d) is d^2 ("mse"), |d| ("l1") or Huber's d^2 / 2 for |d| < 1, else |d| - 1/2 ("huber").
    With `seed` the noise is the one that `q_sample` and `philox_normal` make from it; it never
    touches memory, forward or backward. Sums are float32 whatever the dtype of the tensors, taken
    in a fixed order that does not depend on the batch around a sample. The backward pass reads
    and writes every tensor once.

    Parameters
    ----------
    prediction
        (B, ...), floating point, contiguous or channels_last; other strides work through a copy.
    noise
        Same shape as prediction, floating point. Exclusive with `seed`; one of them is needed. Any
        target will do, not only noise.
    seed
        An int, or int64 keys (B,).
    stream
        Separates uses of one seed.
    weight
        (B,) float32 or float64 weight w of each sample; default 1.
    reduction
        "mean": over all elements of the weighted losses; "none": (B,), the weighted mean over each
        sample's elements; "sum": over all elements.
    kind
        "mse", "l1" or "huber".

    Returns
    -------
    Tensor
        Shape () or (B,); float32 (float64 for a float64 prediction). Differentiable in prediction,
        noise and weight; a second derivative is computed in plain PyTorch.
        Under autocast nothing is cast.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what was given and what was expected.

    Examples
    --------
    >>> import torch, fastdiff
    >>> prediction = torch.zeros(8, 3, 32, 32, requires_grad=True)
    >>> loss = fastdiff.ops.eps_loss(prediction, seed=0)  # about 1: normals have variance 1
    >>> loss.backward()
    """
    if (noise is None) == (seed is None):
        given = "neither" if noise is None else "both"
        raise ValueError(f"eps_loss: pass either noise or seed; {given} was given")
    if not isinstance(reduction, str) or reduction not in REDUCTIONS:
        raise ValueError(
            f"eps_loss: unknown reduction {reduction!r}; choose from {', '.join(REDUCTIONS)}"
        )
    if not isinstance(kind, str) or kind not in LOSS_KINDS:
        raise ValueError(f"eps_loss: unknown kind {kind!r}; choose from {', '.join(LOSS_KINDS)}")
    keys, integer = _checks.split_seed("eps_loss", seed)
    stream = _checks.as_int64("eps_loss", "stream", stream)
    arguments = (
        prediction,
        noise,
        keys,
        integer,
        stream,
        weight,
        REDUCTIONS.index(reduction),
        LOSS_KINDS.index(kind),
    )
    try:
        backend = select_backend("eps_loss", prediction, _unsupported(prediction, noise))
    except AttributeError:  # not a tensor
        _check(*arguments, check_range=False)
        raise
    if backend == "reference":
        _check(*arguments, check_range=True)
        return _reference(*arguments)
    return _op.call(backend, arguments, (prediction, noise, weight))
