"""Which timesteps a sampler visits (DDIM §4.2, IDDPM, Math §7)."""

import math

import numpy as np
import pytest
import torch

from fastdiff.diffusion.gaussian import GaussianDiffusion
from fastdiff.diffusion.schedules import NoiseSchedule
from fastdiff.reference.step_columns import StepColumn
from fastdiff.samplers import DDIM, DDPM, SPACINGS, spaced_indices

T = 1000


@pytest.fixture(scope="module")
def schedule():
    return NoiseSchedule.linear(T)


def _spaced(schedule, steps, spacing):
    return spaced_indices(schedule, steps, spacing).tolist()


def test_known_values(schedule):
    assert _spaced(schedule, 10, "leading") == list(range(0, 1000, 100))
    assert _spaced(schedule, 7, "leading") == [142 * i for i in range(7)]  # 1000 // 7
    assert _spaced(schedule, 4, "linspace") == [0, 333, 666, 999]
    assert _spaced(schedule, 4, "trailing") == [249, 499, 749, 999]
    assert _spaced(schedule, 7, "trailing") == [142, 285, 428, 570, 713, 856, 999]
    # linspace(0, sqrt(800), 10)^2 truncated, as DDIM's code does.
    expected = [int(x) for x in np.linspace(0, math.sqrt(800), 10) ** 2]
    assert _spaced(schedule, 10, "quadratic") == expected
    assert expected[1:4] == [9, 39, 88]


def test_sections_are_iddpm_s(schedule):
    # IDDPM's docstring: 300 steps as "10,15,20" are 10 of the first 100, 15 of the second, ...
    indices = _spaced(NoiseSchedule.linear(300), None, "10,15,20")
    assert len(indices) == 45
    assert indices[:10] == [0, 11, 22, 33, 44, 55, 66, 77, 88, 99]
    assert indices[10] == 100
    assert indices[24] == 199
    assert indices[25] == 200
    assert indices[-1] == 299
    assert _spaced(schedule, None, "4") == [0, 333, 666, 999]
    assert _spaced(schedule, 2, "1,1") == [0, 500]


@pytest.mark.parametrize("name", ["linear", "cosine", "jsd"])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize(
    ("num", "steps"),
    [(1, 1), (2, 2), (10, 1), (10, 3), (10, 7), (10, 9), (10, 10), (T, 1), (T, 999), (T, T)]
    + [(T, s) for s in (20, 30, 50, 333)],
)
def test_every_spacing_gives_S_increasing_indices(name, spacing, num, steps):
    indices = spaced_indices(NoiseSchedule.from_name(name, num), steps, spacing)
    assert indices.dtype == torch.int64
    assert len(indices) == steps
    assert int(indices[0]) >= 0
    assert int(indices[-1]) <= num - 1
    assert bool((indices[1:] > indices[:-1]).all())


@pytest.mark.parametrize("spacing", ["linspace", "trailing", "logsnr"])
@pytest.mark.parametrize("steps", [1, 2, 7, 50])
def test_these_spacings_start_from_pure_noise(schedule, spacing, steps):
    assert _spaced(schedule, steps, spacing)[-1] == T - 1


def test_duplicates_of_the_quadratic_spacing_move_up(schedule):
    # 50 squares start 0, 0.3, 1.3, 3.0, 5.3: two of them round to 0.
    assert _spaced(schedule, 50, "quadratic")[:5] == [0, 1, 2, 3, 5]


def test_logsnr_is_even_in_log_snr(schedule):
    indices = spaced_indices(schedule, 10, "logsnr")
    log_snr = schedule.snr.log()[indices]
    gaps = log_snr[:-1] - log_snr[1:]
    # Away from t = 0, where neighbouring timesteps are 0.7 apart, the nearest index is within 0.1.
    assert float((gaps[2:] - gaps[2:].mean()).abs().max()) < 0.3


def test_logsnr_ends_at_zero_snr():
    indices = _spaced(NoiseSchedule.jsd(100), 10, "logsnr")
    assert indices[0] == 0
    assert indices[-2:] == [98, 99]


@pytest.mark.parametrize("spacing", [*SPACINGS, [3, 4, 900], "3,1,7"])
@pytest.mark.parametrize("steps", [7, 30])
def test_the_previous_timestep_is_the_previous_index(schedule, spacing, steps):
    """Not t - T//S (a known bug): the tables hold abar of the index before, and 1 before that."""
    if not isinstance(spacing, str) or spacing not in SPACINGS:
        steps = None
    diffusion = GaussianDiffusion(schedule)
    sampler = DDIM(diffusion, steps, spacing=spacing)
    indices = sampler.indices.tolist()
    previous = [1.0] + [float(schedule.alpha_bars[i]) for i in indices[:-1]]
    table = schedule.ddim_table(sampler.indices)
    torch.testing.assert_close(
        table[:, StepColumn.COEF_X0].double(),
        torch.tensor(previous, dtype=torch.float64).sqrt(),
        rtol=1e-7,
        atol=0,
    )
    assert DDPM(diffusion, steps, spacing).indices.tolist() == indices


def test_default_numbers_of_steps(schedule):
    diffusion = GaussianDiffusion(schedule)
    assert DDIM(diffusion).steps == 50
    assert DDPM(diffusion).steps == T
    assert DDIM(diffusion, spacing=[1, 2]).timesteps.tolist() == [1, 2]


@pytest.mark.parametrize("kind", [list, tuple, np.array, torch.tensor])
def test_explicit_indices(schedule, kind):
    assert _spaced(schedule, None, kind([0, 5, 999])) == [0, 5, 999]
    assert _spaced(schedule, 3, kind([0, 5, 999])) == [0, 5, 999]


@pytest.mark.parametrize(
    ("steps", "spacing", "error", "message"),
    [
        (0, "leading", ValueError, r"steps is 0, expected 1\.\.1000"),
        (1001, "leading", ValueError, r"steps is 1001, expected 1\.\.1000"),
        (2.5, "leading", TypeError, "steps is 2.5"),
        (5, "even", ValueError, "unknown spacing 'even'; choose from leading, linspace"),
        (None, [5, 3], ValueError, "5 is followed by 3"),
        (None, [3, 3], ValueError, "3 is followed by 3"),
        (None, [3, 1000], ValueError, r"spacing has values from 3 to 1000, expected 0\.\.999"),
        (None, [], ValueError, "spacing has shape"),
        (None, [0.5], TypeError, "expected integers"),
        (4, [1, 2, 3], ValueError, "steps is 4, but spacing has 3"),
        (None, "1000,1", ValueError, "asks for 1000 timesteps in section 1 of 2, which has 500"),
        (None, "10,0", ValueError, "asks for 0 timesteps in section 2"),
        (10, "5,6", ValueError, "steps is 10, but spacing has 11"),
    ],
)
def test_bad_spacings(schedule, steps, spacing, error, message):
    with pytest.raises(error, match=message):
        spaced_indices(schedule, steps, spacing)
