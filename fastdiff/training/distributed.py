"""Several processes that train or sample together, one per device, as ``torchrun`` starts them.

What one process would do is shared out so that the result stays the same: a training batch in
equal contiguous shares in the order of ranks, images to sample in whole batches, in turn. Messages
between CPUs (may we go on? the losses so far) go through gloo, gradients on GPUs through NCCL.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastdiff.training.errors import RunError, UserError, one_line


@dataclass(frozen=True)
class World:
    """The processes of one run, and which of them this is.

    Every method but `from_environment` and `joined` must be called by all processes alike.

    Attributes
    ----------
    rank : int
        This process, 0..size-1; rank 0 alone writes files and talks to the user.
    size : int
        Number of processes; with 1 nothing is ever sent.
    local_rank : int
        This process among those of its machine: the index of its GPU.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @classmethod
    def from_environment(cls) -> World:
        """Read what ``torchrun`` sets (RANK, WORLD_SIZE, LOCAL_RANK); without it, one process."""
        values = {}
        for name, default in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")):
            text = os.environ.get(name, default)
            if not (text.isdecimal() and len(text) < 10):
                raise UserError(f"{name} is {text[:50]!r} in the environment; expected a number")
            values[name] = int(text)
        world = cls(values["RANK"], values["WORLD_SIZE"], values["LOCAL_RANK"])
        if world.rank >= world.size:
            raise UserError(
                f"RANK is {world.rank} and WORLD_SIZE {world.size} in the environment; start "
                "several processes with torchrun --nproc-per-node N -m fastdiff.train"
            )
        return world

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    @contextmanager
    def joined(self, device: torch.device) -> Iterator[None]:
        """Stay connected to the other processes while inside."""
        if self.size == 1:
            yield
            return
        # One of them always speaks for CPU tensors; no stop flag waits for a GPU.
        backend = "gloo" if device.type == "cpu" else f"cpu:gloo,{device.type}:nccl"
        try:
            dist.init_process_group(backend, rank=self.rank, world_size=self.size)
        except (RuntimeError, ValueError) as error:
            raise RunError(
                f"rank {self.rank} cannot reach the other processes: {one_line(error)}; start them "
                "with torchrun"
            ) from error
        yield
        # Not after an error: NCCL would wait for those who are gone. Leaving closes everything.
        dist.destroy_process_group()

    def first(self, action: Callable[[], None]) -> None:
        """Let rank 0 do something; if it fails there, the others leave silently with it."""
        error: Exception | None = None
        if self.is_first:
            try:
                action()
            except (UserError, RunError) as raised:
                error = raised
        if self.any(error is not None):
            raise error or SystemExit(UserError.exit_code)

    def any(self, flag: bool) -> bool:
        """Whether ``flag`` is set in some process: the same answer in all of them."""
        if self.size == 1:
            return flag
        flags = torch.tensor([int(flag)])
        with self.peers():
            dist.all_reduce(flags, dist.ReduceOp.MAX)
        return bool(flags[0])

    def mean(self, values: Tensor) -> Tensor:
        """Average over processes."""
        if self.size == 1:
            return values
        total = values.clone()
        with self.peers():
            dist.all_reduce(total)
        return total / self.size

    def gather(self, values: Tensor) -> list[Tensor]:
        """The CPU tensors of all processes, of one shape and dtype, in the order of ranks."""
        if self.size == 1:
            return [values]
        gathered = [torch.empty_like(values) for _ in range(self.size)]
        with self.peers():
            dist.all_gather(gathered, values)
        return gathered

    def data_parallel(self, module: nn.Module) -> nn.Module:
        """Wrap a module so that its gradients are averaged over processes."""
        if self.size == 1:
            return module
        # Parameters start equal and stay so; the U-Net has no buffer that changes.
        parallel = nn.parallel.DistributedDataParallel(
            module, broadcast_buffers=False, gradient_as_bucket_view=True
        )
        if any(p.dtype in (torch.bfloat16, torch.float16) for p in module.parameters()):
            parallel.register_comm_hook(self.size, _mean_in_float32)
        return parallel

    def averaging(self, module: nn.Module, now: bool):
        """Context of a forward and backward pass: average the gradients at its end, or later."""
        if hasattr(module, "set_requires_gradient_sync"):  # sharded
            module.set_requires_gradient_sync(now)
            return nullcontext()
        if self.size == 1 or now:
            return nullcontext()
        return module.no_sync()

    def batches(self, num: int, batch_size: int) -> list[Tensor]:
        """Indices of the images that this process draws out of ``num``, batch by batch.

        Whole batches go round the ranks. A batch is the same whoever draws it, and then so are
        its pixels, bit for bit: another size might take other matrix kernels.
        """
        return list(torch.arange(num).split(batch_size))[self.rank :: self.size]

    def assemble(self, images: Tensor) -> Tensor:
        """Sum over processes (on rank 0) of CPU images that are 0 where others drew."""
        if self.size > 1:
            with self.peers():
                dist.reduce(images, dst=0)
        return images

    @contextmanager
    def peers(self) -> Iterator[None]:
        """Turn a lost connection into a `RunError` that says so."""
        try:
            yield
        except RuntimeError as error:
            text = one_line(error)
            # DDP passes on what the transport threw, which has no type of its own.
            if self.size == 1 or not (
                isinstance(error, dist.DistError) or "gloo" in text or "nccl" in text.lower()
            ):
                raise
            raise RunError(
                f"rank {self.rank} of {self.size} lost the others: one of them ended or was "
                f"killed, and its own message says why ({text[:200]})"
            ) from error


def _mean_in_float32(size, bucket):  # annotations as text would be refused by torch
    """A hook of DistributedDataParallel: a half-precision mean is rounded once, not per rank."""
    gradients = bucket.buffer()
    total = gradients.float().div_(size)  # itself if it is float32

    def rounded(done: torch.futures.Future) -> Tensor:
        return gradients.copy_(done.value()[0])

    return dist.all_reduce(total, async_op=True).get_future().then(rounded)
