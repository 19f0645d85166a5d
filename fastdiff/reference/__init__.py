"""Every op in plain PyTorch: the executable specification, and the fallback that always works.

Depends on torch alone.
"""

from fastdiff.reference.ddim_step import ddim_step
from fastdiff.reference.ddpm_step import ddpm_step
from fastdiff.reference.eps_loss import eps_loss
from fastdiff.reference.group_norm_silu import (
    group_norm_silu,
    group_norm_silu_backward,
    residual_group_norm_silu,
)
from fastdiff.reference.philox import philox4x32, sample_keys, sample_words
from fastdiff.reference.philox_normal import box_muller, normals, philox_normal
from fastdiff.reference.posterior_mean import posterior_mean
from fastdiff.reference.q_sample import q_sample
from fastdiff.reference.step_columns import StepColumn
from fastdiff.reference.vlb_terms import vlb_terms

__all__ = [
    "StepColumn",
    "box_muller",
    "ddim_step",
    "ddpm_step",
    "eps_loss",
    "group_norm_silu",
    "group_norm_silu_backward",
    "normals",
    "philox4x32",
    "philox_normal",
    "posterior_mean",
    "q_sample",
    "residual_group_norm_silu",
    "sample_keys",
    "sample_words",
    "vlb_terms",
]
