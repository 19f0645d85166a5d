"""Every GPU kernel as compiled for sm_80, sm_90 and sm_100: no spills, and 16-byte accesses.

The CUDA kernels are those of the built library, or compiled here where it lacks an architecture;
the Triton kernels are compiled ahead of time.
"""

from __future__ import annotations

import importlib.util
import pathlib
import re
import sys

import pytest
from ptx_emulator.nvcc import find_nvcc

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # benchmarks/ is run from the root and not installed

from benchmarks.audit import cubin, inspect_kernels, kernel_budget, loops  # noqa: E402
from benchmarks.audit.cubin import Kernel  # noqa: E402

ARCHS = inspect_kernels.ARCHS
# Second stages of reductions, which read one value per chunk or sample.
SCALAR = {
    "finish_sums_kernel",
    "group_norm_silu_statistics_kernel",
    "group_norm_silu_bwd_means_kernel",
    "group_norm_silu_bwd_parameters_kernel",
    "group_norm_silu_residual_bwd_parameters_kernel",
}
# Besides vectors, one value per channel or group: loads and stores in the code. An operand has an
# instruction for either dtype.
PER_CHANNEL = {
    "group_norm_silu_moments_kernel": (5, 0),
    "group_norm_silu_fwd_kernel": (22, 2),
    "group_norm_silu_apply_kernel": (12, 0),
    "group_norm_silu_bwd_kernel": (21, 12),
    "group_norm_silu_bwd_sums_kernel": (15, 0),
    "group_norm_silu_bwd_apply_kernel": (16, 0),
    "group_norm_silu_dropout_fwd_kernel": (11, 2),
    "group_norm_silu_dropout_apply_kernel": (11, 0),
    "group_norm_silu_dropout_bwd_kernel": (22, 12),
    "group_norm_silu_dropout_bwd_sums_kernel": (16, 0),
    "group_norm_silu_dropout_bwd_apply_kernel": (17, 0),
    "group_norm_silu_residual_fwd_kernel": (26, 2),
    "group_norm_silu_residual_moments_kernel": (48, 4),
    "group_norm_silu_residual_bwd_kernel": (21, 15),
    "group_norm_silu_residual_bwd_apply_kernel": (16, 2),
}
# With 96 registers in place of 80, for masks, sums of eight channels or a second tensor.
WIDE = {
    "group_norm_silu_dropout_apply_kernel",
    "group_norm_silu_dropout_bwd_kernel",
    "group_norm_silu_dropout_bwd_sums_kernel",
    "group_norm_silu_dropout_bwd_apply_kernel",
    "group_norm_silu_residual_moments_kernel",
    "group_norm_silu_residual_bwd_kernel",
    "group_norm_silu_residual_bwd_apply_kernel",
}
# A load from another block's shared memory is a generic one in machine code.
CLUSTERS = {
    f"group_norm_silu_{variant}{which}_kernel"
    for variant in ("", "dropout_", "residual_")
    for which in ("fwd", "bwd")
}
# Sampler steps: a row has 15 coefficients, beside step and key.
ROW = 17
STEPS = {"ddim_step_fwd_kernel", "ddpm_step_fwd_kernel"}
# Results of a block's sums: at most so many stores, of 4 bytes each.
RESULTS_PER_BLOCK = {
    "eps_loss_fwd_kernel": 1,
    "eps_loss_small_fwd_kernel": 1,
    "group_norm_silu_bwd_sums_kernel": 6,
    "group_norm_silu_dropout_bwd_sums_kernel": 6,
    "group_norm_silu_moments_kernel": 4,
    "vlb_terms_fwd_kernel": 3,
}
# Loads of t, the key, a row of the table and (backward) three gradients, once per block.
ROW_LOADS = {"vlb_terms_fwd_kernel": 16, "vlb_terms_bwd_kernel": 19}
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "u8": 1}

