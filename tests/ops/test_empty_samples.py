"""Samples without elements: rows of tables that do not exist are refused as for any others."""

from __future__ import annotations

import pytest
import torch
from op_harness import implementation_params
from torch import Tensor

import fastdiff
from fastdiff import NoiseSchedule, ops

SCHEDULE = NoiseSchedule.linear(10)
TABLES = SCHEDULE.tables("cpu")
DDPM = SCHEDULE.ddpm_table(torch.arange(10), variance="fixed_large")
DDIM = SCHEDULE.ddim_table(torch.arange(10), eta=1.0)
CALLS = {
    "q_sample": lambda x, t: ops.q_sample(
        x, t, TABLES.sqrt_alpha_bar, TABLES.sqrt_one_minus_alpha_bar, seed=1
    ),
    "posterior_mean": lambda x, t: ops.posterior_mean(
        x, x, t, TABLES.posterior_coef_x0, TABLES.posterior_coef_x_t
    ),
    "ddim_step": lambda x, t: ops.ddim_step(x, x, t, DDIM),
    "ddpm_step": lambda x, t: ops.ddpm_step(x, x, t, DDPM, seed=1),
    "vlb_terms": lambda x, t: ops.vlb_terms(x, x, x, t, DDPM, seed=1),
    "vlb_terms, recorded": lambda x, t: ops.vlb_terms(
        x, x, x.clone().requires_grad_(), t, DDPM, seed=1
    ),
}


@pytest.mark.parametrize("backend", implementation_params("reference", "cpu"))
@pytest.mark.parametrize("call", CALLS)
def test_timesteps_out_of_range(call: str, backend: str) -> None:
    def run(shape: tuple[int, ...], t: list[int]) -> object:
        x: Tensor = torch.zeros(shape)
        with fastdiff.use_backend(backend):
            return CALLS[call](x, torch.tensor(t, dtype=torch.int64))

    for shape in ((2, 3, 4, 0), (2, 3, 4, 4)):
        run(shape, [0, 9])
        for wrong in ([0, 10], [-1, 0]):
            with pytest.raises(IndexError, match=str(wrong[1] or wrong[0])):
                run(shape, wrong)
    run((0, 3, 4, 4), [])
