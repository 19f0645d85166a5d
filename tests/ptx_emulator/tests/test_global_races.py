"""Races on global memory between the blocks of a launch."""

from __future__ import annotations

import random
from itertools import combinations

import numpy as np
import pytest

from .. import RaceError, run
from .support import needs_nvcc, ptx_of

SEEDS = [None, 1, 7]


def call(entry, args, grid, block=64, seed=None, **options):
    ptx = ptx_of("global_races", "sm_80")
    options = {"racecheck": True, "timeout": 20, **options}
    return run(ptx, entry, args, grid, block, seed=seed, **options)


def zeros(n):
    return np.zeros(n, np.float32)


def integers(n):
    return np.zeros(n, np.int32)


@needs_nvcc
@pytest.mark.parametrize("seed", SEEDS)
def test_rows_that_overlap_by_one_element(seed):
    y = zeros(4 * 128 + 1)
    call("fill_rows", [y, 128], 4, seed=seed)
    with pytest.raises(RaceError, match="on global memory") as caught:
        call("fill_rows", [y, 129], 4, seed=seed)
    hazard = caught.value.hazards[0]
    assert (hazard.space, hazard.kind) == ("global", "write after write")
    assert hazard.array == "fill_rows_param_0"
    assert hazard.offset in (512, 1024, 1536)
    assert abs(hazard.first_block[0] - hazard.block[0]) == 1
    assert "global_races.cu:5: st.global" in hazard.first_instruction
    assert f"block {hazard.first_block} thread" in str(hazard)


@needs_nvcc
def test_overlapping_writes_of_the_same_value_are_races_too():
    with pytest.raises(RaceError, match="write after write"):
        call("fill_rows_with_ones", [zeros(4 * 128 + 1), 129], 4)


@needs_nvcc
@pytest.mark.parametrize("seed", SEEDS)
def test_in_place_stencil(seed):
    x = np.arange(300, dtype=np.float32)
    y = zeros(300)
    call("smooth", [x, y, 300], 5, seed=seed)
    np.testing.assert_array_equal(y[:-1], x[:-1] + x[1:])
    with pytest.raises(RaceError, match=r"write after read|read after write"):
        call("smooth", [x, x, 300], 5, seed=seed)


@needs_nvcc
def test_in_place_stencil_of_one_block_is_not_between_blocks():
    x = np.arange(64, dtype=np.float32)
    call("smooth", [x, x, 64], 1)


@needs_nvcc
def test_nothing_is_reported_unless_asked():
    call("fill_rows", [zeros(4 * 128 + 1), 129], 4, racecheck=False)


@needs_nvcc
@pytest.mark.parametrize("seed", SEEDS)
def test_atomics(seed):
    x, total = np.ones(256, np.float32), zeros(1)
    call("sum_with_atomics", [x, total], 4, seed=seed)
    assert total[0] == 256
    with pytest.raises(RaceError):
        call("sum_without_atomics", [x, total], 4, seed=seed)
    with pytest.raises(RaceError, match=r"ld\.global"):  # an atomic and a plain load
        call("sum_and_look", [x, total, zeros(4)], 4, seed=seed)


@needs_nvcc
@pytest.mark.parametrize("seed", SEEDS)
def test_last_block_reduction(seed):
    x = np.arange(10 * 64, dtype=np.float32)
    total = zeros(1)
    call("last_block_sum", [x, zeros(10), integers(1), total], 10, seed=seed)
    assert total[0] == x.sum()
    with pytest.raises(RaceError, match="read after write") as caught:
        call("last_block_sum_without_fence", [x, zeros(10), integers(1), total], 10, seed=seed)
    assert {hazard.array for hazard in caught.value.hazards} == {
        "last_block_sum_without_fence_param_1"
    }


@needs_nvcc
@pytest.mark.parametrize("entry", ["chain_with_fence", "chain_with_release"])
def test_chain_of_blocks(entry):
    x, total = np.arange(9, dtype=np.float32), zeros(9)
    call(entry, [x, total, integers(9)], 9)
    np.testing.assert_array_equal(total, np.cumsum(x))


@needs_nvcc
def test_chain_of_blocks_without_fence():
    x = np.arange(9, dtype=np.float32)
    with pytest.raises(RaceError, match="chain_without_fence_param_1"):
        call("chain_without_fence", [x, zeros(9), integers(9)], 9)


# ---- random programs against a brute-force model; need no nvcc ----
BLOCKS, STEPS, WORDS = 6, 4, 24
NOTHING, LOAD, STORE, ATOMIC = 0, 1, 2, 3


def random_program(seed: int) -> list[list[tuple[int, int]]]:
    """For each block its steps: what it does to which word."""
    generator = random.Random(seed)
    activity = generator.choice([0.3, 0.6, 0.9])

    def step() -> tuple[int, int]:
        if generator.random() > activity:
            return NOTHING, 0
        kind = generator.choices((LOAD, STORE, ATOMIC), (6, 1, 2))[0]
        return kind, generator.randrange(WORDS)

    return [[step() for _ in range(STEPS)] for _ in range(BLOCKS)]


def has_race(program: list[list[tuple[int, int]]]) -> bool:
    accesses = [(block, *step) for block, steps in enumerate(program) for step in steps]
    for (block_a, kind_a, word_a), (block_b, kind_b, word_b) in combinations(accesses, 2):
        kinds = {kind_a, kind_b}
        if block_a == block_b or word_a != word_b or NOTHING in kinds:
            continue
        if kinds not in ({LOAD}, {ATOMIC}):
            return True
    return False


def as_ptx() -> str:
    """Each block follows its row of a table of (kind, byte offset)."""
    steps = []
    for step in range(STEPS):
        steps.append(f"ld.global.v2.u32 {{%r1, %r2}}, [%rd1+{8 * step}];")
        steps.append("cvt.u64.u32 %rd3, %r2; add.s64 %rd3, %rd3, %rd2;")
        steps += [
            f"setp.eq.u32 %p0, %r1, {LOAD}; @%p0 ld.global.u32 %r3, [%rd3];",
            f"setp.eq.u32 %p0, %r1, {STORE}; @%p0 st.global.u32 [%rd3], %r0;",
            f"setp.eq.u32 %p0, %r1, {ATOMIC}; @%p0 red.global.add.u32 [%rd3], 1;",
        ]
    return "\n".join(
        [
            ".version 8.0\n.target sm_80\n.address_size 64",
            ".visible .entry k(.param .u64 table, .param .u64 words) {",
            ".reg .b64 %rd<4>; .reg .b32 %r<4>; .reg .pred %p<1>;",
            "ld.param.u64 %rd0, [table]; ld.param.u64 %rd2, [words]; mov.u32 %r0, %ctaid.x;",
            f"mul.wide.u32 %rd1, %r0, {8 * STEPS}; add.s64 %rd1, %rd1, %rd0;",
            *steps,
            "ret; }",
        ]
    )


@pytest.mark.parametrize("seed", range(60))
def test_random_program(seed):
    program = random_program(seed)
    table = (np.array(program, np.uint32) * [1, 4]).astype(np.uint32)
    words = np.zeros(WORDS, np.uint32)
    for order in (None, 1):
        try:
            run(as_ptx(), "k", [table, words], BLOCKS, 1, seed=order, racecheck=True)
            found = False
        except RaceError:
            found = True
        assert found == has_race(program)


def test_the_programs_are_of_both_kinds():
    racy = sum(has_race(random_program(seed)) for seed in range(60))
    assert 15 <= racy <= 45
