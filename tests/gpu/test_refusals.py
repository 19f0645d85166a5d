"""What compiled kernels of the device do not compute in is refused by their bindings."""

from __future__ import annotations

import pytest
import torch

import fastdiff

from .needs import GPU
from .test_out_of_memory import raw_calls

pytestmark = GPU


@pytest.fixture(autouse=True)
def compiled_kernels() -> None:
    if not (status := fastdiff.backends()["cuda"]):
        pytest.skip(f"cuda: {status.reason}")


@pytest.mark.parametrize("op", list(raw_calls(torch.ones(2, 8, 4, 4))))
@pytest.mark.parametrize(
    ("dtype", "words"), [(torch.float64, "float64 kernels"), (torch.int32, "floating point")]
)
def test_dtypes_of_raw_operators(op: str, dtype: torch.dtype, words: str) -> None:
    calls = raw_calls(torch.ones(2, 8, 4, 4, device="cuda").to(dtype))
    with pytest.raises(RuntimeError, match=words):
        calls[op]()


@pytest.mark.parametrize(
    ("dtype", "words"),
    [
        (torch.float64, "out must be"),
        (torch.uint8, "out must be"),
        (torch.int32, "out has a dtype that no kernel takes"),
    ],
)
def test_dtypes_that_are_filled_with_normals(dtype: torch.dtype, words: str) -> None:
    out = torch.empty(2, 8, dtype=dtype, device="cuda")
    with pytest.raises(RuntimeError, match=words):
        torch.ops.fastdiff.philox_normal_(out, None, 0, 0)
