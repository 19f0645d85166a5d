#pragma once

// What the launchers of both passes share: device limits, vector width, launches.

#include <algorithm>
#include <initializer_list>

#include "dispatch.cuh"
#include "fastdiff/group_norm_silu_plan.cuh"

namespace fastdiff::cuda {

// Whether the device runs code that was compiled for sm_90 or newer, which knows clusters.
inline bool compiled_for_clusters(int device_arch) {
  for (const int arch : {__CUDA_ARCH_LIST__}) {
    if (arch >= 900 && arch <= device_arch) return true;
  }
  return false;
}

inline cudaError_t device_limits(DeviceLimits& limits) {
  int device = 0, shared = 0, major = 0, minor = 0, clusters = 0;
  cudaError_t error = cudaGetDevice(&device);
  const auto get = [&](cudaDeviceAttr attribute, int& value) {
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&value, attribute, device);
  };
  get(cudaDevAttrMaxSharedMemoryPerBlockOptin, shared);
  get(cudaDevAttrMultiProcessorCount, limits.multiprocessors);
  get(cudaDevAttrComputeCapabilityMajor, major);
  get(cudaDevAttrComputeCapabilityMinor, minor);
  get(cudaDevAttrClusterLaunch, clusters);
  limits.shared_bytes = shared;
  limits.max_cluster = clusters && compiled_for_clusters(100 * major + 10 * minor) ? 8 : 1;
  return error;
}

// Elements per access, in the canonical layout: 16 bytes if all tensors are aligned to them and the
// innermost dimension is a multiple.
inline int vector_elements(const GroupNormLayout& layout, DType type,
                           std::initializer_list<const void*> tensors) {
  const int vector = static_cast<int>(16 / size_of(type));
  const int64_t inner = layout.channels_last ? layout.channels : layout.pixels;
  const auto fits = [](const void* tensor) { return aligned(tensor, 16); };
  return inner % vector == 0 && std::all_of(tensors.begin(), tensors.end(), fits) ? vector : 1;
}

template <typename Args>
using GroupNormKernel = void (*)(Args, GroupNormPlan, int64_t);

// Launches `blocks` blocks in clusters, as many at a time as a grid may have.
template <typename Args>
cudaError_t launch(GroupNormKernel<Args> kernel, const Args& args, const GroupNormPlan& plan,
                   int64_t blocks, int threads, int64_t shared_bytes, int cluster,
                   cudaStream_t stream) {
  constexpr int64_t kWithoutOptIn = 48 << 10;
  if (shared_bytes > kWithoutOptIn) {
    const cudaError_t error =
        cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                             cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(shared_bytes));
    if (error != cudaSuccess) return error;
  }
  const int64_t most = INT_MAX / cluster * cluster;
  for (int64_t first = 0; first < blocks; first += most) {
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(std::min(most, blocks - first)));
    config.blockDim = dim3(static_cast<unsigned>(threads));
    config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
    config.stream = stream;
    cudaLaunchAttribute attribute{};
    if (cluster > 1) {
      attribute.id = cudaLaunchAttributeClusterDimension;
      attribute.val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
      config.attrs = &attribute;
      config.numAttrs = 1;
    }
    const cudaError_t error = cudaLaunchKernelEx(&config, kernel, args, plan, first);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

// Calls body(element type, channels_last, vector width) with compile-time values.
template <typename F>
cudaError_t dispatch_group_norm(DType type, bool channels_last, int vector, const F& body) {
  return dispatch_float(type, [&](auto element) {
    constexpr int V = 16 / sizeof(typename decltype(element)::type);
    const auto with_layout = [&](auto last) {
      return vector > 1 ? body(element, last, std::integral_constant<int, V>{})
                        : body(element, last, std::integral_constant<int, 1>{});
    };
    return channels_last ? with_layout(std::true_type{}) : with_layout(std::false_type{});
  });
}

}  // namespace fastdiff::cuda