needs_cuobjdump = pytest.mark.skipif(
    cubin.find_cuobjdump() is None, reason="cuobjdump is in neither a CUDA toolkit nor triton"
)
needs_nvcc = pytest.mark.skipif(find_nvcc() is None, reason="no nvcc")
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)


def cuda_kernels(arch: str) -> list[Kernel]:
    library = inspect_kernels.cuda_library()
    if (library is None or arch not in cubin.architectures(library)) and find_nvcc() is None:
        pytest.skip(f"no CUDA kernels for {arch}: not in a built library, and there is no nvcc")
    return kernel_budget.cuda_kernels(arch)


def template(kernel: Kernel) -> tuple[str, list[str]]:
    """Stem and template arguments: types and vector width."""
    match = re.fullmatch(r"(\w+)<(.*)>", kernel.name)
    if match is None:
        assert kernel.name in SCALAR, f"{kernel.name} is not a template over its vector width"
        return kernel.name, ["1"]
    return match[1], ["1"] if match[1] in SCALAR else match[2].split(",")


def operands(kernel: Kernel) -> list[str]:
    """Types of the tensors that a kernel reads as vectors. Every new kernel states its own."""
    stem, arguments = template(kernel)
    known = {
        "q_sample_fwd_kernel": lambda out, x0, noise, v: [x0, noise],
        "philox_normal_kernel": lambda out, v: [],
        "eps_loss_fwd_kernel": lambda prediction, noise, v: [prediction, noise],
        "eps_loss_small_fwd_kernel": lambda prediction, noise, v: [prediction, noise],
        "eps_loss_bwd_kernel": lambda prediction, noise, v: [prediction, noise],
        "group_norm_silu_fwd_kernel": lambda x, last, v: [x],
        "group_norm_silu_moments_kernel": lambda x, last, v: [x],
        "group_norm_silu_apply_kernel": lambda x, last, v: [x],
        "group_norm_silu_bwd_kernel": lambda x, last, v: [x, x],
        "group_norm_silu_bwd_sums_kernel": lambda x, last, v: [x, x],
        "group_norm_silu_bwd_apply_kernel": lambda x, last, v: [x, x],
        "group_norm_silu_dropout_fwd_kernel": lambda x, last, v: [x],
        "group_norm_silu_dropout_apply_kernel": lambda x, last, v: [x],
        "group_norm_silu_dropout_bwd_kernel": lambda x, last, v: [x, x],
        "group_norm_silu_dropout_bwd_sums_kernel": lambda x, last, v: [x, x],
        "group_norm_silu_dropout_bwd_apply_kernel": lambda x, last, v: [x, x],
        "group_norm_silu_residual_fwd_kernel": lambda x, last, v: [x, x],
        "group_norm_silu_residual_moments_kernel": lambda x, last, v: [x, x],
        "group_norm_silu_residual_bwd_kernel": lambda x, last, v: [x, x, x],
        "group_norm_silu_residual_bwd_apply_kernel": lambda x, last, v: [x, x, x],
        # x_t, noise; model_output and uncond, and for ddpm_step the variance channels. With a tile
        # both heads of an output are one load in a loop.
        "ddim_step_fwd_kernel": lambda x, out, tiled, v: [x, x, out, out],
        "ddpm_step_fwd_kernel": lambda x, out, tiled, v: [x, x, out, out] + (1 - tiled) * [out],
        "vlb_terms_fwd_kernel": lambda x, out, tiled, v: 3 * [x] + (2 - tiled) * [out],
        "vlb_terms_bwd_kernel": lambda x, out, tiled, v: 3 * [x] + (2 - tiled) * [out],
    }
    assert stem in known, f"state here what {stem} reads as vectors"
    if has_two_heads(stem):
        arguments[2] = arguments[2] == "true"
    return known[stem](*arguments)


def has_two_heads(stem: str) -> bool:
    """Whether the kernel is also a template over a tile for the two heads of a model output."""
    return stem in STEPS or stem in ROW_LOADS


