"""Every op in plain PyTorch: the executable specification, and the fallback that always works.

Depends on torch alone.
"""

from fastdiff.reference.philox import philox4x32, sample_keys, sample_words
from fastdiff.reference.philox_normal import box_muller, normals, philox_normal
from fastdiff.reference.q_sample import q_sample

__all__ = [
    "box_muller",
    "normals",
    "philox4x32",
    "philox_normal",
    "q_sample",
    "sample_keys",
    "sample_words",
]
