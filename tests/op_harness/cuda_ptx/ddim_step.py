"""csrc/cuda/ddim_step.cu with the raw operator's arguments."""

from __future__ import annotations

import functools

from .sampler_step import run

ddim_step = functools.partial(run, "ddim_step")