def assert_stays_in_registers(kernel: Kernel) -> None:
    assert kernel.spills == 0, f"{kernel.name}: {kernel.spills} accesses to local memory"
    assert kernel.stack == kernel.local == 0, f"{kernel.name}: stack or local memory"
    clusters = kernel.name.partition("<")[0] in CLUSTERS or kernel.name.endswith(" cluster")
    for kind in ("generic store",) if clusters else ("generic load", "generic store"):
        assert kernel.count(kind) == 0, f"{kernel.name}: a {kind} hides which memory it uses"


def assert_wide_stores(kernel: Kernel, narrow: int = 0) -> None:
    stores = inspect_kernels.widths(kernel, "global store")
    wide = kernel.count("global store", 16)
    assert wide > 0, f"{kernel.name}: global stores {stores}"
    assert kernel.count("global store") <= wide + narrow, f"{kernel.name}: global stores {stores}"


def assert_wide_loads(kernel: Kernel, sizes: list[int], narrow: int) -> None:
    """Vectors of `sizes` bytes come in packets of 16 (or whole), and little else is narrower."""
    loads = inspect_kernels.widths(kernel, "global load")
    wide = sum(size // 16 for size in sizes)
    small = [size for size in sizes if size < 16]
    copies = kernel.count("global to shared copy", 16)
    assert kernel.count("global load", 16) + copies >= wide, f"{kernel.name}: global loads {loads}"
    narrow_copies = kernel.count("global to shared copy") - copies
    assert narrow_copies == 0, f"{kernel.name}: {narrow_copies} narrow copies to shared memory"
    for size in small:
        assert kernel.count("global load", size) >= 1, f"{kernel.name}: global loads {loads}"
    rest = kernel.count("global load") - kernel.count("global load", 16)
    assert rest <= narrow + len(small), f"{kernel.name}: global loads {loads}"


@needs_cuobjdump
@pytest.mark.parametrize("arch", ARCHS)
def test_cuda_kernels(arch):
    kernels = cuda_kernels(arch)
    assert {"q_sample_fwd_kernel", "philox_normal_kernel", *STEPS} <= {
        template(k)[0] for k in kernels
    }
    for kernel in kernels:
        assert_stays_in_registers(kernel)
        assert kernel.threads, f"{kernel.name} has no __launch_bounds__"

    vectorized = [k for k in kernels if int(template(k)[1][-1]) > 1]
    assert vectorized
    for kernel in vectorized:
        stem, arguments = template(kernel)
        vector = int(arguments[-1])
        if stem in RESULTS_PER_BLOCK:
            results = RESULTS_PER_BLOCK[stem]
            stores = inspect_kernels.widths(kernel, "global store")
            # A compiler may write the same result on two paths, or on one.
            assert kernel.count("global store") == kernel.count("global store", 4), stores
            assert 0 < kernel.count("global store") <= results, stores
        else:
            assert_wide_stores(kernel, narrow=PER_CHANNEL.get(stem, (0, 0))[1])
        sizes = [vector * BYTES[operand] for operand in operands(kernel)]
        if has_two_heads(stem) and arguments[2] == "true":
            sizes = [max(16, size) for size in sizes]  # tiles are copied by 16 bytes
        # Once per block: t, two coefficients, flip, key (or grad, weight, key). A mirrored sample
        # is gathered by element.
        if stem in STEPS:
            narrow = ROW
        elif stem in ROW_LOADS:
            narrow = ROW_LOADS[stem]
        else:
            narrow = max(5 + vector, PER_CHANNEL.get(stem, (0, 0))[0])
        assert_wide_loads(kernel, sizes, narrow)


def group_norm_kernels(arch: str) -> list[Kernel]:
    """Those that walk over vectors."""
    return [k for k in cuda_kernels(arch) if template(k)[0] in PER_CHANNEL]


@needs_cuobjdump
@pytest.mark.parametrize("arch", ARCHS)
def test_group_norm_silu_leaves_room_for_warps(arch):
    """For 24, or 20 of the kernels that do more than the norm."""
    kernels = group_norm_kernels(arch)
    assert {template(k)[0] for k in kernels} == set(PER_CHANNEL)
    for kernel in kernels:
        wide = template(kernel)[0] in WIDE
        assert kernel.registers <= (96 if wide else 80), kernel
        assert kernel.occupancy() >= (20 if wide else 24) / 64, kernel


# Machine instructions per element of the loops of one pass, forward and backward.
LOOPS = {"sm_80": (15, 32), "sm_90": (15, 32), "sm_100": (11, 23)}


@needs_cuobjdump
@pytest.mark.parametrize("arch", ARCHS)
def test_group_norm_silu_loops(arch):
    """In half precision: copies to shared memory, sums, results."""
    library = inspect_kernels.cuda_library()
    if library is None or arch not in cubin.architectures(library):
        pytest.skip(f"the CUDA library was not built for {arch}")
    found = {}
    for name, code in loops.functions(str(library), arch).items():
        if match := re.fullmatch(r"group_norm_silu_(fwd|bwd)_kernel<(bf16|fp16),.*,8>", name):
            found[name] = match[1], loops.main_loops(code, 2, 1 if match[1] == "fwd" else 2)
    assert len(found) == 8
    for name, (which, of_kernel) in found.items():
        assert set(of_kernel) == {"copy", "sums", "results"}, name
        total = sum(loop.per_element for loop in of_kernel.values())
        assert total <= LOOPS[arch][which == "bwd"], f"{name}: {total:.2f}: {of_kernel}"


def test_loops_are_found_and_told_apart():
    code = """
        /*0000*/  IADD3 R1, R1, 0x1, RZ ;
        /*0010*/  LDS.128 R4, [R2] ;
        /*0020*/  FADD R5, R4, R5 ;
        /*0030*/  @P0 BRA 0x10 ;
        /*0040*/  LDS.128 R4, [R2] ;
        /*0050*/  MUFU.EX2 R5, R4 ;
        /*0060*/  MUFU.RCP R5, R4 ;
        /*0070*/  STG.E.128 desc[UR4][R2.64], R4 ;
        /*0080*/  @!P1 BRA 0x40 ;
        /*0090*/  LDGSTS.E.BYPASS.128 [R1], desc[UR4][R2.64] ;
        /*00a0*/  BRA 0x90 ;
        /*00b0*/  @P2 BRA 0x0 ;
        /*00c0*/  EXIT ;
        /*00d0*/  BRA 0xd0 ;
"""
    found = loops.main_loops(code, 2, 1)
    assert found == {
        "sums": loops.Loop("sums", 3, 8),
        "results": loops.Loop("results", 5, 8),
        "copy": loops.Loop("copy", 2, 8),
    }
    assert loops.describe(["LDS.128", "MUFU.EX2", "MUFU.RCP"], 2, 2) == loops.Loop("sums", 3, 1)
    assert loops.describe(["LDS", "FADD"], 2, 1) is None


# Per name: bytes of the vectors that a thread reads, and its other loads.
TRITON = {
    "q_sample fp32 nchw given": ([16, 16], 3),
    "q_sample bf16 nchw seed": ([16], 3),
    "q_sample bf16 channels_last given": ([16, 16], 3),
    "q_sample bf16 channels_last seed": ([16], 3),
    "q_sample fp32 nchw uint8 seed": ([4], 3),
    "q_sample bf16 nchw uint8 seed flip": ([8], 4 + 8),
    "philox_normal bf16 nchw": ([], 0),
    "eps_loss_backward fp32 nchw given": ([16, 16], 2),
    "eps_loss_backward bf16 nchw seed": ([16], 2),
    "eps_loss_backward bf16 channels_last given": ([16, 16], 2),
    "eps_loss fp32 nchw given": ([16, 16], 0),
    "eps_loss bf16 channels_last given": ([16, 16], 0),
    "eps_loss bf16 nchw seed": ([16], 0),
    "eps_loss bf16 nchw given digits mean": ([16, 16], 4),  # weights, if unrolled
    "ddim_step bf16 channels_last guided": ([16, 16, 16], ROW),
    "ddim_step fp32 nchw guided bf16 output": ([16, 8, 8], ROW),
    "ddpm_step bf16 nchw learned seed": ([16, 16, 16], ROW),
    "vlb_terms fp32 nchw given": ([16, 16, 16, 16], 10),
    "vlb_terms bf16 channels_last given": ([16, 16, 16, 16], 10),
    "vlb_terms bf16 nchw seed learned": ([16, 16, 16, 16], 10),
    "vlb_terms_backward fp32 nchw given": ([16, 16, 16, 16], 13),
    "vlb_terms_backward bf16 nchw seed learned": ([16, 16, 16, 16], 13),
}


@needs_cuobjdump
@needs_triton
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("name", TRITON)
def test_triton_kernels(name, arch):
    kernel = inspect_kernels.triton_kernel(name, arch)
    sizes, narrow = TRITON[name]
    assert_stays_in_registers(kernel)
    if name.startswith(("eps_loss ", "vlb_terms ")):  # sums of a program
        results = 1 if name.startswith("eps_loss ") else 3
        assert inspect_kernels.widths(kernel, "global store") == f"{results}x4"
    else:
        assert_wide_stores(kernel)
    assert_wide_loads(kernel, sizes, narrow)


@needs_cuobjdump
@needs_triton
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(
    ("name", "loads", "stores"),
    [
        # 32 elements a thread: 4 vectors of 8 bfloat16 of x, and of grad.
        ("group_norm_silu bf16 channels_last one pass", 4, 4),
        ("group_norm_silu_backward bf16 channels_last one pass", 8, 4),
        # 16: 4 vectors of 4 float32.
        ("group_norm_silu_backward fp32 nchw one pass", 8, 4),
        ("group_norm_silu bf16 channels_last split", 2, 0),
        ("group_norm_silu_backward bf16 nchw split", 4, 0),
        # Dropout reads nothing. A residual and the sum, and the gradient of the sum.
        ("group_norm_silu bf16 channels_last one pass dropout", 4, 4),
        ("group_norm_silu_backward bf16 channels_last one pass dropout", 8, 4),
        ("group_norm_silu bf16 channels_last one pass residual", 8, 8),
        ("group_norm_silu_backward bf16 nchw one pass residual", 6, 2),
        # 64 float32 of a thread, or 32 and their gradients.
        ("group_norm_silu fp32 nchw largest", 16, 16),
        ("group_norm_silu fp32 channels_last largest", 16, 16),
        ("group_norm_silu_backward fp32 nchw largest", 16, 8),
        ("group_norm_silu_backward fp32 channels_last largest", 16, 8),
        ("group_norm_silu_backward bf16 channels_last largest", 8, 4),
    ],
)
def test_triton_group_norm_silu(name, loads, stores, arch):
    """Tensors in vectors of 16 bytes; 4 bytes are parameters, statistics and sums."""
    check_triton_group_norm_silu(name, loads, stores, arch)


@needs_cuobjdump
@needs_triton
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])  # elsewhere they are not held in pairs
@pytest.mark.parametrize(
    ("name", "loads", "stores"),
    [
        # 128 elements of a thread, or 64 and their gradients.
        ("group_norm_silu bf16 nchw largest", 16, 16),
        ("group_norm_silu bf16 channels_last largest", 16, 16),
        ("group_norm_silu_backward bf16 nchw largest", 16, 8),
        ("group_norm_silu bf16 nchw largest cluster", 16, 16),
        ("group_norm_silu_backward bf16 nchw largest cluster", 16, 8),
    ],
)
def test_triton_group_norm_silu_in_pairs(name, loads, stores, arch):
    if name.endswith("cluster") and arch == "sm_80":
        pytest.skip("sm_80 has no clusters")
    check_triton_group_norm_silu(name, loads, stores, arch)


