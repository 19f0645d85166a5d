"""`use_backend` in threads, tasks, generators, compiled code and backward passes."""

from __future__ import annotations

import asyncio
import contextvars
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from op_harness import exact
from op_harness.raw_arguments import arguments
from torch.utils._python_dispatch import TorchDispatchMode

import fastdiff
from fastdiff import _backends, ops

pytestmark = pytest.mark.cpu_kernels

X = torch.randn(2, 8, 4, 4)


class _Operators(TorchDispatchMode):
    """The fastdiff operators that this thread calls."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if str(func).startswith("fastdiff."):
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def operators(function: Callable[[], object]) -> list[str]:
    with _Operators() as seen:
        function()
    return seen.names


def backend_here() -> str:
    """Which backend an op runs on, here and now: the reference calls no operator of ours."""
    return "cpu" if operators(lambda: ops.group_norm_silu(X, 2, None, None)) else "reference"


def test_threads_that_enter_and_leave_in_turns() -> None:
    """The first that enters is the first that leaves: saved globals would be restored wrong."""
    turns = [threading.Event() for _ in range(4)]
    seen: dict[str, str] = {}

    def first() -> None:
        with fastdiff.use_backend("reference"):
            turns[0].set()
            turns[1].wait(60)
            seen["first"] = backend_here()
        turns[2].set()

    def second() -> None:
        turns[0].wait(60)
        with fastdiff.use_backend("cpu"):
            turns[1].set()
            turns[2].wait(60)
            seen["second"] = backend_here()

    with ThreadPoolExecutor(2) as pool:
        for running in [pool.submit(first), pool.submit(second)]:
            running.result(60)
        seen["a thread of the pool"] = pool.submit(backend_here).result(60)
    seen["this thread"] = backend_here()
    assert seen == {
        "first": "reference",
        "second": "cpu",
        "a thread of the pool": "cpu",
        "this thread": "cpu",
    }


def test_blocks_of_many_threads_leave_nothing() -> None:
    """Another thread comes between any two lines: what compiled code follows is set right."""

    def trace(frame, event, _):
        if frame.f_code.co_filename != _backends.__file__:
            return None
        time.sleep(0)
        return trace

    def enter_and_leave(name: str) -> None:
        sys.settrace(trace)
        try:
            for _ in range(50):
                with fastdiff.use_backend(name):
                    pass
        finally:
            sys.settrace(None)

    with ThreadPoolExecutor(4) as pool:
        for running in [pool.submit(enter_and_leave, n) for n in ("cpu", "reference") * 2]:
            running.result(60)
    assert not _backends._open
    assert _backends._latest is None


def test_a_block_is_of_its_thread() -> None:
    with fastdiff.use_backend("reference"), ThreadPoolExecutor(1) as pool:
        assert backend_here() == "reference"
        assert pool.submit(backend_here).result(60) == "cpu"
        here = contextvars.copy_context()
        assert pool.submit(here.run, backend_here).result(60) == "reference"
    assert backend_here() == "cpu"


def test_tasks_in_turns() -> None:
    async def task(name: str, seen: list[str]) -> None:
        with fastdiff.use_backend(name):
            for _ in range(3):
                await asyncio.sleep(0)
                seen.append(backend_here())

    async def both() -> tuple[list[str], list[str], str]:
        first, second = [], []
        with fastdiff.use_backend("reference"):
            inherits = asyncio.create_task(asyncio.to_thread(backend_here))
        await asyncio.gather(task("reference", first), task("cpu", second))
        return first, second, await inherits

    first, second, inherited = asyncio.run(both())
    assert first == ["reference"] * 3
    assert second == ["cpu"] * 3
    assert inherited == "reference"
    assert backend_here() == "cpu"


def test_generators_closed_in_another_order() -> None:
    def block(name: str) -> Iterator[None]:
        with fastdiff.use_backend(name):
            yield

    first, second = block("reference"), block("cpu")
    next(first)
    assert backend_here() == "reference"
    next(second)
    assert backend_here() == "cpu"
    first.close()
    assert backend_here() == "cpu"
    second.close()
    assert backend_here() == "cpu"
    first, second = block("cpu"), block("reference")
    next(first)
    next(second)
    first.close()
    assert backend_here() == "reference"
    second.close()
    assert backend_here() == "cpu"


@pytest.mark.parametrize("ended_by", ["a thread", "a task"])
def test_a_generator_that_ends_elsewhere_leaves_nothing(ended_by: str) -> None:
    """Neither where it began nor where it ended, also while another block is open there."""

    def block() -> Iterator[None]:
        with fastdiff.use_backend("reference"):
            yield

    async def finish(begun: Iterator[None]) -> None:
        await asyncio.create_task(asyncio.to_thread(list, begun))

    def end(begun: Iterator[None]) -> None:
        if ended_by == "a task":
            asyncio.run(finish(begun))
        else:
            with ThreadPoolExecutor(1) as other:
                other.submit(list, begun).result()
                assert other.submit(backend_here).result() == "cpu"

    begun = block()
    next(begun)
    assert backend_here() == "reference"
    end(begun)
    assert backend_here() == "cpu"
    begun = block()
    next(begun)
    with fastdiff.use_backend("cpu"):
        end(begun)
        assert backend_here() == "cpu"
        with fastdiff.use_backend("reference"):
            assert backend_here() == "reference"
    assert backend_here() == "cpu"


def test_an_error_leaves_the_block() -> None:
    with pytest.raises(ZeroDivisionError), fastdiff.use_backend("reference"):
        _ = 1 / 0
    assert backend_here() == "cpu"

    @fastdiff.use_backend("reference")
    def decorated(depth: int) -> list[str]:
        return [backend_here(), *(decorated(depth - 1) if depth else [])]

    assert decorated(2) == ["reference"] * 3
    assert backend_here() == "cpu"


class _Graphs:
    """A torch.compile backend that keeps which graphs it made, and which of them ran."""

    def __init__(self) -> None:
        self.made: list[str] = []
        self.ran: list[str] = []

    def __call__(self, graph: torch.fx.GraphModule, _: list) -> Callable:
        ours = any("fastdiff." in str(node.target) for node in graph.graph.nodes)
        name = "cpu" if ours else "reference"
        self.made.append(name)

        def run(*args: object) -> object:
            self.ran.append(name)
            return graph(*args)

        return run


@pytest.fixture
def graphs() -> Iterator[_Graphs]:
    torch._dynamo.reset()
    yield _Graphs()
    torch._dynamo.reset()


def test_compiled_code_keeps_no_backend(graphs: _Graphs) -> None:
    """A graph for every backend, found again; no graph break."""

    @torch.compile(fullgraph=True, backend=graphs)
    def f(x: torch.Tensor) -> torch.Tensor:
        return ops.group_norm_silu(x, 2, None, None)

    def ran(name: str | None) -> str:
        if name is None:
            f(X)
        else:
            with fastdiff.use_backend(name):
                f(X)
        return graphs.ran.pop()

    for _ in range(2):
        assert [ran(name) for name in (None, "reference", "cpu")] == ["cpu", "reference", "cpu"]
        with ThreadPoolExecutor(1) as pool, fastdiff.use_backend("reference"):
            # Before 2.14 compiled code does not tell threads apart: see use_backend.
            other = "cpu" if torch.__version__ >= "2.14" else "reference"
            assert pool.submit(ran, None).result(120) == other
            assert ran(None) == "reference"
    assert graphs.made == ["cpu", "reference", "cpu"]


def test_block_inside_compiled_code(graphs: _Graphs) -> None:
    @torch.compile(fullgraph=True, backend=graphs)
    def f(x: torch.Tensor) -> torch.Tensor:
        with fastdiff.use_backend("reference"):
            y = ops.group_norm_silu(x, 2, None, None)
        return y + 1

    f(X)
    assert graphs.ran == graphs.made == ["reference"]
    assert backend_here() == "cpu"


@pytest.mark.parametrize("op", exact.PUBLIC)
def test_backward_runs_on_the_backend_of_its_forward(op: str) -> None:
    """In whatever block and thread it is called."""

    def loss(backend: str) -> torch.Tensor:
        args = arguments(op)
        args = {
            name: x.float().requires_grad_(name in exact.DIFFERENTIABLE[op])
            if isinstance(x, torch.Tensor) and x.is_floating_point()
            else x
            for name, x in args.items()
        }
        with fastdiff.use_backend(backend):
            found = exact.PUBLIC[op](args)
        found = found if isinstance(found, tuple) else (found,)
        return sum(1.5 * x.sum() for x in found)

    with fastdiff.use_backend("cpu"):
        assert operators(loss("reference").backward) == []
    with fastdiff.use_backend("reference"):
        assert operators(loss("cpu").backward)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(operators, loss("reference").backward).result(60) == []
        assert pool.submit(operators, loss("cpu").backward).result(60)
