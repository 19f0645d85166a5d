"""Bugs of the kinds that GPU code has, planted one at a time: the suite must catch each.

Every mutant changes one place of a copy of the project and runs the tests that are meant to see it.
`pytest -m slow tests/mutations` plants them all; the default run a few.
"""

from __future__ import annotations

import shutil

import pytest

from .mutant import Mutant, assert_caught, mutants
from .project_copy import ProjectCopy


def cuda(op: str, expression: str) -> tuple[str, ...]:
    return f"tests/ops/test_{op}.py", "-k", f"cuda-ptx and {expression}"


def triton(op: str, expression: str) -> tuple[str, ...]:
    return f"tests/ops/test_{op}.py", "-k", f"triton-ptx and {expression}"


MUTANTS = [
    Mutant(
        "off by one in a tail mask (Triton)",
        "triton_kernels/q_sample.py",
        "mask = i < numel",
        "mask = i <= numel",
        triton("q_sample", "test_forward and odd"),
        "OutOfBounds",
        quick=True,
    ),
    Mutant(
        "off by one in a tail (CUDA)",
        "csrc/include/fastdiff/elementwise.cuh",
        "chunk.count = min(plan.elements, layout.numel - chunk.begin);",
        "chunk.count = min(plan.elements, layout.numel - chunk.begin + 1);",
        cuda("q_sample", "test_forward and odd"),
        "OutOfBounds",
    ),
    Mutant(
        "a missing __syncthreads",
        "csrc/include/fastdiff/reduce.cuh",
        "  __syncthreads();\n#pragma unroll\n  for (int k = 0; k < N; ++k) x[k] = warp_sum(lane <",
        "#pragma unroll\n  for (int k = 0; k < N; ++k) x[k] = warp_sum(lane <",
        cuda("eps_loss", "test_forward"),
        "RaceError",
        quick=True,
    ),
    Mutant(
        "a race in the reduction: warps share one slot",
        "csrc/include/fastdiff/reduce.cuh",
        "warps[k][threadIdx.x / 32] = x[k];",
        "warps[k][0] = x[k];",
        cuda("eps_loss", "test_forward"),
        "RaceError",
    ),
    Mutant(
        "a race in the reduction: blocks share one partial sum",
        "csrc/include/fastdiff/eps_loss.cuh",
        "results[blockIdx.x] = sum;",
        "results[0] = sum;",
        cuda("eps_loss", "test_forward"),
        "RaceError",
    ),
    Mutant(
        "a wrong gradient factor",
        "csrc/include/fastdiff/eps_loss.h",
        "return T(2) * d;",
        "return d;",
        cuda("eps_loss", "test_gradients"),
        "error exceeds the bound",
    ),
    Mutant(
        "swapped strides for channels_last",
        "csrc/include/fastdiff/layout.h",
        "(i % inner) * (numel / inner) + i / inner",
        "(i / inner) * inner + i % inner",
        cuda("q_sample", "test_forward and channels_last and seed and many"),
        "error exceeds the bound",
    ),
    Mutant(
        "int32 overflow in an offset",
        "csrc/include/fastdiff/elementwise.cuh",
        "chunk.begin = (blockIdx.x - chunk.sample * plan.per_sample) * plan.elements;",
        "chunk.begin = static_cast<int>((blockIdx.x - chunk.sample * plan.per_sample) *"
        " plan.elements);",
        ("tests/ops/test_large_tensors.py", "-k", "cuda-ptx and q_sample"),
        "OutOfBounds",
    ),
    Mutant(
        "a kernel reading its input twice",
        "csrc/include/fastdiff/q_sample.cuh",
        "      load_vector<V>(x0 + i, x);\n",
        "      load_vector<V>(x0 + i, x);\n"
        "      const volatile X0* again = x0 + i;\n"
        "      for (int v = 0; v < V; ++v) x[v] += 0 * to_float(again[v]);\n",
        cuda("q_sample", "test_traffic"),
        "AssertionError",
    ),
    Mutant(
        "an output element that nobody writes",
        "csrc/include/fastdiff/elementwise.cuh",
        "chunk.count = min(plan.elements, layout.numel - chunk.begin);",
        "chunk.count = min(plan.elements, layout.numel - chunk.begin - 1);",
        cuda("q_sample", "test_forward and odd"),
        "an element was not written",
    ),
    Mutant(
        "noise of the wrong stream",
        "csrc/include/fastdiff/philox.h",
        "static_cast<uint32_t>(stream >> 32)};",
        "static_cast<uint32_t>(stream)};",
        cuda("philox_normal", "test"),
        "assert",
    ),
    Mutant(
        "coefficients rounded to half precision",
        "triton_kernels/q_sample.py",
        "    y = a * x\n",
        "    a = a.to(tl.bfloat16).to(tl.float32)\n    y = a * x\n",
        triton("q_sample", "test_forward and vectors"),
        "error exceeds the bound",
    ),
    Mutant(
        "silu'(gamma x_hat) in place of silu'(gamma x_hat + beta) (CUDA)",
        "csrc/include/fastdiff/group_norm_silu_backward_items.cuh",
        "return multiply_add(d, slope[j], offset[j]);",
        "return multiply(d, slope[j]);",
        cuda("group_norm_silu", "test_gradients"),
        "error exceeds the bound",
    ),
    Mutant(
        "silu'(x_hat) in place of silu'(gamma x_hat + beta) (Triton)",
        "triton_kernels/group_norm_silu_tiles.py",
        "grad * activation_slope(z, ACTIVATION)",
        "grad * activation_slope(h_hat, ACTIVATION)",
        triton("group_norm_silu_triton", "test_values"),
        "error exceeds the bound",
        quick=True,
    ),
    Mutant(
        "channels_last addressed as contiguous (CUDA)",
        "csrc/include/fastdiff/group_norm_silu_items.cuh",
        "return (first_pixel(item) + team()) * layout_.channels + item.channel;",
        "return item.channel * layout_.pixels + first_pixel(item) + team();",
        cuda("group_norm_silu", "test_forward and channels_last"),
        "MisalignedAccess",
    ),
    Mutant(
        "channels_last addressed as contiguous (Triton)",
        "triton_kernels/group_norm_silu_tiles.py",
        "        base = (rows.sample * pixels + first_pixel) * TILING.channels + rows.first\n"
        "        offsets = p.to(tl.int64) * TILING.channels + c\n",
        "        base = (rows.sample * TILING.channels + rows.first) * pixels + first_pixel\n"
        "        offsets = c.to(tl.int64) * pixels + p\n",
        triton("group_norm_silu_triton", "test_values and channels_last"),
        "error exceeds the bound",
    ),
    Mutant(
        "a dropped mean term in dx (CUDA)",
        "csrc/include/fastdiff/group_norm_silu_backward_items.cuh",
        "(*this)(c, kConstant) = -(rstd * m.x);",
        "(*this)(c, kConstant) = 0.0f;",
        cuda("group_norm_silu", "test_gradients"),
        "error exceeds the bound",
    ),
    Mutant(
        "a dropped mean term in dx (Triton)",
        "triton_kernels/group_norm_silu_tiles.py",
        "slope[:, None] * dz - m0[:, None] - m1[:, None] * h_hat",
        "slope[:, None] * dz - m1[:, None] * h_hat",
        triton("group_norm_silu_triton", "test_values"),
        "error exceeds the bound",
    ),
    Mutant(
        "a missing barrier in the one-pass kernel",
        "csrc/include/fastdiff/group_norm_silu_forward.cuh",
        "  if (plan.cluster > 1) cluster_leave();\n  __syncthreads();\n",
        "  if (plan.cluster > 1) cluster_leave();\n",
        cuda("group_norm_silu", "test_forward"),
        "RaceError",
    ),
    Mutant(
        "a missing barrier between the blocks of a cluster",
        "csrc/include/fastdiff/group_norm_silu_forward.cuh",
        "  if (plan.cluster > 1) cluster_arrive(), cluster_wait();\n  const UnitSums<Moments>",
        "  const UnitSums<Moments>",
        cuda("group_norm_silu_cuda", "test_clusters"),
        "ClusterLifetimeError",
    ),
    Mutant(
        "the wrong sign of guidance (CUDA)",
        "csrc/include/fastdiff/sampler_step.h",
        "return uncond + scale * (cond - uncond);",
        "return uncond - scale * (cond - uncond);",
        cuda("ddim_step", "test_forward"),
        "error exceeds the bound",
    ),
    Mutant(
        "the wrong sign of guidance (Triton)",
        "triton_kernels/sampler_step.py",
        "other + guidance_scale *",
        "other - guidance_scale *",
        triton("ddim_step", "test_forward"),
        "error exceeds the bound",
    ),
    Mutant(
        "the model's log variance in place of the posterior's (CUDA)",
        "csrc/include/fastdiff/vlb_terms.h",
        "row.posterior_log_variance = column(kPosteriorLogVariance);",
        "row.posterior_log_variance = column(kLogVariance);",
        cuda("vlb_terms", "test_forward"),
        "error exceeds the bound",
    ),
    Mutant(
        "the model's log variance in place of the posterior's (Triton)",
        "triton_kernels/vlb_terms.py",
        "w = column(row, POSTERIOR_LOG_VARIANCE) - log_variance",
        "w = column(row, LOG_VARIANCE) - log_variance",
        triton("vlb_terms", "test_forward"),
        "error exceeds the bound",
    ),
    Mutant(
        "off by one in the tail of a CPU kernel",
        "csrc/cpu/tile.cpp",
        "std::memcpy(out + 4 * base, normals, 16 * (blocks - base));",
        "std::memcpy(out + 4 * base, normals, 16 * (blocks - base - 1));",
        ("tests/ops/test_philox_normal.py", "-k", "test_matches_reference and cpu"),
        "assert",
        build=True,
    ),
]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> ProjectCopy:
    return ProjectCopy(tmp_path_factory.mktemp("project"))


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="the CUDA mutants need nvcc")
@mutants(MUTANTS)
def test_planted_bug_is_caught(project: ProjectCopy, mutant: Mutant) -> None:
    assert_caught(project, mutant)
