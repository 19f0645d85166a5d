"""The fused operators. Each module holds one op: public function, schema, fake, autograd.

The public functions check their arguments, choose a backend (`fastdiff.backends`,
`fastdiff.use_backend`) and call `torch.ops.fastdiff.<name>`.
"""

from fastdiff.ops.eps_loss import eps_loss
from fastdiff.ops.group_norm_silu import group_norm_silu
from fastdiff.ops.philox_normal import philox_normal
from fastdiff.ops.posterior_mean import posterior_mean, posterior_mean_variance
from fastdiff.ops.q_sample import q_sample
from fastdiff.reference.philox import sample_keys

__all__ = [
    "eps_loss",
    "group_norm_silu",
    "philox_normal",
    "posterior_mean",
    "posterior_mean_variance",
    "q_sample",
    "sample_keys",
]