@needs_cuobjdump
@needs_triton
@pytest.mark.parametrize("arch", [arch for arch in ARCHS if arch != "sm_80"])
@pytest.mark.parametrize(
    ("name", "loads", "stores"),
    [
        # 16384 elements of x in a block of 512 threads.
        ("group_norm_silu bf16 channels_last cluster", 4, 4),
        ("group_norm_silu fp32 nchw cluster", 8, 8),
        ("group_norm_silu_backward bf16 nchw cluster", 8, 4),
        # 8192 of x, and of grad.
        ("group_norm_silu_backward bf16 channels_last cluster", 4, 2),
        ("group_norm_silu_backward fp32 channels_last cluster", 8, 4),
    ],
)
def test_triton_group_norm_silu_of_clusters(name, loads, stores, arch):
    import triton

    from fastdiff.triton_kernels import _launch

    if not _launch.compiles_clusters(triton.__version__):
        pytest.skip("this Triton cannot add up over the blocks of a cluster")
    check_triton_group_norm_silu(name, loads, stores, arch)


def check_triton_group_norm_silu(name, loads, stores, arch):
    kernel = inspect_kernels.triton_kernel(name, arch)
    assert_stays_in_registers(kernel)
    assert kernel.count("global load", 16) >= loads
    assert kernel.count("global store", 16) == stores
    assert kernel.count("global store") == sum(kernel.count("global store", w) for w in (16, 4))
    narrow = kernel.count("global load") - sum(kernel.count("global load", w) for w in (16, 4))
    # The first elements of a tile's groups, of 16 bits: the values that sums are taken relative to.
    assert narrow == 0 or (narrow <= 4 and "bf16" in name and "backward" not in name)


