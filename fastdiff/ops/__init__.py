"""The fused operators. Each module holds one op: public function, schema, fake, autograd.

The public functions check their arguments, choose a backend (`fastdiff.backends`,
`fastdiff.use_backend`) and call `torch.ops.fastdiff.<name>`.
"""

from fastdiff.ops.philox_normal import philox_normal
from fastdiff.ops.q_sample import q_sample
from fastdiff.reference.philox import sample_keys

__all__ = ["philox_normal", "q_sample", "sample_keys"]
