#pragma once

// What the launchers of both passes share: device limits, vector width, launches.

#include <algorithm>
#include <initializer_list>
#include <mutex>
#include <set>
#include <tuple>

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
  limits.max_cluster = 1;
  if (clusters && compiled_for_clusters(100 * major + 10 * minor)) {
    limits.max_cluster = major == 9 || major == 10 ? 16 : kPortableCluster;
  }
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

// A launch of `blocks` blocks; it cannot be moved, as its parts point to each other.
struct LaunchConfig {
  cudaLaunchConfig_t config{};
  cudaLaunchAttribute attribute{};

  LaunchConfig(int64_t blocks, dim3 threads, int64_t shared_bytes, int cluster,
               cudaStream_t stream) {
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = threads;
    config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
    config.stream = stream;
    if (cluster == 1) return;
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
    config.attrs = &attribute;
    config.numAttrs = 1;
  }
  LaunchConfig(const LaunchConfig&) = delete;
};

// Gives an attribute of a kernel the largest value that the current device allows, once per device.
// Attributes belong to the kernel, not to a launch: of two threads with different plans one would
// take away what the other has just asked for.
inline cudaError_t set_to_maximum(const void* kernel, cudaFuncAttribute attribute) {
  static std::mutex mutex;
  static std::set<std::tuple<const void*, cudaFuncAttribute, int>> done;
  int device = 0;
  if (const cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) return error;
  const std::lock_guard lock(mutex);
  if (done.count({kernel, attribute, device})) return cudaSuccess;
  int value = 1;  // clusters of any size are allowed
  cudaError_t error = cudaSuccess;
  if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize) {
    cudaFuncAttributes kernel_attributes{};
    error = cudaDeviceGetAttribute(&value, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    if (error == cudaSuccess) error = cudaFuncGetAttributes(&kernel_attributes, kernel);
    value -= static_cast<int>(kernel_attributes.sharedSizeBytes);
  }
  if (error == cudaSuccess) error = cudaFuncSetAttribute(kernel, attribute, value);
  if (error == cudaSuccess) done.insert({kernel, attribute, device});
  return error;
}

template <typename Args>
cudaError_t opt_in(GroupNormKernel<Args> kernel, int64_t shared_bytes, int cluster) {
  constexpr int64_t kWithoutOptIn = 48 << 10;
  const auto* function = reinterpret_cast<const void*>(kernel);
  cudaError_t error = cudaSuccess;
  if (shared_bytes > kWithoutOptIn) {
    error = set_to_maximum(function, cudaFuncAttributeMaxDynamicSharedMemorySize);
  }
  if (error == cudaSuccess && cluster > kPortableCluster) {
    error = set_to_maximum(function, cudaFuncAttributeNonPortableClusterSizeAllowed);
  }
  return error;
}

// Launches `rows` rows of blocks in clusters, as many at a time as a grid may have.
template <typename Args>
cudaError_t launch(GroupNormKernel<Args> kernel, const Args& args, const GroupNormPlan& plan,
                   int64_t rows, int64_t blocks_per_row, dim3 threads, int64_t shared_bytes,
                   int cluster, cudaStream_t stream) {
  cudaError_t error = opt_in(kernel, shared_bytes, cluster);
  const int64_t most = INT_MAX / blocks_per_row;
  for (int64_t first = 0; error == cudaSuccess && first < rows; first += most) {
    const LaunchConfig launch(std::min(most, rows - first) * blocks_per_row, threads, shared_bytes,
                              cluster, stream);
    error = cudaLaunchKernelEx(&launch.config, kernel, args, plan, first);
  }
  return error;
}

// Whether the device has room for a cluster of the plan: larger ones need so many neighbouring
// multiprocessors, which a part of a device may lack.
template <typename Args>
bool cluster_fits(GroupNormKernel<Args> kernel, const GroupNormPlan& plan) {
  if (opt_in(kernel, plan.shared_bytes, plan.cluster) != cudaSuccess) return false;
  const LaunchConfig launch(plan.cluster, plan.threads, plan.shared_bytes, plan.cluster, nullptr);
  int clusters = 0;
  return cudaOccupancyMaxActiveClusters(&clusters, kernel, &launch.config) == cudaSuccess &&
         clusters > 0;
}

// The plan of a pass on the current device. fits(plan) asks for a plan of more than
// kPortableCluster blocks whether the device has room for it.
template <typename Fits>
cudaError_t choose_plan(GroupNormPlan& plan, const GroupNormLayout& layout, int vector, DType type,
                        const GroupNormPass& pass, const Fits& fits) {
  DeviceLimits limits{};
  if (const cudaError_t error = device_limits(limits); error != cudaSuccess) return error;
  plan = plan_group_norm(layout, vector, size_of(type), pass, limits);
  if (plan.cluster > kPortableCluster && !fits(plan)) {
    cudaGetLastError();  // of the question
    limits.max_cluster = kPortableCluster;
    plan = plan_group_norm(layout, vector, size_of(type), pass, limits);
  }
  return cudaSuccess;
}

// Calls body<element type, channels_last, vector width>().
template <typename F>
cudaError_t dispatch_group_norm(DType type, bool channels_last, int vector, const F& body) {
  return dispatch_float(type, [&](auto element) {
    using T = typename decltype(element)::type;
    constexpr int V = 16 / sizeof(T);
    if (channels_last) {
      return vector > 1 ? body.template operator()<T, true, V>()
                        : body.template operator()<T, true, 1>();
    }
    return vector > 1 ? body.template operator()<T, false, V>()
                      : body.template operator()<T, false, 1>();
  });
}

}  // namespace fastdiff::cuda
