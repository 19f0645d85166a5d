"""The predicted limits: arithmetic done by hand, known occupancies, the committed page."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
import sys

import numpy as np
import pytest
from op_harness import available

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from benchmarks.audit import executed, in_flight, traffic_cases
from benchmarks.audit.executed import Launch
from benchmarks.audit.expansion import expand, sass_pipe
from benchmarks.roofline import DEVICES, Gpu
from benchmarks.shapes import group_norm_sites
from benchmarks.speed_of_light import __main__ as command
from benchmarks.speed_of_light import counts, model, page, published

needs_nvcc = pytest.mark.skipif(available("cuda-ptx") is not None, reason="needs nvcc and g++")
A100, H100, B200 = (next(g for g in DEVICES if g.name == n) for n in ("A100", "H100", "B200"))
# 100 multiprocessors of 1 GHz and 1 TB/s: clocks and bytes are round numbers.
GPU = Gpu("test", 1e12, 2 * 128 * 100 * 1e9, 100, latency=1e-6, l2_bytes=1 << 20)


@pytest.mark.parametrize(
    ("gpu", "threads", "registers", "shared", "blocks", "limit"),
    [
        # CUDA C++ Best Practices Guide, "Calculating Occupancy": 37 registers give 75 % with
        # blocks of 128 threads (12 of them) and 63 % with blocks of 320 (4).
        (A100, 128, 37, 0, 12, "registers"),
        (A100, 320, 37, 0, 4, "registers"),
        (A100, 1024, 32, 0, 2, "registers"),  # full
        (A100, 1024, 33, 0, 1, "registers"),
        (A100, 32, 16, 0, 32, "blocks"),
        (H100, 512, 128, 0, 1, "registers"),
        (H100, 256, 32, 100 << 10, 2, "shared memory"),  # 228 KB: twice 101, not thrice
        (H100, 128, 32, 227 << 10, 1, "shared memory"),
        (H100, 128, 32, 228 << 10, 0, "shared memory"),  # no room for the reserved KB
        (DEVICES[4], 1024, 32, 0, 1, "warps"),  # 48 warps
        (DEVICES[5], 128, 32, 32 << 10, 2, "shared memory"),  # a T4 reserves nothing
    ],
)
def test_occupancy(gpu, threads, registers, shared, blocks, limit):
    found = model.occupancy(gpu, threads, registers, shared)
    assert (found.blocks, found.limit) == (blocks, limit)
    assert found.warps == blocks * math.ceil(threads / 32)


LAUNCH = Launch(
    "test", 200, 256, 1, 0, 32, 0, {"issue": 0.0}, 2e8, 1e8, 5e5, 5e5, 64, False, 0.0, 1.0
)


def limits(gpu=GPU, cached=False, **changes):
    return model.predict(dataclasses.replace(LAUNCH, **changes), gpu, cached).limits


def test_memory_takes_its_bytes():
    assert limits()["memory"] == pytest.approx(2e8 / 0.9e12)
    # Read twice by each block: 200 blocks of 500 KB do not stay in 1 MB of L2, of 1 KB they do.
    assert limits(block_unique=2.5e5)["memory"] == pytest.approx(2e8 / 0.9e12)
    again = limits(block_loads=2e3, block_unique=1e3)["memory"]
    assert again == pytest.approx(1.5e8 / 0.9e12)
    assert limits(cached=True)["memory"] == pytest.approx(1e8 / 0.9e12)


def test_pipes_and_issue_slots():
    """10^9 warp instructions on 100 multiprocessors: 10^7 each, two blocks of 8 warps at a time."""
    work = {"issue": 1e9, "fma": 4e8, "imad": 1e8, "alu": 3e8, "xu": 1e8, "lsu": 1e8}
    found = limits(executed=work)
    assert found["issue"] == pytest.approx(1e7 / 3.4 / 1e9)
    assert found["fma"] == pytest.approx((4e6 / 4 + 1e6 / 2) / 0.85 / 1e9)
    assert found["alu"] == pytest.approx(3e6 / 2 / 0.85 / 1e9)
    assert found["xu"] == pytest.approx(1e6 / 0.5 / 0.85 / 1e9)
    assert found["lsu"] == pytest.approx(1e6 / 0.85 / 1e9)
    # One warp a multiprocessor issues an instruction every three clocks.
    alone = limits(executed=work, blocks=100, threads=32)
    assert alone["issue"] == pytest.approx(1e7 / 0.33 / 1e9)
    # 150 blocks on 100 multiprocessors: half of them have two, the others wait.
    assert limits(executed=work, blocks=150)["alu"] == pytest.approx(3e6 / 2 / 0.85 / 1e9 / 0.75)
    assert limits(executed=work, blocks=50)["alu"] == pytest.approx(3e6 / 2 / 0.85 / 1e9 * 2)
    float32 = dataclasses.replace(GPU, lanes=64, fp32=GPU.fp32 / 2)
    assert float32.clock == pytest.approx(GPU.clock)
    assert limits(float32, executed={"issue": 1.0, "fma": 4e8})["fma"] == pytest.approx(
        4e6 / 2 / 0.85 / 1e9
    )


def test_bytes_in_flight():
    """Two blocks of 256 threads with 64 bytes each: 32 KB per microsecond and multiprocessor."""
    prediction = model.predict(LAUNCH, GPU)
    assert prediction.in_flight == 2 * 256 * 64
    assert prediction.needed == pytest.approx(0.9e12 * 1e-6 / 100)
    assert prediction.limits["in flight"] == pytest.approx(1e8 / 100 / 32768 * 1e-6)
    # Asynchronous copies: all that a block reads.
    found = limits(copies=True)["in flight"]
    assert found == pytest.approx(1e8 / 100 / 1e6 * 1e-6)


def test_chain_of_one_block_and_waves():
    changes = {
        "block_loads": 3 * 256 * 64.0,
        "barriers": 4.0,
        "executed": {"issue": 200 * 8 * 330.0},
    }
    once = limits(**changes)["chain"]
    assert once == pytest.approx(3e-6 + 1000e-9 + 4 * 50e-9)
    # 64 warps a multiprocessor: 8 blocks, 800 at a time.
    assert model.predict(dataclasses.replace(LAUNCH, blocks=1600), GPU).waves == 2
    more = limits(**changes | {"blocks": 1601, "executed": {"issue": 1601 * 8 * 330.0}})["chain"]
    assert more == pytest.approx(3 * once)


def test_a_kernel_that_does_not_fit():
    with pytest.raises(ValueError, match="does not fit a multiprocessor of test"):
        model.predict(dataclasses.replace(LAUNCH, shared=228 << 10), GPU)


def test_later_launches_find_small_tensors_in_the_cache():
    small = dataclasses.replace(LAUNCH, moved=4e5, read=2e5)
    first, second = model.predict_call([small, small], GPU)
    assert second.limits["memory"] == pytest.approx(first.limits["memory"] / 2)
    first, second = model.predict_call([LAUNCH, LAUNCH], GPU)
    assert second.limits["memory"] == first.limits["memory"]


@pytest.mark.parametrize(
    ("text", "pipes"),
    [
        ("fma.rn.f32 %f1, %f2, %f3, %f4", {"issue": 1, "fma": 1}),
        ("@%p1 fma.rn.f32x2 %rd1, %rd2, %rd3, %rd4", {"issue": 1, "fma": 2}),
        ("mad.lo.s32 %r1, %r2, %r3, %r4", {"issue": 1, "imad": 1}),
        ("add.s64 %rd1, %rd2, %rd3", {"issue": 2, "alu": 2}),
        ("ex2.approx.ftz.f32 %f1, %f2", {"issue": 1, "xu": 1}),
        ("ex2.approx.f32 %f1, %f2", {"issue": 4, "xu": 1, "fma": 2, "alu": 1}),
        ("ld.global.v4.u32 {%r1, %r2, %r3, %r4}, [%rd1]", {"issue": 1, "lsu": 4}),
        ("st.shared.b16 [%r1], %rs1", {"issue": 1, "lsu": 1}),
        ("shfl.sync.bfly.b32 %r1|%p1, %r2, 1, 31, -1", {"issue": 1, "lsu": 1}),
        ("cvta.to.global.u64 %rd1, %rd2", {}),
        ("mov.u32 %r1, %tid.x", {"issue": 1, "alu": 1}),
        ("mov.b32 %r1, %r2", {}),
        ("@!%p1 bra $L1", {"issue": 0.9, "alu": 0.9}),
    ],
)
def test_expansion_of_an_instruction(text, pipes):
    assert expand(text) == pytest.approx(pipes)


def test_pipes_of_machine_code():
    opcodes = {"FFMA.FTZ": "fma", "IMAD.WIDE": "imad", "IMAD.MOV.U32": "fma", "MUFU.EX2": "xu"}
    opcodes |= {"LDG.E.128": "lsu", "SHFL.BFLY": "lsu", "LOP3.LUT": "alu", "BAR.SYNC": "alu"}
    assert {name: sass_pipe(name) for name in opcodes} == opcodes


LISTING = """
        /*0010*/                   LDG.E.128 R4, desc[UR4][R2.64] ;                /* 0x */
        /*0020*/                   LDG.E.128.CONSTANT R8, desc[UR4][R2.64+0x200] ; /* 0x */
        /*0030*/              @!P0 LDG.E R12, desc[UR4][R14.64] ;                  /* 0x */
        /*0040*/                   FADD R20, R5, 1 ;                               /* 0x */
        /*0050*/                   LDG.E.64 R16, desc[UR4][R2.64+0x400] ;          /* 0x */
        /*0060*/                   FADD R21, R12, R16 ;                            /* 0x */
        /*0070*/                   STG.E.128 desc[UR4][R2.64], R4 ;                /* 0x */
