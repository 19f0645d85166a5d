// Facts of this build for `python -m fastdiff.info`; no operators.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "../cpu/simd.h"

#define FASTDIFF_TEXT(x) #x
#define FASTDIFF_STRING(x) FASTDIFF_TEXT(x)

PYBIND11_MODULE(_build_info, m) {
  m.doc() = "Facts of the native build.";
  m.attr("compiler") = FASTDIFF_COMPILER;
  m.attr("torch_version") = FASTDIFF_TORCH_VERSION;
  m.attr("torch_target_version") = FASTDIFF_TORCH_TARGET;
  m.attr("cuda_version") = FASTDIFF_CUDA_VERSION;
  m.attr("cuda_arch_list") = FASTDIFF_CUDA_ARCHS;
  m.def(
      "simd_level", [] { return fastdiff::cpu::simd_level(); },
      "Instruction set that the CPU kernels use on this machine.");
  m.def("isa_names", &fastdiff::cpu::isa_names,
        "The values of FASTDIFF_CPU_ISA that this build has and this machine runs.");
}
