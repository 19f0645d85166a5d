"""Post-hoc EMA: averages of the weights whose length is chosen after training.

Karras et al. 2023 (EDM2, arXiv 2312.02696), §3. A power-function average after t steps is

    theta_g(t) = (g + 1) / t^(g + 1)  int_0^t  tau^g theta(tau) dtau,

which a running average with decay (1 - 1/t)^(g + 1) is up to the size of a step. Its length is
given relative to that of the training, as the standard deviation of the profile over t:
sigma_rel = sqrt((g + 1) / ((g + 2)^2 (g + 3))). Training keeps two lengths and writes both to disk
now and then. The profile of any other average is nearly a linear combination of theirs: the
one of least squares (their algorithm 3).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from fastdiff.training.ema import EMA
from fastdiff.training.errors import UserError, printable
from fastdiff.training.files import read_file, write_atomic

LENGTHS = (0.05, 0.1)
"""Relative lengths of the averages that training keeps."""

LONGEST = 1 / math.sqrt(12)
"""The relative length of the mean over all steps, g = 0."""

_MOST_SNAPSHOTS = 32
_COARSE = 0.05


def power(length: float) -> float:
    """g of a relative length in (0, LONGEST]: a root of (g + 2)^2 (g + 3) length^2 = g + 1."""
    inverse = length**-2
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())


class PowerEMA(EMA):
    """A power-function average; see `EMA` for its attributes."""

    def __init__(self, model, length: float) -> None:
        super().__init__(model, 0.0)
        self._power = power(length)

    def next_decay(self) -> float:
        """(1 - 1/t)^(g + 1) at step t, from 1."""
        return (1 - 1 / (self.num_updates + 1)) ** (self._power + 1)


def interval(steps: int, checkpoint_every: int) -> int:
    """Steps between snapshots: 32 of them at most, each together with a checkpoint."""
    checkpoints = math.ceil(steps / checkpoint_every)
    return checkpoint_every * math.ceil(checkpoints / _MOST_SNAPSHOTS)


def save(folder: Path, step: int, averages: Sequence[Mapping[str, Tensor]]) -> None:
    """Write the averages of LENGTHS after a step."""
    from safetensors.torch import save

    folder.mkdir(exist_ok=True)
    tensors = {
        f"{length}/{name}": tensor.detach().cpu().contiguous()
        for length, state in zip(LENGTHS, averages, strict=True)
        for name, tensor in state.items()
    }
    write_atomic(folder / f"step-{step:08d}.safetensors", save(tensors))


def reconstruct(
    folder: Path,
    step: int,
    newest: Sequence[Mapping[str, Tensor]],
    length: float,
    warn: Callable[[str], None],
) -> dict[str, Tensor]:
    """The average of a relative length at a step, from the snapshots before it and the newest.

    It warns of lengths that the snapshots do not resolve.

    Raises
    ------
    UserError
        The length is not in (0, LONGEST], or a snapshot cannot be read or is of another network.
    """
    if not 0 < length <= LONGEST:
        raise UserError(f"--ema {length}: a relative length is above 0 and at most {LONGEST:.3f}")
    steps = sorted(s for s in _steps(folder) if s < step)
    profiles = [(s, g) for s in (*steps, step) for g in map(power, LENGTHS)]
    wanted = step, power(length)
    weights = combination(profiles, wanted)
    missed = distance(profiles, wanted, weights) * math.sqrt(step)
    if missed > _COARSE:
        warn(
            f"--ema {length}: {len(steps) + 1} snapshots give an average of this length roughly "
            f"(its profile is missed by {missed:.2f}, in a norm in which a uniform one has 1)"
        )
    total = {name: tensor.double() * 0 for name, tensor in newest[0].items()}
    snapshots = (state for s in steps for state in _load(folder, s, total))
    for weight, state in zip(weights, itertools.chain(snapshots, newest), strict=True):
        for name, tensor in state.items():
            total[name] += weight * tensor.double()
    return {name: tensor.to(newest[0][name].dtype) for name, tensor in total.items()}


def combination(profiles: Sequence[tuple[float, float]], wanted: tuple[float, float]) -> np.ndarray:
    """Weights with which the profiles (t, g) come closest to the wanted one, in least squares.

    They add up to 1: weights that do not change are given back as they are.
    """
    t, g = np.array(profiles, dtype=np.float64).T
    gram = _product(t[:, None], g[:, None], t, g)
    right = _product(t, g, *wanted)
    # Where the squared distance is least among the combinations whose integral is 1.
    system = np.block([[gram, np.ones((len(t), 1))], [np.ones((1, len(t))), np.zeros((1, 1))]])
    return np.linalg.lstsq(system, np.append(right, 1.0), rcond=1e-12)[0][:-1]


def distance(
    profiles: Sequence[tuple[float, float]], wanted: tuple[float, float], weights: np.ndarray
) -> float:
    """The L2 norm over t of the wanted profile minus the combination of the others.

    An average differs from what `reconstruct` gives by at most this times the L2 norm over t of the
    weights' trajectory (Cauchy and Schwarz).
    """
    t, g = np.array(profiles, dtype=np.float64).T
    square = (
        weights @ _product(t[:, None], g[:, None], t, g) @ weights
        - 2 * weights @ _product(t, g, *wanted)
        + _product(wanted[0], wanted[1], *wanted)
    )
    return math.sqrt(max(0.0, square))


def _product(t_a, g_a, t_b, g_b):
    """int of the product of two profiles over t, whose ends are t_a and t_b."""
    ratio, exponent = t_a / t_b, np.where(t_a < t_b, g_b, -g_a)
    return (g_a + 1) * (g_b + 1) * ratio**exponent / ((g_a + g_b + 1) * np.maximum(t_a, t_b))


def _steps(folder: Path) -> Iterator[int]:
    for path in folder.glob("step-*.safetensors"):
        number = path.stem.removeprefix("step-")
        if number.isdecimal() and number.isascii():
            yield int(number)


def _load(folder: Path, step: int, like: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    from safetensors import SafetensorError
    from safetensors.torch import load

    path = folder / f"step-{step:08d}.safetensors"
    try:
        tensors = load(read_file(path))
        found = [{name: tensors[f"{length}/{name}"] for name in like} for length in LENGTHS]
    except (OSError, SafetensorError, KeyError) as error:
        raise UserError(f"{printable(path)}: not a snapshot of this run: {error}") from error
    if any(s[name].shape != like[name].shape for s in found for name in like):
        raise UserError(f"{printable(path)}: a snapshot of another network")
    return found
