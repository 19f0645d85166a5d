"""csrc/cuda/ddpm_step.cu with the raw operator's arguments."""

from __future__ import annotations

import functools

from .sampler_step import run

ddpm_step = functools.partial(run, "ddpm_step")
