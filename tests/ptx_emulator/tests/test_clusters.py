"""Thread-block clusters: identity, distributed shared memory, barriers, planted defects."""

from __future__ import annotations

import numpy as np
import pytest

from .. import (
    ClusterLifetimeError,
    Deadlock,
    DivergentBarrier,
    KernelFault,
    KernelTimeout,
    LaunchError,
    OutOfBounds,
    RaceError,
    run,
)
from .support import needs_nvcc, ptx_of

pytestmark = needs_nvcc

SEEDS = [None, 1, 7]
NOT_SUPPORTED, INVALID_CLUSTER_SIZE = 801, 912


def call(entry, args, grid, block=64, cluster=None, arch="sm_90", **options):
    options = {"racecheck": True, "timeout": 60, **options}
    return run(ptx_of("clusters", arch), entry, args, grid, block, cluster=cluster, **options)


def zeros(n):
    return np.zeros(n, np.float32)


def test_identity():
    grid, cluster = (4, 6, 2), (2, 3, 1)
    out = np.zeros((48, 16), np.int32)
    result = call("identity", [out], grid, 32, cluster)
    assert result.cluster == cluster
    for block, row in enumerate(out):
        x, y = block % 4, block // 4 % 6
        expected = [x % 2 + 2 * (y % 3), 6, x % 2, y % 3, 2, 3, x // 2, 2, 1]
        expected += [32 * expected[0], 6 * 32]
        assert row[:11].tolist() == expected


def test_without_cluster_a_block_is_its_own():
    out = np.zeros((4, 16), np.int32)
    assert call("identity", [out], 4, 32).cluster is None
    assert out[:, :9].tolist() == [[0, 1, 0, 0, 1, 1, b, 1, 0] for b in range(4)]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("blocks", [1, 2, 4, 8])
def test_sum_over_the_cluster(blocks, seed):
    x, out = np.arange(16 * 64, dtype=np.float32), zeros(16 * 64)
    call("cluster_sum", [x, out], 16, cluster=blocks, seed=seed)
    sums = x.reshape(-1, blocks, 64).sum(1, keepdims=True)
    np.testing.assert_array_equal(out.reshape(-1, blocks, 64), np.repeat(sums, blocks, 1))


def test_cluster_dims_of_the_kernel():
    x, out = np.arange(8 * 64, dtype=np.float32), zeros(8 * 64)
    assert call("cluster_sum_of_4", [x, out], 8).cluster == (4, 1, 1)
    np.testing.assert_array_equal(out[:64], x.reshape(8, 64)[:4].sum(0))
    with pytest.raises(LaunchError, match="requires"):
        call("cluster_sum_of_4", [x, out], 8, cluster=2)


def test_nonportable_size():
    x, out = np.ones(16 * 64, np.float32), zeros(16 * 64)
    with pytest.raises(LaunchError, match="NonPortable") as caught:
        call("cluster_sum", [x, out], 16, cluster=16)
    assert caught.value.cuda_error == INVALID_CLUSTER_SIZE
    call("cluster_sum", [x, out], 16, cluster=16, nonportable_cluster=True)
    assert (out == 16).all()
    with pytest.raises(LaunchError, match="32 blocks per cluster"):
        call("cluster_sum", [x, out], 32, cluster=32, nonportable_cluster=True)


def test_the_grid_must_be_a_multiple():
    with pytest.raises(LaunchError, match=r"grid\.x = 6 is not a multiple") as caught:
        call("cluster_sum", [zeros(384), zeros(384)], 6, cluster=4)
    assert caught.value.cuda_error == INVALID_CLUSTER_SIZE


def test_older_devices_have_no_clusters():
    ptx = ".version 8.0\n.target sm_80\n.address_size 64\n.visible .entry k() { ret; }"
    for capability in ((8, 0), (8, 9)):
        with pytest.raises(LaunchError, match=r"9\.0") as caught:
            run(ptx, "k", [], 2, 1, cluster=2, compute_capability=capability)
        assert caught.value.cuda_error == NOT_SUPPORTED
    run(ptx, "k", [], 2, 1, cluster=2, compute_capability=(9, 0))


@pytest.mark.parametrize("seed", SEEDS)
def test_missing_first_barrier(seed):
    x, out = np.ones(256, np.float32), zeros(256)
    with pytest.raises(ClusterLifetimeError, match="before any barrier"):
        call("cluster_sum_without_start", [x, out], 4, cluster=4, seed=seed, racecheck=False)


@pytest.mark.parametrize("seed", SEEDS)
def test_block_that_exits_too_early(seed):
    x, out = np.ones(256, np.float32), zeros(256)
    with pytest.raises(ClusterLifetimeError, match=r"exits? |exited") as caught:
        call("cluster_sum_without_end", [x, out], 4, cluster=4, seed=seed, racecheck=False)
    assert "clusters.cu:" in str(caught.value)


@pytest.mark.parametrize("seed", SEEDS)
def test_relaxed_arrival_orders_nothing(seed):
    x, out = np.ones(256, np.float32), zeros(256)
    with pytest.raises(RaceError, match="read after write at shared byte"):
        call("cluster_sum_relaxed", [x, out], 4, cluster=4, seed=seed)


@pytest.mark.parametrize("seed", SEEDS)
def test_race_across_the_cluster(seed):
    out = zeros(8)
    call("rounds_with_barrier", [out], 4, cluster=4, seed=seed)
    assert out.tolist() == [1, 2, 3, 0, 11, 12, 13, 10]
    with pytest.raises(RaceError) as caught:
        call("rounds_without_barrier", [out], 4, cluster=4, seed=seed)
    (hazard, *_) = caught.value.hazards
    assert hazard.space == "shared"
    assert hazard.first_block != hazard.block
    assert hazard.owner in (hazard.first_block, hazard.block)


@pytest.mark.parametrize("seed", SEEDS)
def test_split_barrier(seed):
    x, out = np.arange(8, dtype=np.float32), zeros(8)
    call("split_barrier", [x, out], 8, cluster=4, seed=seed)
    np.testing.assert_array_equal(out, 2 * x + np.repeat(x[::4], 4))


@pytest.mark.parametrize("seed", SEEDS)
def test_window_addresses_and_atomics(seed):
    out = np.zeros((8, 8), np.int32)
    call("window_addresses", [out], 8, 32, 4, seed=seed)
    for block, row in enumerate(out):
        rank = block % 4
        counter = 2 * 4 * 32 if rank == 0 else 0
        following = (rank + 1) % 4
        expected = [4 * 32, counter, 100 + (rank - 1) % 4, following, following, 0, 1]
        assert row[:7].tolist() == expected


@pytest.mark.parametrize("seed", SEEDS)
def test_cluster_barrier_orders_global_memory(seed):
    y, out = zeros(2), zeros(8)
    call("publish_with_barrier", [y, out, 4], 8, cluster=4, seed=seed)
    assert out.tolist() == [0, 3, 3, 3] * 2
    with pytest.raises(RaceError, match="on global memory"):
        call("publish_without_barrier", [y, out, 4], 8, cluster=4, seed=seed)
    with pytest.raises(RaceError, match="on global memory"):  # two clusters, one value
        call("publish_with_barrier", [y, out, 8], 8, cluster=4, seed=seed)


def test_barrier_that_not_all_blocks_reach():
    with pytest.raises(KernelTimeout):
        call("one_block_stays_away", [zeros(1)], 2, cluster=2, timeout=0.5)


def test_wrong_addresses():
    with pytest.raises(OutOfBounds, match="block 2 of a cluster of 2"):
        call("wrong_rank", [zeros(32)], 2, 32, 2)
    with pytest.raises(OutOfBounds, match=r"past_the_end.*clusters\.cu"):
        call("past_the_end", [zeros(32)], 2, 32, 2)


def test_misuse_of_the_barrier():
    with pytest.raises(DivergentBarrier, match="cluster barrier"):
        call("diverging_arrival", [zeros(32)], 2, 32, 2)
    with pytest.raises(KernelFault, match="arrive twice"):
        call("arrive_twice", [zeros(32)], 2, 32, 2)


def test_threads_that_ended_do_not_count():
    ptx = """.version 8.0
        .target sm_90
        .address_size 64
        .visible .entry k(.param .u64 p) {
        .reg .b64 %rd<2>; .reg .b32 %r<2>; .reg .pred %p<1>;
        mov.u32 %r0, %cluster_ctarank; setp.eq.u32 %p0, %r0, 1; @%p0 ret;
        barrier.cluster.arrive; barrier.cluster.wait;
        ld.param.u64 %rd0, [p]; atom.global.add.u32 %r1, [%rd0], 1; ret; }"""
    for seed in (None, 1, 2):
        count = np.zeros(1, np.uint32)
        run(ptx, "k", [count], 4, 32, cluster=4, seed=seed)
        assert count[0] == 96


def test_deadlock_names_the_cluster():
    ptx = """.version 8.0
        .target sm_90
        .address_size 64
        .visible .entry k() {
        .reg .b32 %r<2>; .reg .pred %p<1>;
        mov.u32 %r0, %cluster_ctarank; setp.eq.u32 %p0, %r0, 1; @%p0 bra away;
        barrier.cluster.arrive; barrier.cluster.wait; ret;
        away: bar.sync 1, 64; ret; }"""
    with pytest.raises(Deadlock, match=r"cluster of block.*barrier\.cluster\.wait"):
        run(ptx, "k", [], 2, 32, cluster=2)