DEFECTS = """
// 48 live values, volatile so that none is read later or again, in the 32 registers of the test.
template <typename T, int V>
__global__ void spills(const volatile T* in, volatile T* out) {
  T x[48];
#pragma unroll
  for (int i = 0; i < 48; ++i) x[i] = in[i];
#pragma unroll
  for (int i = 0; i < 48; ++i) out[i] = x[47 - i];
}
// An array written at an index known at run time only.
template <typename T, int V>
__global__ void indexes(const T* in, T* out, int n) {
  T x[16] = {};
  for (int i = 0; i < n; ++i) x[static_cast<int>(in[i]) & 15] += in[i];
  for (int i = 0; i < 16; ++i) out[i] = x[i];
}
// Eight bytes at a time where sixteen were wanted.
template <typename T, int V>
__global__ void halves(const T* in, T* out) {
  reinterpret_cast<float2*>(out)[threadIdx.x] = reinterpret_cast<const float2*>(in)[threadIdx.x];
}
template __global__ void spills<float, 4>(const volatile float*, volatile float*);
template __global__ void indexes<float, 4>(const float*, float*, int);
template __global__ void halves<float, 4>(const float*, float*);
"""


@needs_cuobjdump
@needs_nvcc
def test_planted_defects_are_found(tmp_path):
    source = tmp_path / "defects.cu"
    source.write_text(DEFECTS)
    path = kernel_budget.compile_cuda(source, "sm_90", "-maxrregcount=32")
    kernels = {template(k)[0]: k for k in cubin.inspect(path, "sm_90")}
    for name in ("spills", "indexes"):
        with pytest.raises(AssertionError, match=rf"{name}.*local memory"):
            assert_stays_in_registers(kernels[name])
    assert_stays_in_registers(kernels["halves"])
    with pytest.raises(AssertionError, match="global stores 1x8"):
        assert_wide_stores(kernels["halves"])
    with pytest.raises(AssertionError, match="global loads 1x8"):
        assert_wide_loads(kernels["halves"], [16], narrow=5)
    with pytest.raises(AssertionError, match="state here"):
        operands(kernels["halves"])


