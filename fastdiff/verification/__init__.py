"""What `python -m fastdiff.verify` runs: ops on every backend against plain PyTorch in float64.

cases      an op's calls on small inputs, once for all backends, dtypes and layouts
compare    one call on one backend, forward and gradients, against the float64 reference
parity     what ops are for: noise words, a training step, a sampler, on the backend and without it
"""

from fastdiff.verification.cases import CASES, Case
from fastdiff.verification.compare import Row, verify_case
from fastdiff.verification.parity import PARITY

__all__ = ["CASES", "PARITY", "Case", "Row", "verify_case"]
