"""The fused operators. Each module holds one op: public function, schema, checks, autograd.

The public functions choose a backend (`fastdiff.backends`, `fastdiff.use_backend`) and call
`torch.ops.fastdiff.<name>` or the reference.
"""

from fastdiff.ops.ddim_step import ddim_step
from fastdiff.ops.ddpm_step import ddpm_step
from fastdiff.ops.eps_loss import eps_loss
from fastdiff.ops.group_norm_silu import group_norm_silu
from fastdiff.ops.group_norm_statistics import GroupNormStatistics, group_norm_statistics
from fastdiff.ops.philox_normal import philox_normal
from fastdiff.ops.posterior_mean import posterior_mean, posterior_mean_variance
from fastdiff.ops.q_sample import q_sample
from fastdiff.ops.residual_group_norm_silu import residual_group_norm_silu
from fastdiff.ops.vlb_terms import vlb_terms
from fastdiff.reference.philox import sample_keys

__all__ = [
    "GroupNormStatistics",
    "ddim_step",
    "ddpm_step",
    "eps_loss",
    "group_norm_silu",
    "group_norm_statistics",
    "philox_normal",
    "posterior_mean",
    "posterior_mean_variance",
    "q_sample",
    "residual_group_norm_silu",
    "sample_keys",
    "vlb_terms",
]