SASS = """
\t\tFunction : kernel
\t.headerflags\t@"EF_CUDA_SM90"
        /*0000*/                   LDC R1, c[0x0][0x28] ;              /* 0x00000a00ff017b82 */
        /*0010*/              @!P0 LDG.E.128.CONSTANT R4, desc[UR4][R2.64] ;   /* 0x1 */
        /*0020*/               @P1 LDG.E.U8 R4, desc[UR4][R2.64] ;     /* 0x1 */
        /*0030*/             @!UP2 STG.E.64 desc[UR4][R2.64], R4 ;     /* 0x1 */
        /*0040*/                   LDL.LU R3, [R1+0x4] ;               /* 0x1 */
        /*0050*/                   STL.128 [R1], R4 ;                  /* 0x1 */
        /*12340*/                  LDS R5, [R6+UR64] ;                 /* 0x1 */
        /*12350*/                  FFMA R5, R6, R5, R7 ;               /* 0x1 */
        /*12360*/              @P0 MUFU.EX2 R5, R6 ;                   /* 0x1 */
        /*12370*/                  UIADD3 UR4, UR4, 0x1, URZ ;         /* 0x1 */
        /*12380*/                  VIADDMNMX R4, R4, 0x1, R5, PT ;     /* 0x1 */
        /*12390*/                  SHFL.BFLY PT, R5, R6, 0x1, 0x1f ;   /* 0x1 */
        /*123a0*/                  BAR.SYNC.DEFER_BLOCKING 0x0 ;       /* 0x1 */
        /*123b0*/                  I2FP.F32.S32 R5, R6 ;               /* 0x1 */
        /*123c0*/                  FLO.U32 R5, R6 ;                    /* 0x1 */
        /*123d0*/                  EXIT ;                              /* 0x1 */
\t\tFunction : other
        /*0000*/                   STG.E.U16 desc[UR4][R2.64], R4 ;    /* 0x1 */
"""


