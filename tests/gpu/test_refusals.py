"""What kernels of the device do not take is refused: by the bindings, or by Triton's launchers."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import fastdiff
from fastdiff.training.errors import UserError
from fastdiff.training.run import choose_device

from .needs import GPU
from .test_out_of_memory import raw_calls

pytestmark = GPU


@pytest.fixture(autouse=True)
def kernels() -> None:
    for name, status in fastdiff.backends().items():
        if name in ("cuda", "triton") and not status:
            pytest.skip(f"{name}: {status.reason}")


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


@pytest.mark.parametrize("overload", ["default", "triton"])
def test_normals_into_memory_with_gaps(overload: str) -> None:
    out = torch.empty(2, 8, device="cuda")[:, ::2]
    with pytest.raises((RuntimeError, ValueError), match="contiguous"):
        getattr(torch.ops.fastdiff.philox_normal_, overload)(out, None, 0, 0)


@pytest.mark.parametrize("overload", ["default", "triton"])
@pytest.mark.parametrize("keyed", [True, False])
def test_normals_of_keys_and_of_a_seed(overload: str, keyed: bool) -> None:
    out = torch.empty(2, 8, device="cuda")
    keys, seed = (torch.ones(2, dtype=torch.long, device="cuda"), 0) if keyed else (None, None)
    with pytest.raises((RuntimeError, ValueError), match="either keys or seed"):
        getattr(torch.ops.fastdiff.philox_normal_, overload)(out, keys, seed, 0)


@pytest.mark.parametrize(
    ("device", "process", "words"),
    [
        ("cuda:0", 0, "every process needs a GPU of its own; give --device cuda"),
        ("cuda", 99, r"process 99 of this machine has no GPU, there are \d"),
    ],
)
def test_processes_that_have_no_gpu_of_their_own(device: str, process: int, words: str) -> None:
    world = SimpleNamespace(size=100, local_rank=process)
    with pytest.raises(UserError, match=words):
        choose_device(device, world)