"""


def test_bytes_under_way_in_machine_code():
    code = in_flight.instructions(LISTING)
    assert [opcode for opcode, _ in code][2:4] == ["LDG.E", "FADD"]
    # Two of 16 and one of 4 bytes, before the first is used.
    assert in_flight.in_flight(code) == in_flight.InFlight(36, False)
    copies = in_flight.instructions(" /*0010*/ LDGSTS.E.128 [R1], desc[UR4][R2.64] ; /* */")
    assert in_flight.in_flight(copies) == in_flight.InFlight(0, True)


@needs_nvcc
def test_executed_instructions_of_a_kernel():
    """Two blocks of three warps, each lane 100 dependent multiply-adds of one loaded number."""
    from ptx_emulator import compile_ptx, run

    ptx = compile_ptx("""
extern "C" __global__ void chain(float* x, float a) {
  float v = x[threadIdx.x];
#pragma unroll 4
  for (int i = 0; i < 100; i++) v = v * a + a;
  x[threadIdx.x] = v;
}
""")
    x = np.ones(96, np.float32)
    result = run(ptx, "chain", [x, 1.0], 2, 96, count=True, profile=True)
    launch = executed.describe(result, large=1)
    assert launch.moved == 2 * 96 * 8
    assert launch.executed["fma"] == 2 * 3 * 100
    assert launch.executed["lsu"] == 2 * 3 * 2
    assert (launch.blocks, launch.threads, launch.barriers) == (2, 96, 0)
    assert (launch.block_loads, launch.in_flight, launch.spills) == (384, 4, 0)
    assert 0.5 < launch.static_error < 2
    options = {"count": True, "profile": True, "last_blocks": 1}
    half = executed.describe(run(ptx, "chain", [x, 1.0], 2, 96, **options), large=1)
    assert half.executed == launch.executed


def test_published_measurements_are_of_cases_that_are_counted():
    from benchmarks.speed_of_light.cases import RIVAL_CASES

    counted = {case for _, case in RIVAL_CASES}
    assert {m.case for m in published.MEASUREMENTS} <= counted


def test_the_page_is_that_of_the_counts():
    document = json.loads(command.FILE.read_text())
    assert command.PAGE.read_text() == page.render(document), (
        "run python -m benchmarks.speed_of_light --render"
    )


@pytest.mark.slow
@needs_nvcc
@pytest.mark.timeout(1800)
def test_the_counts_are_those_of_the_kernels():
    """One layer, forward and backward; all of them: python -m benchmarks.speed_of_light."""
    committed = counts.rows_of(json.loads(command.FILE.read_text()))
    (site,) = (s for s in group_norm_sites("vae") if s.channels == 512)
    for call in traffic_cases.group_norm_calls("bf16", "nchw", "sm_90", [(site, 1)]):
        now = counts.count(counts.Memory({}), call, "cuda", H100, "sm_90")
        (then,) = (
            row
            for row in committed
            if (row.shape, row.layout, row.mode, row.device)
            == (now.shape, now.layout, now.mode, now.device)
        )
        for ours, theirs in zip(now.launches, then.launches, strict=True):
            assert ours.executed["issue"] == pytest.approx(theirs.executed["issue"], rel=0.02)
            assert (ours.blocks, ours.shared) == (theirs.blocks, theirs.shared)