def test_parse_sass():
    functions = cubin.parse_sass(SASS)
    assert cubin.parse_sass(2 * SASS) == functions  # of two object files
    assert functions["kernel"].accesses == {
        ("global load", 16): 1,
        ("global load", 1): 1,
        ("global store", 8): 1,
        ("local load", 4): 1,
        ("local store", 16): 1,
        ("shared load", 4): 1,
    }
    assert functions["kernel"].classes == {
        "memory": 6,
        "constant": 1,
        "float": 1,
        "special": 1,
        "integer": 3,
        "exchange": 1,
        "synchronization": 1,
        "conversion": 1,
        "control": 1,
    }
    assert functions["other"].accesses == {("global store", 2): 1}
    assert functions["other"].classes == {"memory": 1}


@pytest.mark.parametrize(
    ("arch", "registers", "threads", "shared", "expected"),
    [
        ("sm_90", 32, 128, 0, 1.0),  # 65536 / (32 * 32) = 64 warps: all
        ("sm_90", 56, 128, 0, 36 / 64),  # 36 warps fit the registers: 9 blocks of 4
        ("sm_90", 57, 256, 0, 32 / 64),  # 57 rounds up to 64: 32 warps, 4 blocks of 8
        ("sm_80", 16, 32, 0, 32 / 64),  # at most 32 blocks
        ("sm_86", 16, 32, 0, 16 / 48),  # at most 16
        ("sm_80", 16, 128, 40 << 10, 4 * 4 / 64),  # 164 KiB hold four times 41
    ],
)
def test_occupancy(arch, registers, threads, shared, expected):
    kernel = Kernel("k", arch, registers, 0, 0, shared, threads)
    assert kernel.occupancy() == expected
